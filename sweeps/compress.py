"""A model's matrices decomposed block by block into a packed checkpoint.

A block that is done is a shard, and a note that says so beside the checkpoint: an interrupted run goes on behind it.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from caldera import Decomposition
from caldera.blocks import covered, named_matrices
from caldera.checkpoint import (
    MANIFEST,
    block_file,
    read_manifest,
    read_matrices,
    write_manifest,
    write_matrices,
    write_rest,
)
from caldera.devices import full_precision, release
from caldera.errors import CheckpointError
from caldera.files import committed
from caldera.matrices import matrices
from caldera.streamed import Source
from sweeps.fitting import Fit, Inputs, fit_block
from sweeps.inputs import Original
from sweeps.parallel import Workers
from sweeps.progress import Stage, warn
from sweeps.record import peak_rss
from sweeps.shared import Shared
from sweeps.store import noted, read_sealed, write_note, write_sealed

COPIED = ("*.json", "*.jinja", "*.model", "*.txt")  # configuration and tokenizer, as the source has them
ALONE, UNSHARED = Workers(), Shared()


@dataclass
class Compressed:
    """A summary of every matrix, as records list them; what was reused of all there was to make, by kind."""

    matrices: list[dict] = field(default_factory=list)
    reused: Counter = field(default_factory=Counter)
    made: Counter = field(default_factory=Counter)
    peak_rss_bytes: int = 0  # of the process that had the highest

    def shares(self) -> dict[str, float]:
        """Of each kind, the share that was reused."""
        totals = self.reused + self.made
        return {kind: self.reused[kind] / totals[kind] for kind in sorted(totals)}


def notes_of(checkpoint: Path) -> Path:
    """Where the notes about a checkpoint's finished blocks lie."""
    return checkpoint.with_name(f"{checkpoint.name}-blocks")


@dataclass(frozen=True)
class CheckpointFolder:
    """The folder of a checkpoint, and of the notes about its finished blocks.

    `key` stands for all that the checkpoint depends on; with none, nothing that is there is taken for finished.
    """

    directory: Path
    key: str = ""

    @property
    def notes(self) -> Path:
        return notes_of(self.directory)

    def open(self, source: Path) -> None:
        """Begin, or go on with what was begun under the same key."""
        mark = self.notes / "key.json"
        if not self.key or read_sealed(mark) != {"key": self.key}:
            drop(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        for file in (f for pattern in COPIED for f in source.glob(pattern) if ".safetensors." not in f.name):
            with committed(self.directory / file.name) as part:
                shutil.copyfile(file, part)
        write_sealed(mark, {"key": self.key})

    def finished(self) -> Compressed | None:
        """What was noted about a checkpoint that is finished under this key, and unchanged since."""
        if not self.key or read_sealed(self.notes / "key.json") != {"key": self.key}:
            return None
        if not (self.directory / MANIFEST).is_file():
            return None
        try:
            shards = [name for name in read_manifest(self.directory)["files"] if name.startswith("model-block-")]
        except CheckpointError as error:
            warn(f"{error}; it is made again")
            return None
        notes = [self.note(i) for i in range(len(shards))]
        return None if None in notes else collected(notes, notes)

    def note(self, index: int) -> dict | None:
        """What was noted about a finished block whose shard is as it was written."""
        return noted(self.directory / block_file(index), self._file(index))

    def finish(self, index: int, found: dict[str, tuple[Decomposition, dict]], facts: dict) -> None:
        """Commit the shard of a block, then the note."""
        write_matrices(self.directory, block_file(index), [d.packed for d, _ in found.values()])
        summaries = [summary(d) | of_matrix for d, of_matrix in found.values()]
        write_note(self.directory / block_file(index), facts | {"matrices": summaries}, self._file(index))

    def _file(self, index: int) -> Path:
        return self.notes / f"{index:05d}.json"


def drop(checkpoint: Path) -> None:
    """Delete a checkpoint and the notes that would let it be finished; the notes' key first: it says what is there."""
    for folder in (notes_of(checkpoint), checkpoint):
        (folder / "key.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class BlockTask:
    """The compression of a block, from its weights to its shard."""

    opened: Callable[[], Source]
    inputs: Inputs
    fit: Fit
    shared: Shared
    target: CheckpointFolder
    workers: Workers = ALONE

    @full_precision()  # here for other processes
    def __call__(self, index: int, device: torch.device) -> int:
        model, fit = self.opened(), self.fit.on(device)
        name = f"{model.name}.{index}"
        layers = {f"{name}.{own}": m for own, m in matrices(model.block(index)).items() if f"{name}.{own}" in fit.names}
        known, found = self.shared.block(index), {}
        if layers:
            found = fit_block(layers, name, self.inputs, index, fit, known, self.workers)
        else:
            self.inputs.skip(index, [])
        facts = {"reused": known.reused, "made": known.made, "peak_rss_bytes": peak_rss()}
        self.target.finish(index, found, facts)
        del layers, known, found
        release()
        return index


@full_precision()
def compress(
    source: Path,
    opened: Callable[[], Source],
    inputs: Inputs,
    fit: Fit,
    target: CheckpointFolder,
    dtype: torch.dtype,
    progress: Stage,
    workers: Workers = ALONE,
    shared: Shared = UNSHARED,
) -> Compressed:
    """Write the packed checkpoint of the model that `opened()` reads from the folder `source` to `target`.

    What is not compressed is stored as `dtype`. With the original model's inputs blocks are shared out to the workers,
    behind a compressed prefix the matrices of a block are. Blocks that were finished under the target's key stay.
    """
    model = opened()
    target.open(source)
    task, before = BlockTask(opened, inputs, fit, shared, target), [target.note(i) for i in range(model.count)]
    if isinstance(inputs, Original):
        _in_any_order(task, before, workers, progress)
    else:
        _in_order(task, before, workers, progress)
    found = collected([target.note(i) for i in range(model.count)], before)
    _name_few_tokens(found.matrices, progress)
    names = {full for full in named_matrices(model.model) if full in fit.names}
    if left := sorted(names - {s["name"] for s in found.matrices}):
        progress.reporter.say(f"  warning: not compressed, as no calibration token reaches them: {', '.join(left)}")
    held = covered(model.model, {s["name"] for s in found.matrices})
    write_rest(target.directory, model.state(), held, dtype, model.read)
    write_manifest(target.directory, {"method": fit.facts})
    return found


def _in_any_order(task: BlockTask, before: list[dict | None], workers: Workers, progress: Stage) -> None:
    todo = [index for index, note in enumerate(before) if note is None]
    for done, _ in enumerate(workers.map(task, todo), start=len(before) - len(todo) + 1):
        progress(done, len(before))


def _in_order(task: BlockTask, before: list[dict | None], workers: Workers, progress: Stage) -> None:
    task, todo = replace(task, workers=workers), [index for index, note in enumerate(before) if note is None]
    for index in range(max(todo, default=-1) + 1):
        if index in todo:
            task(index, task.fit.device)
        else:
            task.inputs.skip(index, read_matrices(task.target.directory, block_file(index)))
        progress(index + 1, len(before))


def collected(notes: list[dict], before: list[dict | None]) -> Compressed:
    """What all blocks noted; `before` has the notes of those that were finished in an earlier run."""
    found = Compressed()
    for note, earlier in zip(notes, before, strict=True):
        (found.made if earlier is None else found.reused)["blocks"] += 1
        found.matrices += note["matrices"]
        found.reused.update(note["reused"])
        found.made.update(note["made"])
        found.peak_rss_bytes = max(found.peak_rss_bytes, note["peak_rss_bytes"] or 0)
    return found


def _name_few_tokens(summaries: list[dict], progress: Stage) -> None:
    if few := [f"{s['name']} ({s['tokens']})" for s in summaries if s["few_tokens"]]:
        progress.reporter.say(
            "  warning: experts with fewer tokens than inputs are fitted to the other experts' tokens too; raise"
            f" calibration.sequences: {', '.join(few)}"
        )


def summary(d: Decomposition) -> dict:
    """What a record says of one matrix."""
    spec = d.spec
    axes = {"shape": list(spec.shape), "rank": spec.rank, "q": spec.q, "l": spec.l, "r": spec.r}
    bits = {"nominal_bits": d.nominal_bits, "stored_bits": d.stored_bits, "stored_bytes": d.stored_bytes}
    fit = {"relative_error": d.relative_error, "trace": d.trace}
    numerics = {"sigma": d.sigma, "jitters": d.jitters, "init_rank": d.init_rank}
    return {"name": spec.name} | axes | bits | fit | numerics
