"""The search: suggestions are screened by what theory expects of them, and the best go through Hydra's launcher."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.trial import TrialState

from caldera.errors import CalderaError, UserError
from sweeps.callback import SweepCallback
from sweeps.grid import composed, parsed
from sweeps.pipeline import finished
from sweeps.plan import resolve
from sweeps.point import Point
from sweeps.progress import SWEEP
from sweeps.search.choose import Expected, beats, gains
from sweeps.search.objectives import costs
from sweeps.search.predict import predicted_error
from sweeps.search.space import Params, Space
from sweeps.search.study import Study, opened
from sweeps.store import digest
from sweeps.wording import sentence

TRIES = 8  # suggestions looked at for each one that is wanted: in a small space most are known in the end
# What changes no point, or not what is searched for: with another value of these a study is gone on with.
ASIDE = ("compute", "tracker", "search", "sweep", "results", "cache", "plan", "force", "checkpoint")


def search(config: DictConfig, context: HydraContext, launcher: Launcher) -> None:
    """Go on until `search.trials` trials of the sweep's study are finished, or nothing new is suggested."""
    if config.plan:
        return
    space = Space.of(parsed(config))
    base = OmegaConf.to_container(composed(config, space.fixed), resolve=False)
    ranges = {name: str(distribution) for name, distribution in space.distributions.items()}
    asked = {key: value for key, value in base.items() if key not in ASIDE}
    objectives = list(config.search.objectives)
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
    name = f"{config.sweep}-{digest([asked, ranges, objectives])[:8]}"
    file = Path(config.results) / "searches" / f"{config.sweep}.log"
    callback = next(c for c in context.callbacks.callbacks if isinstance(c, SweepCallback))
    with opened(file, name, space, len(objectives), config.seed) as study:
        Search(config, launcher, callback, space, study).run()


@dataclass
class Suggestion:
    params: Params
    point: Point
    blocks: int  # that are looked at for its error
    error: float | None = None

    @cached_property
    def bits(self) -> float | None:
        """Stored bits, where they are known before the point is run."""
        return self.point.stored_bits

    @property
    def expected(self) -> Expected | None:
        """Bits and predicted error; None as long as nothing can be predicted."""
        if self.error is None and self.bits is not None:
            self.error = predicted_error(self.point, self.blocks)
        return None if self.error is None else (self.bits, self.error)

    @cached_property
    def kind(self) -> str:
        """What has to agree for predictions to be compared: all but rank and quantizers."""
        point, method = self.point, asdict(self.point.method)
        fit = {key: value for key, value in method.items() if key not in ("rank", "q", "l", "r")}
        return digest([point.moments_key, fit, point.correction and asdict(point.correction)])


@dataclass
class Search:
    """`done` and `waiting` are suggestions that were computed, and that were not yet; `again` failed in an earlier run.

    `seen` has the keys of their points and of those that were pruned, `tried` all that was looked at.
    """

    config: DictConfig
    launcher: Launcher
    callback: SweepCallback
    space: Space
    study: Study
    done: list[Suggestion] = field(default_factory=list)
    waiting: list[Suggestion] = field(default_factory=list)
    again: list[Suggestion] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    tried: list[Params] = field(default_factory=list)
    jobs: int = 0

    def run(self) -> None:
        self.done = self._considered(self.study.params(TrialState.COMPLETE))
        self.again = self._considered(self.study.params(TrialState.FAIL))
        for suggestion in self.done:
            self.callback.add(suggestion.point)
        settings = self.config.search
        left = settings.trials - len(self.done)
        SWEEP.total = max(left, 0)
        print(f"search: {settings.trials} trials, {SWEEP.total} of them to compute", flush=True)
        while left > 0:
            batch = self._batch(min(settings.batch, left))
            if not batch:
                print("search: nothing new is suggested", flush=True)
                return
            self._compute(batch)
            left -= len(batch)

    def _considered(self, found: list[Params]) -> list[Suggestion]:
        """Those that are points, each point once."""
        return [suggestion for params in found if (suggestion := self._consider(params))]

    def _consider(self, params: Params) -> Suggestion | None:
        """The suggestion, unless its point was seen before; one that is no point fails."""
        if params in self.tried:
            return None
        self.tried.append(params)
        try:
            point = resolve(composed(self.config, self.space.overrides(params)))
        except (CalderaError, HydraException, OmegaConfBaseException) as error:
            self.study.note(params, TrialState.FAIL, {"error": sentence(error)})
            self.callback.problems.append(f"{' '.join(self.space.choices(params))}: {sentence(error)}")
            return None
        if point.key in self.seen:
            return None
        self.seen.add(point.key)
        return Suggestion(params, point, self.config.search.blocks)

    def _batch(self, count: int) -> list[Suggestion]:
        """What to compute next."""
        batch, self.again = self.again[:count], self.again[count:]
        while len(batch) < count:
            self._fill()
            if not self.waiting:
                break
            best = self._best(batch)
            self.waiting.remove(best)
            batch.append(best)
        return batch

    def _fill(self) -> None:
        """Let as many suggestions wait as are screened; what is waiting may have been beaten meanwhile."""
        before, self.waiting = self.waiting, []
        for suggestion in before:
            self._admit(suggestion)
        wanted = self.config.search.screen
        for params in islice(self.study.suggestions([s.params for s in self.waiting]), TRIES * wanted):
            if len(self.waiting) >= wanted or len(self.tried) >= self.space.size:
                return
            if suggestion := self._consider(params):
                self._admit(suggestion)

    def _admit(self, suggestion: Suggestion) -> None:
        """Let it wait, unless a finished point is expected to be better in both."""
        margin = self.config.search.prune_margin
        rivals = () if margin is None or not suggestion.expected else self.done
        for rival in rivals:
            same = rival.expected and rival.kind == suggestion.kind
            if same and beats(rival.expected, suggestion.expected, margin):
                facts = _facts(suggestion) | {"beaten_by": rival.point.name}
                self.study.note(suggestion.params, TrialState.PRUNED, facts)
                print(f"  pruned: {suggestion.point.name}, {_words(suggestion)}; {_words(rival)}: {rival.point.name}")
                return
        self.waiting.append(suggestion)

    def _best(self, batch: list[Suggestion]) -> Suggestion:
        """The one that promises most beside what is known; in turn, where nothing can be said."""
        known = [s.expected for s in (*self.done, *batch) if s.expected]
        rated = [s for s in self.waiting if s.expected]
        if not self.waiting[0].expected:
            return self.waiting[0]
        worth = gains([s.expected for s in rated], known)
        return rated[max(range(len(rated)), key=worth.__getitem__)]

    def _compute(self, batch: list[Suggestion]) -> None:
        """Tell the study what came out. A point whose record is there is not run again."""
        numbers = [self.study.begin(s.params, _facts(s)) for s in batch]
        records = [finished(s.point) for s in batch]
        for suggestion in batch:
            self.callback.add(suggestion.point)
        todo = [s for s, record in zip(batch, records) if record is None]
        jobs = self.launcher.launch([self.space.overrides(s.params) for s in todo], self.jobs) if todo else []
        self.jobs += len(todo)
        outcomes = iter([_outcome(job) for job in jobs])
        for number, suggestion, record in zip(numbers, batch, records):
            values = None if record else next(outcomes)
            values = values or self._judged(record or finished(suggestion.point))
            self.study.tell(number, values)
            if values:
                self.done.append(suggestion)

    def _judged(self, record: dict | None) -> tuple[float, ...] | None:
        """The costs that a record says; None, and a line at the end, where it has no finite ones."""
        try:
            return record and costs(record, list(self.config.search.objectives))
        except UserError as error:
            self.callback.problems.append(str(error))
            return None


def _outcome(job: JobReturn) -> tuple[float, ...] | None:
    """What a job returned; None if it failed."""
    return job.return_value if job.status == JobStatus.COMPLETED else None


def _facts(suggestion: Suggestion) -> dict:
    bits, error = suggestion.expected or (suggestion.bits, None)
    return {"point": suggestion.point.name, "bits": bits, "predicted_error": error}


def _words(suggestion: Suggestion) -> str:
    bits, error = suggestion.expected
    return f"{bits:.3f} bits and a predicted error of {error:.4f}"
