"""Killed at any moment, on a full disk, with damaged files: the same command ends with the same bytes."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.store import read_sealed
from tests.sweeps.swept import NO_TASKS, Swept

KILLS = 30
SEED = 5
SWEEP = ["-m", "rank.k=4", "method.inputs=original,corrected", NO_TASKS, "method.outer_iterations=1"]
# not results: when, how fast, in how much memory, and what was there already
PASSING = {"created", "timings_s", "memory", "reused", "environment", "checksum", "config"}


def outcome(results: Path) -> dict[str, object]:
    """All that must not depend on what happened on the way: every checkpoint's files, every record's results."""
    found: dict[str, object] = {}
    for file in sorted(results.glob("checkpoints/*/*")):
        if not file.parent.name.endswith("-blocks"):
            found[str(file.relative_to(results))] = hashlib.sha256(file.read_bytes()).hexdigest()
    for record in Swept(results).records:
        matrices = [{k: v for k, v in m.items() if k != "seconds"} for m in record["matrices"]]
        found[record["name"]] = {k: v for k, v in record.items() if k not in PASSING} | {"matrices": matrices}
    return found


class Launcher:
    """Runs `caldera-run` again and again, forked from a process that has imported everything: a launch is cheap.

    The child is a session of its own, with all of its workers; what it prints goes to a file.
    """

    def __init__(self, folder: Path, settings: list[str], output: Path | None = None):
        self.folder, self.output = folder, output or folder
        self.settings = [s for s in settings if not s.startswith("cache=")]

    def arguments(self, name: str, *more: str) -> list[str]:
        own = [f"results={self.folder / name / 'results'}", f"cache={self.folder / name / 'cache'}"]
        return [*SWEEP, *self.settings, *own, *more]

    def launch(self, name: str, *more: str) -> int:
        """Start the sweep; its process id."""
        return _fork(self.arguments(name, *more), self.output / f"{name}.txt")

    def said(self, name: str) -> str:
        """All that was printed for a sweep, and no longer is kept."""
        text = (self.output / f"{name}.txt").read_text()
        (self.output / f"{name}.txt").unlink()
        return text

    def run(self, name: str, *more: str) -> int:
        """The exit code of the whole sweep."""
        return os.waitstatus_to_exitcode(os.waitpid(self.launch(name, *more), 0)[1])


def _fork(arguments: list[str], output: Path) -> int:
    """The id of a process that runs the console script's main(), leader of a group of its own."""
    if pid := os.fork():
        return pid
    os.setsid()
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["caldera-run", *arguments]
    code = 70
    try:
        from sweeps.run import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture
def launcher(tmp_path, settings) -> Launcher:
    return Launcher(tmp_path, settings)


@pytest.fixture
def undisturbed(launcher) -> tuple[dict, float]:
    """What the sweep ends with when nothing happens, and its seconds."""
    start = time.monotonic()
    assert launcher.run("undisturbed") == 0, launcher.said("undisturbed")
    return outcome(launcher.folder / "undisturbed" / "results"), time.monotonic() - start


# ------------------------------------------------------------------------------------------------------------- killed
@pytest.mark.timeout(1800)  # a machine may be slow: thirty deaths take minutes
def test_a_sweep_that_is_killed_at_any_moment_ends_with_the_same_bytes(launcher, undisturbed):
    """Moments are drawn over the sweep's time; when one is finished, the next begins with an empty folder."""
    expected, seconds = undisturbed
    moments, deaths, rounds = random.Random(SEED), 0, 0
    while deaths < KILLS:
        rounds += 1
        name = f"round{rounds}"
        while (code := _killed(launcher.launch(name), moments, seconds)) is None:
            deaths += 1
        assert code == 0, launcher.said(name)
        assert outcome(launcher.folder / name / "results") == expected
        assert not list((launcher.folder / name).rglob("*.part"))
        shutil.rmtree(launcher.folder / name)


def _killed(pid: int, moments: random.Random, seconds: float) -> int | None:
    """The exit code of a process that was faster than the kill; None of one that was not.

    With an interrupt or a request to end it may still finish what it does.
    """
    how = moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    until = time.monotonic() + moments.uniform(0.05, 0.7) * seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, how)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code in (-how, 130, 143):
        return None
    return code


# ---------------------------------------------------------------------------------------------------------- a full disk
@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB, a quarter of what the sweep takes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"only who may mount can fill a file system: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_said_and_made_up_for(small_disk, settings, launcher, undisturbed):
    expected, _ = undisturbed
    full = Launcher(small_disk, settings, launcher.folder)
    code, said = full.run("sweep"), full.said("sweep")
    assert code == 1, said
    assert "No space left on device" in said and "Traceback" not in said
    before = outcome(small_disk / "sweep" / "results")
    assert {name: found for name, found in before.items() if expected.get(name) == found} != expected
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    assert full.run("sweep") == 0
    assert outcome(small_disk / "sweep" / "results") == expected


# ------------------------------------------------------------------------------------------------------- damaged files
def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


RECORDS, FITS, SCORES = "results/points/*/record.json", "results/checkpoints/*", "cache/evaluations/*.json"
KINDS = {  # what is damaged: what has to be forgotten for it to be needed again
    "results/points/*r4*/record.json": [],
    "results/checkpoints/*r4*/model-block-00001.safetensors": [RECORDS],
    "results/checkpoints/*r4*-blocks/00001.json": [RECORDS],
    "results/checkpoints/*r4*-blocks/key.json": [RECORDS],
    "results/checkpoints/*r4*/model-rest.safetensors": [RECORDS],
    "results/checkpoints/*r4*/manifest.json": [RECORDS],
    "results/checkpoints/*r4*/config.json": [RECORDS],
    SCORES: [RECORDS],
    "cache/moments/*/block-00001.safetensors": [RECORDS, FITS],
    "cache/moments/*/block-00000.safetensors.json": [RECORDS, FITS],
    "cache/moments/*/hidden-00001.safetensors": [RECORDS, FITS],
    "cache/moments/*/manifest.json": [RECORDS, FITS],
    "cache/shared/*/00001/factors-*.o_proj.safetensors": [RECORDS, FITS],
    "cache/shared/*/00001/subspaces-*.o_proj.safetensors": [RECORDS, FITS],
    "cache/references/*.safetensors": [RECORDS, SCORES],
    "cache/references/*.safetensors.json": [RECORDS, SCORES],
    "cache/digests/*.json": [],
    "cache/inventories/*.json": [],
    "cache/finite/*.json": [RECORDS],
    "cache/outlines/*.json": [RECORDS],
}


def test_every_kind_of_file_that_is_damaged_is_named_and_made_again(launcher):
    assert launcher.run("once") == 0
    folder = launcher.folder / "once"
    expected = outcome(folder / "results")
    kinds = {path.relative_to(folder).parts[1] for path in folder.glob("cache/*") if path.is_dir()}
    passing = {"spill", "running"} & kinds  # gone with the rows and the process that they belong to
    assert kinds == {pattern.split("/")[1] for pattern in KINDS if pattern.startswith("cache/")} | passing
    for damage, (pattern, forgotten) in zip([cut, flip] * len(KINDS), KINDS.items()):
        victim = min(folder.glob(pattern))
        for path in (path for other in forgotten for path in folder.glob(other)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        damage(victim)

        code, said = launcher.run("once"), launcher.said("once")
        assert code == 0, (pattern, said)
        assert f"{victim}" in said and "it is made again" in said, (pattern, said)
        assert outcome(folder / "results") == expected, pattern


def test_a_newer_evaluation_uses_the_checkpoint_that_is_there(launcher):
    """Tasks or rows may be added later: nothing is calibrated or fitted again."""
    assert launcher.run("more", "method.inputs=original") == 0
    results = launcher.folder / "more" / "results"
    shards = {f: f.stat().st_mtime_ns for f in results.glob("checkpoints/*/*.safetensors")}
    assert launcher.run("more", "method.inputs=original", "evaluation.tasks=[arc_easy]") == 0
    records = [r for r in Swept(results).records if r["checkpoint"]]
    assert len(records) == 2 and len({r["checkpoint"] for r in records}) == 1
    (later,) = [r for r in records if r["config"]["evaluation"]["tasks"]]
    assert "compress" not in later["timings_s"] and later["reused"]["evaluation"] == 0.5
    assert shards == {f: f.stat().st_mtime_ns for f in results.glob("checkpoints/*/*.safetensors")}
    assert read_sealed(results / "points" / later["name"] / "record.json")["bits"] == records[0]["bits"]
    assert json.dumps(later["matrices"]) == json.dumps(records[0]["matrices"])
