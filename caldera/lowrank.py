"""Low-rank factors: rank-constrained regression (Xiang et al. 2012) and LPLR, its alternation with rounded factors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from caldera.basis import Basis
from caldera.devices import read, read_all
from caldera.linalg import Trust, one_thread, solve_gram, total
from caldera.quantizers import Half, Quantizer, Scales

POWER_ITERATIONS = 3
OVERSAMPLING = 16


@dataclass(frozen=True)
class Factor:
    """A rounded factor in storage order (k, size), one row a rank dimension: L^T (k, m) or R (k, n)."""

    codes: Tensor
    scales: Scales
    values: Tensor

    @classmethod
    def round(cls, x: Tensor, quantizer: Quantizer | Half) -> "Factor":
        scales = quantizer.fit(x)
        codes = quantizer.encode(x, scales)
        return cls(codes, scales, quantizer.decode(codes, scales, x.shape[1]))

    def unless(self, better: Tensor, other: "Factor") -> "Factor":
        """This factor, or the other where `better` (0-d) is true: chosen on the device."""
        pairs = ((self.codes, other.codes), (self.values, other.values), *zip(self.scales, other.scales))
        codes, values, *scales = (None if x is None else torch.where(better, y, x) for x, y in pairs)
        return Factor(codes, Scales(*scales), values)


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

    def loss(self, left: Tensor, cross: Tensor, gram: Tensor) -> Tensor:
        """tr((A - L R) H (A - L R)^T), 0-d float64, from the products of R."""
        return self.energy - 2 * total(left * cross) + total((left.T @ left) * gram)


class Pair(NamedTuple):
    """Rounded L^T (k, m) and R (k, n), and the damped loss tr((A - L R) (H + sigma I) (A - L R)^T)."""

    left: Factor
    right: Factor
    loss: float | Tensor  # a tensor while it is not worth a wait for the device

    def or_better(self, other: "Pair") -> "Pair":
        """The pair of the smaller loss, chosen on the device."""
        better = other.loss < self.loss
        factors = (x.unless(better, y) for x, y in zip(self[:2], other[:2]))
        return Pair(*factors, torch.where(better, other.loss, self.loss))


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
    options = (right, quantizers, iterations, what, start, tolerance)
    run, trust = partial(_alternated, Regression(a, basis), *options), Trust()
    found = run(trust.solve_gram)
    failed, loss = read_all(trust.failed, found.loss)
    if failed > 0:  # once more, and carefully
        found = run(partial(solve_gram, jitters=jitters))
        (loss,) = read_all(found.loss)
    return found._replace(loss=loss)


def _alternated(
    problem: Regression,
    right: Tensor,
    quantizers: tuple,
    iterations: int,
    what: str,
    start: Pair | None,
    tolerance: float,
    solve: Callable[[Tensor, Tensor, str], Tensor],
) -> Pair:
    """`lplr` with `solve` for its Gram systems; its loss stays on the device."""
    (q_left, q_right), found = quantizers, None
    factor = Factor.round(right, q_right) if start is None else start.right
    products = problem.products(factor.values)
    if start is not None:
        found = Pair(start.left, factor, problem.loss(start.left.values.T, *products))
    least = read(found.loss) if tolerance and found is not None else float("inf")
    for _ in range(iterations):
        left = Factor.round(solve(products[1], products[0].T, what), q_left)
        pair = Pair(left, factor, problem.loss(left.values.T, *products))
        found = pair if found is None else found.or_better(pair)
        factor = Factor.round(solve(left.values @ left.values.T, left.values @ problem.a, what), q_right)
        products = problem.products(factor.values)
        found = found.or_better(Pair(left, factor, problem.loss(left.values.T, *products)))
        if tolerance:  # the only wait in here
            before, least = least, read(found.loss)
            if least > before * (1 - tolerance):
                break
    return found
