"""`caldera-run retry=SWEEP` does what is missing of a sweep, as it was planned, and nothing else."""

import json
from pathlib import Path

import pytest

from sweeps import fitting
from sweeps.manifest import manifest_of
from sweeps.store import write_sealed
from tests.sweeps.swept import NO_TASKS, Swept


@pytest.fixture
def failing(monkeypatch):
    """failing(*ranks): compression at these ranks runs out of memory."""
    real = fitting.decompose

    def _failing(*ranks: int) -> None:
        def decompose(weight, moments, method, **options):
            if method.rank in ranks:
                raise RuntimeError("out of memory")
            return real(weight, moments, method, **options)

        monkeypatch.setattr(fitting, "decompose", decompose)

    return _failing


@pytest.fixture
def retried(tmp_path, typed):
    """retried(*arguments): the console script without other settings."""
    return lambda *arguments: typed(f"results={tmp_path / 'results'}", *arguments)


def plan(results: Path, sweep: str) -> None:
    """A manifest without points."""
    file = manifest_of(results, sweep)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(file, {"sweep": sweep, "created": "", "points": []})


def test_only_what_failed_is_done_again_and_a_failure_does_not_stop_the_rest(application, failing, retried, tmp_path):
    failing(4, 2)
    assert application("-m", "rank.k=0,2,4", NO_TASKS, "sweep=three")[0] == 1
    results = (tmp_path / "results").rename(tmp_path / "moved")  # the sweep goes by where it is found
    before = (Swept(results).folder(Swept(results).of(rank=0)) / "record.json").stat().st_mtime_ns

    failing(4)
    code, output, errors = retried("retry=three", f"results={tmp_path}", "compute.spill_mb=7", "tracker=none")
    swept = Swept(results)
    assert (code, [swept.of(rank=k)["status"] for k in (0, 2, 4)]) == (1, ["done", "done", "failed"])
    assert f"3 points of three in {results}, 2 of them to do again" in output
    assert errors.count(f"failed: {swept.of(rank=4)['name']}, see") == 1 and swept.of(rank=2)["name"] not in errors
    assert swept.of(rank=2)["config"]["compute"]["spill_mb"] == 7 and swept.of(rank=2)["config"]["rank"]["k"] == 2
    assert (swept.folder(swept.of(rank=0)) / "record.json").stat().st_mtime_ns == before
    assert not (tmp_path / "results").exists()

    failing()
    code, output, errors = retried(f"retry={results}")
    assert (code, errors) == (0, "") and "1 of them to do again" in output and "frontier.png" in output
    code, output, errors = retried("retry=three", f"results={results}")
    assert (code, errors) == (0, "") and "0 of them to do again" in output


def test_a_point_that_would_be_another_by_now_is_not_run(application, failing, retried, tmp_path):
    failing(4)
    application("-m", "rank.k=4", NO_TASKS)
    file = manifest_of(tmp_path / "results", "default")
    found = json.loads(file.read_text())
    found["points"][0]["config"]["seed"] = 5
    write_sealed(file, {key: found[key] for key in ("sweep", "created", "points")})
    code, _, errors = retried("retry=default")
    assert code == 1 and "so it is tiny-caldera-r4" in errors and "run the sweep" in errors


def test_an_unknown_sweep_is_one_sentence_that_lists_the_known(retried, tmp_path):
    for folder, sweep in (("a", "one"), ("b", "two")):
        plan(tmp_path / "results" / folder, sweep)
    code, output, errors = retried("retry=three")
    assert (code, output) == (1, "")
    assert errors == (
        f"caldera-run: retry=three is no sweep below results={tmp_path / 'results'}, whose sweeps are: one, two\n"
    )


def test_a_name_that_several_folders_have_is_refused(retried, tmp_path):
    for folder in "ab":
        plan(tmp_path / "results" / folder, "one")
    code, _, errors = retried("retry=one")
    assert code == 1 and len(errors.splitlines()) == 1 and "choose one by results=..." in errors


@pytest.mark.parametrize("setting", ["rank.k=4", "model=hf", "sweep=x", "force=true", "+compute_x=1"])
def test_settings_that_would_change_points_are_refused(retried, tmp_path, setting):
    plan(tmp_path / "results", "one")
    code, output, errors = retried("retry=one", setting)
    assert (code, output) == (1, "") and len(errors.splitlines()) == 1
    assert f"{setting.lstrip('+').partition('=')[0]} beside retry would change the points: leave it out" in errors


def test_a_multirun_of_retries_is_refused(retried, tmp_path):
    plan(tmp_path / "results", "one")
    code, output, errors = retried("retry=one", "-m")
    assert (code, output) == (1, "")
    assert errors == "caldera-run: retry=one runs its points by itself: leave out -m and experiment=...\n"
