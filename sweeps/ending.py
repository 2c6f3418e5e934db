"""An interrupt, or a request to end, is obeyed even if it hits a library's clean-up, which makes another error of it.

(Hydra and OmegaConf restore flags in `finally`: an interrupt within an assignment ends as an AttributeError there.)
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_asked: list[BaseException] = []  # what was raised where the signal came


@contextmanager
def heeded() -> Iterator[None]:
    """Raise KeyboardInterrupt for an interrupt and SystemExit(143) for a request to end, whatever it became inside."""
    _asked.clear()
    ends = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: lambda: SystemExit(143)}
    before = {number: signal.signal(number, lambda number, _: _raise(ends[number]())) for number in ends}
    try:
        yield
    except Exception:
        honour()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def honour() -> None:
    """Raise what was asked for: to be called where an error would be taken for a failure, and work go on."""
    if _asked:
        raise _asked[-1]


def _raise(end: BaseException) -> None:
    _asked.append(end)
    raise end
