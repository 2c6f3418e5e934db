"""Medians of repeated runs, and how a time grows with size."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

SHORT, LONG = 0.2, 5.0  # seconds: below, five runs are measured; above, one


class Timing(NamedTuple):
    """Median seconds of `runs` runs, and what the last one returned."""

    seconds: float
    runs: int
    result: Any


def timed(work: Callable[[], Any]) -> Timing:
    """The median of 5 runs below 0.2 s, of 3 below 5 s, else one run.

    The first run warms caches up and is thrown away, unless it is so long that it is the only one: compile and fill
    caches with a small case before.
    """
    first = once(work)
    if first.seconds >= LONG:
        return first
    runs = [once(work) for _ in range(5 if first.seconds < SHORT else 3)]
    return Timing(statistics.median(r.seconds for r in runs), len(runs), runs[-1].result)


def once(work: Callable[[], Any]) -> Timing:
    """A single run."""
    start = time.perf_counter()
    result = work()
    return Timing(time.perf_counter() - start, 1, result)


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """p of the least-squares line log t = p log n + c: t grows like n^p."""
    x, y = [math.log(n) for n in sizes], [math.log(t) for t in seconds]
    return statistics.linear_regression(x, y).slope
