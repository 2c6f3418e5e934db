"""Which products of a decoder block matter where, found by experiment on one row: the plan of its replays."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caldera.blocks import InputGroup, Stream
from caldera.devices import read_all
from caldera.matrices import matrices
from caldera.replay import ATTENTION, Nodes, Plan, Replay, no_attention

ROUNDING = 1e-5  # relative; or the dtype's own


def replay_plan(block: nn.Module, stream: Stream, index: int, groups: list[InputGroup], like: Plan | None) -> Plan:
    """The plan for those groups of a block that receive all tokens at once, by what the stream's first row shows.

    `like` is another block's, tried first. Whatever plan is found, a replay by it has shown what a plain run did.
    """
    trace = _Trace.of(block, Stream([stream.hidden[0]], stream.arguments), index, groups)
    if like is not None and like.groups == trace.groups and trace.agrees(like):
        return like
    found = Plan(trace.groups, trace.needs())
    return found if trace.agrees(found) else Plan(trace.groups, None)


@dataclass
class _Trace:
    """What a plain run of the stream's only row showed, and experiments with other outputs of its products."""

    block: nn.Module
    stream: Stream
    index: int
    groups: tuple[InputGroup, ...]
    outputs: dict[str, Tensor]  # of each product
    plain: list[Tensor]  # what each group receives, and last the block's output

    @classmethod
    def of(cls, block: nn.Module, stream: Stream, index: int, groups: list[InputGroup]) -> "_Trace":
        """Of those groups that receive all tokens, once."""
        trace, tokens = cls(block, stream, index, tuple(groups), {}, []), stream.hidden[0].shape[-2]
        sizes: dict[str, list[int]] = defaultdict(list)

        def keep(name: str, x: Tensor, y: Callable) -> Tensor:
            sizes[name].append(x.numel() // x.shape[-1])
            trace.outputs[name] = (out := y()).clone()
            return out

        found = trace._pass(keep)
        trace.groups = tuple(g for g in groups if all(sizes[name] == [tokens] for name in g.members))
        trace.plain = trace._in_order(found)
        return trace

    def agrees(self, plan: Plan) -> bool:
        """Whether a replay by the plan shows what the plain run did."""
        replay = Replay(self.block, self.stream, self.index, plan)
        found = [x for step in range(len(plan.groups)) for x in replay.inputs(step)]
        return not any(off > 0 for off in read_all(*map(_off, [*found, *replay.outputs()], self.plain)))

    def needs(self) -> tuple[frozenset[str], ...]:
        """For each group, and last for the block's output: the names before it whose outputs change it directly.

        All products give random outputs, so that it does not matter what the weights are (zero, in some blocks), and
        one group's, or the attention's, zeros.
        """
        random, names = self._random(), [g.name for g in self.groups]
        base = self._given(random)
        found = {g.name: self._given(random | {name: 0 * random[name] for name in g.members}) for g in self.groups}
        found[ATTENTION] = self._given(random, no_attention)
        # a single wait for the device; in a dry run everything matters
        differ = iter(read_all(*((x != y).any() for xs in found.values() for x, y in zip(xs, base))))
        changed = {name: [next(differ) != 0 for _ in base] for name in found}
        return tuple(
            frozenset(name for name in [*names[:step], ATTENTION] if changed[name][step])
            for step in range(len(names) + 1)
        )

    def _random(self) -> dict[str, Tensor]:
        """Outputs of the size of the hidden states."""
        size, generator = self.stream.hidden[0].float().square().mean().sqrt(), torch.Generator().manual_seed(0)
        return {
            name: (size * torch.randn(y.shape, generator=generator).to(size)).to(y) for name, y in self.outputs.items()
        }

    def _given(self, outputs: dict[str, Tensor], attention: Callable | None = None) -> list[Tensor]:
        return self._in_order(self._pass(lambda name, _x, _y: outputs[name].clone(), attention))

    def _in_order(self, found: dict[str | None, Tensor]) -> list[Tensor]:
        return [found[key] for key in [*(g.name for g in self.groups), None]]

    def _pass(self, product: Callable, attention: Callable | None = None) -> dict[str | None, Tensor]:
        """What each matrix receives, by its name, and under None the block's output."""
        found: dict[str | None, Tensor] = {}

        def seen(name: str, x: Tensor, y: Callable) -> Tensor:
            found[name] = x.clone()
            return product(name, x, y)

        layers = matrices(self.block)
        with Nodes([layers[name] for g in self.groups for name in g.members], seen, attention):
            found[None] = self.stream.run(self.block, self.index, 0)
        return found


def _off(found: Tensor, plain: Tensor) -> Tensor:
    """Whether the two differ by more than rounding does (0-d)."""
    bound = max(ROUNDING, torch.finfo(plain.dtype).eps)
    return ~((found.reshape(plain.shape) - plain).float().norm() <= bound * plain.float().norm())
