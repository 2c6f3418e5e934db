"""What all matrices that receive the same input share: damped, transformed moments and their factorisations."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from caldera import hadamard
from caldera.devices import read
from caldera.errors import NumericalError
from caldera.linalg import block_feedback, damped_cholesky, diagonal_blocks, require_finite

SIGMA_LIMIT = 1.0


@dataclass
class Basis:
    """Coordinates in which a matrix (m, n) is decomposed, `W~ = T_m S_out W S_in T_n^T`, and the moments there.

    `moments` is H~ = T S (H / mean(diag H)) S T^T (n, n) without damping, `damped` = H~ + sigma I = chol chol^T.
    """

    name: str
    seed: int
    transformed: bool
    moments: Tensor
    chol: Tensor
    sigma: float
    _feedback: dict[int, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.moments.shape[0]

    @cached_property
    def damped(self) -> Tensor:
        """H~ + sigma I."""
        return self.moments + self.sigma * torch.eye(self.n, device=self.moments.device)

    def feedback(self, group: int) -> Tensor:
        """LDLQ's feedback (p, p) for a quantizer's group, where p is n rounded up to a multiple of it."""
        if group not in self._feedback:
            self._feedback[group] = block_feedback(padded(self.chol, group), group)
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


def prepare(moments: Tensor, *, name: str, seed: int = 0, sigma: float = 3e-3, transformed: bool = True) -> Basis:
    """Basis of H = E[x x^T] (n, n). Raises NumericalError when H is not finite, all zero, or cannot be factorised."""
    require_finite(moments, f"{name}: second moments")
    mean = moments.diagonal().double().mean()
    if read(mean) <= 0:
        raise NumericalError(f"{name}: the second moments are zero; no calibration token reached this input")
    h = (moments / mean).float()
    if transformed:
        sign_in = hadamard.signs(h.shape[0], seed, f"{name}/in", device=h.device)
        h = hadamard.transform(h * sign_in * sign_in[:, None])
        h = hadamard.transform(h.T.contiguous())
    h = (h + h.T) / 2
    chol, sigma = damped_cholesky(h, sigma, SIGMA_LIMIT, f"{name}: second moments")
    return Basis(name, seed, transformed, h, chol, sigma)
