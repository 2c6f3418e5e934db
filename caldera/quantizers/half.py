"""16-bit floats as a quantizer: no codebook, no scale, stored as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from caldera.devices import read
from caldera.errors import NumericalError
from caldera.quantizers.base import Scales, TensorSpec


@dataclass(frozen=True)
class Half:
    """bfloat16 or float16 values. A float16 overflow saturates instead of becoming infinite."""

    name: str
    dtype: torch.dtype
    group = 1
    bits = 16.0
    granularity = 0
    symmetric = True
    sequential = False

    @property
    def codebook(self) -> "Half":
        return self

    @property
    def gaussian_scale(self) -> float:
        return 1.0

    @property
    def gaussian_mse(self) -> float:
        """Relative error of rounding the mantissa, uniform in a binade: E[x^2] eps^2 / 12 x E[4^{-fraction}]."""
        return torch.finfo(self.dtype).eps ** 2 / 12 * 0.52

    def layout(self, m: int, n: int) -> dict[str, TensorSpec]:
        return {"codes": TensorSpec((m, n), self.dtype)}

    def fit(self, x: Tensor) -> Scales:
        return Scales(torch.ones(1, 1, device=x.device))

    def columns(self, scales: Scales, n: int) -> Scales:
        return Scales(scales.scale, torch.zeros_like(scales.scale))

    def encode(self, x: Tensor, scales: Scales | None = None) -> Tensor:
        """int64 view of the 16 bits, (m, n) or, for unit-scale vectors (N, 1), (N,)."""
        top = torch.finfo(self.dtype).max
        codes = x.clamp(-top, top).to(self.dtype).view(torch.int16).to(torch.int64)
        return codes[:, 0] if scales is None else codes

    def decode(self, codes: Tensor, scales: Scales | None = None, n: int | None = None) -> Tensor:
        values = codes.to(torch.int16).view(self.dtype).float()
        return values[:, None] if scales is None else values

    def kernel(self) -> None:
        return None

    def block_rows(self, m: int, wanted: int) -> int:
        return max(1, wanted)

    def round(self, x: Tensor) -> Tensor:
        scales = self.fit(x)
        return self.decode(self.encode(x, scales), scales)

    def rescaled(self, codes: Tensor, scales: Scales, factor: float, what: str) -> tuple[Tensor, Scales]:
        """Codes of the values times a power of 2. Raises NumericalError naming `what` when they leave the range."""
        values, info = self.decode(codes, scales) * factor, torch.finfo(self.dtype)
        largest = read(values.abs().max())
        if largest > info.max or 0 < largest < info.smallest_normal:
            raise NumericalError(f"{what}: {self.name} cannot hold values of {largest:.3g}; choose bf16")
        return self.encode(values, scales), scales

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"codes": codes.to(torch.int16).view(self.dtype)}

    def unpack(self, tensors: dict[str, Tensor], m: int, n: int) -> Tensor:
        return tensors["codes"].float()
