"""Modules that hold matrices packed: what stands in a model for its `Linear` layers and for its stacks of experts.

Their buffers are the stored tensors under the names that a checkpoint has them by, so a shard is a state dict.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from caldera.blocks import named_matrices
from caldera.devices import is_fake
from caldera.errors import CheckpointError
from caldera.matrices import Matrix
from caldera.packed import MatrixSpec, PackedMatrix


class Packed(nn.Module):
    """The stored tensors of one matrix W_hat (m, n), on the meta device until they are loaded."""

    def __init__(self, spec: MatrixSpec):
        super().__init__()
        self.spec = spec
        self._signs: tuple[Tensor, Tensor] | None = None
        for key, t in spec.layout().items():
            self.register_buffer(key, torch.empty(t.shape, dtype=t.dtype, device="meta"))

    @property
    def matrix(self) -> PackedMatrix:
        return PackedMatrix(self.spec, {key: getattr(self, key) for key in self.spec.layout()})

    def product(self, x: Tensor) -> Tensor:
        """x W_hat^T (..., m) of x (..., n), in the type of x."""
        return self.matrix.product(x, self._signs_on(x))

    def _signs_on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transform's signs on the device of x, one byte each; kept, so that a GPU gets them once."""
        if self._signs is None or self._signs[0].device != x.device or is_fake(x):
            with torch.inference_mode(False):
                signs = tuple(s.to(torch.int8) for s in self.spec.signs(x.device))
            if is_fake(x):
                return signs
            self._signs = signs
        return self._signs

    def _apply(self, fn, recurse: bool = True):
        """Move, but never cast: codes and scales stay as they were stored when the model changes its type."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key, t in before.items():
            if self._buffers[key].dtype != t.dtype:
                self._buffers[key] = t.to(self._buffers[key].device)
        return self

    def extra_repr(self) -> str:
        m, n = self.spec.shape
        return f"{m} x {n}, rank={self.spec.rank}, {self.spec.stored_bits:.2f} bits"


class PackedLinear(Packed):
    """y = x W_hat^T + bias, in place of a `Linear` or a `Conv1D`."""

    def __init__(self, spec: MatrixSpec, layer: nn.Module):
        super().__init__(spec)
        self.register_parameter("bias", layer.bias)
        self.replaced = [layer]  # in a list, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> "PackedWeight":
        """For code that reaches into a layer."""
        return PackedWeight(self, transposed=not isinstance(self.replaced[0], nn.Linear))

    def restored(self) -> nn.Module:
        """The layer that was replaced, with its bias; its weight is still on the meta device."""
        layer = self.replaced[0].train(self.training)
        layer.bias = self.bias
        return layer


class PackedStack(nn.Module):
    """In place of a parameter (experts, ., .): `stack[expert]` is that expert's weight, as far as products go."""

    _is_hf_initialized = True  # see PackedWeight

    def __init__(self, specs: Iterable[MatrixSpec], parameter: nn.Parameter, transposed: bool):
        super().__init__()
        for index, spec in enumerate(specs):
            self.add_module(str(index), Packed(spec))
        self.replaced, self.transposed = [parameter], transposed

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, expert: int | Tensor) -> "PackedWeight":
        return PackedWeight(self._modules[str(int(expert))], self.transposed)


class PackedWeight:
    """A weight that torch takes for a factor of `linear(x, w)` or `x @ w`; `dense()` is a tensor."""

    _is_hf_initialized = True  # or transformers, which looks for parameters of this name, would draw it at random

    def __init__(self, packed: Packed, transposed: bool):
        self.packed, self.transposed = packed, transposed

    def dense(self) -> Tensor:
        """float32, as the model stores it: (m, n), or (n, m) where it is transposed."""
        weight = self.packed.matrix.dequantize()
        return weight.T if self.transposed else weight

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Tensor:
        x, weight, *bias = (*args, *(kwargs or {}).values())
        if _PRODUCTS.get(function) is not getattr(weight, "transposed", None):
            raise NotImplementedError(f"a packed weight takes no part in {function}: use its dense()")
        y = weight.packed.product(x)
        return y + bias[0] if bias and bias[0] is not None else y


# products with a weight as second factor, and whether that is (n, m)
_PRODUCTS = {nn.functional.linear: False, torch.matmul: True, Tensor.matmul: True, Tensor.__matmul__: True}


def pack(model: nn.Module, specs: dict[str, MatrixSpec]) -> dict[str, Matrix]:
    """Put empty packed modules in the places of the matrices.

    Returns the places that stay dense: in a stack of which other experts are not compressed. Raises CheckpointError
    for a matrix that the model has no place for.
    """
    places, stacks, layers = named_matrices(model), {}, {}
    for name, spec in specs.items():
        place = places.get(name)
        if place is None or place.shape != spec.shape:
            raise CheckpointError(f"{type(model).__name__} has no place for {name} {spec.shape}: load the causal LM")
        if place.expert is None:
            layers[place.owner] = PackedLinear(spec, place.owner)
        else:
            stacks.setdefault((place.owner, place.attribute), []).append((place, spec))
    _replace(model, layers)
    return {spec.name: place for stack in stacks.values() if not _stacked(stack) for place, spec in stack}


def _stacked(stack: list[tuple[Matrix, MatrixSpec]]) -> bool:
    """Replace a parameter by its packed experts, if all of them are there."""
    stack = sorted(stack, key=lambda pair: pair[0].expert)
    first, whole = stack[0][0], stack[0][0].whole
    if len(stack) < len(whole):
        return False
    delattr(first.owner, first.attribute)
    setattr(first.owner, first.attribute, PackedStack((spec for _, spec in stack), whole, first.transposed))
    return True


def materialize(model: nn.Module, dtype: torch.dtype) -> None:
    """Undo `pack` with the values of W_hat in `dtype`, one matrix after another, each on the device that it was on."""
    modules = list(model.modules())
    packed = {m.spec.name: m.matrix for m in modules if isinstance(m, Packed)}
    _replace(model, {m: m.restored() for m in modules if isinstance(m, PackedLinear)})
    for module in modules:
        for key, child in list(module._modules.items()):
            if isinstance(child, PackedStack):
                delattr(module, key)
                module.register_parameter(key, child.replaced[0])
    modules.clear()
    place(named_matrices(model), (packed.pop(name) for name in list(packed)), dtype)


def place(places: dict[str, Matrix], packed: Iterable[PackedMatrix], dtype: torch.dtype) -> None:
    """Write the values of W_hat into their places in a model, one matrix at a time."""
    for matrix in packed:
        places[matrix.spec.name].write(matrix.dequantize().to(dtype))


def _replace(model: nn.Module, others: dict[nn.Module, nn.Module]) -> None:
    """Put other modules in the places, all of them, where the model has these."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child in others:
                module._modules[key] = others[child]
