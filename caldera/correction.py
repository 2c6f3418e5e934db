"""What a matrix should be so that, behind a compressed prefix, the model goes on as the original does.

There a matrix W (m, n) receives x^ instead of the original's x. With H^ = E[x^ x^^T] and C = E[x x^^T] the linear map
whose output on x^ is nearest to W x is W C (H^)^-1. A matrix that writes into the residual stream can answer for more:
with D = E[d x^^T], where d is what the stream lacks at that place, adding D (H^)^-1 repairs what x^ knows of d. Taken
fully, both shrink what they cannot explain, and the shrinkage compounds over depth; a damped part of them helps, more
so when every row of W' is brought back to the energy that the row of W has on x^.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from caldera.devices import read
from caldera.errors import UserError
from caldera.linalg import damped_cholesky, energy, relative

LIMIT = 1.0


@dataclass(frozen=True)
class Correction:
    """W' = W ((1 - a) I + a (C + s I)(H^ + s I)^-1) + b D (H^ + s I)^-1, with s = `sigma` x the mean diagonal of H^.

    a, the `strength`, and b, the `residual`, run linearly over depth to their `_last` value (None: the same). With
    `preserve` each row w' of W' is scaled to E (w' x^)^2 = E (w x^)^2.
    """

    strength: float = 0.3
    strength_last: float | None = None
    residual: float = 0.3
    residual_last: float | None = None
    sigma: float = 1e-2
    preserve: bool = True

    def __post_init__(self) -> None:
        """Raises UserError naming the field, its value and the remedy."""
        for name in ("strength", "strength_last", "residual", "residual_last"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name}={value!r} must lie between 0 (no correction) and 1 (the full least squares)")
        if not 0 < self.sigma <= 1:
            raise UserError(f"sigma={self.sigma!r} must be above 0 and at most 1 (the mean diagonal of H)")

    def fit(self, moments: Tensor, cross: Tensor, lack: Tensor | None, depth: float, what: str) -> "Target":
        """The rule for W' from H^, C (n, n) and D (d, n), at a depth from 0 (first block) to 1 (last).

        Raises NumericalError naming `what` when H^ cannot be factorised.
        """
        n, mean = moments.shape[0], moments.diagonal().mean()
        if read(mean) <= 0:  # nothing arrives here, which `prepare` refuses by name
            return Target(torch.eye(n, device=moments.device))
        chol, sigma = damped_cholesky(moments / mean, self.sigma, LIMIT, f"{what}: moments of the correction")
        a, b = _at(depth, self.strength, self.strength_last), _at(depth, self.residual, self.residual_last)
        wanted = (cross / mean).T.contiguous()  # from here on in place: n is what memory is short of
        wanted.diagonal().add_(sigma)
        through = torch.cholesky_solve(wanted, chol).T.mul_(a)
        del wanted
        through.diagonal().add_(1 - a)
        added = None if lack is None else b * torch.cholesky_solve((lack / mean).T.contiguous(), chol).T
        return Target(through, added, moments if self.preserve else None)


def _at(depth: float, first: float, last: float | None) -> float:
    return first if last is None else first + (last - first) * depth


@dataclass(frozen=True)
class Target:
    """W' = W P + A: P (n, n) for every matrix with this input, A (m, n) for those that write into the stream.

    With `moments`, H^ (n, n), the rows keep their energy.
    """

    through: Tensor
    added: Tensor | None = None
    moments: Tensor | None = None

    def of(self, weight: Tensor, writes: bool) -> Tensor:
        """W' (m, n) of W (m, n)."""
        target = weight @ self.through
        target = target + self.added if writes and self.added is not None else target
        if self.moments is None:
            return target
        before, after = (((w @ self.moments) * w).sum(1, keepdim=True) for w in (weight, target))
        return target * torch.where(after > 0, before / after, 1.0).sqrt()


def output_error(weight: Tensor, approximation: Tensor, original: Tensor, cross: Tensor, moments: Tensor) -> float:
    """sqrt(E|W x - W^ x^|^2 / E|W x|^2) from H = E[x x^T], C = E[x x^^T] and H^ = E[x^ x^^T], each (n, n)."""
    w, v = weight.float(), approximation.float()
    mixed = read(((w @ cross) * v).sum(dtype=torch.float64))
    whole = energy(w, original)
    return relative(whole - 2 * mixed + energy(v, moments), whole)
