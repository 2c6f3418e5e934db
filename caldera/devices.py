"""The few places where tensors meet the host: constants on a device, scalars read back, rows split over threads.

Samples are drawn on the host, from generators seeded by a seed and a name, and then moved: what is drawn does not
depend on the device, so that no device needs a generator of its own.
"""

import ctypes
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(x: Tensor) -> bool:
    """Whether x has a shape and a device but no data (a dry run)."""
    return isinstance(x, FakeTensor)


def address(x: Tensor) -> tuple:
    """Where a tensor begins: the same for two that share their memory from there on, in a dry run too."""
    if is_fake(x):
        return x.untyped_storage()._cdata, x.storage_offset()
    return (x.data_ptr(),)


def read(x: Tensor) -> float:
    """The host's value of a 0-d tensor; NaN in a dry run. Waits for the device: never call it inside a column loop."""
    return _fetched(x).item()


def read_all(*xs: Tensor) -> list[float]:
    """What `read` gives for each of several 0-d tensors of one device, after a single wait."""
    return _fetched(torch.stack([x.double() for x in xs])).tolist() if xs else []


def array(x: Tensor) -> np.ndarray:
    """The host's copy of a small tensor, float64; NaNs in a dry run. Waits for the device as `read` does."""
    return _fetched(x)


def _fetched(x: Tensor) -> np.ndarray:
    """The one place that waits, so that tests can count."""
    return np.full(tuple(x.shape), np.nan) if is_fake(x) else x.detach().double().cpu().numpy()


@contextmanager
def precision(operation, name: str) -> Iterator[None]:
    """Where float32 products of one kind (`torch.backends.cuda.matmul`, ...) are computed as torch calls `name`."""
    before = operation.fp32_precision
    operation.fp32_precision = name
    try:
        yield
    finally:
        operation.fp32_precision = before


@contextmanager
def full_precision() -> Iterator[None]:
    """Where float32 products are those of float32 numbers, whatever the process has set: no TF32, no bfloat16.

    Moments and factorisations lose by TF32 what the quantizers are there to save. Settings are as before afterwards.
    """
    backends = torch.backends
    with ExitStack() as settings:
        settings.enter_context(_old_switch())
        for operation in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul):
            settings.enter_context(precision(operation, "ieee"))
        yield


@contextmanager
def _old_switch() -> Iterator[None]:
    """Torch's older switch of the same, off: if it was used, it must agree with the newer ones."""
    before, matmul = _old_setting(), torch.backends.cuda.matmul
    if before == "highest":
        yield
        return
    newer = matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    with warnings.catch_warnings(action="ignore"):  # it is on its way out
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):
            torch.set_float32_matmul_precision(before)
        matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = newer


def _old_setting() -> str:
    """What the older switch says; it refuses to answer where the newer ones say something else."""
    with warnings.catch_warnings(action="ignore"):
        with suppress(RuntimeError):
            return torch.get_float32_matmul_precision()
        with suppress(RuntimeError):
            return "high" if torch.backends.cuda.matmul.allow_tf32 else "highest"
    return "highest"


@cache
def _cached(make: Callable[[], np.ndarray], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or a table that was copied while moments are collected could serve no training
        return torch.from_numpy(make()).to(device)


def constant(make: Callable[[], np.ndarray], like: Tensor) -> Tensor:
    """The array that `make()` returns, as a tensor on the device of `like`; built and copied once a device."""
    return torch.tensor(make(), device=like.device) if is_fake(like) else _cached(make, like.device)


def release() -> None:
    """Give what was freed back to the system, where the C library keeps it (glibc: pieces of up to 32 MB)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def release_devices() -> None:
    """Give freed memory of GPUs back to them, for other processes."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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
