"""The CALDERA decomposition W ~ Q + L R of one matrix (Saha et al., NeurIPS 2024, arXiv 2405.18886)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from caldera.basis import Basis, downdated, prepare, unit_mean
from caldera.devices import is_fake, read
from caldera.errors import NumericalError, UserError
from caldera.initial import initial_factors
from caldera.ldlq import Rounded, ldlq, tune
from caldera.linalg import energy, named, power_of_4, relative, require_finite, total
from caldera.lowrank import Pair, lplr, starting_right
from caldera.method import Method
from caldera.packed import MatrixSpec, PackedMatrix
from caldera.problem import Problem, generator_of
from caldera.quantizers import get_quantizer

# An alternation inside LPLR that gains less of the loss is the last one: going on takes two or three times as long and
# ended half a percent higher on 28 matrices of SmolLM2-135M (rank 64, 15 x 10 iterations).
GAIN = 1e-3
# A loss that is this small a part of the terms it is the difference of is computed anew.
CANCELLED = 1e-2
SPREAD = 0.1  # tr(W H W^T) over |W|^2, with H of mean diagonal 1


@dataclass(frozen=True)
class Decomposition:
    """A packed matrix with the error it was measured to have, and how the loop went.

    `trace` lists every half step: iteration, step ("Q" or "LR") and relative error in the loop's coordinates, by the
    moments of the fit. `sigma` is the damping of H; `jitters` lists every damping that had to rise above its start:
    what it was added to, and how much. `init_rank` counts the dimensions that the initial factors took.
    """

    packed: PackedMatrix
    relative_error: float
    trace: list[dict]
    sigma: float
    jitters: list[dict] = field(default_factory=list)
    init_rank: int = 0

    @property
    def spec(self) -> MatrixSpec:
        return self.packed.spec

    @property
    def stored_bytes(self) -> int:
        return self.spec.stored_bytes

    @property
    def stored_bits(self) -> float:
        return self.spec.stored_bits

    @property
    def nominal_bits(self) -> float:
        return self.spec.nominal_bits

    def dequantize(self) -> Tensor:
        """W_hat (m, n) float32, from the packed tensors."""
        return self.packed.dequantize()


def relative_error(weight: Tensor, approximation: Tensor, moments: Tensor) -> float:
    """sqrt(tr(E H E^T) / tr(W H W^T)) with E = W - W_hat and the measured, undamped H (n, n)."""
    unit, moments = power_of_4(weight), unit_mean(moments)  # so that no square leaves float32's range
    weight = weight.float() / unit
    lost, all_of_it = (energy(x, moments) for x in (weight - approximation / unit, weight))
    return relative(lost, all_of_it)


def decompose(
    weight: Tensor,
    moments: Tensor,
    method: Method,
    *,
    name: str = "matrix",
    basis: Basis | None = None,
    problem: Problem | None = None,
) -> Decomposition:
    """Decompose W (m, n) given H = E[x x^T] (n, n) of its inputs; neither is changed.

    `basis`, from `prepare`, is shared by matrices with the same inputs, `problem`, from `Problem.of`, by decompositions
    of one matrix at several ranks and bits. Raises UserError for a rank above
    min(m, n), NumericalError for NaN, infinity, or moments that cannot be factorised, naming the matrix.
    """
    weight, moments = weight.detach(), moments.detach()
    if weight.dim() != 2 or moments.shape != (weight.shape[1],) * 2:
        shapes = f"{tuple(weight.shape)} and {tuple(moments.shape)}"
        raise UserError(f"{name}: W and H have shapes {shapes}; they must be (m, n) and (n, n)")
    weight = weight.float()
    require_finite(weight, f"{name}: weights")
    basis = prepare(moments, name=name, **method.basis_options) if basis is None else basis
    _check_basis(basis, weight, method, name)
    spec = method.spec(tuple(weight.shape), name, basis.name)
    problem = Problem.of(weight, basis, name) if problem is None else problem
    loop = _Loop(problem, method)
    with named(name):
        loop.run()
    packed = PackedMatrix(spec, loop.pack())
    error = _defined(_deployed_error(weight, packed, moments, problem), weight, name)
    return Decomposition(packed, error, loop.trace, basis.sigma, basis.jitters + loop.jitters, loop.init_rank)


def _deployed_error(weight: Tensor, packed: PackedMatrix, moments: Tensor, problem: Problem) -> float:
    """`relative_error` of W (m, n) as it is read back; the problem knows tr(W H W^T), which its coordinates keep.

    But for rounding: where W all but avoids the large inputs, spreading these over all coordinates loses it.
    """
    avoids = problem.energy < SPREAD * read(total(problem.weight.square()))
    if problem.basis.identity or avoids:
        return relative_error(weight, packed.dequantize(), moments)
    lost = energy((weight - packed.dequantize()) / problem.unit, unit_mean(moments))
    return relative(lost, problem.energy)


def _check_basis(basis: Basis, weight: Tensor, method: Method, name: str) -> None:
    """Raise UserError when the basis is not the one that the method asks for."""
    made = (basis.n, basis.seed, basis.transformed, basis.identity)
    options = method.basis_options
    asked = (weight.shape[1], *(options[key] for key in ("seed", "transformed", "identity")))
    if made != asked:
        raise UserError(
            f"{name}: its basis was prepared with (n, seed, transformed, identity) = {made}, but matrix and method"
            f" have {asked}: prepare it with method.basis_options"
        )


def _defined(error: float, like: Tensor, name: str) -> float:
    """The error itself. Raises NumericalError when it is no number; a dry run has none."""
    if not math.isfinite(error) and not is_fake(like):
        reason = "an overflow" if math.isnan(error) else "weights that give no output on the calibration inputs"
        raise NumericalError(f"{name}: the relative error is {error} because of {reason}")
    return error


@dataclass
class _Loop:
    """The alternating minimisation in the basis' coordinates; `best` is the best (error, Q, L and R) met."""

    problem: Problem
    method: Method
    trace: list[dict] = field(default_factory=list)
    jitters: list[dict] = field(default_factory=list)
    q: Rounded | None = None
    factors: Pair | None = None
    product: Tensor | float = 0.0  # L R (m, n)
    best: tuple[float, Rounded | None, Pair | None] | None = None
    init_rank: int = 0

    def __post_init__(self) -> None:
        self.weight, self.basis, self.name = self.problem.weight, self.problem.basis, self.problem.name
        self.generator = generator_of(self.method.seed, self.name)
        self.has_q, self.has_factors = self.method.q != "none", self.method.rank > 0

    def run(self) -> None:
        """Alternate until the iterations or the patience end. Without both parts one round is all there is to do."""
        self._start()
        steps = [("LR", self._update_factors)] * self.has_factors + [("Q", self._update_q)] * self.has_q
        steps = steps if self.method.order == "lr_first" else steps[::-1]
        stale = 0
        for iteration in range(self.method.outer_iterations if len(steps) == 2 else 1):
            before = self.best[0] if self.best else float("inf")
            for step, update in steps:
                rest, damped = update(f"{self.name}: {step} of iteration {iteration}")
                self._judge(iteration, step, rest, damped)
            improved = self.best is not None and self.best[0] < before * (1 - self.method.tolerance)
            stale = 0 if improved else stale + 1
            if stale >= self.method.patience:
                break

    def _start(self) -> None:
        what = f"{self.name}: initial factors"
        self._set_factors(initial_factors(self.weight, self.basis, self.method, self.generator, what, self.jitters))
        self.init_rank = self._dimensions()

    def _set_factors(self, factors: Pair | None) -> None:
        self.factors = factors
        self.product = 0.0 if factors is None else factors.left.values.T @ factors.right.values

    def _dimensions(self) -> int:
        """Of the rank, how many the present factors have."""
        return 0 if self.factors is None else self.factors.right.values.shape[0]

    def _update_factors(self, what: str) -> tuple[Tensor, float | None]:
        """LPLR on what Q leaves; W~ - Q - L R and its damped loss, if it has enough digits.

        Factors that nothing has improved on yet, and warm ones, are where it starts.
        """
        method, target = self.method, self.weight if self.q is None else self.weight - self.q.values
        if self.q is not None and not method.warm_start:
            self._set_factors(None)
        start = self.factors if self._dimensions() == method.rank else None
        right, options = self._right(target), (method.factor_quantizers, method.alternations, what)
        self._set_factors(lplr(target, right, self.basis, *options, start, self.jitters, GAIN))
        loss, whole = self.factors.loss, self.factors.whole
        return target - self.product, loss if loss > CANCELLED * whole else None

    def _right(self, target: Tensor) -> Tensor:
        """R (k, n) of the present factors; for dimensions that they lack, a regression of what they leave."""
        missing = self.method.rank - self._dimensions()
        if missing == 0:
            return self.factors.right.values
        # the first regression is one of W alone, which all ranks share
        leading = self.problem.subspace(missing) if self.q is None and self.factors is None else None
        options = (self.generator, self.method.rotate, leading)
        right = starting_right(target - self.product, self.basis, missing, *options)
        return right if self.factors is None else torch.cat([self.factors.right.values, right])

    def _update_q(self, what: str) -> tuple[Tensor, float | None]:
        """LDLQ on what L and R leave; W~ - Q - L R and its damped loss where the rounding knows it."""
        method, basis = self.method, self.basis
        if method.downdate and self.factors is not None:
            basis = downdated(basis, self.factors.right.values, what, self.jitters)
        quantizer, target = get_quantizer(method.q), self.weight - self.product
        # whether the scales have to be widened, the first rounding finds out for all
        factor = 1.0 if self.q is None else self.q.widened
        scales = None if self.q is None else quantizer.fit(target).times(factor)
        rounded = ldlq(target, basis, quantizer, scales)
        factor *= rounded.widened
        if method.tune_passes:
            rounded = tune(target, basis, quantizer, rounded, method.tune_passes)
        self.q = rounded._replace(widened=factor)
        return target - self.q.values, self.q.loss if basis is self.basis else None

    def _judge(self, iteration: int, step: str, rest: Tensor, damped: float | None) -> None:
        """Record the error of a half step and keep the iterate if it is complete and the best so far."""
        lost = self._undamped(rest, damped)
        error = _defined(relative(lost, self.problem.energy), rest, f"{self.name}: {step} of iteration {iteration}")
        self.trace.append({"iteration": iteration, "step": step, "error": error})
        complete = (self.q is not None or not self.has_q) and self._dimensions() == self.method.rank
        if complete and (self.best is None or error < self.best[0]):
            self.best = (error, self.q, self.factors)

    def _undamped(self, rest: Tensor, damped: float | None) -> float:
        """tr(E H E^T) of E = `rest` (m, n), from its damped loss unless little of that remains: no product with H."""
        if damped is not None:
            lost = damped - self.basis.sigma * read(total(rest.square()))
            if lost > CANCELLED * damped:
                return lost
        return energy(rest, self.basis.moments)

    def pack(self) -> dict[str, Tensor]:
        """The best iterate's stored tensors, in the unit of W."""
        _, q, factors = self.best
        tensors, unit, root = {}, self.problem.unit, self.problem.unit**0.5
        parts = {"q": (q, unit), "l": (factors and factors.left, root), "r": (factors and factors.right, root)}
        for prefix, (part, scale) in parts.items():
            if part is not None:
                quantizer = get_quantizer(getattr(self.method, prefix))
                codes, scales = quantizer.rescaled(part.codes, part.scales, scale, f"{self.name}: {prefix}")
                tensors |= {f"{prefix}_{key}": t for key, t in quantizer.pack(codes, scales).items()}
        return tensors
