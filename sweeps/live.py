"""The table of a sweep, live on the terminal of its main process while the points run, wherever they run."""

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from analysis.records import RecordError
from sweeps.overview import Results
from sweeps.progress import LIVE
from sweeps.status import view

EVERY = 1.0  # seconds between two looks
_SHOWN = ExitStack()  # of this process; here, as launchers pickle the callback
atexit.register(_SHOWN.close)


def show_live(results: Results) -> None:
    """Show the table until `end_live`, or until the process ends. Without a terminal nothing is shown."""
    console = Console(highlight=False)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        return
    said = results.folder / "sweeps" / f".live-{os.getpid()}"
    _SHOWN.enter_context(_board(said))
    live = _SHOWN.enter_context(Live(console=console, auto_refresh=False))
    _SHOWN.enter_context(_kept_up(live, results, said))


def end_live() -> None:
    """Leave the table as it is, and give the terminal back."""
    _SHOWN.close()


@contextmanager
def _board(said: Path) -> Iterator[None]:
    """A file for warnings of all processes, which are otherwise quiet."""
    said.parent.mkdir(parents=True, exist_ok=True)
    said.touch()
    os.environ[LIVE] = str(said.absolute())
    try:
        yield
    finally:
        del os.environ[LIVE]
        said.unlink(missing_ok=True)


@contextmanager
def _kept_up(live: Live, results: Results, said: Path) -> Iterator[None]:
    """A thread that looks at the files every second; at the end once more."""
    over = threading.Event()

    def keep_up() -> None:
        with said.open() as lines:
            while True:
                last = over.wait(EVERY)
                for line in lines:
                    live.console.print(line.rstrip("\n"), markup=False, soft_wrap=True)
                with suppress(RecordError, OSError):  # a newer version's record, a disk that is away for a moment
                    live.update(view(results.look(), live.console.height), refresh=True)
                if last:
                    return

    thread = threading.Thread(target=keep_up, name="live table", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
