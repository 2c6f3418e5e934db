"""What a quantizer is: a codebook for unit-scale values, a rule for scales, and a storage format.

A value x is stored as a code and read back as `scale * codebook[code] + zero`. Whatever is rounded, the fit uses the
scale as it is stored, so that what was fitted is what is deployed.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from caldera.devices import is_fake, over_rows
from caldera.packing import pack, packed_bytes, unpack


class Codebook(Protocol):
    """Points that vectors of `group` unit-scale values are rounded to; `bits` of code for each value.

    A `sequential` one (group 1) rounds the values of a column together: `encode` and `decode` then take one column, and
    there are `encode_columns` and `decode_columns` for matrices.
    """

    group: int
    sequential: bool
    bits: float
    gaussian_scale: float  # best standard deviation of the values that are rounded, in units of the codebook
    gaussian_mse: float  # mean squared error on a unit Gaussian at that scale

    def encode(self, z: Tensor) -> Tensor: ...  # (N, group) -> int64 (N,)
    def decode(self, codes: Tensor) -> Tensor: ...  # int64 (N,) -> (N, group)
    def kernel(self) -> tuple | None: ...  # the codebook as `_kernels` take it; None: tensor code only


class Scales(NamedTuple):
    """Scales and zeros of a matrix (m, n), each (1 | m, 1 | n / granule): one for all, a row, or a granule of a row."""

    scale: Tensor
    zero: Tensor | None = None

    def times(self, factor: float) -> "Scales":
        """Scales `factor` times as wide, in their type."""
        return Scales((self.scale.float() * factor).to(self.scale.dtype), self.zero)


class TensorSpec(NamedTuple):
    """Declared storage of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Quantizer:
    """Codebook + scales. `granularity`: 0 = one scale a matrix, -1 = one a row, g > 0 = one for g columns of a row."""

    name: str
    codebook: Codebook
    granularity: int = 0
    symmetric: bool = True

    @property
    def group(self) -> int:
        return self.codebook.group

    @property
    def bits(self) -> float:
        """Nominal bits per value: codes only."""
        return self.codebook.bits

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.granularity else torch.float32

    def _scale_shape(self, m: int, n: int) -> tuple[int, int]:
        if self.granularity > 0:
            return m, -(-n // self.granularity)
        return (m if self.granularity else 1), 1

    def _code_shape(self, m: int, n: int) -> tuple[int, int]:
        return m, -(-n // self.group)

    def layout(self, m: int, n: int) -> dict[str, TensorSpec]:
        """The tensors that a matrix (m, n) is stored in, declared before anything is packed."""
        rows, groups = self._code_shape(m, n)
        code_bits = round(self.bits * self.group)
        specs = {"codes": TensorSpec((packed_bytes(rows * groups, code_bits),), torch.uint8)}
        scale = TensorSpec(self._scale_shape(m, n), self._scale_dtype)
        return specs | {"scale": scale} | ({} if self.symmetric else {"zero": scale})

    def columns(self, scales: Scales, n: int) -> Scales:
        """Scale and zero in float32 with a column for each of n columns, or a single one that serves all."""
        scale = scales.scale.float()
        wide = (scale, torch.zeros_like(scale) if scales.zero is None else scales.zero.float())
        if self.granularity > 0:
            wide = (t.repeat_interleave(self.granularity, 1)[:, :n] for t in wide)
        return Scales(*(t.contiguous() for t in wide))

    def fit(self, x: Tensor) -> Scales:
        """Scales for x (m, n), as they will be stored. A granule of zeros gets scale 0 and is read back as zeros."""
        return self._stored(self.codebook.fit(self._granules(x), self.symmetric, self._scale_dtype), *x.shape)

    def _granules(self, x: Tensor) -> Tensor:
        """x as (granules, values), the last granule of a row padded with its own last value."""
        m, n = x.shape
        if self.granularity <= 0:
            return x if self.granularity else x.reshape(1, -1)
        short = -n % self.granularity
        x = torch.cat([x, x[:, -1:].expand(m, short)], 1) if short else x
        return x.reshape(-1, self.granularity)

    def _stored(self, fitted: tuple[Tensor, Tensor | None], m: int, n: int) -> Scales:
        shape = self._scale_shape(m, n)
        return Scales(*(None if t is None else t.reshape(shape).to(self._scale_dtype) for t in fitted))

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        """Codes int64 (m, ceil(n / group)) of the codewords nearest to x (m, n)."""
        m, n = x.shape
        scale, zero = self.columns(scales, n)
        z = torch.where(scale > 0, (x - zero) / scale, 0.0)
        if self.codebook.sequential:
            return nearest_columns(self.codebook, z)
        z = torch.nn.functional.pad(z, (0, -n % self.group)).reshape(-1, self.group)
        return nearest(self.codebook, z).reshape(self._code_shape(m, n))

    def decode(self, codes: Tensor, scales: Scales, n: int) -> Tensor:
        """Values float32 (m, n) of codes (m, ceil(n / group))."""
        scale, zero = self.columns(scales, n)
        if self.codebook.sequential:
            values = self.codebook.decode_columns(codes)
        else:
            values = self.codebook.decode(codes.reshape(-1)).reshape(codes.shape[0], -1)[:, :n]
        return values * scale if self.symmetric else values * scale + zero

    def block_rows(self, m: int, wanted: int) -> int:
        """About how many of m rows may be unpacked apart: any block of so many, from a multiple of it, and the rest.

        Eight rows end at a whole byte, whatever the width of a code.
        """
        return self.codebook.block_rows(m) if self.codebook.sequential else max(8, wanted // 8 * 8)

    def round(self, x: Tensor) -> Tensor:
        """x (m, n) fitted, encoded and decoded: the nearest storable matrix, without error feedback."""
        scales = self.fit(x)
        return self.decode(self.encode(x, scales), scales, x.shape[1])

    def rescaled(self, codes: Tensor, scales: Scales, factor: float, what: str) -> tuple[Tensor, Scales]:
        """Codes and scales of the values times a power of 2, which costs no bit."""
        return codes, Scales(*(None if t is None else t * factor for t in scales))

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        """The stored tensors, exactly as `layout` declares them."""
        tensors = {"codes": pack(codes, round(self.bits * self.group)), "scale": scales.scale}
        return tensors if scales.zero is None else tensors | {"zero": scales.zero}

    def unpack(self, tensors: dict[str, Tensor], m: int, n: int) -> Tensor:
        """Values float32 (m, n) of stored tensors."""
        rows, groups = self._code_shape(m, n)
        codes = unpack(tensors["codes"], round(self.bits * self.group), rows * groups).reshape(rows, groups)
        return self.decode(codes, Scales(tensors["scale"], tensors.get("zero")), n)


def gaussian_fit(x: Tensor, gaussian_scale: float) -> Tensor:
    """The scale (granules, 1) of x (granules, values) at which its deviation is the codebook's best for a Gaussian."""
    return _mean_square(x).sqrt() / gaussian_scale


def _mean_square(x: Tensor) -> Tensor:
    """(granules, 1) of x (granules, values), in two steps: long sums depend on the number of threads."""
    width = x.shape[1]
    part = max(math.isqrt(width), 1024)
    parts = torch.nn.functional.pad(x, (0, -width % part)).reshape(len(x), -1, part)
    return parts.square().sum(2).sum(1, keepdim=True) / width


def compiled(codebook: Codebook, like: Tensor) -> tuple | None:
    """The codebook for the compiled loops, if these can run: data on the processor, in float32."""
    usable = like.device.type == "cpu" and like.dtype == torch.float32 and not is_fake(like)
    return codebook.kernel() if usable else None


def nearest(codebook: Codebook, z: Tensor) -> Tensor:
    """Codes int64 (N,) of the points nearest to z (N, group), compiled where possible."""
    book = compiled(codebook, z)
    if book is None:
        return codebook.encode(z)
    from caldera.quantizers import _kernels

    codes = torch.empty(z.shape[0], dtype=torch.int64)
    over_rows(_kernels.encode, z.shape[0], z.contiguous().numpy(), book, codes.numpy())
    return codes


def nearest_columns(codebook: Codebook, z: Tensor) -> Tensor:
    """Codes int64 (m, n) of a sequential codebook for the columns of z (m, n), compiled where possible."""
    book = compiled(codebook, z)
    if book is None:
        return codebook.encode_columns(z)
    from caldera.quantizers import _trellis

    codes = torch.empty(z.shape, dtype=torch.int64)
    edges = codebook.edges(z.shape[0])
    over_rows(_trellis.encode, z.shape[0], z.contiguous().numpy(), book, codes.numpy(), edges=edges)
    return codes
