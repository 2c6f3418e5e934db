"""A compressed matrix as it is stored: what it is (a spec, JSON) and its packed tensors."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

from caldera import hadamard
from caldera.basis import out_of, sign_vectors
from caldera.errors import CheckpointError
from caldera.quantizers import TensorSpec, get_quantizer

BLOCK = 1 << 18  # values of Q decoded at a time, 1 MB: they are still in the processor's cache when they are multiplied


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
        return dict(_layout(self))

    def signs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """sign_in (n,) and sign_out (m,)."""
        return sign_vectors(self.shape, self.seed, self.input_name, self.name, device)

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


@cache
def _layout(spec: MatrixSpec) -> dict[str, TensorSpec]:
    specs = {p: get_quantizer(q).layout(rows, columns) for p, (q, rows, columns) in spec._parts().items()}
    return {f"{p}_{key}": spec for p, tensors in specs.items() for key, spec in tensors.items()}


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
        return get_quantizer(quantizer).unpack(self._tensors_of(prefix), rows, columns)

    def _tensors_of(self, prefix: str) -> dict[str, Tensor]:
        return {key[2:]: t for key, t in self.tensors.items() if key.startswith(f"{prefix}_")}

    def _blocks_of_q(self) -> Iterator[Tensor]:
        """Q in float32, a few rows at a time."""
        name, rows, columns = self.spec._parts()["q"]
        tensors, step = self._tensors_of("q"), get_quantizer(name).block_rows(rows, BLOCK // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            # one scale for all rows stays as it is; all else is in the order of rows, and divides evenly among them
            own = {
                key: t if t.shape == (1, 1) else t[len(t) * start // rows : len(t) * stop // rows]
                for key, t in tensors.items()
            }
            yield get_quantizer(name).unpack(own, stop - start, columns)

    def inner(self) -> Tensor:
        """Q + L R (m, n) in the transformed coordinates."""
        q, left, right = (self.part(p) for p in "qlr")
        total = q if left is None else left.T @ right if q is None else q + left.T @ right
        return torch.zeros(self.spec.shape) if total is None else total

    def dequantize(self) -> Tensor:
        """W_hat (m, n) float32."""
        spec, x = self.spec, self.inner()
        return out_of(x, spec.seed, spec.input_name, spec.name) if spec.transformed else x

    def product(self, x: Tensor, signs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x W_hat^T (..., m) of x (..., n), in the type of x, without W_hat: it is x that goes through the transforms.

        `signs` are the spec's on the device of x, for callers that keep them. The transforms are in float32; products
        are in the type of x, as they would be with W_hat.
        """
        spec = self.spec
        if not spec.transformed:
            return self._inner_product(x)
        sign_in, sign_out = spec.signs(x.device) if signs is None else signs
        y = self._inner_product(hadamard.transform(x.float() * sign_in).to(x.dtype))
        return (hadamard.inverse(y.float()) * sign_out).to(x.dtype)

    def _inner_product(self, x: Tensor) -> Tensor:
        """x (Q + L R)^T (..., m) in the transformed coordinates."""
        parts = self.spec._parts()
        y = x.new_zeros(*x.shape[:-1], self.spec.shape[0])
        if "q" in parts:
            y = torch.cat([x @ rows.to(x.dtype).T for rows in self._blocks_of_q()], -1)
        return y + x @ self.part("r").to(x.dtype).T @ self.part("l").to(x.dtype) if "l" in parts else y
