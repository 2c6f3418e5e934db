"""What a model is scored on, in parts that are measured, and kept, one by one.

A metric is a plain dict: value, stderr, higher_is_better, measured_on (all that must agree before two values may be
compared) and samples (one number a row or document, in order, for paired comparisons). Missing is None.
"""

import functools
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from caldera.errors import CalderaError, UserError
from sweeps.progress import Reporter, warn
from sweeps.store import digest, once
from sweeps.texts import text_digest

VERSION = 2  # counts up when the same settings give other scores


@dataclass(frozen=True)
class Part:
    """A text or a task; the stage in which it is measured, and what its scores depend on beside the model."""

    stage: str
    name: str
    depends_on: tuple

    def file(self, cache: Path, model: str) -> Path:
        """Where the scores of the model of that key are kept."""
        return cache / "evaluations" / f"{digest([VERSION, self.stage, self.name, self.depends_on, model])[:24]}.json"


def parts(settings: dict, dtype: str) -> list[Part]:
    """All that the settings under `evaluation` ask for, in the order in which it is measured."""
    text = (text_digest(settings["text"]), settings["rows"], settings["length"], dtype)
    label = Path(settings["text"]).stem.removeprefix("embedded_")
    found = [Part("perplexity", f"perplexity/{label}_{settings['length']}", text)]
    if settings["tasks"]:
        harness = importlib.metadata.version("lm-eval")
        asked = (settings["limit"], settings["batch_size"], dtype, harness)
        found += [Part("tasks", name, (*asked, _task_digest(name))) for name in settings["tasks"]]
    return found


def evaluation_key(settings: dict, dtype: str) -> str:
    """What all scores depend on beside the model."""
    return digest([VERSION, [[p.stage, p.name, p.depends_on] for p in parts(settings, dtype)]])


def _task_digest(name: str) -> str | None:
    """Of the YAML of a task of ours."""
    from sweeps.tasks import task_file

    file = task_file(name)
    return digest(file.read_text()) if file.is_file() else None


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model; `model` is the key of all that its weights depend on, `load` gives it when it is needed.

    `rows` (rows, length) are the text's tokens, `facts` go with the perplexity.
    """

    settings: dict
    dtype: str
    cache: Path
    model: str
    load: Callable[[], object]
    rows: Callable[[], object]
    tokenizer: Callable[[], object]
    facts: dict

    def run(self, reporter: Reporter, force: bool = False) -> dict[str, dict]:
        """Metrics by name, measured as far as the cache does not have them; `force`: all of them."""
        wanted = parts(self.settings, self.dtype)
        files = {part: part.file(self.cache, self.model) for part in wanted}
        for file in files.values() if force else ():
            file.unlink(missing_ok=True)
        load, metrics, reused = functools.cache(lambda: self._loaded(reporter)), {}, 0
        for stage in dict.fromkeys(part.stage for part in wanted):
            some = [part for part in wanted if part.stage == stage]
            if not all(files[part].is_file() for part in some):
                load()  # a stage of its own
            with reporter.stage(stage) as progress:
                for i, part in enumerate(some):
                    step = _within(progress, i, len(some))
                    found, there = once(files[part], lambda: self._measured(part, load(), step))  # noqa: B023
                    metrics |= found
                    reused += there
        reporter.reused["evaluation"] = reused / len(wanted)
        return metrics

    def _loaded(self, reporter: Reporter):
        with reporter.stage("load"):
            return self.load()

    def _measured(self, part: Part, model, progress: Callable[[int, int], None]) -> dict[str, dict]:
        if part.stage == "perplexity":
            from sweeps.perplexity import perplexity

            return {part.name: perplexity(model, self.rows(), **self.facts, progress=progress)}
        from sweeps.tasks import run_tasks

        def run(batch: int) -> dict[str, dict]:
            options = {"limit": self.settings["limit"], "batch_size": batch, "progress": progress}
            return run_tasks(model, self.tokenizer(), [part.name], **options)

        return halving(run, self.settings["batch_size"], f"evaluation of {part.name}")


def _within(progress: Callable[[int, int], None], index: int, count: int) -> Callable[[int, int], None]:
    """Progress of one part of several, in thousandths of each."""
    if count == 1:
        return progress
    return lambda done, total: progress(round(1000 * (index + done / total)), 1000 * count)


def halving(run: Callable[[int], dict], batch: int, what: str) -> dict:
    """`run(batch)`; where memory is too small for it, with half the batch, and so on.

    Raises CalderaError when a batch of one does not fit.
    """
    import torch

    while True:
        try:
            return run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch == 1:
                raise CalderaError(f"{what}: out of memory at evaluation.batch_size=1: use a larger machine") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warn(f"{what}: out of memory with batches of {batch}, going on with {batch // 2}")
        batch //= 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, a GPU's or the machine's, is too small."""
    import torch

    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in text or "can't allocate" in text
    )


def check_tasks(names: Iterable[str]) -> None:
    """Raises UserError for a name that is no task, or that stands there twice."""
    from sweeps import tasks

    names = list(names)
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"evaluation.tasks has {doubled[0]!r} twice: leave one out")
    tasks.check_tasks(names)
