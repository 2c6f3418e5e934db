"""The weight matrices of a decoder block, wherever the model keeps them, and the products that they take part in.

A matrix W (m, n) = out x in may be the weight of a `Linear`, the transposed weight of GPT-2's `Conv1D`, or an expert's
slice of a three-dimensional parameter, as transformers stores mixtures of experts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from caldera.devices import address

EXPERTS = ("gate_up_proj", "up_proj", "gate_proj", "down_proj")  # parameters (experts, ., .) of a fused module


@dataclass(frozen=True)
class Matrix:
    """One weight matrix: `attribute` of `owner`, a slice of it if `expert` is a number; `name` is unique in its block.

    `parameter` is the parameter's name in the block's state dict; `transposed` says that it is stored as (n, m).
    """

    name: str
    parameter: str
    owner: nn.Module
    attribute: str
    expert: int | None = None
    transposed: bool = False

    @property
    def whole(self) -> nn.Parameter:
        """The parameter that the matrix is, or is a slice of."""
        return getattr(self.owner, self.attribute)

    @property
    def stored(self) -> Tensor:
        """The parameter's part that holds the matrix, as it lies in memory."""
        return self.whole if self.expert is None else self.whole[self.expert]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def stage(self) -> str:
        """Name of what runs together: the layer, or the matrices of all experts."""
        return self.parameter.removesuffix(".weight")

    def part(self, whole: Tensor) -> Tensor:
        """What belongs to the matrix, as (m, n), of a tensor that is shaped as its parameter; a view."""
        stored = whole if self.expert is None else whole[self.expert]
        return stored.T if self.transposed else stored

    def read(self) -> Tensor:
        """W (m, n), a view."""
        return self.part(self.whole.detach())

    def write(self, weight: Tensor) -> None:
        """Put W (m, n) in its place, in the place's dtype; one without data is given data of W's dtype first."""
        if self.stored.is_meta:
            whole = torch.empty_like(self.whole, dtype=weight.dtype, device=weight.device)
            setattr(self.owner, self.attribute, nn.Parameter(whole, requires_grad=False))
        with torch.no_grad():
            self.read().copy_(weight)


def matrices(block: nn.Module) -> dict[str, Matrix]:
    """Every matrix of a block by its name; a parameter that two modules share is listed once."""
    found: dict[str, Matrix] = {}
    seen: set[int] = set()
    for name, module in block.named_modules():
        for matrix in _of_module(name, module):
            if id(matrix.whole) not in seen:
                found[matrix.name] = matrix
        seen.update(id(p) for p in module._parameters.values())
    return found


def _of_module(name: str, module: nn.Module) -> list[Matrix]:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        return [Matrix(name, f"{name}.weight", module, "weight", None, isinstance(module, Conv1D))]
    if not hasattr(module, "num_experts"):
        return []
    stacks = [key for key in EXPERTS if isinstance(p := getattr(module, key, None), nn.Parameter) and p.dim() == 3]
    prefix = f"{name}." if name else ""
    turned = getattr(module, "is_transposed", False)
    return [
        Matrix(f"{prefix}{key}.{i}", f"{prefix}{key}", module, key, i, turned)
        for key in stacks
        for i in range(len(getattr(module, key)))
    ]


def chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether the matrix of that full name fits a pattern of `include` (`*`, `?`, `[...]`) and none of `exclude`."""
    return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)


class Products(TorchFunctionMode):
    """While it is entered, `seen(name, x, y)` hears of every product y = x W^T (+ bias) with a watched matrix.

    What `seen` returns, unless it is None, takes the place of y; y is a function, so that it is computed only if it is
    called, with another x if it is given one. Products are recognised by the memory of their weight: it does not matter
    which module computes them.
    """

    def __init__(self, watched: Iterable[Matrix], seen: Callable[[str, Tensor, Callable[..., Tensor]], Tensor | None]):
        super().__init__()
        self.names = {address(matrix.stored): matrix.name for matrix in watched}
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (place := _PRODUCTS.get(function)) is None:
            return function(*args, **kwargs)
        x, weight = (_operand(args, kwargs, at) for at in place)
        plain = isinstance(weight, Tensor) and weight.dim() == 2  # a stack of experts begins where its first one does
        name = self.names.get(address(weight)) if plain else None
        y = partial(_product, function, args, kwargs, place[0])
        instead = None if name is None else self.seen(name, x, y)
        return y() if instead is None else instead


def watch(watched: Iterable[Matrix], note: Callable[[str, Tensor], None]) -> Products:
    """A context in which `note(name, x)` hears of the input x (..., n) of every product with a watched matrix."""

    def seen(name: str, x: Tensor, _y) -> None:
        note(name, x)

    return Products(watched, seen)


def _operand(args: tuple, kwargs: dict, place: tuple[int, str]) -> Tensor | None:
    index, key = place
    return args[index] if index < len(args) else kwargs.get(key)


def _product(function: Callable, args: tuple, kwargs: dict, place: tuple[int, str], x: Tensor | None = None) -> Tensor:
    """What the function gives, with x, if it is given, as the operand at that place."""
    if x is None:
        return function(*args, **kwargs)
    index, key = place
    if index < len(args):
        return function(*args[:index], x, *args[index + 1 :], **kwargs)
    return function(*args, **kwargs | {key: x})


# where a product has its input and its weight: (position, keyword)
_PRODUCTS = {
    nn.functional.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    Tensor.matmul: ((0, "self"), (1, "other")),
    Tensor.__matmul__: ((0, "self"), (1, "other")),
}
