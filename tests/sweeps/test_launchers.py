"""Launchers: the same records whoever runs the points, and a process that dies ends neither the sweep nor its list."""

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from joblib import cpu_count

from sweeps.launching import THREADS, share
from sweeps.overview import Results
from tests.sweeps.swept import NO_TASKS, Swept

LAUNCHERS = ["basic", "processes", "slurm_local", "ray"]
SMALL = [NO_TASKS, "evaluation.rows=1", "method.outer_iterations=1"]
CHANCES = {"created", "timings_s", "memory", "reused", "checksum"}  # what a record says of one run
PLACES = {"results", "cache"}


@pytest.fixture(autouse=True)
def no_ray_left():
    yield
    import ray

    ray.shutdown()


@contextmanager
def watching(results: Path, act: Callable[[str, int], None]):
    """While the sweep runs: act(point's name, pid) again and again, of each process that computes a point."""
    ended = threading.Event()

    def _look() -> None:
        while not ended.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    logs = [Path(file.path) for file in process.open_files() if file.path.endswith("log.txt")]
                    for log in logs:
                        if results in log.parents:
                            act(log.parent.name, process.pid)

    thread = threading.Thread(target=_look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def comparable(record: dict) -> dict:
    """A record without times, memory, paths and threads; the uncompressed model's may have either point's settings."""
    kept = {key: value for key, value in record.items() if key not in CHANCES}
    kept["config"] = {key: value for key, value in record["config"].items() if key not in PLACES}
    if record["point"]["method"] == "none":
        del kept["config"]["rank"]
    kept["environment"] = record["environment"] | {"threads": None}
    return kept | {"matrices": [matrix | {"seconds": None} for matrix in record["matrices"]]}


# ---------------------------------------------------------------------------------------------------------- conformance
def test_every_launcher_leaves_the_same_records(application, tmp_path, monkeypatch):
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    found = {}
    for name in LAUNCHERS:
        places = [f"results={tmp_path / name}", f"cache={tmp_path / name / 'cache'}"]
        sweep = ["-m", "rank.k=0,2", *SMALL, "compute.threads=0", *places]
        code, _, errors = application(*sweep, f"hydra/launcher={name}")
        assert (name, code, "failed" in errors) == (name, 0, False)
        found[name] = Swept(tmp_path / name).records
    assert len(found["basic"]) == 3
    for name in LAUNCHERS:
        assert [comparable(record) for record in found[name]] == [comparable(record) for record in found["basic"]]
    threads = {name: {record["environment"]["threads"] for record in found[name]} for name in LAUNCHERS[1:]}
    assert threads == {"processes": {max(1, cpu_count() // 2)}, "slurm_local": {max(1, cpu_count() // 2)}, "ray": {1}}


# --------------------------------------------------------------------------------------------------------------- deaths
@pytest.mark.parametrize("name", ["processes", "ray"])
def test_the_points_of_a_dead_process_are_tried_once_more_and_the_others_go_on(name, application, tmp_path):
    times, killed, victims = {"r2": 2, "r4": 1}, Counter(), set()

    def kill(point: str, pid: int) -> None:
        rank = point.split("-")[2]
        if pid not in victims and killed[rank] < times.get(rank, 0):
            os.kill(pid, signal.SIGKILL)
            victims.add(pid)
            killed[rank] += 1

    results = tmp_path / "results"
    with watching(results, kill):
        code, _, errors = application("-m", "rank.k=0,2,4", *SMALL, f"hydra/launcher={name}")
    swept = Swept(results)
    assert killed == times
    assert {rank: swept.of(rank=rank)["status"] for rank in (0, 2, 4)} == {0: "done", 2: "failed", 4: "done"}
    failed = swept.of(rank=2)
    assert failed["error"]["type"] == "Killed" and "out of memory" in failed["error"]["message"]
    assert failed["error"]["stage"] in ("start", "calibrate", "compress", "load", "perplexity")
    assert (failed["metrics"], failed["bits"]) == ({}, None)
    assert Results(results).look().counts == {"running": 0, "failed": 1, "interrupted": 0, "waiting": 0, "done": 2}
    assert (code, f"failed: {failed['name']}" in errors) == (1, True)
    assert f"failed: {swept.of(rank=4)['name']}" not in errors


def test_a_job_that_is_told_of_its_time_out_is_queued_again_and_goes_on(application, tmp_path):
    results, told = tmp_path / "results", []

    def tell(_: str, pid: int) -> None:
        if not told and any(results.rglob("*.safetensors")):
            os.kill(pid, signal.SIGUSR2)
            told.append(pid)

    with watching(results, tell):
        code, _, errors = application("-m", "rank.k=2", *SMALL, "hydra/launcher=slurm_local")
    assert (code, len(told)) == (0, 1), errors
    record = Swept(results).of(rank=2)
    assert record["status"] == "done" and record["reused"]["blocks"] > 0
    (log,) = results.glob(".submitit/*/*.err")
    assert "Caught signal SIGUSR2" in log.read_text()


# ----------------------------------------------------------------------------------------------------- shares, mistakes
def test_processes_divide_cores_and_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share(i, 2).get("CUDA_VISIBLE_DEVICES") for i in range(2)] == ["0,2", "1"]
    assert [share(i, 4).get("CUDA_VISIBLE_DEVICES") for i in range(4)] == ["0", "1", "2", "0"]
    assert "CUDA_VISIBLE_DEVICES" not in share(0, 1)
    assert share(0, 2)["OMP_NUM_THREADS"] == str(max(1, cpu_count() // 2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,9")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (share(1, 3)["CUDA_VISIBLE_DEVICES"], share(1, 3)["OMP_NUM_THREADS"]) == ("7", "3")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hydra/launcher=processes", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0 must be a whole number"),
        (["hydra/launcher=processes", "hydra.launcher.n_jobs=two"], "hydra.launcher.n_jobs=two must be a whole number"),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm: there is no srun here"),
    ],
)
def test_a_launcher_that_cannot_work_is_refused_before_any_point(lines, message, application, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, output, errors = application("-m", "rank.k=0,2", *lines)
    assert code == 1 and errors.count("\n") == 1 and message in errors and "points" not in output
