"""What the original model's matrices receive, collected once and shared by every point of every later sweep.

A folder holds, a block, the second moments of its inputs and the hidden states that enter it; the manifest, written
last, lists the groups of matrices that receive one tensor.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from caldera.blocks import InputGroup, Stream, input_groups, residual_writers
from caldera.devices import full_precision, release
from caldera.files import committed, write_json
from caldera.moments import collect, pooled
from caldera.rows import Rows, Spill
from caldera.streamed import Source
from caldera.tensorfile import write_tensors
from sweeps.store import read_json

DONE = "manifest.json"


@dataclass(frozen=True)
class Calibration:
    """A finished folder. Raises UserError when a file of it is unreadable."""

    directory: Path

    @cached_property
    def manifest(self) -> dict:
        return read_json(self.directory / DONE)

    def groups(self, block: int) -> list[InputGroup]:
        """The groups of matrices that receive one tensor, named inside the block, in the order in which they run."""
        entries = self.manifest["blocks"][block]["groups"]
        return [InputGroup(g["name"], tuple(g["members"]), g["width"], g["stage"], expert=g["expert"]) for g in entries]

    def residual_writers(self, block: int) -> list[str]:
        """Matrices whose output is added to the hidden states as it is."""
        return self.manifest["blocks"][block]["residual_writers"]

    def tokens(self, block: int) -> dict[str, int]:
        """Tokens that each group saw."""
        return {g["name"]: g["tokens"] for g in self.manifest["blocks"][block]["groups"]}

    def filled_up(self, block: int) -> set[str]:
        """Groups of experts that saw fewer tokens than they are wide."""
        return {g["name"] for g in self.manifest["blocks"][block]["groups"] if g["filled_up"]}

    def moments(self, block: int, names: list[str] | None = None) -> dict[str, Tensor]:
        """H (n, n) float32 of the groups of those names, or of all groups, of a block."""
        with safe_open(self.directory / _moments_file(block), "pt") as opened:
            return {name: opened.get_tensor(name) for name in (opened.keys() if names is None else names)}

    def hidden(self, block: int, device: torch.device | str = "cpu") -> Rows:
        """The hidden states (1, length, width) that enter a block, a row at a time from the disk."""
        return Rows.stored(self.directory / _hidden_file(block), "hidden", device)


def _moments_file(block: int) -> str:
    return f"block-{block:05d}.safetensors"


def _hidden_file(block: int) -> str:
    return f"hidden-{block:05d}.safetensors"


def ensure_calibration(
    directory: Path,
    model: Callable[[], Source],
    rows: Callable[[], Tensor],
    progress: Callable[[int, int], None],
    hidden: bool = False,
    spill: Spill | None = None,
) -> Calibration:
    """The calibration in `directory`, collected from `model()` over `rows()` (sequences, length) unless it is there.

    `hidden` asks for the hidden states too; `spill` says where they go meanwhile. One process collects, others wait
    for it. Raises NumericalError naming block and layer for NaN or infinity.
    """
    if not is_complete(directory, hidden):
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not is_complete(directory, hidden):
                _collect_all(directory, model(), rows(), progress, hidden, spill)
    return Calibration(directory)


def is_complete(directory: Path, hidden: bool) -> bool:
    """Whether there is a finished calibration, with the hidden states if these are asked for."""
    file = directory / DONE
    return file.is_file() and (not hidden or read_json(file)["hidden"])


@full_precision()
def _collect_all(
    directory: Path,
    model: Source,
    rows: Tensor,
    progress: Callable[[int, int], None],
    hidden: bool,
    spill: Spill | None,
) -> None:
    stream, done, listed = Stream.open(model.model, rows, spill), 0, []

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, model.count * len(rows))

    for index in range(model.count):
        if hidden:
            _write_hidden(directory / _hidden_file(index), stream.hidden)
        listed.append(_collect_block(directory, model, stream, index, step))
        release()
    facts = {"blocks_name": model.name, "blocks": listed, "tokens": rows.numel(), "hidden": hidden}
    write_json(directory / DONE, facts)


def _collect_block(directory: Path, model: Source, stream: Stream, index: int, step: Callable[[int], None]) -> dict:
    """What the manifest says of a block; its moments are written, the stream has advanced, all else is forgotten."""
    block = model.block(index)
    groups, writers = input_groups(block, stream, index), residual_writers(block, stream, index)
    found = collect(block, stream, index, groups, f"{model.name}.{index}", step)
    del block
    moments, few = pooled(groups, found)
    with committed(directory / _moments_file(index)) as part:
        save_file({key: h.cpu().contiguous() for key, h in moments.items()}, part)
    facts = [asdict(g) | {"tokens": found[g.name].tokens, "filled_up": g.name in few} for g in groups]
    return {"groups": facts, "residual_writers": writers}


def _write_hidden(path: Path, rows: list[Tensor] | Rows) -> None:
    """Commit all rows as one tensor (rows, length, width)."""
    layout = {"hidden": (rows[0].dtype, (len(rows), *rows[0].shape[1:]))}
    write_tensors(path, layout, lambda _name: rows)
