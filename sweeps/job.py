"""The work on one point as a person follows it, and what is said when the points of a run have ended."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.frontier import report
from analysis.records import RecordError
from sweeps.pipeline import check_inputs, finished, run_point
from sweeps.point import Point
from sweeps.progress import SWEEP, Reporter
from sweeps.store import read_sealed


def work(point: Point, check: bool) -> dict:
    """The record of a point, which is run unless it is done; with `check` its inputs are looked at first."""
    if point.config["compute"]["threads"]:
        import torch

        torch.set_num_threads(point.config["compute"]["threads"])
    reporter = Reporter(point.name)
    if record := finished(point):
        reporter.say(f"{point.name}: done before")
        return record
    if check:
        check_inputs(point)
    with SWEEP.point() as heading:
        reporter.say(heading(point.name))
        return run_point(point, reporter)


def show(results: Path) -> None:
    """The table and the picture of a results folder; a line that says why when there is nothing to draw."""
    try:
        report(results)
    except RecordError as error:
        print(f"caldera-run: {error}", file=sys.stderr)


def conclude(results: Path, names: Iterable[str], problems: Sequence[str] = ()) -> None:
    """Show what there is, name the points that are not done, and other problems. Raises SystemExit if there are any."""
    show(results)
    records = ((name, read_sealed(results / "points" / name / "record.json")) for name in names)
    failed = [name for name, record in records if record is None or record["status"] != "done"]
    for name in failed:
        print(f"failed: {name}, see its record.json and log.txt", file=sys.stderr)
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    if failed or problems:
        raise SystemExit(1)
