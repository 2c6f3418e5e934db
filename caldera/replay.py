"""A decoder block run from stage to stage of its matrices, each product computed once.

What a stage receives depends on products before it. A plain run up to there computes all of them again; a replay takes
those that matter directly (a residual stream's) as they were, and leaves those zero that act only through inputs seen
already: q, k, v and the attention once o's input is known. `caldera.wiring` finds out which are which.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caldera.blocks import InputGroup, Stop, Stream
from caldera.matrices import Products, matrices

ATTENTION = "scaled_dot_product_attention"  # what the fused attention is called among the groups


class Nodes(Products):
    """Products, and the fused attention: `attention`, if given, is called in its place."""

    def __init__(self, watched, seen, attention: Callable[..., Tensor] | None = None):
        super().__init__(watched, seen)
        self.attention = attention

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.attention is not None and function is nn.functional.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


def no_attention(query: Tensor, key: Tensor, value: Tensor, *_args, **_kwargs) -> Tensor:
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

    def needed(self, start: int) -> frozenset[str]:
        """What the runs from number `start` on need."""
        return frozenset() if self.needs is None else frozenset().union(*self.needs[start:])


@dataclass
class Replay:
    """The stream's rows through a block: the `inputs` of each of the plan's groups in turn, then the block's `outputs`.

    A group's matrices may be changed when all rows have given its inputs and none has gone on. Kept are the inputs of
    one group, and what those matrices gave that are needed later or named in `noted`.
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
        target = self.plan.groups[step].name if step < len(self.plan.groups) else None
        pending, before = self.new | {target}, self.received[row]  # None is never seen: the run goes to the end

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
        with Nodes([self.layers[name] for name in self.place], seen, no_attention if skip else None), suppress(Stop):
            return self.stream.run(self.block, self.index, row)

    def _product(self, name: str, x: Tensor, y: Callable, step: int, row: int, before: Tensor | None) -> Tensor | None:
        """What a matrix gives on the way to group `step`; `before` is the row's input of the group ahead of it."""
        place = self.place[name]
        if place >= step:
            return None  # as it comes
        if self.plan.needs is None:
            return y()
        if name not in self.new and name in self.products:
            return self.products[name][row].clone()
        if place == step - 1 and (name in self.new or self.plan.groups[place].name in self.plan.needs[step]):
            return y(before.reshape(x.shape))
        return x.new_zeros(*x.shape[:-1], self.layers[name].shape[0])
