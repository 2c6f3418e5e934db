"""The CALDERA decomposition W ~ Q + L R of one matrix (Saha et al., NeurIPS 2024, arXiv 2405.18886)."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from caldera.basis import Basis, prepare
from caldera.devices import read
from caldera.errors import UserError
from caldera.ldlq import Rounded, ldlq, tune
from caldera.linalg import require_finite
from caldera.lowrank import Factor, lplr, rank_constrained_regression, rotated
from caldera.packed import MatrixSpec, PackedMatrix
from caldera.quantizers import get_quantizer

ORDERS = ("lr_first", "q_first")


@dataclass(frozen=True)
class Method:
    """How a matrix is decomposed. `q`, `l`, `r` are quantizer names; `q="none"` leaves the backbone out.

    Each of `outer_iterations` rounds updates L, R (by `inner_iterations` alternations) and Q, in the given order; the
    best iterate is kept. With `warm_start` the factors continue from the last round instead of a fresh regression.
    `tune_passes` of coordinate descent follow each LDLQ. `sigma` damps the moments (of unit mean diagonal).
    After `patience` rounds without an improvement of `tolerance` (relative) the loop stops.
    """

    rank: int = 64
    q: str = "e8p_2bit"
    l: str = "e8p_4bit"
    r: str = "e8p_4bit"
    outer_iterations: int = 15
    inner_iterations: int = 10
    order: str = "lr_first"
    warm_start: bool = True
    rotate: bool = True
    transform: bool = True
    tune_passes: int = 0
    sigma: float = 3e-3
    tolerance: float = 1e-4
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError naming the field, its value and the remedy."""
        whole = {"rank": 0, "outer_iterations": 1, "inner_iterations": 1, "tune_passes": 0, "patience": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.order not in ORDERS:
            raise UserError(f"order={self.order!r} must be one of {', '.join(ORDERS)}")
        if not 0 < self.sigma <= 1:
            raise UserError(f"sigma={self.sigma!r} must be above 0 and at most 1 (the mean diagonal of H)")
        for name in (self.q, self.l, self.r):
            name == "none" or get_quantizer(name)
        if self.rank and "none" in (self.l, self.r):
            raise UserError(f"rank={self.rank} needs both factors: give l and r a quantizer, or set rank=0")
        if not self.rank and self.q == "none":
            raise UserError("q='none' with rank=0 leaves nothing of the matrix: give q a quantizer or set a rank")

    def spec(self, shape: tuple[int, int], name: str = "matrix", input_name: str = "input") -> MatrixSpec:
        """What a matrix of that shape becomes. Raises UserError when the rank exceeds its smaller side."""
        if self.rank > min(shape):
            m, n = shape
            raise UserError(
                f"rank={self.rank} exceeds the smaller side of {name} ({m} x {n}); use at most {min(shape)}"
            )
        factors = (self.l, self.r) if self.rank else ("none", "none")
        return MatrixSpec(name, input_name, tuple(shape), self.rank, self.q, *factors, self.seed, self.transform)


@dataclass(frozen=True)
class Decomposition:
    """A packed matrix with the error it was measured to have, and how the loop went.

    `trace` lists every half step: iteration, step ("Q" or "LR") and relative error in the loop's coordinates.
    """

    packed: PackedMatrix
    relative_error: float
    trace: list[dict]
    sigma: float

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
    error, moments = weight.float() - approximation, moments.float()
    lost, all_of_it = (((x @ moments) * x).sum(dtype=torch.float64) for x in (error, weight.float()))
    return _ratio(read(lost), read(all_of_it))


def _ratio(lost: float, all_of_it: float) -> float:
    return 0.0 if lost <= 0 else (lost / all_of_it) ** 0.5 if all_of_it > 0 else float("inf")


def decompose(
    weight: Tensor, moments: Tensor, method: Method, *, name: str = "matrix", basis: Basis | None = None
) -> Decomposition:
    """Decompose W (m, n) given H = E[x x^T] (n, n) of its inputs; neither is changed.

    `basis`, from `prepare`, is shared by matrices with the same inputs. Raises UserError for a rank above
    min(m, n), NumericalError for NaN, infinity, or moments that cannot be factorised, naming the matrix.
    """
    weight, moments = weight.detach(), moments.detach()
    if weight.dim() != 2 or moments.shape != (weight.shape[1],) * 2:
        shapes = f"{tuple(weight.shape)} and {tuple(moments.shape)}"
        raise UserError(f"{name}: W and H have shapes {shapes}; they must be (m, n) and (n, n)")
    require_finite(weight, f"{name}: weights")
    if basis is None:
        basis = prepare(moments, name=name, seed=method.seed, sigma=method.sigma, transformed=method.transform)
    if (basis.n, basis.seed, basis.transformed) != (weight.shape[1], method.seed, method.transform):
        raise UserError(
            f"{name}: its basis was prepared for n={basis.n}, seed={basis.seed}, transformed={basis.transformed}; the"
            f" matrix and the method have n={weight.shape[1]}, seed={method.seed}, transform={method.transform}"
        )
    spec = method.spec(tuple(weight.shape), name, basis.name)
    loop = _Loop(basis.forward(weight, name), basis, method, name)
    loop.run()
    packed = PackedMatrix(spec, loop.pack())
    return Decomposition(packed, relative_error(weight, packed.dequantize(), moments), loop.trace, basis.sigma)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.shake_256(f"{seed}/{name}".encode()).digest(8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass
class _Loop:
    """The alternating minimisation in the basis' coordinates; `best` is the best (Q, L, R) by relative error."""

    weight: Tensor
    basis: Basis
    method: Method
    name: str
    trace: list[dict] = field(default_factory=list)
    q: Rounded | None = None
    factors: tuple[Factor, Factor] | None = None
    best: tuple | None = None

    def __post_init__(self) -> None:
        self.generator = _generator(self.method.seed, self.name)
        self.energy = self._energy(self.weight)
        self.has_q, self.has_factors = self.method.q != "none", self.method.rank > 0

    def run(self) -> None:
        """Alternate until the iterations or the patience end. Without both parts one round is all there is to do."""
        steps = [("LR", self._update_factors)] * self.has_factors + [("Q", self._update_q)] * self.has_q
        steps = steps if self.method.order == "lr_first" else steps[::-1]
        stale = 0
        for iteration in range(self.method.outer_iterations if len(steps) == 2 else 1):
            before = self.best[0] if self.best else float("inf")
            for name, update in steps:
                update()
                self._judge(iteration, name)
            improved = self.best is not None and self.best[0] < before * (1 - self.method.tolerance)
            stale = 0 if improved else stale + 1
            if stale >= self.method.patience:
                break

    def _update_factors(self) -> None:
        method, target = self.method, self.weight if self.q is None else self.weight - self.q.values
        start = self.factors if method.warm_start else None
        right = start[1].values if start else self._regression(target)
        quantizers = get_quantizer(method.l), get_quantizer(method.r)
        rounds = 1 if all(q.bits == 16 for q in quantizers) else method.inner_iterations
        self.factors = lplr(target, right, self.basis, quantizers, rounds, f"{self.name}: factors", start)

    def _regression(self, target: Tensor) -> Tensor:
        left, right = rank_constrained_regression(target, self.basis, self.method.rank, self.generator)
        return rotated(left, right, self.generator)[1] if self.method.rotate else right

    def _update_q(self) -> None:
        quantizer, target = get_quantizer(self.method.q), self.weight - self._product()
        self.q = ldlq(target, self.basis, quantizer)
        if self.method.tune_passes:
            self.q = tune(target, self.basis, quantizer, self.q, self.method.tune_passes)

    def _product(self) -> Tensor | float:
        return 0.0 if self.factors is None else self.factors[0].values.T @ self.factors[1].values

    def _energy(self, x: Tensor) -> float:
        return read(((x @ self.basis.moments) * x).sum(dtype=torch.float64))

    def _judge(self, iteration: int, step: str) -> None:
        """Record the error after a half step and keep the iterate if it is complete and the best so far."""
        rest = self.weight - self._product() - (0.0 if self.q is None else self.q.values)
        error = _ratio(self._energy(rest), self.energy)
        self.trace.append({"iteration": iteration, "step": step, "error": error})
        complete = (self.q is not None or not self.has_q) and (self.factors is not None or not self.has_factors)
        if complete and (self.best is None or error < self.best[0]):
            self.best = (error, self.q, self.factors)

    def pack(self) -> dict[str, Tensor]:
        """The best iterate's stored tensors."""
        _, q, factors = self.best
        method, tensors = self.method, {}
        parts = {"q": q, "l": factors and factors[0], "r": factors and factors[1]}
        for prefix, part in parts.items():
            if part is not None:
                stored = get_quantizer(getattr(method, prefix)).pack(part.codes, part.scales)
                tensors |= {f"{prefix}_{key}": t for key, t in stored.items()}
        return tensors
