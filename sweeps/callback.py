"""Around a multirun: the whole grid is checked before its first job, and its frontier is shown after the last."""

from pathlib import Path

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from caldera.errors import CalderaError
from sweeps.grid import expand, is_search
from sweeps.job import conclude
from sweeps.launching import check_launcher
from sweeps.live import end_live, show_live
from sweeps.manifest import remember
from sweeps.overview import Results
from sweeps.pipeline import check_inputs, finished
from sweeps.plan import resolve
from sweeps.point import Point
from sweeps.progress import SWEEP
from sweeps.wording import refuse, sentence


class SweepCallback(Callback):
    """Named in conf/config.yaml. A SystemExit is the only way in which a callback can end Hydra's run."""

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        points, problems = [], []
        self.problems: list[str] = []  # of a search: choices that make no point
        if config.retry is not None:
            refuse([f"retry={config.retry} runs its points by itself: leave out -m and experiment=..."])
        try:
            check_launcher(config.hydra.launcher)
        except CalderaError as error:
            problems.append(sentence(error))
        try:
            jobs = expand(config)
        except (CalderaError, HydraException, OmegaConfBaseException) as error:  # a value that its type refuses
            jobs = []
            problems.append(sentence(error))
        for job in jobs:
            try:
                points.append(resolve(job))
            except CalderaError as error:
                problems.append(sentence(error))
        self.points = list({point.key: point for point in points}.values())
        if config.plan:
            refuse(problems)
            self._show_plan()
            return
        refuse(problems + self._input_problems())
        if is_search(config):
            self.points = []  # the search adds those that it chooses
            show_live(Results(Path(config.results), config.sweep))
            return
        remember(self.points)
        print(f"{len(self.points)} points, {SWEEP.total} of them to compute", flush=True)
        names = frozenset(name for point in self.points for name in (point.name, point.uncompressed.name))
        show_live(Results(self.points[0].results, names=names))

    def _input_problems(self) -> list[str]:
        """What is wrong with the weights and texts of the points that are to be computed; these count from here on."""
        problems = []
        try:
            todo = [point for point in self.points if not finished(point)]
        except CalderaError as error:
            return [sentence(error)]
        for point in {p.texts: p for p in todo}.values():
            try:
                check_inputs(point)
            except CalderaError as error:
                problems.append(sentence(error))
        SWEEP.total = len(todo)
        return problems

    def add(self, point: Point) -> None:
        """A point that was not planned before the first job."""
        remember([point])
        self.points.append(point)

    def _show_plan(self) -> None:
        from sweeps.preview import show_plan

        try:
            show_plan(self.points)
        except CalderaError as error:
            refuse([sentence(error)])
        self.points = []  # nothing is run

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        if self.points or self.problems:
            end_live()
            conclude(Path(config.results), [point.name for point in self.points], self.problems)
