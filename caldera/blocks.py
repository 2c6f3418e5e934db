"""A causal LM seen as a chain of decoder blocks, whatever its family: where they are, what is linear in them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caldera.errors import UserError


class _Stop(Exception):
    """Ends a forward pass once everything that was wanted has been seen."""


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the outermost, longest ModuleList with linear layers in every entry.

    Raises UserError when there is none.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [(name, m) for name, m in lists if all(linears(block) for block in m)]
    outer = [(name, m) for name, m in lists if not any(name.startswith(f"{o}.") for o, _ in lists)]
    if not outer:
        raise UserError(f"model {type(model).__name__} has no list of decoder blocks with linear layers to compress")
    return max(outer, key=lambda pair: len(pair[1]))


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of a block by their name in it."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a block that receive the very same tensor; `name` is the first one's."""

    name: str
    members: tuple[str, ...]
    width: int


@dataclass
class Stream:
    """Hidden states (rows of (1, length, width)) on their way through the blocks, and each block's other arguments."""

    hidden: list[Tensor]
    arguments: list[dict]

    @classmethod
    @torch.inference_mode()
    def open(cls, model: nn.Module, rows: Tensor) -> "Stream":
        """Embed token rows (rows, length) and note what the model passes to each block.

        Positions and masks depend on the length alone, since all rows are full; so one row shows them.
        """
        _, blocks = decoder_blocks(model)
        device = next(model.parameters()).device
        arguments, hidden = [], []

        def note(_module, _args, kwargs):
            arguments.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

        def keep(_module, args, kwargs):
            hidden.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        with _hooked([(block, note) for block in blocks]):
            model(rows[:1].to(device), use_cache=False)
        with _hooked([(blocks[0], keep)]):
            for row in rows:
                _until_stop(model, row[None].to(device))
        return cls(hidden, arguments)

    @torch.inference_mode()
    def advance(self, block: nn.Module, index: int, progress: Callable[[int], None] | None = None) -> None:
        """Replace every row by the block's output for it."""
        for i, x in enumerate(self.hidden):
            out = block(x, **self.arguments[index])
            self.hidden[i] = out[0] if isinstance(out, tuple) else out
            if progress:
                progress(1)


@contextmanager
def _hooked(pairs) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _until_stop(model: nn.Module, row: Tensor) -> None:
    with suppress(_Stop):
        model(row, use_cache=False)


@torch.inference_mode()
def input_groups(block: nn.Module, stream: Stream, index: int) -> list[InputGroup]:
    """Groups of linear layers that receive one tensor, seen in a forward pass of the stream's first row.

    Layers that the row does not reach (an expert without a token) are left out.
    """
    seen: dict[tuple, list[str]] = {}
    held = []  # keeps every input alive, so that no address is used twice

    def note(name: str):
        def hook(_module, args, _kwargs):
            x = args[0]
            held.append(x)
            seen.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)

        return hook

    layers = linears(block)
    with _hooked([(layer, note(name)) for name, layer in layers.items()]):
        block(stream.hidden[0], **stream.arguments[index])
    return [InputGroup(names[0], tuple(dict.fromkeys(names)), layers[names[0]].in_features) for names in seen.values()]
