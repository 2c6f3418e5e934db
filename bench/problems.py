"""Synthetic matrices, the method that is timed, and how many operations its parts have."""

from dataclasses import replace

import torch
from torch import Tensor

from caldera import Basis, Method, decompose

RANK, OUTER, INNER = 64, 15, 10
METHOD = Method(
    rank=RANK,
    q="e8p_2bit",
    l="e8p_4bit",
    r="e8p_4bit",
    outer_iterations=OUTER,
    inner_iterations=INNER,
    patience=OUTER,  # all of them
)


def problem(m: int, n: int) -> tuple[Tensor, Tensor]:
    """W (m, n) Gaussian, and H (n, n) of correlated inputs whose channels differ in size by a factor of about 50."""
    generator = torch.Generator().manual_seed(m + n)
    mixing = torch.eye(n) + 0.5 * torch.randn(n, n, generator=generator) / n**0.5
    size = torch.randn(n, generator=generator).exp()
    return torch.randn(m, n, generator=generator), mixing.T @ mixing * size * size[:, None]


def warm_up() -> None:
    """Compile, or load from disk, every loop that is timed."""
    decompose(*problem(64, 64), replace(METHOD, rank=8, outer_iterations=1, inner_iterations=1))


def start(w: Tensor, basis: Basis, rank: int) -> Tensor:
    """R (k, n) of a rank-k regression of W~ (m, n): where LPLR starts from."""
    torch.manual_seed(0)
    _, s, v = torch.svd_lowrank(w @ basis.chol, rank)
    return torch.linalg.solve_triangular(basis.chol, (v * s.sqrt()).T, upper=False, left=False)


def ldlq_operations(m: int, n: int) -> float:
    """m n^2: the error feedback, a product of (m, n) with a triangle of n^2 / 2. The codebook search is not counted."""
    return m * n**2


def lplr_operations(m: int, n: int, k: int = RANK, inner: int = INNER) -> float:
    """A H once, 2 m n^2; for every R the products R H, R H R^T and A H R^T; for every pair two solves and L^T A.

    Rounding is not counted, nor is the loss: a trace of products of k x k.
    """
    of_right = 2 * k * n**2 + 2 * k**2 * n + 2 * m * n * k
    of_pair = 2 * m * n * k + 4 * k**2 * (m + n)
    return 2 * m * n**2 + (inner + 1) * of_right + inner * of_pair


def decomposition_operations(m: int, n: int, k: int = RANK, outer: int = OUTER, inner: int = INNER) -> float:
    """Cholesky n^3 / 3 and W C, m n^2, once; an iteration: LPLR, L R, LDLQ. Not counted: transform, errors, sketch."""
    iteration = lplr_operations(m, n, k, inner) + 2 * m * n * k + ldlq_operations(m, n)
    return n**3 / 3 + m * n**2 + outer * iteration
