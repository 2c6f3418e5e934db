"""What launchers share: a job whose process dies is tried once more and then is a failed point; the others go on.

The launchers themselves are in `hydra_plugins/caldera_launchers.py`, as Hydra takes them from that namespace alone.
"""

import os
import re
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from caldera.errors import CalderaError, UserError
from sweeps.progress import warn

TRIES = 2  # times that a point's process may die in one launch
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
REMEDY = "out of memory is the likeliest reason: take fewer points at once or give each more memory, and run it again"
EXTRAS = {
    "Submitit": ("submitit", ("submitit", "hydra_plugins.hydra_submitit_launcher")),
    "Ray": ("ray", ("ray",)),
}


class Lost(CalderaError):
    """A job ended without a result, for a reason that would be the same at a second try."""


class Killed(CalderaError):
    """The process of a job died."""

    @classmethod
    def by(cls, error: Exception) -> "Killed":
        """From a pool's exception, which names the signal or the job's state if it knows it."""
        told = re.search(r"\bSIG[A-Z0-9]+|\bstate: \w+", str(error))
        reason = told[0] if told else str(error).strip().partition("\n")[0]
        killed = cls(f"the point's process died ({reason}); {REMEDY}")
        killed.__cause__ = error
        return killed


class Surviving(Launcher):
    """Runs the jobs of a sweep, of which some may die, and returns something for each."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    @abstractmethod
    def run(self, jobs: dict[int, list[str]], again: bool) -> Iterator[tuple[int, JobReturn | Exception]]:
        """What came of each job, as they end: `Killed` where it may be tried again, any other exception if not."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = dict(enumerate(map(list, job_overrides), initial_job_idx))
        returns = self._round(jobs, last=False)
        if dead := {index: jobs[index] for index in jobs if index not in returns}:
            warn(f"{len(dead)} points whose processes died are tried once more")
            returns |= self._round(dead, last=True)
        return [returns[index] for index in jobs]

    def _round(self, jobs: dict[int, list[str]], last: bool) -> dict[int, JobReturn]:
        """The returns of those that ended for good."""
        returns = {}
        with closing(self.run(jobs, again=last)) as outcomes:
            for index, outcome in outcomes:
                if isinstance(outcome, JobReturn):
                    returns[index] = outcome
                elif last or not isinstance(outcome, Killed):
                    returns[index] = self._failed(jobs[index], outcome)
                else:
                    warn(f"{self._point(jobs[index]).name}: {outcome}")
        return returns

    def _failed(self, overrides: list[str], error: Exception) -> JobReturn:
        """A record of the failure, and nothing as the job's value, as when a point fails by itself."""
        record_lost(self._point(overrides), error)
        return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=None)

    def _point(self, overrides: list[str]):
        from sweeps.grid import composed
        from sweeps.plan import resolve

        return resolve(composed(self.config, overrides))

    def job(self) -> tuple:
        """What Hydra's plug-ins hand to a job besides its number and its overrides."""
        return self.hydra_context, self.config, self.task_function, Singleton.get_state()


def record_lost(point, error: Exception) -> None:
    """Commit the failed record that the process of a `Point` could not, unless the point is done or somebody's now."""
    from filelock import FileLock, Timeout

    from sweeps.heartbeat import PROGRESS, read_heartbeat
    from sweeps.pipeline import commit_failure, finished

    warn(f"{point.name}: {error}")
    point.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(point.folder / ".lock", timeout=0):
            if finished(point):
                return
            last = point.folder / PROGRESS
            commit_failure(point, error, (read_heartbeat(last) or {"stage": "start"})["stage"])
            last.unlink(missing_ok=True)
    except Timeout:
        return


# --------------------------------------------------------------------------------------------------------- the machine
def share(index: int, count: int) -> dict[str, str]:
    """Environment of process `index` of `count` on this machine: its part of the cores and of the GPUs.

    Numbers of threads that the user has put into the environment stay.
    """
    from joblib import cpu_count

    threads = max(1, cpu_count() // count)
    variables = {name: os.environ.get(name, str(threads)) for name in THREADS}
    gpus = visible_gpus()
    if count > 1 and len(gpus) > 1:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index::count] or [gpus[index % len(gpus)]])
    return variables


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch

    count, chosen = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",")[:count] if chosen else [str(i) for i in range(count)]


def check_launcher(settings: DictConfig) -> None:
    """Raises UserError for a launcher of ours that cannot work here."""
    name = settings._target_.removeprefix("hydra_plugins.caldera_launchers.")
    extra, modules = EXTRAS.get(name, (None, ()))
    if not all(find_spec(module) for module in modules):
        raise UserError(f"this hydra/launcher needs {modules[0]}: pip install 'caldera-sweeps[{extra}]'")
    count = settings.get("n_jobs", -1)
    if not isinstance(count, int) or (count < 1 and count != -1):
        raise UserError(f"hydra.launcher.n_jobs={count} must be a whole number of at least 1, or -1: one a core")
    if settings.get("cluster") == "slurm" and not shutil.which("srun"):
        raise UserError("hydra/launcher=slurm: there is no srun here; start it on a login node of the Slurm cluster")
