"""A decoder block run from stage to stage of its matrices, each product computed once.

What a stage receives depends on products before it. A plain run up to there computes all of them again; a replay takes
those that matter directly (a residual stream's) as they were, and leaves those zero that act only through inputs seen
already: q, k, v and the attention once o's input is known. Which are which is found by experiment.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from caldera.blocks import InputGroup, Stop, Stream
from caldera.matrices import Products, matrices

ATTENTION = "attention"  # what the fused attention is called among the groups
ROUNDING = 1e-5  # relative; or the dtype's own


class _Nodes(Products):
    """Products, and the fused attention: `attention`, if given, is called in its place."""

    def __init__(self, watched, seen, attention: Callable[..., Tensor] | None = None):
        super().__init__(watched, seen)
        self.attention = attention

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.attention is not None and function is nn.functional.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


def _no_attention(query: Tensor, key: Tensor, value: Tensor, *_args, **_kwargs) -> Tensor:
    """Zeros where attention's output (..., length, value width) would be."""
    return query.new_zeros(*query.shape[:-1], value.shape[-1])


@dataclass(frozen=True)
class Plan:
    """What a run towards each stage needs of what is done: names of groups before it, and `ATTENTION`.

    One set for each of `groups`, in the order in which they run, and one for the block's output. `needs` is None where
    no replay shows what a plain run does: then every run is one.
    """

    groups: tuple[InputGroup, ...]
    needs: tuple[frozenset[str], ...] | None

    @classmethod
    def of(cls, block: nn.Module, stream: Stream, index: int, groups: list[InputGroup], like: "Plan | None") -> "Plan":
        """The plan for those groups of a block that see all tokens at once, by what its first row shows.

        `like` is another block's, tried first. Whatever plan is found, a replay by it has shown what a plain run did.
        """
        trace = _Trace.of(block, Stream(stream.hidden[:1], stream.arguments), index, groups)
        if like is not None and like.groups == trace.groups and trace.agrees(like):
            return like
        found = cls(trace.groups, trace.needs())
        return found if trace.agrees(found) else cls(trace.groups, None)

    def needed(self, start: int) -> frozenset[str]:
        """What the runs from number `start` on need."""
        return frozenset() if self.needs is None else frozenset().union(*self.needs[start:])


@dataclass
class _Trace:
    """A plain run of the stream's only row, and runs that repeat its products with the outputs of one group zero."""

    block: nn.Module
    stream: Stream
    index: int
    groups: tuple[InputGroup, ...]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    plain: list[Tensor] = field(default_factory=list)  # what each group receives, and last the block's output

    @classmethod
    def of(cls, block: nn.Module, stream: Stream, index: int, groups: list[InputGroup]) -> "_Trace":
        trace, times = cls(block, stream, index, tuple(groups)), Counter()
        tokens = stream.hidden[0].shape[-2]

        def keep(name: str, x: Tensor, y: Callable) -> Tensor:
            times[name] += x.numel() == tokens * x.shape[-1] or 2
            trace.outputs[name] = (out := y()).clone()
            return out

        found = trace._pass(keep)
        trace.groups = tuple(g for g in groups if all(times[name] == 1 for name in g.members))
        trace.plain = [found[key] for key in [*(g.name for g in trace.groups), None]]
        return trace

    def needs(self) -> tuple[frozenset[str], ...]:
        """For each group, and last for the block's output: the names before it whose outputs change it directly."""
        names = [g.name for g in self.groups]
        changed = {g.name: self._changed(g.members) for g in self.groups}
        changed[ATTENTION] = self._changed((), _no_attention)
        return tuple(
            frozenset(name for name in [*names[:step], ATTENTION] if changed[name][step])
            for step in range(len(names) + 1)
        )

    def agrees(self, plan: Plan) -> bool:
        """Whether a replay by the plan shows what the plain run did."""
        replay = Replay(self.block, self.stream, self.index, plan)
        found = [x for step in range(len(plan.groups)) for x in replay.inputs(step)]
        return all(map(_close, [*found, *replay.outputs()], self.plain))

    def _changed(self, zero: Collection[str], attention: Callable | None = None) -> list[bool]:
        def repeat(name: str, _x: Tensor, _y) -> Tensor:
            return torch.zeros_like(self.outputs[name]) if name in zero else self.outputs[name].clone()

        found = self._pass(repeat, attention)
        found = [found[key] for key in [*(g.name for g in self.groups), None]]
        return [not torch.equal(x, plain) for x, plain in zip(found, self.plain)]

    def _pass(self, product: Callable, attention: Callable | None = None) -> dict[str | None, Tensor]:
        """What each matrix receives, by its name, and under None the block's output."""
        found: dict[str | None, Tensor] = {}

        def seen(name: str, x: Tensor, y: Callable) -> Tensor:
            found[name] = x.clone()
            return product(name, x, y)

        layers = matrices(self.block)
        with _Nodes([layers[name] for g in self.groups for name in g.members], seen, attention):
            found[None] = self.stream.run(self.block, self.index, 0)
        return found


def _close(found: Tensor, plain: Tensor) -> bool:
    bound = max(ROUNDING, torch.finfo(plain.dtype).eps)
    return bool((found.reshape(plain.shape) - plain).float().norm() <= bound * plain.float().norm())


@dataclass
class Replay:
    """The stream's rows through a block: the `inputs` of each of the plan's groups in turn, then the block's `outputs`.

    Before the next group's are asked for the matrices of the last may be changed. Kept are the inputs of one group, and
    what products gave that are needed later or named in `noted`.
    """

    block: nn.Module
    stream: Stream
    index: int
    plan: Plan
    noted: Collection[str] = ()

    def __post_init__(self) -> None:
        self.received: list[Tensor | None] = [None] * len(self.stream.hidden)  # (length, n), of the group seen last
        self.products: dict[str, list[Tensor]] = {}  # what matrices of groups before it gave, a row each
        self.layers = matrices(self.block)
        self.place = {name: step for step, g in enumerate(self.plan.groups) for name in g.members}

    def inputs(self, step: int) -> Iterator[Tensor]:
        """(length, n) of each row, of the group of number `step`."""
        self._keep(step)
        for row in range(len(self.received)):
            self._run(step, row)
            yield self.received[row]

    def outputs(self) -> Iterator[Tensor]:
        """The block's output (1, length, width) for each row."""
        self._keep(len(self.plan.groups))
        for row in range(len(self.received)):
            yield self._run(len(self.plan.groups), row)

    def _keep(self, step: int) -> None:
        """Drop what is needed no longer, and make room for what the group before gives that is needed beyond `step`."""
        before, needed = self.plan.groups[:step], self.plan.needed(step)
        wanted = {name for g in before if g.name in needed for name in g.members} | set(self.noted)
        self.products = {name: rows for name, rows in self.products.items() if name in wanted}
        needed = self.plan.needed(step + 1)
        self.new = {name for g in before[-1:] for name in g.members if g.name in needed or name in self.noted}
        self.products |= {name: [] for name in self.new}

    @torch.inference_mode()
    def _run(self, step: int, row: int) -> Tensor | None:
        """The row's input of group `step` into `received`; where there is no such group, the block's output."""
        last = step == len(self.plan.groups)
        target = None if last else self.plan.groups[step].name
        pending = self.new | {target}
        before = self.received[row]

        def seen(name: str, x: Tensor, y: Callable) -> Tensor | None:
            if name == target:
                self.received[row] = x.reshape(-1, x.shape[-1]).clone()
            out = self._product(name, x, y, step, row, before)
            if name in self.new:
                self.products[name].append(out.clone())
            pending.discard(name)
            if not pending:
                raise Stop
            return out

        skip = self.plan.needs is not None and ATTENTION not in self.plan.needs[step]
        with _Nodes([self.layers[name] for name in self.place], seen, _no_attention if skip else None), suppress(Stop):
            return self.stream.run(self.block, self.index, row)

    def _product(self, name: str, x: Tensor, y: Callable, step: int, row: int, before: Tensor | None) -> Tensor | None:
        """What a matrix gives on the way to group `step`; `before` is the row's input of the group ahead of it."""
        place = self.place[name]
        if place >= step:
            return None
        if self.plan.needs is None:
            return y()
        if name not in self.new and name in self.products:
            return self.products[name][row].clone()
        if place == step - 1 and (name in self.new or self.plan.groups[place].name in self.plan.needs[step]):
            return y(before.reshape(x.shape))
        return x.new_zeros(*x.shape[:-1], self.layers[name].shape[0])
