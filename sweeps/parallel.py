"""One function over many jobs, here or in worker processes; when a worker dies, what it had not finished is done again.

Processes come from joblib: its own on this machine (`loky`), or those of a Ray cluster (`ray`), whose machines need the
same packages, and the results and cache folders under the same paths.
"""

import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

from caldera.errors import CalderaError, UserError
from sweeps.progress import logger

BACKENDS = ("loky", "ray")
TOGETHER = 4  # jobs for each worker of a cluster before the next ones are handed out
ATTEMPTS = 3  # rounds in which a worker may die before something finishes


@dataclass(frozen=True)
class Workers:
    """`count` processes with `threads` threads each; job i computes on device i, counted round."""

    count: int = 1
    threads: int = 1
    backend: str = "loky"
    devices: tuple[str, ...] = ("cpu",)

    def map(self, task: Callable, keys: Iterable[Hashable], job: Callable = lambda key: key) -> Iterator[tuple]:
        """(key, task(job(key), device)) of every key, in any order; an exception of a task is raised here.

        Jobs are made when they are needed. One worker, and a single key, is this process.
        """
        keys = list(keys)
        if self.count == 1 or len(keys) == 1:
            for key in keys:
                yield key, task(job(key), torch.device(self.devices[0]))
            return
        places = {key: self.devices[i % len(self.devices)] for i, key in enumerate(keys)}
        barren = 0
        while places:
            before = len(places)
            try:
                with _closing(self._round(task, places, job)) as outcomes:
                    for key, outcome in outcomes:
                        del places[key]
                        if isinstance(outcome, Exception):
                            raise _Raised from outcome
                        yield key, outcome
            except _Raised as raised:
                raise raised.__cause__ from None
            except _lost() as error:
                barren = barren + 1 if len(places) == before else 0
                if barren == ATTEMPTS:
                    raise CalderaError(
                        f"workers were killed {ATTEMPTS} times before they finished anything (out of memory?): set"
                        f" compute.workers below {self.count}"
                    ) from error
                logger.warning("a worker was killed; %d jobs are done again", len(places))

    def _round(self, task: Callable, places: dict, job: Callable) -> Iterator[tuple]:
        """One go at all that is left: (key, result or exception), as they come."""
        from joblib import Parallel, delayed

        calls = (delayed(_guarded)(task, key, job(key), where, self.threads) for key, where in list(places.items()))
        options = {"n_jobs": self.count, "backend": self.backend, "batch_size": 1}
        if self.backend != "ray":
            yield from Parallel(return_as="generator_unordered", **options)(calls)
            return
        self._join_cluster()
        with Parallel(**options) as pool:  # Ray's returns lists alone: a few jobs at a time
            while batch := list(islice(calls, TOGETHER * self.count)):
                yield from pool(batch)

    def _join_cluster(self) -> None:
        """Make a Ray known to joblib that has a processor for every worker, unless there is one to be joined."""
        import ray
        from ray.util.joblib import register_ray

        register_ray()
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            ray.init(address=address or "local", num_cpus=None if address else self.count, log_to_driver=False)


@contextmanager
def _closing(outcomes: Iterator) -> Iterator[Iterator]:
    """Close the generator at the end, without joblib's advice to those who stop early."""
    try:
        yield outcomes
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            outcomes.close()


class _Raised(Exception):
    """Carries a task's own exception past those of the pool."""


def _guarded(task: Callable, key: Hashable, job: object, device: str, threads: int) -> tuple:
    """In a worker: the key with the task's result, or with its exception as a value."""
    torch.set_num_threads(threads)
    try:
        return key, task(job, torch.device(device))
    except Exception as error:
        return key, error


def _lost() -> tuple[type[Exception], ...]:
    """What the pools raise when a process dies."""
    from joblib.externals.loky import BrokenProcessPool

    try:
        from ray.exceptions import RayError
    except ImportError:
        return (BrokenProcessPool,)
    return BrokenProcessPool, RayError


def check_backend(name: str) -> None:
    """Raises UserError for a backend that is unknown or not installed."""
    if name not in BACKENDS:
        raise UserError(f"compute.backend={name!r} must be one of {', '.join(BACKENDS)}")
    if name == "ray":
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise UserError("compute.backend=ray needs Ray: pip install 'caldera-sweeps[ray]'") from error


def gpu_count() -> int:
    return torch.cuda.device_count()


def thread_count() -> int:
    """Threads that torch would take."""
    return torch.get_num_threads()
