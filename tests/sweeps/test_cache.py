"""`caldera-cache` says what there is and deletes whole artefacts, the least recently used first, and none in use."""

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from sweeps.cache import main
from sweeps.heartbeat import beating
from sweeps.store import write_sealed
from tests.sweeps.swept import NO_TASKS, Swept

HOUR, DAY = 3600, 86400
KEYS = {name: name * 24 for name in "abc"}


@pytest.fixture
def cache(tmp_path) -> Path:
    """Moments a (2 kB, 3 days), b (3 kB, 2 days), c (1 kB, a minute), a note of 40 days, a model of a year."""
    folder = tmp_path / "cache"
    for name, size, age in (("a", 2000, 3 * DAY), ("b", 3000, 2 * DAY), ("c", 1000, 60)):
        for part in ("manifest.json", "block.safetensors"):
            put(folder / "moments" / KEYS[name] / part, size // 2, age)
        (folder / "moments" / f"{KEYS[name]}.lock").touch()
    put(folder / "digests" / "d", 10, 40 * DAY)
    put(folder / "checkpoints" / "model-v1" / "model.safetensors", 9000, 365 * DAY)
    return folder


def put(path: Path, size: int, age: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    for changed in (path, path.parent):
        os.utime(changed, (time.time() - age,) * 2)


@pytest.fixture
def run(cache, capsys):
    """run(*arguments): (exit code, stdout, stderr) of the console script on that cache."""

    def _run(*arguments: str) -> tuple[int, str, str]:
        return main(["--cache", str(cache), *arguments]), *capsys.readouterr()

    return _run


def left(cache: Path) -> str:
    return "".join(name for name, key in KEYS.items() if (cache / "moments" / key).exists())


# --------------------------------------------------------------------------------------------------------------- list
def test_kinds_are_listed_with_count_size_and_use(run):
    code, output, _ = run("list")
    assert code == 0
    rows = [" ".join(line.split()) for line in output.splitlines()]
    assert "moments 3 6.0 kB 3d ago to 1m ago" in rows
    assert "checkpoints 1 9.0 kB 365d ago" in rows
    assert "all 5 15.0 kB" in rows


def test_each_artefact_is_listed_with_the_results_that_use_it(run, tmp_path):
    record = tmp_path / "results" / "points" / "one" / "record.json"
    record.parent.mkdir(parents=True)
    write_sealed(record, {"name": "one", "key": "k", "keys": {"moments": KEYS["b"] + "f" * 40, "fit": "0" * 64}})
    _, output, _ = run("list", "--long", "--results", str(tmp_path / "results"))
    users = {line.split()[1]: line.split()[-1] for line in output.splitlines() if line.strip().startswith("moments")}
    assert users[KEYS["b"]] == "one" and users[KEYS["a"]] == "ago"


# -------------------------------------------------------------------------------------------------------------- prune
def test_what_was_not_used_for_long_goes_whole_with_its_lock(run, cache):
    code, output, _ = run("prune", "--older-than", "60h")
    assert code == 0 and left(cache) == "bc" and not (cache / "digests" / "d").exists()
    assert not (cache / "moments" / f"{KEYS['a']}.lock").exists()
    assert f"moments/{KEYS['a']}: 2.0 kB" in output and "freed 2.0 kB in 2 of the artefacts" in output
    assert (cache / "checkpoints" / "model-v1").is_dir()
    assert not list(cache.rglob("*.part"))


@pytest.mark.parametrize(("size", "stay"), [("10kB", "abc"), ("4.5kB", "bc"), ("3.9kB", "c"), ("1", "c")])
def test_the_least_recently_used_go_until_the_rest_fits(run, cache, size, stay):
    assert run("prune", "--max-size", size)[0] == 0
    assert left(cache) == stay
    assert (cache / "digests" / "d").exists()  # a few bytes are no room, and costly to find again


def test_a_dry_run_only_says(run, cache):
    _, output, _ = run("prune", "--max-size", "0", "--dry-run")
    assert left(cache) == "abc" and "would free 5.0 kB in 2" in output


def test_what_somebody_holds_stays(run, cache):
    with FileLock(cache / "moments" / f"{KEYS['a']}.lock"):
        run("prune", "--max-size", "0")
    assert left(cache) == "ac"


def test_what_a_running_point_needs_stays(run, cache):
    with beating([cache / "running" / "point.json"], {"uses": [KEYS["b"] + "f" * 40]}):
        run("prune", "--max-size", "0")
    assert left(cache) == "bc"
    run("prune", "--max-size", "0")
    assert left(cache) == "c"


def test_models_go_when_asked_for(run, cache):
    assert run("prune", "--older-than", "30d", "--kind", "checkpoints")[0] == 0
    assert left(cache) == "abc" and not (cache / "checkpoints" / "model-v1").exists()


def test_leftovers_of_dead_processes_are_swept(run, cache):
    dead, alive = 2**22 + 1, os.getpid()  # a number above the largest that Linux gives
    files = {number: cache / "moments" / f".x.host.{number}.part" for number in (dead, alive)}
    for file in files.values():
        put(file, 5, DAY)
    young = cache / "moments" / f".y.host.{dead}.part"
    young.touch()
    assert run("prune", "--older-than", "900d")[0] == 0
    assert not files[dead].exists() and files[alive].exists() and young.exists()


def test_a_note_goes_with_its_file(run, cache):
    for name in ("x.safetensors", "x.safetensors.json"):
        put(cache / "shared" / name, 100, DAY)
    _, output, _ = run("prune", "--older-than", "12h", "--kind", "shared")
    assert "freed 200 B in 1" in output and not list((cache / "shared").iterdir())


def test_a_pruned_cache_is_made_again(application, settings, tmp_path, capsys):
    cache = next(s for s in settings if s.startswith("cache=")).removeprefix("cache=")
    lines = ("rank.k=0", NO_TASKS, "calibration.shuffle_seed=9")  # moments that no other test has
    assert application(*lines)[0] == 0
    before = Swept(tmp_path / "results").of(rank=0)
    assert main(["--cache", cache, "list", "--long", "--results", str(tmp_path)]) == 0
    users = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in users if line[:1] == ["moments"] and line[-1] == before["name"]] == [
        before["keys"]["moments"][:24]
    ]
    folders = {path for path in Path(cache, "moments").iterdir() if path.is_dir()}
    for file in (f for folder in folders for f in (folder, *folder.iterdir())):
        os.utime(file, (time.time() - DAY,) * 2)
    assert main(["--cache", cache, "prune", "--max-size", "0", "--kind", "moments"]) == 0
    assert not [path for path in folders if path.exists()]
    capsys.readouterr()
    code, _, errors = application(*lines, "force=true")
    after = Swept(tmp_path / "results").of(rank=0)
    assert (code, errors, after["metrics"]) == (0, "", before["metrics"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prune"], "prune needs --max-size or --older-than"),
        (["prune", "--max-size", "20XB"], "--max-size=20XB is no size: write for example 20GB"),
        (["prune", "--older-than", "soon"], "--older-than=soon is no age: write for example 30d"),
        (["prune", "--max-size", "1", "--kind", "x"], "--kind=x is not in"),
        (["--cache", "/nowhere", "list"], "--cache=/nowhere is no folder"),
    ],
)
def test_bad_input_is_one_sentence(run, arguments, sentence):
    code, output, errors = run(*arguments)
    assert (code, output) == (1, "") and len(errors.splitlines()) == 1
    assert errors.startswith("caldera-cache: ") and sentence in errors
