"""plan=true: what would be run is said, and nothing is."""

import shutil

import pytest

from sweeps.pipeline import run_point
from sweeps.preview import preview, table_of
from sweeps.progress import Reporter
from tests.sweeps.test_estimate import MACHINE

GRID = ("-m", "rank.k=0,8", "method.inputs=original", "plan=true")
PARTS = ("evaluation.tasks=[]", "method.inputs=original")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr("sweeps.preview.machine_of", lambda point: MACHINE)


@pytest.fixture
def described(tiny_llama_dir, tmp_path):
    """A folder with the tiny model's config.json and nothing else."""
    folder = tmp_path / "described"
    folder.mkdir()
    shutil.copyfile(tiny_llama_dir / "config.json", folder / "config.json")
    return folder


@pytest.mark.parametrize("arguments", [GRID, ("rank.k=8", "plan=true")])
def test_a_plan_runs_nothing(arguments, application, tmp_path):
    code, output, errors = application(*arguments, f"cache={tmp_path / 'cache'}")
    assert code == 0, errors
    assert "-r8-" in output and "nothing was run" in output
    assert not list((tmp_path / "results").rglob("record.json"))
    made = {path.name for path in (tmp_path / "cache").iterdir()}
    assert not made & {"moments", "baselines", "shared", "spill", "finite"}


def test_a_plan_of_budgets_says_what_they_will_weigh(point):
    strategies = ("uniform", "allocated")
    jobs = [point(f"budget={s}", "budget.bits=2.4", *PARTS, "calibration.shuffle_seed=7") for s in strategies]
    (_, uniform, _), (_, allocated, there) = preview(jobs, MACHINE)
    assert 0.99 * 2.4 < uniform.stored_bits <= 2.4 and 0.97 * 2.4 < allocated.stored_bits <= 2.4
    assert "allocate" in allocated.stages and "allocate" not in uniform.stages
    assert not {"curves", "sensitivity"} & set(there)
    row = table_of([(jobs[1], allocated, there)]).columns
    assert list(row[1].cells) == ["mixed"]


def test_points_after_the_first_share_what_it_makes(point):
    jobs = [point(f"rank.k={rank}", *PARTS, "calibration.shuffle_seed=5") for rank in (8, 16, 0)]
    (_, first, _), (_, second, there), (_, third, _) = preview(jobs, MACHINE)
    assert "calibrate" in first.stages and "calibrate" not in second.stages
    assert "baseline" not in second.stages and set(there) == {"baseline", "moments", "factors", "subspaces"}
    assert "compress" in third.stages


def test_a_plan_says_what_is_there(point):
    job, other = (point(f"rank.k={rank}", *PARTS, "calibration.shuffle_seed=6") for rank in (8, 4))
    run_point(job, Reporter(job.name))
    (_, done, first), (_, left, second) = preview([job, other], MACHINE)
    assert first == ["done"] and not done.stages and done.stored_bits > 0
    assert set(second) == {"baseline", "moments", "factors", "subspaces"}
    assert list(left.stages) == ["compress", "load", "perplexity", "tasks"]


def test_a_model_without_weights_is_planned(application, described):
    code, output, errors = application("rank.k=8", "plan=true", f"model.path={described}")
    assert code == 0, errors
    assert "no weights here" in output.replace("\n", " ")
    assert application("rank.k=8", f"model.path={described}")[0] == 1


def test_a_hub_id_that_is_not_here_is_one_sentence(application, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    code, _, errors = application("plan=true", "model.path=nobody/nothing")
    assert code == 1 and errors.count("\n") == 1 and "plan=true downloads nothing" in errors


@pytest.mark.parametrize("bad", [("rank.k=4096",), ("-m", "rank.k=0,4096"), ("calibration.sequences=1000000",)])
def test_a_mistake_is_one_sentence(bad, application):
    code, output, errors = application(*bad, "plan=true")
    assert code == 1 and errors.startswith("caldera-run: ") and errors.count("\n") == 1
    assert "nothing was run" not in output
