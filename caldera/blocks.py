"""A causal LM seen as a chain of decoder blocks, whatever its family: where they are, what flows through them."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caldera.devices import address, read, read_all
from caldera.errors import UserError
from caldera.matrices import Matrix, Products, matrices, watch
from caldera.rows import Rows, Spill

LOUD = 100.0  # size of an experiment's output, in units of the hidden states


class Stop(Exception):
    """Ends a forward pass once everything that was wanted has been seen."""


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the outermost, longest ModuleList with matrices in every entry.

    Raises UserError when there is none.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [(name, m) for name, m in lists if all(matrices(block) for block in m)]
    outer = [(name, m) for name, m in lists if not any(name.startswith(f"{o}.") for o, _ in lists)]
    if not outer:
        raise UserError(f"model {type(model).__name__} has no list of decoder blocks with matrices to compress")
    return max(outer, key=lambda pair: len(pair[1]))


def named_matrices(model: nn.Module) -> dict[str, Matrix]:
    """The matrices of all blocks by full name, in order; one that two blocks share has the first one's name."""
    prefix, blocks = decoder_blocks(model)
    seen: set[tuple] = set()
    found = {}
    for index, block in enumerate(blocks):
        own = {f"{prefix}.{index}.{name}": m for name, m in matrices(block).items()}
        found |= {name: m for name, m in own.items() if (id(m.whole), m.expert) not in seen}
        seen.update((id(m.whole), m.expert) for m in own.values())
    return found


def covered(model: nn.Module, compressed: Collection[str]) -> set[str]:
    """State-dict names of the parameters that the matrices of these full names hold entirely."""
    parts = named_matrices(model)
    kept = {id(m.whole) for name, m in parts.items() if name not in compressed}
    whole = {id(m.whole) for m in parts.values()} - kept
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in whole}


@dataclass(frozen=True)
class InputGroup:
    """Matrices of a block that receive the very same tensor; `name` is the first one's.

    Groups of one `stage` run side by side: the experts of a mixture.
    """

    name: str
    members: tuple[str, ...]
    width: int
    stage: str
    expert: bool = False


@dataclass
class Stream:
    """Hidden states (rows of (1, length, width)) on their way through the blocks, and each block's other arguments."""

    hidden: list[Tensor] | Rows
    arguments: list[tuple[tuple, dict]]

    @classmethod
    @torch.inference_mode()
    def open(cls, model: nn.Module, rows: Tensor, spill: Spill | None = None) -> "Stream":
        """Embed token rows (rows, length) and note what the model passes to each block; no block runs or needs data.

        Positions and masks depend on the length alone, since all rows are full; so one row shows them. From here on
        the model multiplies its experts one by one. `spill` says where hidden states go that are too many for memory.
        """
        _, blocks = decoder_blocks(model)
        rows = rows.to(next(p.device for p in model.parameters() if not p.is_meta))
        hidden = Rows(spill=spill) if spill else []
        if getattr(model.config, "_experts_implementation", None):
            model.set_experts_implementation("eager")  # one product an expert: fused kernels show no weight

        def keep(*args, **kwargs):
            hidden.append(args[0] if args else kwargs["hidden_states"])
            raise Stop

        arguments = _arguments(model, blocks, rows[:1])
        with instead([(blocks[0], keep)]):
            for row in rows:
                with suppress(Stop):
                    model(row[None], use_cache=False)
        return cls(hidden, arguments)

    @torch.inference_mode()
    def run(self, block: nn.Module, index: int, row: int) -> Tensor:
        """The block's output (1, length, width) for one row."""
        args, kwargs = self.arguments[index]
        out = block(self.hidden[row], *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, block: nn.Module, index: int, progress: Callable[[int], None] | None = None) -> None:
        """Replace every row by the block's output for it."""
        for row in range(len(self.hidden)):
            self.hidden[row] = self.run(block, index, row)
            if progress:
                progress(1)


# what a block may return: models take the hidden states from a tensor, or from a tuple of one or of several
RETURNED = (lambda x: x, lambda x: (x,), lambda x: (x, None), lambda x: (x, None, None))


def _arguments(model: nn.Module, blocks: nn.ModuleList, row: Tensor) -> list[tuple[tuple, dict]]:
    """What the model passes to each block besides the hidden states, in a pass over a row (1, length) in which every
    block hands on what it was given. Raises UserError for a model that takes them in no known form."""
    failed = None
    for form in RETURNED:
        try:
            return _passed(model, blocks, row, form)
        except Exception as error:  # whatever the model's code does with a tensor that it takes for a tuple
            failed = failed or error
    raise UserError(f"model {type(model).__name__} does not pass hidden states from block to block") from failed


def _passed(model: nn.Module, blocks: nn.ModuleList, row: Tensor, form: Callable) -> list[tuple[tuple, dict]]:
    arguments, shapes = [], []

    def note(*args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        shapes.append(hidden.shape)
        if hidden.shape != shapes[0]:
            raise ValueError(f"hidden states {tuple(shapes[0])} became {tuple(hidden.shape)}")
        arguments.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        if len(arguments) == len(blocks):
            raise Stop
        return form(hidden)

    with instead([(block, note) for block in blocks]), suppress(Stop):
        model(row, use_cache=False)
    return arguments


@contextmanager
def instead(pairs: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Meanwhile each module's forward is that function."""
    with ExitStack() as undo:
        for module, function in pairs:
            before = vars(module).get("forward")  # a wrapper that somebody set
            undo.callback(setattr, module, "forward", before) if before else undo.callback(delattr, module, "forward")
            module.forward = function
        yield


def input_groups(block: nn.Module, stream: Stream, index: int) -> list[InputGroup]:
    """Groups of matrices that receive one tensor, in the order in which they run, seen on the stream's first rows.

    Experts without a token come after the others, grouped as their fellows are; a layer without any is left out.
    """
    found = matrices(block)
    unseen, groups = dict(found), []
    for row in range(len(stream.hidden)):
        groups += _sharing(block, stream, index, row, unseen)
        unseen = {name: m for name, m in unseen.items() if not any(name in names for names in groups)}
        if all(m.expert is not None for m in unseen.values()):
            break
    leading = {found[name].stage: found[names[0]].stage for names in groups for name in names}
    order, idle = list(leading), {}
    experts = [(name, m) for name, m in unseen.items() if m.expert is not None]
    for name, m in sorted(experts, key=lambda pair: order.index(pair[1].stage) if pair[1].stage in leading else -1):
        idle.setdefault((leading.get(m.stage, m.stage), m.expert), []).append(name)
    groups += map(tuple, idle.values())
    return _staged([_group(names, found[names[0]]) for names in groups])


def _sharing(
    block: nn.Module, stream: Stream, index: int, row: int, watched: dict[str, Matrix]
) -> list[tuple[str, ...]]:
    """Names of the matrices that receive one tensor in that row, in the order in which they run."""
    seen: dict[tuple, list[str]] = {}
    held = []  # keeps every input alive, so that no address is used twice

    def note(name: str, x: Tensor) -> None:
        if x.numel():
            held.append(x)
            seen.setdefault((address(x), x.shape, x.stride()), []).append(name)

    with watch(watched.values(), note):
        stream.run(block, index, row)
    return list(dict.fromkeys(tuple(dict.fromkeys(names)) for names in seen.values()))


def _group(names: tuple[str, ...], first: Matrix) -> InputGroup:
    return InputGroup(names[0], names, first.shape[1], first.stage, first.expert is not None)


def _staged(groups: list[InputGroup]) -> list[InputGroup]:
    """Groups of one stage side by side, at the place of the first."""
    stages = list(dict.fromkeys(group.stage for group in groups))
    return sorted(groups, key=lambda group: stages.index(group.stage))


@torch.inference_mode()
def residual_writers(block: nn.Module, stream: Stream, index: int) -> list[str]:
    """Matrices whose output is added, as it is, to the hidden states that leave the block: o_proj, down_proj.

    Found by experiment on the stream's first row: with the outputs of all candidates set to zero, a random output of
    one must reach the end of the block unchanged. A norm or a factor behind a matrix rules it out; what the rest of
    the block (biases of routed experts) makes of it is small beside an output `LOUD` times the hidden states.
    """
    tokens, width = stream.hidden[0].shape[:-1], stream.hidden[0].shape[-1]
    candidates = {name: m for name, m in matrices(block).items() if m.shape[0] == width}

    def output(chosen: str | None, value: Tensor | None) -> Tensor:
        def seen(name: str, x: Tensor, _y) -> Tensor:
            zeros = torch.zeros(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
            all_tokens = zeros.numel() == tokens.numel() * width
            return zeros + value.reshape(zeros.shape) if name == chosen and all_tokens else zeros

        with Products(candidates.values(), seen):
            return stream.run(block, index, 0)

    base = output(None, None)
    size = LOUD * read(base.float().square().mean().sqrt())
    generator = torch.Generator().manual_seed(index)
    value = (size * torch.randn(base.shape, generator=generator)).to(base)
    expected = base + value
    layers = [name for name, m in candidates.items() if m.expert is None]
    gaps = [(output(name, value) - expected).float().abs().max() for name in layers]
    return [name for name, gap in zip(layers, read_all(*gaps)) if gap <= 0.05 * size]
