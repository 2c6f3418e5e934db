"""The published algorithm (Saha et al. 2024) written down plainly in torch: what the project's speed is compared to.

Columns are rounded group by group in a Python loop. The codebook search is the one of the published implementations:
the signs are folded away, then a product with all 1366 codewords that can still be nearest and an argmax, for both
shifts. Every outer iteration takes a fresh full SVD, every step its own Cholesky factor, every inner iteration its
n x n products anew. Scales, damping and the random rotation of the factors are the project's: they decide the error,
which is that of `decompose` with `warm_start=False`; warm-started factors end a little lower.

All matrices are in the coordinates of the randomized transform; sizes are multiples of 8.
"""

import time
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from caldera.quantizers.e8p import CODEBOOKS, codewords

GROUP = 8
CHUNK = 512  # vectors searched at a time, so that their scores stay in a processor's cache


@cache
def folded_points() -> Tensor:
    """(1366, 8) the unshifted codewords that can be nearest to a vector whose last entry alone may be negative.

    Of their first seven entries one at most is negative, and then -1/2: the cheapest to repair a parity with.
    """
    points = torch.from_numpy(codewords()[::2]) - 0.25
    one_negative = (points[:, :7] < 0).sum(1) <= 1
    return points[one_negative & (points[:, :7].amin(1) >= -0.5)]


def nearest_shifted(z: Tensor, shift: float) -> Tensor:
    """The nearest codewords (N, 8) of one shift."""
    y, points = z - shift, folded_points()
    sign = torch.where(y < 0, -1.0, 1.0)
    sign[:, 7] *= sign.prod(1)  # an even number of signs: it keeps the parity of a codeword
    norms = points.square().sum(1) / 2
    best = [(part @ points.T - norms).argmax(1) for part in (y * sign).split(CHUNK)]
    return points[torch.cat(best)] * sign + shift


def nearest(z: Tensor, bits: int) -> Tensor:
    """The nearest 2-bit codewords (N, 8) to z (N, 8); at 4 bits a second one on what the first leaves."""
    found = [nearest_shifted(z, shift) for shift in (0.25, -0.25)]
    if bits == 4:
        residual = CODEBOOKS[4].residual
        found = [first + nearest((z - first) * residual, 2) / residual for first in found]
    errors = [(z - x).square().sum(1, keepdim=True) for x in found]
    return torch.where(errors[1] < errors[0], found[1], found[0])


def scale_of(x: Tensor, bits: int) -> Tensor:
    """One scale for the matrix, the codebook's best for a Gaussian."""
    return x.square().mean().sqrt() / CODEBOOKS[bits].gaussian_scale


def rounded(x: Tensor, bits: int) -> Tensor:
    """x (k, size) rounded to nearest codewords, without feedback."""
    scale = scale_of(x, bits)
    return nearest((x / scale).reshape(-1, GROUP), bits).reshape(x.shape) * scale


def feedback(h: Tensor) -> Tensor:
    """M (n, n) of H = M D M^T, unit lower triangular in 8 x 8 blocks."""
    chol = torch.linalg.cholesky(h)
    m = torch.empty_like(chol)
    for first in range(0, len(h), GROUP):
        at = slice(first, first + GROUP)
        m[:, at] = chol[:, at] @ torch.linalg.inv(chol[at, at])
    return m


def ldlq(w: Tensor, h: Tensor, bits: int) -> Tensor:
    """Q (m, n) by LDLQ: last columns first, each group after the errors of all later ones were fed back."""
    m, scale, q = feedback(h), scale_of(w, bits), torch.zeros_like(w)
    for first in reversed(range(0, w.shape[1], GROUP)):
        at, later = slice(first, first + GROUP), slice(first + GROUP, None)
        target = w[:, at] + (w[:, later] - q[:, later]) @ m[later, at]
        q[:, at] = nearest(target / scale, bits) * scale
    return q


def loss(error: Tensor, h: Tensor) -> float:
    """tr(E H E^T)."""
    return float(((error @ h) * error).sum(dtype=torch.float64))


def regression(a: Tensor, h: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """R (k, n) of the best rank-k fit of A (m, n) under H, its dimensions rotated at random."""
    chol = torch.linalg.cholesky(h)
    _, s, vt = torch.linalg.svd(a @ chol, full_matrices=False)
    right = torch.linalg.solve_triangular(chol, s[:rank, None].sqrt() * vt[:rank], upper=False, left=False)
    return torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q @ right


def lplr(a: Tensor, h: Tensor, rank: int, bits: int, inner: int, generator: torch.Generator) -> Tensor:
    """L R (m, n) of rounded factors near A (m, n): the best pair met in `inner` alternations."""
    right = rounded(regression(a, h, rank, generator), bits)
    best, least = None, float("inf")
    for _ in range(inner):
        left = rounded(torch.linalg.solve(right @ h @ right.T, (a @ h @ right.T).T), bits)  # L^T (k, m)
        solved = rounded(torch.linalg.solve(left @ left.T, left @ a), bits)
        for product in (left.T @ right, left.T @ solved):
            found = loss(a - product, h)
            best, least = (product, found) if found < least else (best, least)
        right = solved
    return best


@dataclass
class Run:
    """The least relative error of a run, and of each outer iteration the seconds of both steps and the errors after."""

    error: float = float("inf")
    lplr_seconds: list[float] = field(default_factory=list)
    ldlq_seconds: list[float] = field(default_factory=list)
    lplr_errors: list[float] = field(default_factory=list)
    ldlq_errors: list[float] = field(default_factory=list)


def decompose(w: Tensor, moments: Tensor, sigma: float, rank: int, outer: int, inner: int) -> Run:
    """`outer` rounds of (L, R) <- LPLR(W - Q), Q <- LDLQ(W - L R) from Q = 0: 2-bit Q, 4-bit factors, H + sigma I."""
    h, generator = moments + sigma * torch.eye(len(moments)), torch.Generator().manual_seed(0)
    q, run, whole = torch.zeros_like(w), Run(), loss(w, moments)
    for _ in range(outer):
        start = time.perf_counter()
        product = lplr(w - q, h, rank, 4, inner, generator)
        middle = time.perf_counter()
        run.lplr_errors.append((loss(w - product - q, moments) / whole) ** 0.5)
        if len(run.lplr_errors) > 1:  # before that there is no Q
            run.error = min(run.error, run.lplr_errors[-1])
        after = time.perf_counter()
        q = ldlq(w - product, h, 2)
        end = time.perf_counter()
        run.ldlq_errors.append((loss(w - product - q, moments) / whole) ** 0.5)
        run.lplr_seconds.append(middle - start)
        run.ldlq_seconds.append(end - after)
        run.error = min(run.error, run.ldlq_errors[-1])
    return run
