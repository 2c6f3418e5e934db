"""Low-rank factors: rank-constrained regression (Xiang et al. 2012) and LPLR, its alternation with rounded factors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from caldera.basis import Basis
from caldera.devices import read
from caldera.linalg import one_thread, solve_gram, total
from caldera.quantizers import Half, Quantizer

POWER_ITERATIONS = 3
OVERSAMPLING = 16


@dataclass(frozen=True)
class Factor:
    """A rounded factor in storage order (k, size), one row a rank dimension: L^T (k, m) or R (k, n)."""

    codes: Tensor
    scales: object
    values: Tensor

    @classmethod
    def round(cls, x: Tensor, quantizer: Quantizer | Half) -> "Factor":
        scales = quantizer.fit(x)
        codes = quantizer.encode(x, scales)
        return cls(codes, scales, quantizer.decode(codes, scales, x.shape[1]))


class Subspace(NamedTuple):
    """U (m, k), S (k,), V (n, k) of the largest singular values of a matrix (m, n)."""

    u: Tensor
    s: Tensor
    v: Tensor

    def first(self, k: int) -> "Subspace":
        """The k largest."""
        return Subspace(self.u[:, :k], self.s[:k], self.v[:, :k])


def top_subspace(x: Tensor, k: int, generator: torch.Generator, power_iterations: int = POWER_ITERATIONS) -> Subspace:
    """The k largest singular values of x (m, n), by randomized subspace iteration."""
    if 2 * (k + OVERSAMPLING) >= min(x.shape):
        u, s, vt = _svd(x)
        return Subspace(u[:, :k], s[:k], vt[:k].T)
    probe = torch.randn(x.shape[1], k + OVERSAMPLING, generator=generator).to(x.device)
    q = _orthonormal(x @ probe)
    for _ in range(power_iterations):
        q = _orthonormal(x @ _orthonormal(x.T @ q))
    u, s, vt = _svd(q.T @ x)
    return Subspace((q @ u)[:, :k], s[:k], vt[:k].T)


def _orthonormal(x: Tensor) -> Tensor:
    with one_thread():
        return torch.linalg.qr(x).Q


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with one_thread():
        return torch.linalg.svd(x, full_matrices=False)


def rank_constrained_regression(
    a: Tensor, basis: Basis, k: int, generator: torch.Generator, leading: Subspace | None = None
) -> tuple[Tensor, Tensor]:
    """L (m, k), R (k, n) that minimise ||(A - L R) C||_F over rank k, where H + sigma I = C C^T.

    Closed form: U S V^T = svd_k(A C), L = U S^(1/2), R = S^(1/2) V^T C^(-1). `leading` is the subspace of A C, if it is
    known for k or more dimensions.
    """
    u, s, v = top_subspace(a @ basis.chol, k, generator) if leading is None else leading.first(k)
    root = s.sqrt()
    right = torch.linalg.solve_triangular(basis.chol, (v * root).T, upper=False, left=False)
    return u * root, right


def starting_right(
    a: Tensor, basis: Basis, k: int, generator: torch.Generator, rotate: bool, leading: Subspace | None = None
) -> Tensor:
    """R (k, n) that LPLR starts from: the regression's, its dimensions mixed at random if wanted."""
    left, right = rank_constrained_regression(a, basis, k, generator, leading)
    return rotated(left, right, generator)[1] if rotate else right


def rotated(left: Tensor, right: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(L G, G^T R) for a random orthogonal G (k, k): the same product, singular values spread over all k dimensions.

    With one scale a factor the rounding error of the product falls from sum s_i^2 to (sum s_i)^2 / k.
    """
    k = left.shape[1]
    g = _orthonormal(torch.randn(k, k, generator=generator, dtype=torch.float64)).float().to(left.device)
    return left @ g, g.T @ right


@dataclass
class Regression:
    """The data of one regression of A (m, n): tr((A - L R) H (A - L R)^T) needs only A H and a few k x k products."""

    a: Tensor
    basis: Basis

    def __post_init__(self) -> None:
        self.a_h = self.a @ self.basis.damped
        self.energy = total(self.a_h * self.a)

    def products(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """A H R^T (m, k) and R H R^T (k, k)."""
        gram = right @ self.basis.damped @ right.T
        return self.a_h @ right.T, (gram + gram.T) / 2

    def loss(self, left: Tensor, cross: Tensor, gram: Tensor) -> float:
        """tr((A - L R) H (A - L R)^T) from the products of R."""
        return read(self.energy - 2 * total(left * cross) + total((left.T @ left) * gram))


class Pair(NamedTuple):
    """Rounded L^T (k, m) and R (k, n), and the damped loss tr((A - L R) (H + sigma I) (A - L R)^T)."""

    left: Factor
    right: Factor
    loss: float


def lplr(
    a: Tensor,
    right: Tensor,
    basis: Basis,
    quantizers: tuple,
    iterations: int,
    what: str,
    start: Pair | None = None,
    jitters: list | None = None,
    tolerance: float = 0.0,
) -> Pair:
    """Rounded L^T (k, m) and R (k, n) near A (m, n), alternating from R (k, n): each is solved for, then rounded.

    L <- round(A H R^T (R H R^T)^-1), R <- round((L^T L)^-1 L^T A) (Saha et al. 2023). The best pair met is returned;
    `start`, a pair that exists already, is one of those. An alternation that lowers the least loss by less than
    `tolerance` of itself is the last one. Damping that a solve needs is noted in `jitters`.
    """
    (q_left, q_right), problem, found = quantizers, Regression(a, basis), None
    factor = Factor.round(right, q_right) if start is None else start.right
    products = problem.products(factor.values)
    if start is not None:
        found = Pair(start.left, factor, problem.loss(start.left.values.T, *products))
    for _ in range(iterations):
        before = float("inf") if found is None else found.loss
        left = Factor.round(solve_gram(products[1], products[0].T, what, jitters), q_left)
        found = _better(found, Pair(left, factor, problem.loss(left.values.T, *products)))
        solved = solve_gram(left.values @ left.values.T, left.values @ a, what, jitters)
        factor = Factor.round(solved, q_right)
        products = problem.products(factor.values)
        found = _better(found, Pair(left, factor, problem.loss(left.values.T, *products)))
        if found.loss > before * (1 - tolerance):
            break
    return found


def _better(found: Pair | None, other: Pair) -> Pair:
    return other if found is None or other.loss < found.loss else found
