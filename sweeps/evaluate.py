"""What a model is scored on, in parts that are measured, and kept, one by one.

A metric is a plain dict: value, stderr, higher_is_better, measured_on (all that must agree before two values may be
compared) and samples (one number a window or document, in order, for paired comparisons), of which the value is the
mean: by `weights` if there are any, and exp of it if `scale` is "log". Missing is None.
"""

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from caldera.errors import CalderaError, UserError
from sweeps.perplexity import Windows, text_scores
from sweeps.progress import Reporter, warn
from sweeps.store import digest, once
from sweeps.texts import text_digest

VERSION = 2  # counts up when the same settings give other scores
TEXT = ("rows", "length", "stride", "bos", "join", "kl_tokens")  # what scores on a text depend on beside it


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
    text = (text_digest(settings["text"]), *(settings.get(key) for key in TEXT), dtype)
    found = [Part("perplexity", text_name(settings), text)]
    if settings["tasks"]:
        harness = importlib.metadata.version("lm-eval")
        asked = (settings["limit"], settings["batch_size"], dtype, harness)
        found += [Part("tasks", name, (*asked, _task_digest(name))) for name in settings["tasks"]]
    return found


def text_name(settings: dict) -> str:
    """The text and the windows' length, as metrics are called by them."""
    label = settings["label"] or Path(settings["text"]).stem.removeprefix("embedded_")
    return f"{label}_{settings['length']}"


def evaluation_key(settings: dict, dtype: str) -> str:
    """What all scores depend on beside the model, and what is asked about the uncompressed one."""
    floor = ["noise_floor"] if settings["noise_floor"] else []
    return digest([VERSION, [[p.stage, p.name, p.depends_on] for p in parts(settings, dtype)], *floor])


def _task_digest(name: str) -> str | None:
    """Of the YAML of a task of ours."""
    from sweeps.tasks import task_file

    file = task_file(name)
    return digest(file.read_text()) if file.is_file() else None


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model; `model` is the key of all that its weights depend on, `load` gives it when it is needed.

    `original` is the key of the uncompressed model, from which the divergence is measured, and what loads it.
    """

    settings: dict
    dtype: str
    cache: Path
    model: str
    load: Callable[[], object]
    windows: Callable[[], Windows]
    tokenizer: Callable[[], object]
    original: tuple[str, Callable[[], object]]

    def run(self, reporter: Reporter, force: bool = False) -> dict[str, dict]:
        """Metrics by name, measured as far as the cache does not have them; `force`: all of them."""
        wanted = parts(self.settings, self.dtype)
        files = {part: part.file(self.cache, self.model) for part in wanted}
        for file in files.values() if force else ():
            file.unlink(missing_ok=True)
        load, metrics, reused = functools.cache(lambda: self._loaded(reporter)), {}, 0
        for stage in dict.fromkeys(part.stage for part in wanted):
            some = [part for part in wanted if part.stage == stage]
            missing = [part for part in some if not files[part].is_file()]
            for part in missing:
                self._prepare(part, reporter)
            if missing:
                load()  # a stage of its own
            with reporter.stage(stage) as progress:
                for i, part in enumerate(some):
                    step = _within(progress, i, len(some))
                    found, there = once(files[part], lambda: self._measured(part, load(), step))  # noqa: B023
                    metrics |= found
                    reused += there
        reporter.reused["evaluation"] = reused / len(wanted)
        return metrics

    def _reference(self, part: Part):
        """A context with what the uncompressed model says of the text, or with None where it is not asked for."""
        count = self.settings["kl_tokens"]
        if not count:
            return contextlib.nullcontext()
        from sweeps.reference import reference

        depends_on = [VERSION, part.depends_on, self.original[0]]
        return reference(self.cache / "references" / f"{digest(depends_on)[:24]}.safetensors", count)

    def _prepare(self, part: Part, reporter: Reporter) -> None:
        """Have the uncompressed model say it, before another model takes the memory; its own evaluation does so too."""
        key, load = self.original
        if part.stage != "perplexity" or key == self.model:
            return
        with self._reference(part) as found:
            if found is not None and found.known is None:
                with reporter.stage("reference") as progress:
                    text_scores(load(), self.windows(), part.name, None, found, progress)

    def noise_floor(self, load: Callable[[], object], metrics: dict, reporter: Reporter) -> dict[str, float | None]:
        """What float32 would change of the scores of the uncompressed model, by metric; `load` gives it in float32.

        Of perplexities and tasks what is more than in float32; of the divergence and the agreement, which compare with
        the uncompressed model anyway, those of the model in float32.
        """
        wanted, load, found = parts(self.settings, self.dtype), functools.cache(load), {}
        with reporter.stage("noise_floor") as progress:
            for i, part in enumerate(wanted):
                step = _within(progress, i, len(wanted))
                file = Part("noise_floor", part.name, part.depends_on).file(self.cache, self.model)
                found |= once(file, lambda: self._changes(self._measured(part, load(), step), metrics))[0]  # noqa: B023
        return found

    @staticmethod
    def _changes(exact: dict[str, dict], metrics: dict[str, dict]) -> dict[str, float | None]:
        return {name: _change(name, metrics[name]["value"], score["value"]) for name, score in exact.items()}

    def _loaded(self, reporter: Reporter):
        with reporter.stage("load"):
            return self.load()

    def _measured(self, part: Part, model, progress: Callable[[int, int], None]) -> dict[str, dict]:
        if part.stage == "perplexity":
            with self._reference(part) as found:
                return text_scores(model, self.windows(), part.name, self.tokenizer(), found, progress)
        from sweeps.tasks import run_tasks

        def run(batch: int) -> dict[str, dict]:
            options = {"limit": self.settings["limit"], "batch_size": batch, "progress": progress}
            return run_tasks(model, self.tokenizer(), [part.name], **options)

        return halving(run, self.settings["batch_size"], f"evaluation of {part.name}")


def _change(name: str, value: float | None, exact: float | None) -> float | None:
    from analysis.records import RELATIVE

    if name.startswith(RELATIVE):
        return exact
    return None if None in (value, exact) else value - exact


def _within(progress: Callable[[int, int], None], index: int, count: int) -> Callable[[int, int], None]:
    """Progress of one part of several, in thousandths of each."""
    if count == 1:
        return progress
    return lambda done, total: progress(round(1000 * (index + done / total)), 1000 * count)


def halving(run: Callable[[int], dict], batch: int, what: str) -> dict:
    """`run(batch)`; where memory is too small for it, with half the batch, and so on.

    Raises CalderaError when a batch of one does not fit.
    """
    from caldera.devices import release_devices

    while True:
        try:
            return run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch == 1:
                raise CalderaError(f"{what}: out of memory at evaluation.batch_size=1: use a larger machine") from error
        release_devices()
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
