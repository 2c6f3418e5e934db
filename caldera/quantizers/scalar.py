"""Scalar codebooks: uniform levels and NormalFloat, with scales searched for the least squared error."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial, reduce
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from caldera.devices import constant

# Candidate scales: from twice the one that covers the range down, densely first, then far down for outliers.
COARSE = [2.0 ** (-i / 4) for i in range(-4, 20)] + [2.0**-i for i in range(5, 17)]
FINE = [2.0 ** (i / 64) for i in range(-16, 17)]  # around the best of them
LARGEST = 64
SAMPLE = 1 << 16  # values of a granule that the search looks at


@cache
def uniform_levels(bits: int) -> np.ndarray:
    """2^bits levels one apart, symmetric about 0 (so 2 bits are four levels: -1.5, -0.5, 0.5, 1.5)."""
    return (np.arange(2**bits) - (2**bits - 1) / 2).astype(np.float32)


@cache
def normal_float_levels(bits: int) -> np.ndarray:
    """NormalFloat: equally likely quantiles of a Gaussian with an exact zero, in [-1, 1] (Dettmers et al. 2023)."""
    half, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
    offset = 1 - 0.25 * (1 / 2**bits + 1 / (2**bits - 1))
    upper = [quantile(p) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    lower = [-quantile(p) for p in np.linspace(offset, 0.5, half)[:-1]]
    levels = np.array(sorted([*lower, 0.0, *upper]))
    return (levels / np.abs(levels).max()).astype(np.float32)


def gaussian_error(levels: np.ndarray, scale: float) -> float:
    """Mean squared error of a unit Gaussian, multiplied by `scale` and rounded to the nearest level, in closed form."""
    points = torch.from_numpy(levels).double() / scale
    edges = torch.cat([points.new_tensor([-math.inf]), (points[1:] + points[:-1]) / 2, points.new_tensor([math.inf])])
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(edges).diff()
    weighted = -density.diff()  # E[x; cell]
    return float(1 - (2 * points * weighted - points.square() * mass).sum())


@dataclass(frozen=True)
class ScalarCodebook:
    """The sorted levels that `make(bits)` gives."""

    bits: int
    make: Callable[[int], np.ndarray]
    group = 1
    sequential = False

    @cached_property
    def levels(self) -> np.ndarray:
        return self.make(self.bits)

    @cached_property
    def gaussian_scale(self) -> float:
        top = float(np.abs(self.levels).max())
        return min((top * f for f in np.geomspace(0.1, 2.0, 600)), key=partial(gaussian_error, self.levels))

    @cached_property
    def gaussian_mse(self) -> float:
        return gaussian_error(self.levels, self.gaussian_scale)

    def _on(self, like: Tensor) -> Tensor:
        return constant(partial(self.make, self.bits), like)

    def encode(self, z: Tensor) -> Tensor:
        levels = self._on(z)
        return torch.searchsorted((levels[1:] + levels[:-1]) / 2, z[:, 0].contiguous())

    def decode(self, codes: Tensor) -> Tensor:
        return self._on(codes).index_select(0, codes)[:, None]

    def kernel(self) -> tuple:
        from caldera.quantizers import _kernels

        return (_kernels.LEVELS, np.float32(1), *_kernels.no_tables(), self.levels)

    def fit(self, x: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scale (and zero) of each granule of x (granules, values), as `dtype` holds it, by a search over ranges."""
        x, weight = _sample(x)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        middle, widest = (low + high) / 2, (high - low) / float(np.ptp(self.levels))
        mean = middle if symmetric else x.mean(1, keepdim=True)

        def tried(shrink: Tensor) -> tuple[Tensor, ...]:
            """Squared error, shrink, scale and zero of every granule."""
            scale, zero = (t.to(dtype).float() for t in (widest * shrink, mean + (middle - mean) * shrink))
            z = torch.where(scale > 0, (x - zero) / scale, 0.0)
            values = self.decode(self.encode(z.reshape(-1, 1))).reshape(x.shape) * scale + zero
            return ((x - values).square() * weight).sum(1, keepdim=True), shrink, scale, zero

        one = torch.ones_like(widest)
        best = reduce(_better, (tried(one * s) for s in COARSE))
        best = reduce(_better, [best, *(tried(best[1] * s) for s in FINE)])
        return best[2], None if symmetric else best[3]


def _sample(x: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spaced values of large granules with their largest ones, and how many values each stands for."""
    step = -(-x.shape[1] // SAMPLE)
    if step == 1:
        return x, torch.ones_like(x[:1])
    even, large = x[:, ::step], x.gather(1, x.abs().topk(LARGEST, 1).indices)
    counted = even.abs() >= large.abs().amin(1, keepdim=True)
    weight = torch.where(counted, 0.0, float(step))
    return torch.cat([even, large], 1), torch.cat([weight, torch.ones_like(large)], 1)


def _better(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(b[0] < a[0], y, x) for x, y in zip(a, b))
