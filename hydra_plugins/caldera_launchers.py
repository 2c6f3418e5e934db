"""Launchers for many points at once, by one override. Hydra takes plug-ins from this namespace alone.

They run what the plug-ins of Hydra run (joblib, submitit), and wait for it themselves: those raise for the first dead
process, and with it go the other results, the rest of the grid and the list of what failed. The one for Ray
(hydra-ray-launcher 1.2.2) is not used at all: it wants cloudpickle<3, older than what all else here has, and boto3.
"""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import fields
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf

from caldera.errors import UserError
from sweeps.launching import Killed, Lost, Surviving, share

Outcomes = Iterator[tuple[int, JobReturn | Exception]]


class Processes(Surviving):
    """`n_jobs` processes of this machine (-1: one a core), which divide its cores and its GPUs among them.

    What died is tried again alone, with the whole machine.
    """

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def run(self, jobs: dict[int, list[str]], again: bool) -> Outcomes:
        from hydra_plugins.hydra_joblib_launcher._core import execute_job
        from joblib import cpu_count

        count = 1 if again else min(cpu_count() if self.n_jobs == -1 else self.n_jobs, len(jobs))
        free, waiting, busy = [_Process(share(i, count)) for i in range(count)], list(jobs.items()), {}
        try:
            while waiting or busy:
                while waiting and free:
                    process, (index, overrides) = free.pop(0), waiting.pop(0)
                    busy[process.pool.submit(execute_job, index, overrides, *self.job())] = process, index
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    process, index = busy.pop(future)
                    free.append(process)
                    yield index, process.outcome(future)
        finally:
            for process in [*free, *(process for process, _ in busy.values())]:
                process.pool.shutdown(kill_workers=bool(busy))


class _Process:
    """A pool of one: when it breaks, nobody else's job is lost, and whose job it was is known."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._start()

    def _start(self) -> None:
        from joblib.externals.loky import ProcessPoolExecutor

        self.pool = ProcessPoolExecutor(1, env=self.environment)

    def outcome(self, future: Future) -> JobReturn | Exception:
        from joblib.externals.loky import BrokenProcessPool

        try:
            return future.result()
        except BrokenProcessPool as error:
            self._start()
            return Killed.by(error)
        except Exception as error:  # of a job that could not even begin
            return error


class Submitit(Surviving):
    """Jobs of a Slurm cluster, or with `cluster=local` processes of this machine, all at once; options as submitit's.

    A job that is told of its time-out is queued again and goes on at the block that it was in.
    """

    def __init__(self, cluster: str, submitit_folder: str, **options: Any) -> None:
        self.cluster, self.folder = cluster, submitit_folder
        self.options = {k: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in options.items()}

    def run(self, jobs: dict[int, list[str]], again: bool) -> Outcomes:
        from submitit.core.utils import UncompletedJobError

        submitted = self._submit(jobs)
        for index, job in zip(jobs, submitted):
            try:
                outcome = job.results()[0]
            except UncompletedJobError as error:
                outcome = _lost(error)
            yield index, outcome

    def _submit(self, jobs: dict[int, list[str]]) -> list:
        from hydra_plugins.hydra_submitit_launcher import submitit_launcher
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
        from submitit import AutoExecutor
        from submitit.core.utils import environment_variables

        plugin = {"local": submitit_launcher.LocalLauncher, "slurm": submitit_launcher.SlurmLauncher}[self.cluster]()
        context, config, task, state = self.job()
        plugin.setup(hydra_context=context, task_function=task, config=config)
        general = {field.name for field in fields(BaseQueueConf)}
        options = {key if key in general else f"{self.cluster}_{key}": value for key, value in self.options.items()}
        first = {key: options.pop(key) for key in list(options) if key.endswith("_max_num_timeout")}
        executor = AutoExecutor(self.folder, cluster=self.cluster, **first)
        executor.update_parameters(**options)
        calls = [(overrides, "hydra.sweep.dir", index, "", state) for index, overrides in jobs.items()]
        with environment_variables(**(share(0, len(jobs)) if self.cluster == "local" else {})):
            return executor.map_array(plugin, *zip(*calls))


def _lost(error: Exception) -> Exception:
    """Of a job that could not begin there is a traceback, which ends with the reason; any other has died."""
    from submitit.core.utils import FailedJobError

    if not isinstance(error, FailedJobError):
        return Killed.by(error)
    lines = [line for line in str(error).splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return Lost((lines or str(error).splitlines())[-1])


class Ray(Surviving):
    """Tasks of a Ray cluster: `init` is what `ray.init` takes, `remote` what a point needs."""

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self.init, self.remote = OmegaConf.to_object(init), OmegaConf.to_object(remote)

    def run(self, jobs: dict[int, list[str]], again: bool) -> Outcomes:
        import ray
        from ray.exceptions import RayError, RayTaskError

        if not ray.is_initialized():
            self._join(ray.init)
        task = ray.remote(_in_folder).options(max_retries=0, **self.remote)
        context = ray.put(self.job())
        running = {task.remote(os.getcwd(), index, overrides, context): index for index, overrides in jobs.items()}
        while running:
            (ended, *_), _ = ray.wait(list(running))
            index = running.pop(ended)
            try:
                outcome = ray.get(ended)
            except RayTaskError as error:
                outcome = Lost(str(error.cause))
            except RayError as error:
                outcome = Killed.by(error)
            yield index, outcome

    def _join(self, init: Callable) -> None:
        """Raises UserError when no cluster answers."""
        try:
            init(**self.init)
        except ConnectionError as error:
            raise UserError(
                f"hydra.launcher.init.address={self.init['address']}: no Ray cluster answers there; start one by"
                " `ray start --head`, or give this shell its RAY_AUTH_TOKEN"
            ) from error


def _in_folder(folder: str, index: int, overrides: list[str], job: tuple) -> JobReturn:
    """In a worker of Ray: a job, with relative paths as where the sweep was started."""
    from hydra_plugins.hydra_joblib_launcher._core import execute_job

    os.chdir(folder)
    return execute_job(index, overrides, *job)
