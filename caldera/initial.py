"""Factors that exist before the first step. All kinds are one regression of W; they differ in the moments it uses."""

import torch
from torch import Tensor

from caldera.basis import Basis, prepare, restricted
from caldera.devices import array
from caldera.lowrank import Pair, lplr, starting_right, top_subspace
from caldera.method import Method


def initial_factors(
    weight: Tensor, basis: Basis, method: Method, generator: torch.Generator, what: str, jitters: list
) -> Pair | None:
    """Rounded L^T (k, m) and R (k, n) near W~ (m, n) under the moments of `method.init`; None to start from nothing."""
    k = initial_rank(weight, basis, method, generator)
    if k == 0:
        return None
    fit = initial_basis(basis, method, jitters)
    right = starting_right(weight, fit, k, generator, method.rotate)
    return lplr(weight, right, fit, method.factor_quantizers, method.alternations, what, jitters=jitters)


def initial_basis(basis: Basis, method: Method, jitters: list) -> Basis:
    """The basis' coordinates with the moments that the initial factors are fitted to.

    The transform is orthogonal, so a fit in its coordinates is the transformed fit in the original ones.
    """
    if method.init == "odlri":
        return restricted(basis, method.init_channels, jitters)
    if method.init == "svd" and not basis.identity:
        return prepare(basis.moments, name=basis.name, **method.basis_options | {"identity": True})
    return basis


def initial_rank(weight: Tensor, basis: Basis, method: Method, generator: torch.Generator) -> int:
    """How many dimensions the initial factors take; 0: there are none."""
    if method.init == "zero" or method.rank == 0:
        return 0
    if method.init_rank == "auto":
        return split(weight, basis, method.rank, generator)
    return method.rank if method.init_rank is None else min(method.init_rank, method.rank)


def split(weight: Tensor, basis: Basis, rank: int, generator: torch.Generator) -> int:
    """The k of 0..rank that minimises rho_k(W C) rho_(rank - k)(E C), the smallest of equal ones (SRR).

    rho_p(A) = ||A - SVD_p(A)||_F / ||A||_F. k dimensions are kept from W before Q is rounded, the others take up its
    error, for which a Gaussian E stands.
    """
    error = torch.randn(weight.shape, generator=generator).to(weight.device)
    kept, lost = (_tails(x @ basis.chol, rank, generator) for x in (weight, error))
    products = array(kept * lost.flip(0))
    return min(range(rank + 1), key=products.__getitem__)


def _tails(a: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """rho_p(A)^2 for p = 0..rank, (rank + 1,) float64."""
    total = a.square().sum(dtype=torch.float64)
    largest = top_subspace(a, rank, generator)[1].double().square().cumsum(0)
    tails = torch.cat([total[None], total - largest]).clamp(min=0)
    return torch.where(total > 0, tails / total, torch.zeros_like(tails))
