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
from caldera.checkpoint import block_file, read_matrices, write_manifest, write_matrices, write_rest
from caldera.devices import full_precision, release
from caldera.files import sha256, write_json
from caldera.matrices import matrices
from caldera.streamed import Source
from sweeps.fitting import Fit, Inputs, fit_block
from sweeps.inputs import Original
from sweeps.parallel import Workers
from sweeps.progress import Stage
from sweeps.record import peak_rss
from sweeps.shared import Shared
from sweeps.store import read_json

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
    """Where the notes about a checkpoint's finished blocks lie, until its point is done."""
    return checkpoint.with_name(f"{checkpoint.name}-blocks")


@dataclass(frozen=True)
class Target:
    """The folder of a checkpoint, and of the notes about its finished blocks."""

    directory: Path
    key: str

    @property
    def notes(self) -> Path:
        return notes_of(self.directory)

    def open(self, source: Path) -> None:
        """Begin, or go on with what was begun under the same key."""
        mark = self.notes / "key.json"
        if not (self.key and mark.is_file() and read_json(mark) == {"key": self.key}):
            for folder in (self.notes, self.directory):
                shutil.rmtree(folder, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        for file in (f for pattern in COPIED for f in source.glob(pattern) if ".safetensors." not in f.name):
            shutil.copyfile(file, self.directory / file.name)
        write_json(mark, {"key": self.key})

    def note(self, index: int) -> dict | None:
        """What was noted about a finished block whose shard is as it was written."""
        file, shard = self._file(index), self.directory / block_file(index)
        if not (file.is_file() and shard.is_file()):
            return None
        note = read_json(file)
        return note if note["sha256"] == sha256(shard) else None

    def finish(self, index: int, found: dict[str, tuple[Decomposition, dict]], facts: dict) -> None:
        """Commit the shard of a block, then the note."""
        write_matrices(self.directory, block_file(index), [d.packed for d, _ in found.values()])
        summaries = [summary(d) | of_matrix for d, of_matrix in found.values()]
        shard = {"sha256": sha256(self.directory / block_file(index))}
        write_json(self._file(index), shard | facts | {"matrices": summaries})

    def _file(self, index: int) -> Path:
        return self.notes / f"{index:05d}.json"


@dataclass(frozen=True)
class BlockTask:
    """The compression of a block, from its weights to its shard."""

    opened: Callable[[], Source]
    inputs: Inputs
    fit: Fit
    shared: Shared
    target: Target
    workers: Workers = ALONE

    @full_precision()  # here for other processes
    def __call__(self, index: int, device: torch.device) -> int:
        model, fit = self.opened(), self.fit.on(device)
        name = f"{model.name}.{index}"
        layers = {f"{name}.{own}": m for own, m in matrices(model.block(index)).items() if f"{name}.{own}" in fit.names}
        with self.shared.block(index) as known:
            if layers:
                found = fit_block(layers, name, self.inputs, index, fit, known, self.workers)
            else:
                found = {}
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
    target: Path,
    dtype: torch.dtype,
    progress: Stage,
    workers: Workers = ALONE,
    shared: Shared = UNSHARED,
) -> Compressed:
    """Write the packed checkpoint of the model that `opened()` reads from the folder `source` to `target`.

    What is not compressed is stored as `dtype`. With the original model's inputs blocks are shared out to the workers,
    behind a compressed prefix the matrices of a block are. Blocks that were finished under the key of `fit` stay.
    """
    model, place = opened(), Target(target, fit.key)
    place.open(source)
    task, before = BlockTask(opened, inputs, fit, shared, place), [place.note(i) for i in range(model.count)]
    if isinstance(inputs, Original):
        _in_any_order(task, before, workers, progress)
    else:
        _in_order(task, before, workers, progress)
    found = _collected(place, before)
    _name_few_tokens(found.matrices, progress)
    names = {full for full in named_matrices(model.model) if full in fit.names}
    if left := sorted(names - {s["name"] for s in found.matrices}):
        progress.reporter.say(f"  warning: not compressed, as no calibration token reaches them: {', '.join(left)}")
    held = covered(model.model, {s["name"] for s in found.matrices})
    write_rest(target, model.state(), held, dtype, model.read)
    write_manifest(target, {"method": vars(fit.method)})
    return found


def _in_any_order(task: BlockTask, before: list[dict | None], workers: Workers, progress: Stage) -> None:
    todo = [index for index, note in enumerate(before) if note is None]
    for done, _ in enumerate(workers.map(task, todo), start=len(before) - len(todo) + 1):
        progress(done, len(before))


def _in_order(task: BlockTask, before: list[dict | None], workers: Workers, progress: Stage) -> None:
    task = replace(task, workers=workers)
    for index, note in enumerate(before):
        if note is None:
            task(index, task.fit.device)
        else:
            task.inputs.skip(index, read_matrices(task.target.directory, block_file(index)))
        progress(index + 1, len(before))


def _collected(target: Target, before: list[dict | None]) -> Compressed:
    """What all blocks noted; `before` has the notes of those that were finished in an earlier run."""
    found = Compressed()
    for index, note in enumerate(before):
        (found.made if note is None else found.reused)["blocks"] += 1
        note = target.note(index) if note is None else note
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
