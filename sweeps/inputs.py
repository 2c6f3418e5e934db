"""What each matrix is fitted to: the original model's inputs (`original`), or those behind the compressed prefix.

Both yield, block by block, stages of groups of matrices with their moments and targets; the fit of a matrix is the
same code for both. `install` hears of every compressed matrix before the next stage is looked at.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from caldera.blocks import InputGroup, Stream
from caldera.correction import Correction, output_error
from caldera.devices import full_precision
from caldera.matrices import matrices
from caldera.moments import Accumulator, add_product
from caldera.packed import PackedMatrix
from caldera.replay import Plan, Replay
from caldera.rows import Spill
from caldera.streamed import Source
from caldera.wiring import replay_plan
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


def as_original(calibration: Calibration, index: int, groups: list[InputGroup]) -> list[Given]:
    """Groups of block `index` with the original model's moments."""
    moments = calibration.moments(index, [g.name for g in groups])
    tokens, few = calibration.tokens(index), calibration.filled_up(index)
    return [Given(g, moments[g.name], tokens[g.name], g.name in few) for g in groups]


@dataclass(frozen=True)
class Original:
    """Second moments of the original model: blocks independent of each other, one set for every point."""

    calibration: Calibration

    def stages(self, index: int) -> Iterator[list[Given]]:
        """All groups of a block at once."""
        yield as_original(self.calibration, index, self.calibration.groups(index))

    def install(self, name: str, weight: Tensor) -> None:
        """Nothing here depends on what was compressed."""

    def skip(self, index: int, packed: list[PackedMatrix]) -> None:
        """Nor on a block that is not."""


@dataclass
class CorrectedPrefix:
    """Blocks in order, the original's and the compressed model's hidden states side by side; targets are corrected.

    Inside a block each stage (q/k/v, o, gate/up, down) sees the stages before it compressed. Experts keep the
    original's moments and weights: the two models may route a token differently. Memory: two copies of a block; and of
    either model the hidden states, the inputs of one group and what the block added to the stream so far, which spill.
    """

    calibration: Calibration
    model: Source  # the original, in the dtype and on the device of the evaluation
    rows: Tensor
    correction: Correction
    spill: Spill | None = None

    @full_precision()
    def __post_init__(self) -> None:
        self.stream = Stream.open(self.model.model, self.rows, self.spill)  # of the compressed prefix
        self.plan: Plan | None = None

    @torch.no_grad()
    def stages(self, index: int) -> Iterator[list[Given]]:
        """The groups that run side by side, in the order in which they run."""
        self.index = index
        self.writers = self.calibration.residual_writers(index)
        groups = self.calibration.groups(index)
        self._open(self.model.block(index), self.model.block(index), groups)
        steps = {group: step for step, group in enumerate(self.plan.groups)}
        for _, stage in itertools.groupby(groups, key=lambda group: group.stage):
            stage = list(stage)
            if all(group in steps for group in stage):
                yield [self._given(group, steps[group]) for group in stage]
            else:
                yield as_original(self.calibration, index, stage)
        for row, output in enumerate(self.compressed.outputs()):
            self.stream.hidden[row] = output
        del self.original, self.compressed  # before the next block is read

    def install(self, name: str, weight: Tensor) -> None:
        """Put W^ (m, n) of the matrix of that name, in its block, into the compressed prefix."""
        self.compressed.layers[name].write(weight)

    def skip(self, index: int, packed: list[PackedMatrix]) -> None:
        """Let the compressed prefix go through a block that is compressed already, or has nothing to compress."""
        block = self.model.block(index)
        layers = matrices(block)
        for matrix in packed:
            layers[matrix.spec.name.removeprefix(f"{self.model.name}.{index}.")].write(matrix.dequantize())
        self.stream.advance(block, index)

    def _open(self, original: nn.Module, compressed: nn.Module, groups: list[InputGroup]) -> None:
        """Both blocks at their start; groups that miss a token have no pairs of inputs."""
        tokens = self.calibration.tokens(self.index)
        whole = [g for g in groups if not g.expert and tokens[g.name] == self.rows.numel()]
        self.plan = replay_plan(compressed, self.stream, self.index, whole, like=self.plan)
        before = self.calibration.hidden(self.index, self.stream.hidden[0].device)
        stream = Stream(before, self.stream.arguments)
        writing = [[name for name in g.members if name in self.writers] for g in self.plan.groups]
        noted = list(itertools.chain.from_iterable([names for names in writing if names][:-1]))  # a later one uses them
        self.original = Replay(original, stream, self.index, self.plan, noted, self.spill)
        self.compressed = Replay(compressed, self.stream, self.index, self.plan, noted, self.spill)

    def _given(self, group: InputGroup, step: int) -> Given:
        seen, cross, lack, tokens = self._means(group, step)
        what, depth = f"block {self.index}.{group.name}", self.index / max(self.model.count - 1, 1)
        target = self.correction.fit(seen, cross, lack, depth, what)
        original = partial(self._moments_of, group.name, seen.device)
        return Given(
            group,
            seen,
            tokens,
            target=lambda name, weight: target.of(weight, name in self.writers),
            output_error=lambda weight, approximation: output_error(weight, approximation, original(), cross, seen),
        )

    def _moments_of(self, name: str, device: torch.device) -> Tensor:
        """H (n, n) of the original model's inputs, from its file."""
        return self.calibration.moments(self.index, [name])[name].to(device)

    def _means(self, group: InputGroup, step: int) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """H^ and C (n, n), D (width, n) if a matrix of the group writes into the stream, and the number of tokens."""
        n, hidden = group.width, self.stream.hidden[0]
        moments, cross = Accumulator.zeros(n, hidden.device), torch.zeros(n, n, device=hidden.device)
        writes = any(name in self.writers for name in group.members)
        lack = torch.zeros(hidden.shape[-1], n, device=hidden.device) if writes else None
        for row, (x, y) in enumerate(zip(self.original.inputs(step), self.compressed.inputs(step))):
            moments.add(y)
            add_product(cross, x, y)
            if writes:
                add_product(lack, self._lack(row), y)
        tokens = moments.tokens
        return moments.mean(), cross.div_(tokens), None if lack is None else lack.div_(tokens), tokens

    def _lack(self, row: int) -> Tensor:
        """(length, width): what the compressed residual stream lacks, in the stream's own dtype."""
        lack = self.original.stream.hidden[row].float() - self.stream.hidden[row].float()
        lack = lack.reshape(-1, lack.shape[-1])
        for name in self.compressed.noted:
            if rows := self.original.products.get(name):
                lack += (rows[row].float() - self.compressed.products[name][row].float()).reshape(lack.shape)
        return lack.to(self.stream.hidden[row].dtype)
