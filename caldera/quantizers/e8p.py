"""E8P lattice codebooks at 2, 3 and 4 bits a value (QuIP#, arXiv 2402.04396, section 4).

A 2-bit codeword is v +- 1/4 in eight dimensions: v half-integer with an even sum, |v| one of 256 patterns. Its code is
pattern << 8 | seven signs << 1 | shift; the eighth sign follows from the parity. 3 bits add one of 256 E8 points on
what remains, times `residual`; 4 bits add a second E8P codeword. Of the two shifts the one that ends nearer is taken,
which together with the residual scales below lowers the error of the 4-bit code on a unit Gaussian from 0.0096
(residual 3.3 at scale 1.03) to 0.0079, and that of the 3-bit code from 0.0300 to 0.0292.
"""

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from caldera.devices import constant
from caldera.quantizers.base import gaussian_fit

# Positions of the three entries 1/2 in the 29 patterns of norm 12 (the other five are 3/2): the published choice.
HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 "
    "245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)


@cache
def extra_halves() -> np.ndarray:
    """(29, 3) positions of the entries 1/2."""
    return np.array([[int(c) for c in triple] for triple in HALVES.split()], np.int32)


@cache
def patterns() -> np.ndarray:
    """(256, 8) of |v| - 1/2: the 227 with |v|^2 <= 10 in lexicographic order, then the 29 of norm 12."""
    small = [p for p in itertools.product(range(3), repeat=8) if sum(m * (m + 1) for m in p) <= 8]
    extra = np.ones((29, 8), np.int64)
    np.put_along_axis(extra, extra_halves().astype(np.int64), 0, 1)
    return np.concatenate([np.array(small), extra])


@cache
def pattern_lookup() -> np.ndarray:
    """(3^8,) index of a pattern by its base-3 digits, -1 where there is none."""
    lookup = np.full(3**8, -1, np.int32)
    lookup[patterns() @ 3 ** np.arange(7, -1, -1)] = np.arange(256)
    return lookup


@cache
def mask_lookup() -> np.ndarray:
    """(4096,) index of a pattern by the mask of its 3/2 | (1 + place of its 5/2) << 8: the compiled search's words."""
    lookup = np.full(4096, -1, np.int32)
    places = 1 << np.arange(8)
    five = (patterns() == 2) @ np.arange(1, 9)
    lookup[(patterns() == 1) @ places | five << 8] = np.arange(256)
    return lookup


@cache
def e81_points() -> np.ndarray:
    """(256, 8) E8 points: 112 roots with two entries +-1, 128 of +-1/2 with even parity, 0, and 15 of norm 4."""
    pairs = np.zeros((112, 8), np.float32)
    pairs_of = itertools.product(itertools.combinations(range(8), 2), (1, -1), (1, -1))
    for row, ((i, j), a, b) in enumerate(pairs_of):
        pairs[row, i], pairs[row, j] = a, b
    signs = (np.arange(128)[:, None] >> np.arange(7)) & 1
    halves = 0.5 - np.concatenate([signs, signs.sum(1, keepdims=True) % 2], 1)
    singles = np.kron(np.eye(8), [[2.0], [-2.0]])[:15]
    return np.concatenate([pairs, halves, np.zeros((1, 8)), singles]).astype(np.float32)


def _at_place(at: Tensor) -> Tensor:
    """(N, 8), true at one place of each row; `one_hot` asks some devices whether the places are in range."""
    return at[:, None] == torch.arange(8, device=at.device)


def _free_point(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest half-integer points with even sums, any norm: |v| - 1/2 (N, 8), signs, squared distances (N,)."""
    a, negative = y.abs(), y < 0
    m = a.floor()
    rest = a - m - 0.5
    odd = ((m.sum(1) + negative.sum(1)) % 2) == 1
    worst, at = rest.abs().max(1)
    moved = _at_place(at) & odd[:, None]
    down = moved & (rest < 0)
    negative = negative ^ (down & (m == 0))
    m = m + (moved & ~down) - (down & (m > 0)).to(m.dtype)
    return m, negative, rest.square().sum(1) + torch.where(odd, 1 - 2 * worst, 0.0)


def _table_point(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest points of the table, by type: see `_kernels._table_point`, whose arithmetic this is."""
    halves = constant(extra_halves, y).long()
    a, negative = y.abs(), y < 0
    ordered, order = a.sort(dim=1, descending=True, stable=True)
    parity = negative.sum(1) % 2
    base, smallest = a.square().sum(1) - a.sum(1), ordered[:, 7]
    tops = torch.cat([torch.zeros_like(ordered[:, :1]), ordered[:, :5].cumsum(1)], 1)
    options = []  # (distance, number of 3/2, number of 5/2)
    for j, five in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0)):
        flip = torch.where((parity + j) % 2 == 1, smallest, 0.0)
        top = tops[:, j] if not five else 2 * ordered[:, 0] + (ordered[:, 1] if j else 0)
        options.append(base - 2 * (top - flip) + 2 + 2 * j + 6 * five)
    wrong = parity == 0
    flip = torch.minimum(3 * smallest[:, None], a[:, halves].amin(2))
    extra = (
        base[:, None]
        - 2 * a.sum(1)[:, None]
        + 12
        + 2 * a[:, halves].sum(2)
        + 2 * torch.where(wrong[:, None], flip, 0.0)
    )
    distance, choice = torch.cat([torch.stack(options, 1), extra], 1).min(1)
    return _arranged(choice, order, a, negative, parity, distance)


@cache
def _sorted_types() -> np.ndarray:
    """(7, 8) the seven types as |v| - 1/2 on coordinates sorted by size, in the order of `_table_point`'s options."""
    rows = [(0,), (2,), (1,), (2, 1), (1, 1), (1, 1, 1), (1, 1, 1, 1)]
    return np.array([row + (0,) * (8 - len(row)) for row in rows], np.int64)


def _arranged(choice, order, a, negative, parity, distance) -> tuple[Tensor, Tensor, Tensor]:
    sorted_m = constant(_sorted_types, a)[choice.clamp(max=6)]
    by_type = torch.zeros_like(sorted_m).scatter(1, order, sorted_m)
    by_extra = constant(patterns, a)[227 + (choice - 7).clamp(min=0)]
    m = torch.where((choice >= 7)[:, None], by_extra, by_type)
    odd = (m.sum(1) + parity) % 2 == 1
    cheapest = _at_place((a * (2 * m + 1)).argmin(1))
    negative = negative ^ (cheapest & odd[:, None])
    return m.to(a.dtype), negative, distance


def _shifted(x: Tensor, bit: int) -> tuple[Tensor, Tensor]:
    """Nearest codewords with one shift: codes (N,) and squared distances (N,). No branch depends on the data."""
    y = x - (0.25 if bit == 0 else -0.25)
    (m, negative, distance), table = _free_point(y), _table_point(y)
    outside = (m > 2).any(1) | (_index(m) < 0)
    m, negative = (torch.where(outside[:, None], a, b) for a, b in zip(table, (m, negative)))
    signs = (negative[:, :7].long() << torch.arange(7, device=x.device)).sum(1)
    return (_index(m) << 8) | (signs << 1) | bit, torch.where(outside, table[2], distance)


def _index(m: Tensor) -> Tensor:
    """Table index of |v| - 1/2 (N, 8), -1 where the table has none; entries above 2 are taken for 2."""
    powers = 3 ** torch.arange(7, -1, -1, device=m.device)
    return constant(pattern_lookup, m)[(m.long().clamp(max=2) * powers).sum(1)].long()


def encode_2bit(x: Tensor) -> Tensor:
    """Codes int64 (N,) of the nearest 2-bit codewords of x (N, 8), exactly."""
    (code0, distance0), (code1, distance1) = _shifted(x, 0), _shifted(x, 1)
    return torch.where(distance1 < distance0, code1, code0)


@cache
def codewords() -> np.ndarray:
    """(65536, 8) the 2-bit codewords, float32: 2 MB. Looking them up takes 1/100 of the time of computing them."""
    codes = np.arange(1 << 16)
    m = patterns()[codes >> 8]
    signs = (codes[:, None] >> np.arange(1, 8)) & 1
    last = (m.sum(1) + signs.sum(1)) % 2
    signs = np.concatenate([signs, last[:, None]], 1)
    return ((m + 0.5) * (1 - 2 * signs) + (0.25 - 0.5 * (codes & 1))[:, None]).astype(np.float32)


def decode_2bit(codes: Tensor) -> Tensor:
    """Codewords float32 (N, 8)."""
    return embedding(codes, constant(codewords, codes))


def encode_e81(x: Tensor) -> Tensor:
    """Codes int64 (N,) of the nearest of the 256 E8 points."""
    points = constant(e81_points, x)
    return (2 * x @ points.T - points.square().sum(1)).argmax(1)


@dataclass(frozen=True)
class E8P:
    """The codebook; `gaussian_scale` and `residual` minimise the error on a unit Gaussian (found numerically)."""

    bits: int
    gaussian_scale: float
    gaussian_mse: float
    residual: float = 1.0
    group = 8
    sequential = False

    def encode(self, z: Tensor) -> Tensor:
        z = z.clamp(-1e6, 1e6)  # far outside the table already; keeps squares finite and parities exact
        if self.bits == 2:
            return encode_2bit(z)
        second = encode_e81 if self.bits == 3 else encode_2bit
        codes = [first | second((z - decode_2bit(first)) * self.residual) << 16 for first in self._both_shifts(z)]
        errors = [(z - self.decode(c)).square().sum(1) for c in codes]
        return torch.where(errors[1] < errors[0], codes[1], codes[0])

    @staticmethod
    def _both_shifts(z: Tensor) -> tuple[Tensor, Tensor]:
        return _shifted(z, 0)[0], _shifted(z, 1)[0]

    def decode(self, codes: Tensor) -> Tensor:
        first = decode_2bit(codes & 0xFFFF)
        if self.bits == 2:
            return first
        rest = codes >> 16
        second = embedding(rest, constant(e81_points, codes)) if self.bits == 3 else decode_2bit(rest)
        return first + second / self.residual

    def kernel(self) -> tuple:
        from caldera.quantizers import _kernels

        kind = {2: _kernels.E8P, 3: _kernels.E8P_E81, 4: _kernels.E8P_E8P}[self.bits]
        return (kind, np.float32(self.residual), mask_lookup(), extra_halves(), np.zeros(1, np.float32))

    def fit(self, x: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, None]:
        """The scale that gives each granule of x (granules, values) the best standard deviation for a Gaussian."""
        return gaussian_fit(x, self.gaussian_scale), None


CODEBOOKS = {
    2: E8P(2, gaussian_scale=1.03, gaussian_mse=0.0914),
    3: E8P(3, gaussian_scale=1.00, gaussian_mse=0.0292, residual=1.85),
    4: E8P(4, gaussian_scale=0.90, gaussian_mse=0.0079, residual=3.75),
}
