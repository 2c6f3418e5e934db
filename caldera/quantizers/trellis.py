"""Trellis-coded quantization at 1 to 4 bits a value (Marcellin and Fischer 1990; for weights QTIP, arXiv 2406.11235).

Down a column of a matrix, every value adds `bits` bits to a shift register of 12; the register's content, a state, is
looked up in a table of 4096 levels, so that a value costs `bits` bits and is chosen among levels that the bits of its
neighbours have opened. Sequences are closed: the register runs round their end, and no bits are spent on a first state.
The best sequence is found by Viterbi's search over all states. The levels are quantiles of a Gaussian in an order that
a hash of the state gives, so nothing is stored for them. Sequences shorter than two registers have too little choice;
their values are rounded one by one to uniform levels.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from caldera.devices import constant
from caldera.quantizers.base import gaussian_fit

STATE_BITS = 12
STATES = 1 << STATE_BITS
RUN = 256  # longest sequence
WARM = 64  # values before and after the seam that decide with which state a closed sequence begins
BLOCKED = 1e30
TOGETHER = 1024  # sequences that tensor code searches side by side, in 1/4 to 1/2 GB
FAR = 16.0  # values beyond are taken for this: float32 sums must keep the digits of the others' distances
STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352}  # of the best uniform levels for a unit Gaussian (Max 1960)


@cache
def levels() -> np.ndarray:
    """(4096,) the level of every state: part of the checkpoint format."""
    state = np.arange(STATES, dtype=np.uint64)
    for _ in range(2):  # a bijection in 12 bits; its two numbers are the best of 60 pairs, by 3% over the mean pair
        state = (state * np.uint64(3187) + np.uint64(2897)) & np.uint64(STATES - 1)
        state ^= state >> np.uint64(STATE_BITS // 2)
    quantile = NormalDist().inv_cdf
    # rounded, so that the last digits of a machine's logarithm do not matter
    return np.array([round(quantile((int(s) + 0.5) / STATES), 4) for s in state], np.float32)


@cache
def planes(bits: int) -> np.ndarray:
    """(4096,) the levels in the order of `_trellis`."""
    return np.ascontiguousarray(levels().reshape(-1, 1 << bits).T.reshape(-1))


@dataclass(frozen=True)
class Trellis:
    """The codebook. `encode` and `decode` take one column; `gaussian_mse` was measured on sequences of 256."""

    bits: int
    gaussian_scale: float
    gaussian_mse: float
    group = 1
    sequential = True

    def edges(self, rows: int) -> list[int]:
        """Where the sequences of a column of that many rows begin and end: equal parts of at most RUN."""
        parts = -(-rows // RUN)
        return [rows * part // parts for part in range(parts + 1)]

    def block_rows(self, rows: int) -> int:
        """Rows of one sequence, where all have as many and end at a whole byte; else all rows."""
        parts = len(self.edges(rows)) - 1
        return rows if rows % parts or rows // parts % 8 else rows // parts

    def encode(self, z: Tensor) -> Tensor:
        """Codes int64 (m,) of a column z (m, 1)."""
        return self.encode_columns(z)[:, 0]

    def decode(self, codes: Tensor) -> Tensor:
        """Values float32 (m, 1) of a column's codes (m,)."""
        return self.decode_columns(codes[:, None])

    def encode_columns(self, z: Tensor) -> Tensor:
        """Codes int64 (m, n) of the columns of z (m, n)."""
        if self.is_short(z.shape[0]):
            return self._encode_short(z)
        if z.shape[1] > (piece := max(1, TOGETHER // (len(self.edges(z.shape[0])) - 1))):
            return torch.cat([self.encode_columns(part) for part in z.split(piece, 1)], 1)
        runs = [z[a:b].clamp(-FAR, FAR) for a, b in pairwise(self.edges(z.shape[0]))]
        found: dict[int, list[Tensor]] = {}
        for length in {len(run) for run in runs}:  # two at most, each searched as one batch
            together = self._encode_runs(torch.cat([run for run in runs if len(run) == length], 1))
            found[length] = list(together.split(z.shape[1], 1))
        return torch.cat([found[len(run)].pop(0) for run in runs])

    def decode_columns(self, codes: Tensor) -> Tensor:
        """Values float32 (m, n) of codes (m, n)."""
        if self.is_short(codes.shape[0]):
            return (codes - ((1 << self.bits) - 1) / 2) * STEPS[self.bits]
        return constant(levels, codes).index_select(0, self._states(codes).reshape(-1)).reshape(codes.shape)

    def _states(self, codes: Tensor) -> Tensor:
        """The register after each code, (m, n)."""
        runs = (codes[a:b].to(torch.int16) for a, b in pairwise(self.edges(codes.shape[0])))
        return torch.cat([self._registers(run) for run in runs]).to(torch.int32)

    def _registers(self, codes: Tensor) -> Tensor:
        """The register after each code of closed sequences (T, n), from registers of 1, 2, 4 and 8 codes."""
        register, held, power, size = torch.zeros_like(codes), 0, codes, 1
        while held < STATE_BITS // self.bits:
            if STATE_BITS // self.bits & size:
                register = register | power.roll(held, 0) << self.bits * held
                held += size
            power, size = power | power.roll(size, 0) << self.bits * size, 2 * size
        return register

    def is_short(self, rows: int) -> bool:
        """Whether sequences of a column of that many rows are too short for the trellis."""
        return -(-rows // -(-rows // RUN)) * self.bits < 2 * STATE_BITS

    def _encode_runs(self, x: Tensor) -> Tensor:
        """Codes (T, n) of closed sequences x (T, n), T <= RUN."""
        around = x[torch.arange(-WARM, WARM, device=x.device) % x.shape[0]]
        opening = self._viterbi(around, None)[WARM - 1] & ((STATES >> self.bits) - 1)
        return self._viterbi(x, opening) & ((1 << self.bits) - 1)

    def _viterbi(self, x: Tensor, opening: Tensor | None) -> Tensor:
        """States (T, n) of the cheapest paths through x (T, n), which begin and end with `opening` (n,) if given."""
        many, (length, n) = 1 << self.bits, x.shape
        table, state = constant(levels, x), torch.arange(STATES, device=x.device)
        groups = STATES >> self.bits
        fits = None if opening is None else (state & (groups - 1)) == opening[:, None]
        cost = torch.zeros(n, STATES, device=x.device) if fits is None else torch.where(fits, 0.0, BLOCKED)
        back = []
        for t in range(length):
            best, winner = cost.reshape(n, many, groups).min(1)
            back.append(winner.to(torch.uint8))
            cost = best.repeat_interleave(many, 1) + (x[t][:, None] - table).square()
        last = (cost if fits is None else torch.where(fits, cost, 2 * BLOCKED)).argmin(1)
        states = []
        for winner in back[::-1]:
            states.append(last)
            group = last >> self.bits
            last = (winner.gather(1, group[:, None])[:, 0].long() << (STATE_BITS - self.bits)) | group
        return torch.stack(states[::-1])

    def _encode_short(self, z: Tensor) -> Tensor:
        top = (1 << self.bits) - 1
        return (z / STEPS[self.bits] + top / 2).round().clamp(0, top).long()

    def kernel(self) -> tuple:
        return (self.bits, planes(self.bits), levels(), np.float32(STEPS[self.bits]))

    def fit(self, x: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, None]:
        """The scale that gives each granule of x (granules, values) the best standard deviation for a Gaussian."""
        return gaussian_fit(x, self.gaussian_scale), None


CODEBOOKS = {
    1: Trellis(1, gaussian_scale=1.15, gaussian_mse=0.2723),
    2: Trellis(2, gaussian_scale=0.975, gaussian_mse=0.0713),
    3: Trellis(3, gaussian_scale=0.925, gaussian_mse=0.0188),
    4: Trellis(4, gaussian_scale=0.90, gaussian_mse=0.0050),
}
