"""Second moments H = E[x x^T] of the inputs of a block's linear layers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caldera.blocks import InputGroup, Stream, _hooked, linears
from caldera.errors import NumericalError

STRIPS = 4  # of H, so that only its lower triangle of strips is computed


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
        x = x.reshape(-1, x.shape[-1]).float()
        width = -(-x.shape[1] // STRIPS)
        for start in range(0, x.shape[1], width):
            stop = start + width
            self.total[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """H (n, n), symmetric."""
        lower = self.total.tril()
        return (lower + lower.tril(-1).T) / max(self.tokens, 1)


@torch.inference_mode()
def collect(
    block: nn.Module, stream: Stream, index: int, groups: list[InputGroup], what: str, progress: Callable | None = None
) -> dict[str, Accumulator]:
    """Moments of every group of the block, by group name, while the stream advances through the block.

    Raises NumericalError naming block and layer when an activation is NaN or infinite.
    """
    layers = linears(block)
    found = {g.name: Accumulator.zeros(g.width, stream.hidden[0].device) for g in groups}

    def add(name: str):
        return lambda _module, args, _kwargs: found[name].add(args[0])

    with _hooked([(layers[g.name], add(g.name)) for g in groups]):
        stream.advance(block, index, progress)
    for name, accumulator in found.items():
        if not torch.isfinite(accumulator.total.diagonal()).all():
            raise NumericalError(f"{what}.{name}: its input activations contain NaN or infinity")
    return found
