"""What each matrix is fitted to: the original model's inputs (`original`), or those behind the compressed prefix.

Both yield, block by block, stages of groups of matrices with their moments and targets; the fit of a matrix is the
same code for both. `install` hears of every compressed matrix before the next stage is looked at.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caldera.blocks import InputGroup, Stop, Stream
from caldera.correction import Correction, output_error
from caldera.matrices import matrices, watch
from caldera.moments import Accumulator
from caldera.rows import Spill
from caldera.streamed import Source
from sweeps.calibration import Calibration


@dataclass(frozen=True)
class Given:
    """A group with H (n, n) to fit against and the rule for what each of its matrices should be."""

    group: InputGroup
    moments: Tensor
    tokens: int
    few: bool = False  # an expert that saw too few tokens: its moments are filled up with its fellows'
    target: Callable[[str, Tensor], Tensor] = lambda _name, weight: weight
    output_error: Callable[[Tensor, Tensor], float | None] = lambda _weight, _approximation: None


def as_original(
    calibration: Calibration, index: int, groups: list[InputGroup], moments: dict[str, Tensor], device: torch.device
) -> list[Given]:
    """Groups of block `index` with the original model's moments."""
    tokens, few = calibration.tokens(index), calibration.filled_up(index)
    return [Given(g, moments[g.name].to(device), tokens[g.name], g.name in few) for g in groups]


class Original:
    """Second moments of the original model: blocks independent of each other, one set for every point."""

    def __init__(self, calibration: Calibration, device: torch.device):
        self.calibration, self.device = calibration, device

    def stages(self, index: int) -> Iterator[list[Given]]:
        """All groups of a block at once."""
        groups, moments = self.calibration.groups(index), self.calibration.moments(index)
        yield as_original(self.calibration, index, groups, moments, self.device)

    def install(self, name: str, weight: Tensor) -> None:
        """Nothing here depends on what was compressed."""


@dataclass
class CorrectedPrefix:
    """Blocks in order, the original's and the compressed model's hidden states side by side; targets are corrected.

    Inside a block each stage (q/k/v, o, gate/up, down) sees the stages before it compressed. Experts keep the
    original's moments and weights: the two models may route a token differently. Memory: two copies of a block, the
    original's inputs of one block, and the compressed hidden states, unless they spill.
    """

    calibration: Calibration
    model: Source  # the original, in the dtype and on the device of the evaluation
    rows: Tensor
    correction: Correction
    spill: Spill | None = None

    def __post_init__(self) -> None:
        self.stream = Stream.open(self.model.model, self.rows, self.spill)  # of the compressed prefix

    @torch.no_grad()
    def stages(self, index: int) -> Iterator[list[Given]]:
        """The groups that run side by side, in the order in which they run."""
        self.index, self.original, self.block = index, self.model.block(index), self.model.block(index)
        groups, self.moments = self.calibration.groups(index), self.calibration.moments(index)
        self.writers = self.calibration.residual_writers(index)
        before = self.calibration.hidden(index, self.stream.hidden[0].device)
        # (length, width) a row: what the compressed residual stream lacks
        self.lack = [(x - y)[0].float() for x, y in zip(before, self.stream.hidden)]
        self.inputs = self._original_inputs(Stream(before, self.stream.arguments), groups)
        for _, stage in itertools.groupby(groups, key=lambda group: group.stage):
            yield from self._stage(list(stage))
        self.stream.advance(self.block, index)
        del self.original, self.block, self.inputs, self.lack, self.moments  # before the next block is read

    def install(self, name: str, weight: Tensor) -> None:
        """Put W^ (m, n) of the matrix of that name, in its block, into the compressed prefix."""
        matrices(self.block)[name].write(weight)

    def _original_inputs(self, stream: Stream, groups: list[InputGroup]) -> dict[str, list[Tensor]]:
        """What each group receives in the original, (length, n) a row; those that miss a token are left out."""
        found = self._record(self.original, stream, [g for g in groups if not g.expert])
        lengths = [self.rows.shape[1]] * len(self.rows)
        return {name: rows for name, rows in found.items() if [len(x) for x in rows] == lengths}

    def _record(self, block: nn.Module, stream: Stream, groups: list[InputGroup]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {g.name: [] for g in groups}

        def note(name: str, x: Tensor) -> None:
            found[name].append(x.reshape(-1, x.shape[-1]).clone())
            if name == groups[-1].name:
                raise Stop

        layers = matrices(block)
        for row in range(len(self.rows)):
            with watch([layers[g.name] for g in groups], note), suppress(Stop):
                stream.run(block, self.index, row)
        return found

    def _stage(self, stage: list[InputGroup]) -> Iterator[list[Given]]:
        if any(g.name not in self.inputs for g in stage):
            yield as_original(self.calibration, self.index, stage, self.moments, self.stream.hidden[0].device)
            return
        received = self._record(self.block, self.stream, stage)
        yield [self._given(g, received[g.name]) for g in stage]
        layers, originals = matrices(self.block), matrices(self.original)
        for group, name in ((g, name) for g in stage for name in g.members if name in self.writers):
            for lack, x, y in zip(self.lack, self.inputs[group.name], received[group.name]):
                lack += x @ originals[name].read().T - y @ layers[name].read().T

    def _given(self, group: InputGroup, received: list[Tensor]) -> Given:
        n, device = group.width, received[0].device
        moments, cross = Accumulator.zeros(n, device), torch.zeros(n, n, device=device)
        writes = any(name in self.writers for name in group.members)
        lack = torch.zeros(self.lack[0].shape[1], n, device=device) if writes else None
        for x, y, missing in zip(self.inputs[group.name], received, self.lack):
            moments.add(y)
            cross.addmm_(x.float().T, y.float())
            if writes:
                lack.addmm_(missing.T, y.float())
        seen, cross = moments.mean(), cross / moments.tokens
        lack = None if lack is None else lack / moments.tokens
        what, depth = f"block {self.index}.{group.name}", self.index / max(self.model.count - 1, 1)
        target = self.correction.fit(seen, cross, lack, depth, what)
        original = self.moments[group.name].to(device)
        return Given(
            group,
            seen,
            moments.tokens,
            target=lambda name, weight: target.of(weight, name in self.writers),
            output_error=lambda weight, approximation: output_error(weight, approximation, original, cross, seen),
        )
