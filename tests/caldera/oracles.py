"""Slow twins of the numerics, written from the definitions and not from the sources, and seeded test matrices."""

import itertools
from functools import cache

import torch
from torch import Tensor

from caldera import Basis, prepare
from caldera.quantizers import Quantizer, Scales

# Positions of the three entries 1/2 among five 3/2 in the 29 patterns of norm 12: QuIP#'s published choice.
THREE_HALVES = """
    123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057 047 056 046 014 237
"""


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def even_gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    """Equally likely quantiles of a unit Gaussian, shuffled: no luck in its tails, which rule the error at 8 bits."""
    quantiles = torch.special.ndtri((torch.arange(m * n, dtype=torch.float64) + 0.5) / (m * n))
    return quantiles[torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))].float().reshape(m, n)


def second_moments(n: int, seed: int = 0, tokens: int | None = None) -> Tensor:
    """H (n, n) of correlated inputs whose channels differ in size by a factor of about 50, as real ones do."""
    tokens = 4 * n if tokens is None else tokens
    mixed = gaussian(tokens, n, seed=seed + 1) @ (torch.eye(n) + 0.5 * gaussian(n, n, seed=seed + 2) / n**0.5)
    x = mixed * gaussian(n, seed=seed + 3).exp() + 0.3
    return x.T @ x / tokens


def basis_of(n: int, seed: int = 0, transformed: bool = False, sigma: float = 1e-2) -> Basis:
    return prepare(second_moments(n, seed), name="input", seed=seed, sigma=sigma, transformed=transformed)


def weighted_loss(error: Tensor, moments: Tensor) -> float:
    """tr(E H E^T), in float64."""
    error, moments = error.double(), moments.double()
    return float(torch.einsum("mi,ij,mj->", error, moments, error))


def never_rises(values: list[float], slack: float = 1e-6) -> bool:
    """Whether each value is at most the one before, but for a relative rounding error."""
    return all(b <= a * (1 + slack) for a, b in itertools.pairwise(values))


def error_by_definition(weight: Tensor, approximation: Tensor, moments: Tensor) -> float:
    return (weighted_loss(weight - approximation, moments) / weighted_loss(weight, moments)) ** 0.5


# -------------------------------------------------------------------------------------------------------------- packing
def packed_bit_by_bit(codes: list[int], bits: int) -> bytes:
    """The codes as digits of one large integer, first code lowest."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


# ------------------------------------------------------------------------------------------------------------------ E8P
@cache
def e8p_sizes() -> Tensor:
    """(256, 8) the patterns |v|: every half-integer one with |v|^2 <= 10, and 29 with |v|^2 = 12."""
    grid = torch.tensor(list(itertools.product((0.5, 1.5, 2.5), repeat=8)))
    extra = torch.full((29, 8), 1.5)
    for row, triple in zip(extra, THREE_HALVES.split()):
        row[[int(c) for c in triple]] = 0.5
    return torch.cat([grid[grid.square().sum(1) <= 10], extra])


@cache
def e8p_points() -> Tensor:
    """(65536, 8) all codewords v +- 1/4, v of even sum, in no particular order."""
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=8)))
    v = (e8p_sizes()[:, None] * signs).reshape(-1, 8)
    even = v[v.sum(1) % 2 == 0]
    return torch.cat([even + 0.25, even - 0.25])


def distance_by_force(x: Tensor, points: Tensor) -> Tensor:
    """Squared distances (N,) float64 from x (N, 8) to the nearest of the points, all of which are tried."""
    norms, nearest = points.square().sum(1) / 2, torch.empty(len(x), dtype=torch.int64)
    products = torch.empty(16, len(points))  # a strip that fits a processor's cache, used again and again
    for first in range(0, len(x), 16):
        part = x[first : first + 16]
        scores = torch.addmm(norms, part, points.T, alpha=-1, out=products[: len(part)])
        nearest[first : first + 16] = scores.argmin(1)
    return squared_distances(x, points[nearest])


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() - y.double()).square().sum(1)


# ----------------------------------------------------------------------------------------------------------------- LDLQ
def block_ldl(moments: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """M unit block-lower-triangular and D block-diagonal with H = M D M^T, float64, by block elimination."""
    rest, n = moments.double().clone(), moments.shape[0]
    m, d = torch.eye(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for first in range(0, n, group):
        at, below = slice(first, first + group), slice(first + group, n)
        d[at, at] = rest[at, at]
        m[below, at] = torch.linalg.solve(rest[at, at], rest[at, below]).T
        rest[below, below] -= m[below, at] @ rest[at, below]
    return m, d


def widened(x: Tensor, group: int) -> Tensor:
    """x (m, n) with zero columns up to a multiple of the group."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % group))


def widened_moments(moments: Tensor, group: int) -> Tensor:
    """H (n, n) with an identity for the columns that `widened` adds."""
    return torch.block_diag(moments, torch.eye(-moments.shape[0] % group, dtype=moments.dtype))


def ldlq_by_columns(weight: Tensor, moments: Tensor, quantizer: Quantizer, scales: Scales) -> tuple[Tensor, Tensor]:
    """LDLQ as the paper states it: last columns first, each rounded after the errors of all later ones were fed back.

    Codes (m, n / g) and values (m, n).
    """
    group, n = quantizer.group, weight.shape[1]
    work = widened(weight, group).double()
    feedback = block_ldl(widened_moments(moments, group), group)[0]
    values, codes = torch.zeros_like(work), []
    for first in reversed(range(0, work.shape[1], group)):
        at, later = slice(first, first + group), slice(first + group, None)
        target = work[:, at] + (work - values)[:, later] @ feedback[later, at]
        found, values[:, at] = nearest_in_columns(quantizer, scales, target, first, work.shape[1])
        codes.insert(0, found)
    return torch.stack(codes, 1), values[:, :n]


def nearest_in_columns(quantizer, scales: Scales, target: Tensor, first: int, n: int) -> tuple[Tensor, Tensor]:
    """Codes and values nearest to target (m, g), the columns from `first` of a matrix with n columns."""
    scale, zero = (t.expand(-1, n)[:, [first]] for t in quantizer.columns(scales, n))
    z = torch.where(scale > 0, (target - zero) / scale, 0.0).float()
    found = quantizer.codebook.encode(z)
    return found, quantizer.codebook.decode(found) * scale + zero


def tuned_by_columns(
    weight: Tensor, moments: Tensor, quantizer: Quantizer, start, passes: int
) -> tuple[Tensor, Tensor]:
    """Coordinate descent without panels or running gradients: each group to its nearest codeword, if the loss falls.

    Codes (m, n / g) and values (m, n).
    """
    group, n = quantizer.group, weight.shape[1]
    work, h = widened(weight, group).double(), widened_moments(moments, group).double()
    codes, values = start.codes.clone(), widened(start.values, group).double()
    for first in [*reversed(range(0, work.shape[1], group))] * passes:
        at = slice(first, first + group)
        best = values[:, at] + (work - values) @ h[:, at] @ torch.linalg.inv(h[at, at])
        found, new = nearest_in_columns(quantizer, start.scales, best, first, work.shape[1])
        changed = values.clone()
        changed[:, at] = new
        before, after = (((work - v) @ h * (work - v)).sum(1) for v in (values, changed))
        better = after < before
        values[better] = changed[better]
        codes[better, first // group] = found[better]
    return codes, values[:, :n]


def ldlq_regret(weight: Tensor, moments: Tensor, quantizer: Quantizer, scales: Scales, codes: Tensor) -> float:
    """By how much the worst of the codes missed the nearest codeword, given all the codes chosen before it.

    In units of the largest scale: 0 for exact LDLQ, rounding noise at ties; a flipped tie does not disturb the rest.
    """
    group, work = quantizer.group, widened(weight, quantizer.group)
    values = quantizer.decode(codes, scales, work.shape[1])
    feedback, worst = block_ldl(widened_moments(moments, group), group)[0], 0.0
    for first in range(0, work.shape[1], group):
        at, later = slice(first, first + group), slice(first + group, None)
        target = work[:, at] + (work - values)[:, later].double() @ feedback[later, at]
        _, best = nearest_in_columns(quantizer, scales, target, first, work.shape[1])
        excess = (target - values[:, at]).norm(dim=1) - (target - best).norm(dim=1)
        worst = max(worst, float(excess.max() / scales.scale.float().max()))
    return worst


# ------------------------------------------------------------------------------------------------------------- low rank
def dense_regression(a: Tensor, moments: Tensor, rank: int) -> float:
    """min over rank k of ||(A - L R) H^(1/2)||_F, by the symmetric root and a dense SVD in float64."""
    values, vectors = torch.linalg.eigh(moments.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return float(torch.linalg.svdvals(a.double() @ root)[rank:].norm())


def dense_product(a: Tensor, moments: Tensor, rank: int, sigma: float) -> Tensor:
    """L R (m, n) float64 of rank k that minimises ||(A - L R) (H + s I)^(1/2)||_F, s = sigma mean(diag H)."""
    h = moments.double()
    h = h + sigma * h.diagonal().mean() * torch.eye(h.shape[0], dtype=h.dtype)
    values, vectors = torch.linalg.eigh(h)
    root, inverse = (vectors * values**p @ vectors.T for p in (0.5, -0.5))
    u, s, vt = torch.linalg.svd(a.double() @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ inverse


def kept_channels(moments: Tensor, count: int) -> Tensor:
    """H (n, n) with zeros outside the rows and columns of the `count` largest diagonal entries."""
    found, kept = torch.zeros_like(moments), sorted(range(len(moments)), key=lambda i: -float(moments[i, i]))[:count]
    for i in kept:
        found[i, kept] = moments[i, kept]
    return found


def best_left(a: Tensor, moments: Tensor, right: Tensor) -> Tensor:
    """L (m, k) float64 that minimises tr((A - L R) H (A - L R)^T), by least squares against a root of H."""
    values, vectors = torch.linalg.eigh(moments.double())
    root = vectors * values.clamp(min=0).sqrt()
    return torch.linalg.lstsq((right.double() @ root).T, (a.double() @ root).T).solution.T


def downdated_by_definition(moments: Tensor, right: Tensor) -> Tensor:
    """H - H R^T (R H R^T)^-1 R H, in float64."""
    h, r = moments.double(), right.double()
    return h - h @ r.T @ torch.linalg.solve(r @ h @ r.T, r @ h)


def split_by_force(weight: Tensor, moments: Tensor, rank: int, generator: torch.Generator) -> list[float]:
    """SRR's criterion rho_k(W C) rho_(rank - k)(E C) for k = 0..rank, squared, from dense spectra."""
    chol = torch.linalg.cholesky(moments.double())
    error = torch.randn(weight.shape, generator=generator).double()
    kept, lost = (torch.linalg.svdvals(x.double() @ chol).square() for x in (weight, error))

    def rho(spectrum: Tensor, p: int) -> float:
        return float(spectrum[p:].sum() / spectrum.sum())

    return [rho(kept, k) * rho(lost, rank - k) for k in range(rank + 1)]
