"""The few places where tensors meet the host: constants on a device, scalars read back, rows split over threads."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(x: Tensor) -> bool:
    """Whether x has a shape and a device but no data (a dry run)."""
    return isinstance(x, FakeTensor)


def read(x: Tensor) -> float:
    """The host's value of a 0-d tensor; NaN in a dry run. Waits for the device: never call it inside a column loop."""
    return float("nan") if is_fake(x) else float(x)


@cache
def _cached(make: Callable[[], np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(make()).to(device)


def constant(make: Callable[[], np.ndarray], like: Tensor) -> Tensor:
    """The array that `make()` returns, as a tensor on the device of `like`; built and copied once a device."""
    return torch.tensor(make(), device=like.device) if is_fake(like) else _cached(make, like.device)


def release() -> None:
    """Give what was freed back to the system, where the C library keeps it (glibc: pieces of up to 32 MB)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="caldera")


def over_rows(kernel: Callable[..., None], rows: int, *arguments, edges: list[int] | None = None) -> None:
    """kernel(*arguments, start, stop) over a split of the rows, one part a torch thread; `edges`: where it may cut."""
    edges = list(range(0, rows, 16)) + [rows] if edges is None else edges
    parts = max(1, min(torch.get_num_threads(), len(edges) - 1))
    cuts = [edges[(len(edges) - 1) * i // parts] for i in range(parts + 1)]
    if parts == 1:
        return kernel(*arguments, 0, rows)
    jobs = [_pool(parts).submit(kernel, *arguments, *pair) for pair in pairwise(cuts)]
    for job in jobs:
        job.result()
