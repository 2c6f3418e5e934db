"""Around a multirun: the whole grid is checked before its first job, and its frontier is shown after the last."""

import sys
from pathlib import Path

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from analysis.records import RecordError
from caldera.errors import CalderaError
from sweeps.grid import expand, is_search
from sweeps.launching import check_launcher
from sweeps.pipeline import check_inputs, finished
from sweeps.plan import resolve
from sweeps.point import Point
from sweeps.progress import SWEEP
from sweeps.store import read_sealed
from sweeps.wording import refuse, sentence


class SweepCallback(Callback):
    """Named in conf/config.yaml. A SystemExit is the only way in which a callback can end Hydra's run."""

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        points, problems = [], []
        self.problems: list[str] = []  # of a search: choices that make no point
        try:
            check_launcher(config.hydra.launcher)
            jobs = expand(config)
        except (CalderaError, HydraException, OmegaConfBaseException) as error:  # a value that its type refuses
            jobs, problems = [], [sentence(error)]
        for job in jobs:
            try:
                points.append(resolve(job))
            except CalderaError as error:
                problems.append(sentence(error))
        refuse(problems)
        self.points = list({point.key: point for point in points}.values())
        if any(point.config["plan"] for point in self.points):
            self._show_plan()
            return
        try:
            todo = [point for point in self.points if not finished(point)]
            for point in {p.texts: p for p in todo}.values():
                check_inputs(point)
        except CalderaError as error:
            refuse([sentence(error)])
        if is_search(config):
            self.points = []  # the search adds those that it chooses
            return
        SWEEP.total = len(todo)
        print(f"{len(self.points)} points, {SWEEP.total} of them to compute", flush=True)

    def add(self, point: Point) -> None:
        """A point that was not planned before the first job."""
        self.points.append(point)

    def _show_plan(self) -> None:
        from sweeps.preview import show_plan

        try:
            show_plan(self.points)
        except CalderaError as error:
            refuse([sentence(error)])
        self.points = []  # nothing is run

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        if not (self.points or self.problems):
            return
        show(Path(config.results))
        failed = [
            name for name, record in ((p.name, _record(p)) for p in self.points) if record.get("status") != "done"
        ]
        for name in failed:
            print(f"failed: {name}, see its record.json and log.txt", file=sys.stderr)
        for problem in self.problems:
            print(f"failed: {problem}", file=sys.stderr)
        if failed or self.problems:
            raise SystemExit(1)


def _record(point: Point) -> dict:
    return read_sealed(point.folder / "record.json") or {}


def show(results: Path) -> None:
    """The table and the picture of a results folder; a line that says why when there is nothing to draw."""
    from analysis.frontier import report

    try:
        report(results)
    except RecordError as error:
        print(f"caldera-run: {error}", file=sys.stderr)
