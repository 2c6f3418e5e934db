"""`caldera-status RESULTS_DIR`: which points of a sweep are done, running, failed or waiting, and how good they are."""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from analysis.frontier import PIPE_WIDTH
from analysis.records import RecordError
from caldera.errors import CalderaError, UserError
from sweeps.manifest import results_below
from sweeps.overview import Overview, Results, Status
from sweeps.progress import clock

STYLES = {"running": "cyan", "failed": "red", "interrupted": "yellow", "waiting": "dim", "done": "green"}
FIRST = ("running", "failed", "interrupted", "done", "waiting")  # what a small screen shows first
AROUND = 12  # lines of a screen that are not rows: heads, notes, and what is printed above
FAILURES = 3  # reasons that a small screen shows


def view(overview: Overview, height: int | None = None) -> RenderableType:
    """The table and what there is to say below it; with a `height` it fits a screen of so many lines, and its width."""
    shown, small = _shown(overview.points, height), height is not None
    metrics = [p.metric for p in overview.points if p.metric]
    metric = max(metrics, key=metrics.count) if metrics else "metric"
    table = Table(title=escape(str(overview.folder)), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, head in enumerate(("", "point", "state", "stored\nbits", metric.replace("/", "/\n"), "time")):
        side = "right" if index > 2 else "left"
        table.add_column(escape(head), justify=side, overflow="fold", no_wrap=small and index != 1)
    one_line = {"no_wrap": True, "overflow": "ellipsis"} if small else {}
    same = _same_start([point.name for point in shown]) if small else ""
    for point in shown:
        name = Text(point.name.removeprefix(same), **one_line)
        table.add_row("*" if point.best else "", name, *map(escape, _cells(point, metric)), style=STYLES[point.state])
    return Group(table, *(Text(line, **one_line) for line in _notes(overview, len(shown), height)))


def _same_start(names: list[str]) -> str:
    """The parts that all names begin with."""
    return "".join(os.path.commonprefix(names).rpartition("-")[:2]) if len(names) > 1 else ""  # noqa: RUF071


def _shown(points: list[Status], height: int | None) -> list[Status]:
    """As many as there is room for: those at work and those that failed, then the newest; in their order."""
    room = len(points) if height is None else max(3, height - AROUND)
    if len(points) <= room:
        return points
    ranked = sorted(points, key=lambda p: (FIRST.index(p.state), -p.ended))
    chosen = {point.name for point in ranked[:room]}
    return [point for point in points if point.name in chosen]


def _cells(point: Status, metric: str) -> list[str]:
    value = "" if point.value is None else f"{point.value:,.2f}" if abs(point.value) > 1 else f"{point.value:.3f}"
    other = f" ({point.metric})" if value and point.metric != metric else ""
    bits = "" if point.stored_bits is None else f"{point.stored_bits:.3f}"
    spent = "" if point.seconds is None else clock(point.seconds)
    return [_doing(point), bits, value + other, spent]


def _doing(point: Status) -> str:
    stage = point.stage or ""
    share = "" if point.share is None else f" {point.share:.0%}"
    left = "" if point.stage_left is None else f", {clock(point.stage_left)} left"
    return f"{point.state}: {stage}{share}{left}" if stage else point.state


def _notes(overview: Overview, shown: int, height: int | None) -> list[str]:
    points, counts = overview.points, overview.counts
    total = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    total = total or "none yet"
    spent = sum(point.seconds or 0.0 for point in points)
    left = "" if overview.seconds_left is None else f"; about {clock(overview.seconds_left)} to the end"
    notes = [f"{sum(counts.values())} points: {total}; {clock(spent)} of work{left}"]
    if shown < len(points):
        notes.append(f"{len(points) - shown} of them are not shown")
    failures = [f"failed: {point.name}: {point.reason}" for point in points if point.state == "failed"]
    notes += failures if height is None else failures[-FAILURES:]
    if any(point.best for point in points):
        notes.append("* Pareto-optimal so far: no other point has as few stored bits and as good a metric.")
    return notes


# --------------------------------------------------------------------------------------------------- the console script
def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-status`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="caldera-status", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("results_dir", type=Path, help="a sweep's results folder, or one that holds several")
    parser.add_argument("--sweep", help="only the points of this sweep")
    parser.add_argument("--watch", action="store_true", help="keep the table up to date until nothing is left to do")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.epilog = "Exit code 1: something failed or was interrupted."
    options = parser.parse_args(arguments)
    try:
        found = _results(options.results_dir, options.sweep)
        overviews = _watch(found) if options.watch and not options.json else [results.look() for results in found]
    except (CalderaError, RecordError) as error:
        print(f"caldera-status: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"folders": [_plain(overview) for overview in overviews]}, indent=1))
    elif not options.watch:
        console = _console()
        for overview in overviews:
            console.print(view(overview))
    return int(any(o.counts["failed"] or o.counts["interrupted"] for o in overviews))


def _console() -> Console:
    wide = {} if sys.stdout.isatty() else {"width": PIPE_WIDTH}
    return Console(highlight=False, **wide)


def _results(root: Path, sweep: str | None) -> list[Results]:
    """What is to be looked at. Raises UserError when there is nothing."""
    found = [Results(folder, sweep) for folder in results_below(root)]
    if not found:
        raise UserError(f"{root} holds no points: give the results folder of a sweep")
    known = sorted({name for results in found for name in results.sweeps()})
    if sweep is not None and sweep not in known:
        raise UserError(f"--sweep={sweep} has no points in {root}: known are {', '.join(known)}")
    return [results for results in found if sweep is None or sweep in results.sweeps()]


def _watch(found: list[Results]) -> list[Overview]:
    """The table, kept up to date until nothing runs and nothing waits, or until Ctrl-C."""
    console = _console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            overviews = [results.look() for results in found]
            height = console.height // len(found) if console.is_terminal else None
            live.update(Group(*(view(overview, height) for overview in overviews)), refresh=True)
            if not any(o.counts["running"] or o.counts["waiting"] for o in overviews):
                return overviews
            try:
                time.sleep(2)
            except KeyboardInterrupt:
                return overviews


def _plain(overview: Overview) -> dict:
    points = [asdict(point) for point in overview.points]
    best = [point.name for point in overview.points if point.best]
    facts = {"counts": overview.counts, "best": best, "seconds_left": overview.seconds_left}
    return {"folder": str(overview.folder), **facts, "points": points}


if __name__ == "__main__":
    sys.exit(main())
