"""A search on disk: optuna's journal of every trial, which a later start goes on with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from caldera.errors import UserError
from sweeps.search.space import Params, Space
from sweeps.store import digest


@dataclass(frozen=True)
class Study:
    """Trials are COMPLETE, FAIL, PRUNED (not worth computing), or RUNNING: when that process is gone, interrupted."""

    study: optuna.Study
    space: Space
    seed: int

    def params(self, *states: TrialState) -> list[Params]:
        """What the trials in those states had chosen, each once, in the order in which they began."""
        found = []
        for trial in self.study.get_trials(deepcopy=False, states=states):
            if trial.params not in found:
                found.append(trial.params)
        return found

    def suggestions(self, waiting: list[Params]) -> Iterator[Params]:
        """Without end, what the sampler would try next beside what is waiting. Nothing is noted."""
        trials = self.study.get_trials(deepcopy=False)
        seed = int(digest([self.seed, len(trials)])[:8], 16)
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
        scratch = optuna.create_study(directions=self.study.directions, sampler=sampler)
        scratch.add_trials([*trials, *(self._trial(params, TrialState.RUNNING) for params in waiting)])
        while True:
            yield scratch.ask(self.space.distributions).params

    def begin(self, params: Params, facts: dict) -> int:
        """The number of a new trial; `facts` are for whoever looks at the study."""
        self._add(params, TrialState.RUNNING, facts)
        return self.study.get_trials(deepcopy=False)[-1].number

    def tell(self, number: int, values: tuple[float, ...] | None) -> None:
        """The end of a trial; without values it failed."""
        self.study.tell(number, values, state=TrialState.FAIL if values is None else None)

    def note(self, params: Params, state: TrialState, facts: dict) -> None:
        """Note once a suggestion that is not computed: PRUNED, or FAIL if it cannot be."""
        if params not in self.params(state):
            self._add(params, state, facts)

    def give_up_running(self) -> None:
        """Let the trials fail that a process began which is gone."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.tell(trial.number, None)

    def _add(self, params: Params, state: TrialState, facts: dict) -> None:
        self.study.add_trial(self._trial(params, state, facts))

    def _trial(self, params: Params, state: TrialState, facts: dict | None = None) -> FrozenTrial:
        return create_trial(state=state, params=params, distributions=self.space.distributions, user_attrs=facts)


@contextmanager
def opened(file: Path, name: str, space: Space, objectives: int, seed: int) -> Iterator[Study]:
    """The study called `name` in `file`, begun or gone on with. Raises UserError while another process has the file."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file.with_suffix(".running"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{file} is in use by another search: wait for it, or set sweep=... to another name") from error
    try:
        study = Study(_loaded(file, name, objectives), space, seed)
        study.give_up_running()
        yield study
    finally:
        lock.release()


def _loaded(file: Path, name: str, objectives: int) -> optuna.Study:
    if file.is_file():  # what a killed process left: half a line, and optuna's own lock
        data = file.read_bytes()
        with file.open("r+b") as stream:
            stream.truncate(data.rfind(b"\n") + 1)
        file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        directions = ["minimize"] * objectives
        return optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    except (ValueError, KeyError, TypeError) as error:
        remedy = "delete it and start again: points that are finished keep their records"
        raise UserError(f"{file} cannot be read as a study ({error}): {remedy}") from error
