"""A compressed matrix as it is stored: what it is (a spec, JSON) and its packed tensors."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from caldera.basis import out_of
from caldera.errors import CheckpointError
from caldera.quantizers import TensorSpec, get_quantizer


@dataclass(frozen=True)
class MatrixSpec:
    """Everything but the tensors that is needed to read a matrix W_hat (m, n) = S_out T_m^T (Q + L R) T_n S_in back.

    The signs of the transform follow from (seed, input_name) and (seed, name); they are not stored.
    """

    name: str
    input_name: str
    shape: tuple[int, int]
    rank: int
    q: str
    l: str
    r: str
    seed: int = 0
    transformed: bool = True

    def _parts(self) -> dict[str, tuple[str, int, int]]:
        """Prefix -> quantizer and shape, in storage order: L is stored transposed (k, m)."""
        (m, n), k = self.shape, self.rank
        parts = {"q": (self.q, m, n), "l": (self.l, k, m), "r": (self.r, k, n)}
        return {p: v for p, v in parts.items() if v[0] != "none" and v[1] > 0}

    def layout(self) -> dict[str, TensorSpec]:
        """The tensors that the matrix is stored in, by name."""
        specs = {p: get_quantizer(q).layout(rows, columns) for p, (q, rows, columns) in self._parts().items()}
        return {f"{p}_{key}": spec for p, tensors in specs.items() for key, spec in tensors.items()}

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors: codes and scales."""
        return sum(spec.bytes for spec in self.layout().values())

    @property
    def stored_bits(self) -> float:
        """Stored bits per parameter."""
        return 8 * self.stored_bytes / self.parameters

    @property
    def nominal_bits(self) -> float:
        """Codes only, per parameter: B_Q + k (m B_L + n B_R) / (m n), the paper's convention."""
        bits = {p: get_quantizer(q).bits * rows * columns for p, (q, rows, columns) in self._parts().items()}
        return sum(bits.values()) / self.parameters

    def to_json(self) -> dict:
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: dict) -> "MatrixSpec":
        return cls(**data | {"shape": tuple(data["shape"])})


@dataclass(frozen=True)
class PackedMatrix:
    """A spec with its tensors. Raises CheckpointError when they are not what the spec declares."""

    spec: MatrixSpec
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        declared = {key: (t.shape, t.dtype) for key, t in self.spec.layout().items()}
        found = {key: (tuple(t.shape), t.dtype) for key, t in self.tensors.items()}
        if declared != found:
            raise CheckpointError(f"{self.spec.name}: stored tensors {found} differ from the declared {declared}")

    def part(self, prefix: str) -> Tensor | None:
        """Q (m, n), L^T (k, m) or R (k, n) in float32, or None when there is none."""
        if prefix not in self.spec._parts():
            return None
        quantizer, rows, columns = self.spec._parts()[prefix]
        own = {key[2:]: t for key, t in self.tensors.items() if key.startswith(f"{prefix}_")}
        return get_quantizer(quantizer).unpack(own, rows, columns)

    def inner(self) -> Tensor:
        """Q + L R (m, n) in the transformed coordinates."""
        q, left, right = (self.part(p) for p in "qlr")
        total = q if left is None else left.T @ right if q is None else q + left.T @ right
        return torch.zeros(self.spec.shape) if total is None else total

    def dequantize(self) -> Tensor:
        """W_hat (m, n) float32."""
        spec, x = self.spec, self.inner()
        return out_of(x, spec.seed, spec.input_name, spec.name) if spec.transformed else x
