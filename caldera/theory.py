"""What error a decomposition will have, from the singular values of W and the factorisation of H alone.

LDLQ as a linear system. With damped moments H = M D M^T (M = I + U unit block-triangular, D block-diagonal), the input
t of every rounding and its error eta obey eta = (W - Q) M and t = W + eta - (W - Q). If eta is white with variance v,
the loss is tr(E H E^T) = m v tr(D): the equality behind QuIP's bound (Chee et al. 2023, arXiv 2307.13304) and its
block form in QuIP# (arXiv 2402.04396), which put a worst case for v and a bound on tr(D) in its place; CALDERA's
guarantee (Saha et al. 2024, arXiv 2405.18886) carries such a bound to the residual of the low-rank fit. Those hold
always; this is an expectation under a model and may lie on either side of the truth. Beyond eta = white:
  * A rounding loses the share alpha of its input beside adding noise (at the best scale alpha is the relative mean
    squared error): eta = alpha t + white. So E (I + U (1 - alpha)) = alpha W + white, solved for random sketches of the
    rows. The share alpha of a W that lies along the large directions of H costs more than all the noise.
  * Fed back errors widen t beyond the scale, which is fitted on W: v and alpha are curves of the variance of t,
    measured once a quantizer on Gaussian values, and solved for by fixed point.
  * The part of W in its k best directions goes into L, R; their rounding errors are added to what Q has to round.
    After Q they are refitted to its error, which pays only for precise factors.
  * Coordinate descent is the one part that is fitted and not derived: see TUNED_CAP, TUNED_GAIN.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.functional import pad

from caldera.basis import Basis, padded, prepare
from caldera.devices import array, read
from caldera.linalg import relative
from caldera.lowrank import Subspace
from caldera.method import Method
from caldera.problem import Problem, generator_of
from caldera.quantizers import get_quantizer
from caldera.quantizers.trellis import RUN

RATIOS = 2.0 ** (np.arange(-16, 17) / 4)  # variance of what is rounded over the variance that its scale was fitted on
SAMPLE = 1 << 15  # Gaussian values that a point of the curves is measured on
PROBES = 32  # random combinations of the rows of W, and as many rows of noise
ROUNDS = 3  # of the fixed point between errors and the variance that they feed back

# Coordinate descent, fitted by eye on 28 matrices of SmolLM2-135M (layers 0, 1, 15, 29; E8P at 2 and 4 bits; ranks 0
# and 32; two passes): no block weighs more than TUNED_CAP times the median one, since later choices make up for its
# error, and the loss falls by TUNED_GAIN of itself in the end, half of what is left at every pass (an assumption).
TUNED_CAP = 4.0
TUNED_GAIN = 0.045


def predict_error(
    weight: Tensor,
    moments: Tensor,
    method: Method,
    *,
    name: str = "matrix",
    basis: Basis | None = None,
    problem: Problem | None = None,
) -> float:
    """The relative error that `decompose(weight, moments, method)` is expected to measure, without running it.

    W (m, n), H (n, n), `name`, `basis` and `problem` as there. Costs ROUNDS triangular solves with 2 PROBES rows, and
    what a decomposition shares through `problem`: the transform, one product W C and its leading subspace.

    Not modelled: `moments="identity"` (the error is then that against H = I), `init` and `downdate`, `order` and the
    number of rounds (as "lr_first", with at most one refit of the factors), `warm_start`, `rotate` (as on), the
    alternation inside LPLR, entries of the transformed W far from Gaussian, and rows that differ: scales of rows or
    groups follow rows of unlike size and do better than predicted; where single rows of W lie along one dominant
    direction of H, LDLQ widens its one scale (`caldera.ldlq.OVERLOAD`), and the true error is up to a fifth above or
    below the prediction (q, k and o of SmolLM2's first block).
    Raises NumericalError for moments that cannot be factorised.
    """
    if basis is None:
        basis = prepare(moments, name=name, seed=method.seed, sigma=method.sigma, transformed=method.transform)
    problem = Problem.of(weight.detach(), basis, name) if problem is None else problem
    a, generator = problem.weight, generator_of(method.seed, f"{name}/theory")
    norm, total = _energy(a), problem.energy
    if norm == 0:
        return 0.0
    damped, target, factors = total + basis.sigma * norm, _Target.of(a, generator), None
    if method.rank:
        factors = _Factors.of(a, problem.subspace(method.rank).first(method.rank), basis, method)
        target = factors.residual(target, generator)
    if method.q == "none":
        return relative(factors.alone(damped) - basis.sigma * (norm - _energy(factors.kept)), total)
    backbone = _Backbone(target, basis, method, generator)
    gain = factors.refit(backbone) if factors and method.outer_iterations > 1 else 1.0
    return relative(backbone.undamped * gain, total)


def _energy(x: Tensor) -> float:
    return read(x.square().sum(dtype=torch.float64))


def _noise(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(rows, columns, generator=generator).to(like.device)


# ------------------------------------------------------------------------------------------------------------- rounding
@cache
def _measured(quantizer: str, columns: int, ratio: float) -> tuple[float, float]:
    """White variance and lost share alpha at a ratio: rows of Gaussians, rounded with the scales of others."""
    with unset_fake_temporarily():  # what is kept must be real
        q, generator = get_quantizer(quantizer), torch.Generator().manual_seed(0)
        fitted, other = (torch.randn(-(-SAMPLE // columns), columns, generator=generator) for _ in range(2))
        scales = q.fit(fitted)
        x = fitted * min(ratio, 1.0) ** 0.5 + other * max(ratio - 1.0, 0.0) ** 0.5
        error = x - q.decode(q.encode(x, scales), scales, columns)
        lost = float((error * x).mean() / x.square().mean())
        return float((error - lost * x).square().mean()), lost


def _sampled(quantizer: str, columns: int) -> int:
    """Columns of what is rounded; with one scale a matrix the shape is free: long enough for a trellis code."""
    return columns if get_quantizer(quantizer).granularity else SAMPLE // RUN


def _rounding(quantizer: str, columns: int, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """White variance, in units of the fitted one, and alpha for inputs of `ratio` times the fitted variance."""
    points = [_measured(quantizer, _sampled(quantizer, columns), r) for r in RATIOS.tolist()]
    (white, lost), x, at = np.array(points).T, np.log2(ratio), np.log2(RATIOS)
    return np.exp(np.interp(x, at, np.log(white))), np.interp(x, at, lost)


def _mse(quantizer: str, columns: int) -> float:
    """Mean squared error of unit Gaussians that the scales were fitted on."""
    white, lost = _measured(quantizer, _sampled(quantizer, columns), 1.0)
    return white + lost**2


# ------------------------------------------------------------------------------------------------------------- backbone
@dataclass(frozen=True)
class _Target:
    """A matrix (m, n) seen by `probes`, random sketches (PROBES, n) of its rows, and its columns' `variance` (n,).

    `mix` (PROBES, m) made them: a sketch's square is, in expectation, the mean square of the rows.
    """

    mix: Tensor
    probes: Tensor
    variance: Tensor

    @classmethod
    def of(cls, a: Tensor, generator: torch.Generator) -> "_Target":
        m, columns = a.shape[0], a.square().mean(0)
        mix, mean = _noise(PROBES, m, generator, a) / m**0.5, columns.mean()
        chance = 2 * mean**2 / m / columns.var(correction=0).clamp(min=1e-30)  # of m Gaussians' mean square
        return cls(mix, mix @ a, mean + (columns - mean) * (1 - chance).clamp(min=0))


class _Backbone:
    """The expected error of LDLQ and coordinate descent on a target: `damped` and `undamped` loss."""

    def __init__(self, target: _Target, basis: Basis, method: Method, generator: torch.Generator) -> None:
        self.rows, self.basis, self.quantizer = target.mix.shape[1], basis, get_quantizer(method.q)
        group = self.quantizer.group
        self.blocks = basis.feedback(group).blocks
        self.weights = self.blocks.square().sum((1, 2))  # tr of D's blocks
        error = self._fixed_point(target, generator)
        scale = self.rows / PROBES
        signal, noise = (_energy(x) * scale for x in (error @ padded(basis.chol, group)).chunk(2))
        self.damped = signal + noise * self._control()
        self.undamped = self.damped - basis.sigma * scale * _energy(error)
        after = self._after_tuning(method.tune_passes)
        self.damped, self.undamped = self.damped * after, self.undamped * after

    def _fixed_point(self, target: _Target, generator: torch.Generator) -> Tensor:
        """Errors E (2 PROBES, p) of the sketched rows and of rows of noise."""
        group, unit = self.quantizer.group, self._unit(target.variance)
        feedback = self.basis.feedback(group).matrix
        probes = pad(target.probes, (0, feedback.shape[0] - self.basis.n))
        noise, back = _noise(*probes.shape, generator, probes), torch.zeros_like(probes).repeat(2, 1)
        own = self._per_block(target.variance)
        for _ in range(ROUNDS):
            fed = (back.square().sum(0) + 2 * (back[:PROBES] * probes).sum(0)) / PROBES
            ratio = (own + self._per_block(fed)).clamp(min=1e-30) / unit.clamp(min=1e-30)
            white, lost = _rounding(self.quantizer.name, self.basis.n, array(ratio))
            white, lost = (torch.from_numpy(x).float().to(unit.device) for x in (white, lost))
            self.white, self.eta = white * unit, white * unit + lost.square() * ratio * unit  # variances, by block
            lost = lost.repeat_interleave(group)
            self.eps = noise * self.white.sqrt().repeat_interleave(group)
            right = torch.cat([probes * lost, self.eps])
            error = torch.linalg.solve_triangular(
                feedback * (1 - lost), right, upper=False, left=False, unitriangular=True
            )
            back = (right - error) / (1 - lost)
        return error

    def _per_block(self, columns: Tensor) -> Tensor:
        """Mean of n or p columns' values over each block; columns that were added repeat the last one."""
        group = self.quantizer.group
        short = -len(columns) % group
        return torch.cat([columns, columns[-1:].expand(short)]).reshape(-1, group).mean(1)

    def _unit(self, variance: Tensor) -> Tensor:
        """The variance that the scale of each block is fitted on."""
        width = self.quantizer.granularity
        if width <= 0:
            return variance.mean().expand(len(self.blocks))
        means = torch.stack([part.mean() for part in variance.split(width)])
        return means.repeat_interleave(width // self.quantizer.group)[: len(self.blocks)]

    def _control(self) -> float:
        """What white noise should have cost over what these rows of it did: takes most of the chance out."""
        count, group = self.blocks.shape[:2]
        drawn = self.eps.reshape(PROBES, count, group).transpose(0, 1) @ self.blocks
        return PROBES * read((self.white * self.weights).sum()) / _energy(drawn)

    def _after_tuning(self, passes: int) -> float:
        capped = self.weights.clamp(max=TUNED_CAP * read(self.weights.median())) if passes else self.weights
        gain = TUNED_GAIN * (1 - 0.5**passes)
        return (1 - gain) * read((self.eta * capped).sum()) / read((self.eta * self.weights).sum())

    def share_along(self, v: Tensor) -> float:
        """Share of the loss along the directions v (n, k) of the inputs' coordinates C."""
        count, group = self.blocks.shape[:2]
        found = self.blocks @ pad(v, (0, 0, 0, count * group - v.shape[0])).reshape(count, group, -1)
        return read((self.eta * found.square().sum((1, 2))).sum()) / read((self.eta * self.weights).sum())


# -------------------------------------------------------------------------------------------------------------- factors
@dataclass(frozen=True)
class _Factors:
    """The first regression's factors L = U S^(1/2) (m, k), R = S^(-1/2) U^T W (k, n), and their roundings' variances.

    `kept` = U^T W is what W loses to L R. Of a rounding error of R, the part along the rows of R costs nothing, since L
    is solved for after it; likewise for L. The error of the factor that is rounded last stays whole.
    """

    left: Tensor
    right: Tensor
    kept: Tensor
    roots: Tensor  # S^(1/2) (k,)
    v: Tensor
    noise: tuple[float, float]  # variances of the rounding errors of L and R
    image: Tensor  # C V (n, k)
    spread: float  # tr H

    @classmethod
    def of(cls, a: Tensor, leading: Subspace, basis: Basis, method: Method) -> "_Factors":
        u, s, v = leading
        roots, kept = s.clamp(min=1e-6 * read(s[0])).sqrt(), u.T @ a
        left, right = u * roots, kept / roots[:, None]
        quantizers = ((method.l, left), (method.r, right))
        noise = tuple(_mse(q, x.shape[i]) * _energy(x) / x.numel() for i, (q, x) in enumerate(quantizers))
        return cls(left, right, kept, roots, v, noise, basis.chol @ v, _energy(basis.chol))

    @cached_property
    def costs(self) -> tuple[float, float, float, float]:
        """Loss from the rounding of L and of R: whole, whole, and what a solve for the other leaves of each."""
        (m, k), (left, right) = self.left.shape, self.noise
        whole_left, whole_right = left * m * _energy(self.roots), right * _energy(self.roots) * self.spread
        return whole_left, whole_right, whole_left * (1 - k / m), whole_right * (1 - _energy(self.image) / self.spread)

    def residual(self, target: _Target, generator: torch.Generator) -> _Target:
        """W - L R with rounded L and R."""
        (m, k), n, mix, root = self.left.shape, self.right.shape[1], target.mix, self.roots
        mixed = mix @ self.left
        from_left = _noise(PROBES, k, generator, mix) * self.noise[0] ** 0.5 @ self.right
        from_right = mixed @ (_noise(k, n, generator, mix) * self.noise[1] ** 0.5)
        from_right = from_right - from_right @ self.image / root @ self.right  # what L is solved for
        probes = target.probes - mixed @ self.right + from_left + from_right
        variance = target.variance - self.kept.square().sum(0) / m
        variance = variance + self.noise[0] * self.right.square().sum(0) + self.noise[1] * _energy(self.left) / m
        return _Target(mix, probes, variance.clamp(min=0))

    def alone(self, damped: float) -> float:
        """Damped loss of L R without a backbone, the better of the two factors rounded last."""
        left, right, rest_left, rest_right = self.costs
        return max(damped - _energy(self.roots.square()), 0.0) + min(left + rest_right, right + rest_left)

    def refit(self, backbone: _Backbone) -> float:
        """What is left of the backbone's loss once L and R have been fitted to its error too and rounded again."""
        (m, k), along = self.left.shape, backbone.share_along(self.v)
        left, right, rest_left, rest_right = self.costs
        rounded = min(left + rest_right, right + rest_left) / backbone.damped
        return min(1.0, (1 - along) * (1 - k / m) + rounded)
