"""What the original model's matrices receive, collected once and shared by every point of every later sweep.

A folder holds, a block, the second moments of its inputs with a note that lists the groups of matrices that receive one
tensor, and, where they are asked for, the hidden states that enter it; the manifest, written last, says how many blocks
there are. What is there already, and whole, is not collected again: an interrupted collection goes on behind it.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from caldera.blocks import InputGroup, Stream, input_groups, residual_writers
from caldera.devices import full_precision, release
from caldera.moments import collect, pooled
from caldera.rows import Rows, Spill
from caldera.streamed import Source
from caldera.tensorfile import write_tensors
from sweeps.store import note_of, noted, read_sealed, write_note, write_sealed, write_tensors_noted

DONE = "manifest.json"
KEPT_EVERY = 60.0  # seconds after which hidden states are kept for an interrupted collection to go on from


@dataclass(frozen=True)
class Calibration:
    """A finished folder."""

    directory: Path

    @cached_property
    def _blocks(self) -> list[dict]:
        count = read_sealed(self.directory / DONE)["blocks"]
        return [read_sealed(note_of(self.directory / _moments_file(i)))["facts"] for i in range(count)]

    def groups(self, block: int) -> list[InputGroup]:
        """The groups of matrices that receive one tensor, named inside the block, in the order in which they run."""
        entries = self._blocks[block]["groups"]
        return [InputGroup(g["name"], tuple(g["members"]), g["width"], g["stage"], expert=g["expert"]) for g in entries]

    def residual_writers(self, block: int) -> list[str]:
        """Matrices whose output is added to the hidden states as it is."""
        return self._blocks[block]["residual_writers"]

    def tokens(self, block: int) -> dict[str, int]:
        """Tokens that each group saw."""
        return {g["name"]: g["tokens"] for g in self._blocks[block]["groups"]}

    def filled_up(self, block: int) -> set[str]:
        """Groups of experts that saw fewer tokens than they are wide."""
        return {g["name"] for g in self._blocks[block]["groups"] if g["filled_up"]}

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
                _Collection(directory, model(), rows(), progress, hidden, spill).run()
    (directory / DONE).touch()  # says when it was used last
    return Calibration(directory)


def is_complete(directory: Path, hidden: bool) -> bool:
    """Whether there is a whole calibration, with the hidden states if these are asked for."""
    done = read_sealed(directory / DONE)
    if done is None or (hidden and not done["hidden"]):
        return False
    kinds = (_moments_file, _hidden_file) if hidden else (_moments_file,)
    return all(noted(directory / file(i)) is not None for i in range(done["blocks"]) for file in kinds)


@dataclass
class _Collection:
    """The way of the rows through the model; `at` is the block that `stream` is about to enter."""

    directory: Path
    model: Source
    rows: Tensor
    progress: Callable[[int, int], None]
    hidden: bool
    spill: Spill | None
    at: int = 0
    done: int = 0
    kept: float = 0.0

    @full_precision()
    def run(self) -> None:
        with self.model.outside() as whole:
            self.stream = Stream.open(whole, self.rows, self.spill)
        self.kept = time.monotonic()
        for index in range(self.model.count):
            if self._is_missing(index):
                self._reach(index)
                self._keep(index)
                self._collect(index)
            else:
                self._step(len(self.rows))
        facts = {"blocks_name": self.model.name, "blocks": self.model.count}
        write_sealed(self.directory / DONE, facts | {"tokens": self.rows.numel(), "hidden": self.hidden})
        if not self.hidden:
            self._forget(self.model.count)

    def _is_missing(self, index: int) -> bool:
        return noted(self._moments(index)) is None or (self.hidden and noted(self._hidden(index)) is None)

    def _reach(self, index: int) -> None:
        """Bring the rows to a block, from the last one before it whose hidden states were kept."""
        known = [i for i in range(self.at + 1, index + 1) if note_of(self._hidden(i)).is_file()]
        for i in reversed(known):
            if noted(self._hidden(i)) is not None:
                self.stream.hidden = Rows(Rows.stored(self._hidden(i), "hidden", self.rows_device), self.spill)
                self.at = i
                break
        while self.at < index:
            self.stream.advance(self.model.block(self.at), self.at)
            self.at += 1
            release()

    @property
    def rows_device(self) -> torch.device:
        return self.stream.hidden[0].device

    def _keep(self, index: int) -> None:
        """Write the hidden states that enter a block, if they are asked for or it is time."""
        late = time.monotonic() - self.kept > KEPT_EVERY
        if not (self.hidden or late) or noted(self._hidden(index)) is not None:
            return
        _write_hidden(self._hidden(index), self.stream.hidden)
        write_note(self._hidden(index), {})
        self.kept = time.monotonic()
        if not self.hidden:
            self._forget(index)

    def _forget(self, stop: int) -> None:
        """Hidden states that were kept for the way only."""
        for i in range(stop):
            for file in (note_of(self._hidden(i)), self._hidden(i)):
                file.unlink(missing_ok=True)

    def _collect(self, index: int) -> None:
        """Moments of a block, with the note; the stream has advanced, all else is forgotten."""
        block = self.model.block(index)
        groups, writers = input_groups(block, self.stream, index), residual_writers(block, self.stream, index)
        found = collect(block, self.stream, index, groups, f"{self.model.name}.{index}", self._step)
        self.at = index + 1
        del block
        moments, few = pooled(groups, found)
        facts = [asdict(g) | {"tokens": found[g.name].tokens, "filled_up": g.name in few} for g in groups]
        write_tensors_noted(self._moments(index), moments, {"groups": facts, "residual_writers": writers})
        release()

    def _step(self, count: int) -> None:
        self.done += count
        self.progress(self.done, self.model.count * len(self.rows))

    def _moments(self, index: int) -> Path:
        return self.directory / _moments_file(index)

    def _hidden(self, index: int) -> Path:
        return self.directory / _hidden_file(index)


def _write_hidden(path: Path, rows: list[Tensor] | Rows) -> None:
    """Commit all rows as one tensor (rows, length, width)."""
    layout = {"hidden": (rows[0].dtype, (len(rows), *rows[0].shape[1:]))}
    write_tensors(path, layout, lambda _name: rows)
