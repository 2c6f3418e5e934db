"""What a person sees while a point runs: a bar on a terminal, a line now and then elsewhere, and a log file a point.

While a live table shows a whole sweep (`sweeps.live`), points of all processes are quiet; warnings show above it.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sweeps.heartbeat import Heartbeat

LIVE = "CALDERA_LIVE"  # environment variable, for workers too: the file that takes what is to show above a live table
EVERY = 10.0  # seconds between two lines about one stage, when the output is no terminal
logger = logging.getLogger("caldera.sweeps")
logger.addHandler(logging.NullHandler())  # what `warn` prints is not to be printed again where no log file is open


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def warn(text: str) -> None:
    """One line on stderr and in the point's log."""
    complain(f"  warning: {text}")
    logger.warning(text)


def complain(text: str) -> None:
    """One line on stderr, or above the live table, from whatever process."""
    try:
        board = os.open(os.environ.get(LIVE, ""), os.O_WRONLY | os.O_APPEND)
    except OSError:  # there is no live table, or none any more
        print(text, file=sys.stderr, flush=True)
        return
    with open(board, "w") as stream:
        stream.write(f"{text}\n")


def is_live() -> bool:
    """Whether a live table has the terminal."""
    return LIVE in os.environ


@dataclass
class Sweep:
    """How far the sweep of this process is; an estimate of the rest from the points that took work.

    A process of a launcher does not know how many there are: `total` is 0.
    """

    total: int = 0
    begun: int = 0
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def point(self) -> Iterator[Callable[[str], str]]:
        """Count and time a point; what it yields makes the point's headline."""
        self.begun += 1
        start = time.perf_counter()
        yield self._heading
        self.seconds.append(time.perf_counter() - start)

    def _heading(self, name: str) -> str:
        if not self.total:
            return f"point: {name}"
        left = self.total - self.begun + 1
        estimate = f", about {clock(left * sum(self.seconds) / len(self.seconds))} to the end" if self.seconds else ""
        return f"point {self.begun}/{self.total}: {name}{estimate}"


SWEEP = Sweep()


@dataclass
class Reporter:
    """Stages of one point: what is under way, how long each took, and what was there already."""

    name: str
    timings: dict[str, float] = field(default_factory=dict)
    reused: dict[str, float] = field(default_factory=dict)
    stage_name: str = "start"
    pulse: Heartbeat = field(default_factory=Heartbeat)
    console: Console = field(default_factory=lambda: Console(file=sys.stdout, soft_wrap=True, highlight=False))

    def say(self, text: str) -> None:
        """One line for the person and the log."""
        if not is_live():
            self.console.print(text, markup=False)
        logger.info(text)

    @contextmanager
    def stage(self, name: str) -> Iterator["Stage"]:
        """Time a stage; calls to what it yields, with (done, total), show how far it is."""
        self.stage_name, start = name, time.perf_counter()
        self.pulse.begin(name)
        bar = Progress(
            TextColumn("  {task.description:<22}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, transient=True, disable=is_live() or not self.console.is_terminal,
        )  # fmt: skip
        with bar:
            yield Stage(self, name, bar, bar.add_task(name, total=None), start)
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start
        self.say(f"  {name}: {clock(self.timings[name])}")


@dataclass
class Stage:
    reporter: Reporter
    name: str
    bar: Progress
    task: int
    start: float
    last: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total)
        self.reporter.pulse.reached(done, total)
        now = time.perf_counter()
        self.last = self.last or self.start
        if now - self.last < EVERY or done >= total or not done:
            return
        self.last = now
        left = clock((now - self.start) * (total - done) / done)
        line = f"  {self.name}: {done}/{total}, about {left} left"
        logger.info(line) if self.reporter.console.is_terminal else self.reporter.say(line)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """On a full disk lines are lost, and nothing else."""


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Everything that is said, with times, in `path` too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
