"""What all matrices that receive the same input share: damped, transformed moments and their factorisations."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from caldera import hadamard
from caldera.devices import read
from caldera.errors import NumericalError
from caldera.linalg import block_feedback, damped_cholesky, diagonal_blocks, require_finite, solve_gram

SIGMA_LIMIT = 1.0


class Feedback(NamedTuple):
    """LDLQ's feedback M - I (p, p), where H~ + sigma I = M D M^T and p is n rounded up to a multiple of the group g.

    D = B B^T with the `blocks` B (p / g, g, g); `largest` is the largest size of an entry of M - I.
    """

    matrix: Tensor
    blocks: Tensor
    largest: float


class Factorised(NamedTuple):
    """The Cholesky factor (n, n) of the damped moments, the damping that it took, and whether that had to rise."""

    chol: Tensor
    sigma: float
    jitters: list[dict]


@dataclass
class Basis:
    """Coordinates in which a matrix (m, n) is decomposed, `W~ = T_m S_out W S_in T_n^T`, and the moments there.

    `moments` is H~ = T S (H / mean(diag H)) S T^T (n, n) without damping, `damped` = H~ + sigma I = chol chol^T; with
    `identity` H = I takes the place of what was measured. `jitters` says whether sigma had to rise.
    """

    name: str
    seed: int
    transformed: bool
    moments: Tensor
    chol: Tensor
    sigma: float
    identity: bool = False
    jitters: list[dict] = field(default_factory=list)
    _feedback: dict[int, Feedback] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.moments.shape[0]

    def to(self, device: torch.device) -> "Basis":
        """The same on another device."""
        moments = self.moments.to(device)
        if moments is self.moments:  # "cuda" is also where "cuda:0" is
            return self
        return replace(self, moments=moments, chol=self.chol.to(device), _feedback={})

    def __getstate__(self) -> dict:
        """What travels to another process: not what it can make itself."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"_feedback": {}}

    @cached_property
    def damped(self) -> Tensor:
        """H~ + sigma I."""
        return self.moments + self.sigma * torch.eye(self.n, device=self.moments.device)

    def feedback(self, group: int) -> Feedback:
        """What LDLQ needs for a quantizer's group; made once."""
        if group not in self._feedback:
            chol = padded(self.chol, group)
            matrix = block_feedback(chol, group)
            self._feedback[group] = Feedback(matrix, diagonal_blocks(chol, group), read(matrix.abs().max()))
        return self._feedback[group]

    def block_inverses(self, group: int) -> Tensor:
        """Inverses (p / g, g, g) of the diagonal blocks of the damped moments."""
        return torch.linalg.inv(diagonal_blocks(padded(self.damped, group), group))

    def forward(self, weight: Tensor, name: str) -> Tensor:
        """W~ (m, n) of W (m, n), the matrix called `name`."""
        return into(weight, self.seed, self.name, name) if self.transformed else weight.float()


def sign_vectors(
    shape: tuple[int, int], seed: int, input_name: str, name: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """sign_in (n,) and sign_out (m,) of the matrix (m, n) called `name`."""
    m, n = shape
    sign_in = hadamard.signs(n, seed, f"{input_name}/in", device=device)
    return sign_in, hadamard.signs(m, seed, f"{name}/out", device=device)


def into(weight: Tensor, seed: int, input_name: str, name: str) -> Tensor:
    """T_m S_out W S_in T_n^T: outliers spread over all entries, so that one scale serves the whole matrix."""
    sign_in, sign_out = sign_vectors(weight.shape, seed, input_name, name, weight.device)
    x = hadamard.transform(weight.float() * sign_in)
    return hadamard.transform((x * sign_out[:, None]).T.contiguous()).T.contiguous()


def out_of(x: Tensor, seed: int, input_name: str, name: str) -> Tensor:
    """The inverse of `into`."""
    sign_in, sign_out = sign_vectors(x.shape, seed, input_name, name, x.device)
    x = hadamard.inverse(x.T.contiguous()).T * sign_out[:, None]
    return hadamard.inverse(x.contiguous()) * sign_in


def padded(x: Tensor, group: int) -> Tensor:
    """x (n, n) extended by an identity to a multiple of the group; added columns stand alone."""
    short = -x.shape[0] % group
    return torch.block_diag(x, torch.eye(short, device=x.device)) if short else x


def unit_mean(moments: Tensor) -> Tensor:
    """H (n, n) float32 of mean diagonal 1, whatever its unit; H itself when the mean is not positive."""
    mean = moments.diagonal().double().mean()
    return (moments if read(mean) <= 0 else moments / mean).float()


def prepare(
    moments: Tensor,
    *,
    name: str,
    seed: int = 0,
    sigma: float = 3e-3,
    transformed: bool = True,
    identity: bool = False,
    known: Factorised | None = None,
) -> Basis:
    """Basis of H = E[x x^T] (n, n), or of H = I in its place; `known`: what a former call with all the same found.

    Raises NumericalError when H is not finite, all zero, or cannot be factorised.
    """
    require_finite(moments, f"{name}: second moments")
    if read(moments.diagonal().double().mean()) <= 0:
        raise NumericalError(f"{name}: the second moments are zero; no calibration token reached this input")
    if identity:  # in any coordinates, and exactly, so that there is no feedback at all
        h = torch.eye(moments.shape[0], device=moments.device)
    else:
        h = unit_mean(moments)
        h = into_both(h, seed, name) if transformed else h
        h = (h + h.T) / 2
    if known is None:
        jitters = []
        known = Factorised(*damped_cholesky(h, sigma, SIGMA_LIMIT, f"{name}: second moments", jitters), jitters)
    return Basis(name, seed, transformed, h, known.chol, known.sigma, identity, known.jitters)


def restricted(basis: Basis, channels: int, jitters: list) -> Basis:
    """The same coordinates with the moments of only the `channels` inputs of largest second moment."""
    h = _out_of_both(basis.moments, basis.seed, basis.name) if basis.transformed else basis.moments
    largest = h.diagonal().topk(min(channels, basis.n)).indices
    mask = torch.zeros(basis.n, device=h.device).index_fill(0, largest, 1.0)
    options = {"seed": basis.seed, "sigma": basis.sigma, "transformed": basis.transformed}
    found = prepare(h * mask * mask[:, None], name=basis.name, **options)
    jitters += found.jitters
    return found


def downdated(basis: Basis, right: Tensor, what: str, jitters: list) -> Basis:
    """The same coordinates with H' = H - H R^T (R H R^T)^-1 R H, what of H a refit of L beside R (k, n) cannot absorb.

    tr(E H' E^T) = min over L of tr((E - L R) H (E - L R)^T) for any E (m, n).
    """
    cross = right @ basis.moments
    gram = cross @ right.T
    h = basis.moments - cross.T @ solve_gram((gram + gram.T) / 2, cross, what, jitters)
    h = (h + h.T) / 2
    chol, sigma = damped_cholesky(h, basis.sigma, SIGMA_LIMIT, what, jitters)
    return replace(basis, moments=h, chol=chol, sigma=sigma, identity=False, _feedback={})


def into_both(h: Tensor, seed: int, name: str) -> Tensor:
    """T S H S T^T."""
    sign = hadamard.signs(h.shape[0], seed, f"{name}/in", device=h.device)
    return hadamard.transform(hadamard.transform(h * sign * sign[:, None]).T.contiguous())


def _out_of_both(h: Tensor, seed: int, name: str) -> Tensor:
    """The inverse of `into_both`."""
    sign = hadamard.signs(h.shape[0], seed, f"{name}/in", device=h.device)
    return hadamard.inverse(hadamard.inverse(h).T.contiguous()) * sign * sign[:, None]
