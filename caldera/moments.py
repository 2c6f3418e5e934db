"""Second moments H = E[x x^T] of the inputs of a block's matrices."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caldera.blocks import InputGroup, Stream
from caldera.devices import precision, read
from caldera.errors import NumericalError
from caldera.matrices import matrices, watch

STRIPS = 4  # of H, so that only its lower triangle of strips is computed
PIECE = 256  # tokens a product: longer sums of bfloat16 products lose a bit of float32's accuracy


@contextmanager
def products_of(*factors: Tensor) -> Iterator[None]:
    """Where float32 products of these tensors are computed: bfloat16 numbers by the CPU's own instructions for them.

    That is as exact over `PIECE` tokens, as such numbers are multiplied without rounding and summed in float32, and
    about twice as fast: an exception to `full_precision` that costs nothing. Other devices and numbers are left alone.
    """
    exact = all(x.dtype == torch.bfloat16 for x in factors)
    with precision(torch.backends.mkldnn.matmul, "bf16") if exact else nullcontext():
        yield


@dataclass
class Accumulator:
    """Running sum of x x^T in float32 over tokens, and their number."""

    total: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, n: int, device: torch.device) -> "Accumulator":
        return cls(torch.zeros(n, n, device=device))

    def add(self, x: Tensor) -> None:
        """Add tokens x (..., n)."""
        with products_of(x):
            for piece in x.reshape(-1, x.shape[-1]).float().split(PIECE):
                self._add(piece)

    def _add(self, x: Tensor) -> None:
        width = -(-x.shape[1] // STRIPS)
        for start in range(0, x.shape[1], width):
            stop = start + width
            self.total[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """H (n, n), symmetric."""
        return self.symmetric().div_(max(self.tokens, 1))

    def symmetric(self) -> Tensor:
        """The sum of x x^T (n, n)."""
        lower = self.total.tril()
        return lower + lower.tril(-1).T


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x^T y of tokens x (t, m) and y (t, n) to `total` (m, n), float32."""
    with products_of(x, y):
        for some, others in zip(x.float().split(PIECE), y.float().split(PIECE)):
            total.addmm_(some.T, others)


@torch.inference_mode()
def collect(
    block: nn.Module, stream: Stream, index: int, groups: list[InputGroup], what: str, progress: Callable | None = None
) -> dict[str, Accumulator]:
    """Moments of every group of the block, by group name, while the stream advances through the block.

    Raises NumericalError naming block and layer when an activation is NaN or infinite.
    """
    layers = matrices(block)
    found = {g.name: Accumulator.zeros(g.width, stream.hidden[0].device) for g in groups}
    with watch([layers[g.name] for g in groups], lambda name, x: found[name].add(x)):
        stream.advance(block, index, progress)
    for name, accumulator in found.items():
        if read((~torch.isfinite(accumulator.total.diagonal())).sum()) > 0:
            raise NumericalError(f"{what}.{name}: its input activations contain NaN or infinity")
    return found


def pooled(groups: list[InputGroup], found: dict[str, Accumulator]) -> tuple[dict[str, Tensor], list[str]]:
    """H (n, n) of each group by name, and the names of experts that saw fewer tokens than they are wide.

    Such an expert's moments are filled up to n tokens with the mean over all experts of its stage, so that H has full
    rank and an expert without any token is fitted to what its fellows see.
    """
    moments = {g.name: found[g.name].mean() for g in groups}
    few = [g for g in groups if g.expert and found[g.name].tokens < g.width]
    for group in few:
        fellows = [found[g.name] for g in groups if g.stage == group.stage]
        mean = sum(f.symmetric() for f in fellows) / max(sum(f.tokens for f in fellows), 1)
        own = found[group.name]
        moments[group.name] = (own.symmetric() + (group.width - own.tokens) * mean) / group.width
    return moments, [g.name for g in few]
