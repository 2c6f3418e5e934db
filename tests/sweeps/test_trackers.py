"""Trackers get a copy of each record, read back here from W&B's own files, and cannot cost a point."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from sweeps import trackers
from sweeps.mirror import curves
from sweeps.sync import main
from tests.sweeps.swept import NO_TASKS, Swept

RECORDS = ("run", "summary", "history", "metric", "artifact", "exit")


@pytest.fixture(scope="module")
def tracked(settings, console, tmp_path_factory) -> Swept:
    """A point whose budget chooses its rank, with its checkpoint, and the uncompressed model."""
    results = tmp_path_factory.mktemp("tracked") / "results"
    choices = ["budget=uniform", "budget.bits=4", "method.inputs=original", NO_TASKS]
    tracker = ["tracker=wandb", "tracker.artifact=true", "sweep=tracked"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(results.parent))  # where artifacts wait for their upload
        done = console(*settings, *choices, *tracker, f"results={results}")
    return Swept(results, done.stdout, done.stderr, done.returncode)


def test_every_point_is_a_run_of_its_sweep_with_flat_axes_and_numbers(tracked):
    assert (tracked.code, tracked.errors, len(tracked.records)) == (0, "", 2)
    for one in tracked.records:
        found = offline_run(tracked.results, one)
        run, config, summary = found.run, found.config, found.summary
        assert (run.project, run.run_group, run.display_name) == ("caldera-sweeps", "tracked", one["name"])
        assert {key: config[key] for key in one["point"]} == one["point"]
        assert config["full"] == one["config"]
        perplexity = one["metrics"]["perplexity/heldout_256"]
        assert summary["perplexity/heldout_256"] == summary["perplexity"] == perplexity["value"]
        assert summary["perplexity/heldout_256_stderr"] == perplexity["stderr"]
        assert summary["bits/stored"] == summary["stored_bits"] == one["bits"]["stored"]
        assert (summary["status"], found.exit_code) == ("done", 0)
        achieved = (one["allocation"] or {}).get("achieved", {}).get("bits")
        assert summary.get("budget_achieved_bits") == achieved
        slashed = {name for name in summary if "/" in name and not name.startswith(("bits/", "seconds/"))}
        assert slashed == {name for m in one["metrics"] for name in (m, f"{m}_stderr")}
        assert {f"seconds/{stage}" for stage in one["timings_s"]} <= set(summary)


def test_tables_hold_every_matrix_every_half_step_and_every_choice(tracked):
    for one in tracked.records:
        tables = offline_run(tracked.results, one).tables
        rows = {m["name"]: m for m in one["matrices"]}
        assert set(tables) == ({"matrices", "convergence", "allocation"} if rows else set())
        for name, table in tables.items():
            read = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
            if name == "matrices":
                assert {r["matrix"]: r["relative_error"] for r in read} == {
                    k: m["relative_error"] for k, m in rows.items()
                }
            elif name == "allocation":
                assert {r["matrix"]: (r["rank"], r["q"]) for r in read} == {
                    k: (m["rank"], m["q"]) for k, m in rows.items()
                }
            else:
                traced = [(k, s["step"], s["error"]) for k, m in rows.items() for s in m["trace"]]
                assert sorted((r["matrix"], r["step"], r["error"]) for r in read) == sorted(traced)


def test_curves_are_drawn_over_depth_and_over_half_steps(tracked):
    one = tracked.of(method="caldera")
    found = offline_run(tracked.results, one)
    layers = [row for row in found.history if "steps/block" in row]
    assert [row["steps/block"] for row in layers] == [0, 1]
    errors = {m["name"]: m["relative_error"] for m in one["matrices"]}
    assert layers[1]["layers/q_proj"] == pytest.approx(errors["model.layers.1.self_attn.q_proj"])
    converging = [row for row in found.history if "steps/half_step" in row]
    traces = [[s["error"] for s in m["trace"]] for m in one["matrices"] if m["name"].endswith("q_proj")]
    assert [row["steps/half_step"] for row in converging] == list(
        range(max(len(t) for m in one["matrices"] for t in [m["trace"]]))
    )
    assert converging[0]["convergence/q_proj"] == pytest.approx(sum(t[0] for t in traces) / 2)
    over = {m.glob_name: m.step_metric for m in found.metrics if m.glob_name}
    assert over == {"layers/*": "steps/block", "convergence/*": "steps/half_step"}
    assert {m.name for m in found.metrics if m.options.hidden} == {"steps/block", "steps/half_step"}


def test_a_matrix_that_ended_early_keeps_its_best_iterate():
    place = {"shape": [4, 4], "relative_error": 0.1}
    steps = {"a": [0.4, 0.2, 0.3], "b": [0.6, 0.5, 0.4, 0.2]}
    matrices = [
        place | {"name": f"h.{i}.{name}.q", "trace": [{"iteration": 0, "step": "Q", "error": e} for e in errors]}
        for i, (name, errors) in enumerate(steps.items())
    ]
    rows = curves({"name": "some", "matrices": matrices})
    assert [row["convergence/q"] for row in rows] == pytest.approx([0.5, 0.35, 0.35, 0.2])


def test_pictures_and_the_checkpoint_go_along(tracked):
    last = tracked.of(method="caldera")
    found = offline_run(tracked.results, last)
    pictures = {path.name.split("_")[1]: path.read_bytes() for path in found.files.glob("media/images/picture_*.png")}
    assert set(pictures) == {"frontier", "errors"}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    (artifact,) = [a for a in found.artifacts if a.type == "model"]
    checkpoint = tracked.checkpoint(last)
    assert artifact.name == checkpoint.name
    assert {e.path for e in artifact.manifest.contents} == {f.name for f in checkpoint.iterdir() if f.is_file()}
    uncompressed = offline_run(tracked.results, tracked.of(method="none"))
    assert "model" not in {a.type for a in uncompressed.artifacts}


@dataclass
class Run:
    """An offline run, from W&B's own files."""

    run: object
    config: dict
    summary: dict
    history: list[dict]
    metrics: list
    artifacts: list
    exit_code: int
    files: Path
    tables: dict[str, dict]


def offline_run(results: Path, record: dict) -> Run:
    """The only run of a record."""
    run_id = record["key"][:16]
    (folder,) = (results / "wandb").glob(f"offline-run-*-{run_id}")
    found = wandb_records(folder / f"run-{run_id}.wandb")
    of = {kind: [getattr(r, kind) for r in found if r.HasField(kind)] for kind in RECORDS}
    read = lambda items: {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}  # noqa: E731
    (run,), (end,) = of["run"], of["exit"]
    summary = {key: value for s in of["summary"] for key, value in read(s.update).items()}
    tables = {f.name.split("_")[1]: json.loads(f.read_text()) for f in folder.glob("files/media/table/table_*.json")}
    return Run(
        run, read(run.config.update), summary, [read(h.item) for h in of["history"]], of["metric"], of["artifact"],
        end.exit_code, folder / "files", tables,
    )  # fmt: skip


def numbers(history: list[dict]) -> list[dict]:
    """The rows of curves, without W&B's own keys."""
    curves = ("layers/", "convergence/", "steps/")
    rows = [{k: v for k, v in row.items() if k.startswith(curves)} for row in history]
    return [row for row in rows if row]


def wandb_records(file: Path) -> list:
    """The protobuf records of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, found = file.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def test_a_broken_tracker_does_not_cost_the_point(application, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "wandb").write_text("a file where W&B wants a folder")
    code, *_ = application("rank.k=0", "tracker=wandb", NO_TASKS)
    swept = Swept(tmp_path / "results")
    record = swept.of(method="caldera")
    assert (code, record["status"]) == (0, "done")
    log = (swept.folder(record) / "log.txt").read_text()
    assert log.count("tracker wandb failed (FileExistsError") == 2  # the point and the uncompressed model


def test_wandb_without_a_login_does_not_cost_the_point(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(trackers.logger, "propagate", True)
    point = {"name": "some", "key": "0123456789abcdef", "sweep": "default", "status": "done", "config": {}, "bits": {}}
    record = point | {"point": {"method": "caldera"}, "metrics": {}, "matrices": [], "timings_s": {}, "memory": {}}
    trackers.track(
        record, {"name": "wandb", "mode": "online", "project": "p", "entity": None, "artifact": False}, tmp_path
    )
    assert "tracker wandb failed (UsageError: No API key configured" in caplog.text


# ----------------------------------------------------------------------------------------------------------------- sync
@pytest.fixture
def copied(tracked, tmp_path) -> Path:
    """The tracked results as another machine has them."""
    return shutil.copytree(tracked.results, tmp_path / "copied", symlinks=True)


def test_offline_runs_are_written_again_in_the_place_of_the_first(tracked, copied, capsys):
    before = sorted((copied / "wandb").glob("offline-run-*"))
    assert main(["sync", str(copied), "--mode", "offline", "--project", "team/other"]) == 0
    assert "2 runs written to" in capsys.readouterr().out
    assert not any(folder.exists() for folder in before)
    for one in tracked.records:
        again = offline_run(copied, one)
        first = offline_run(tracked.results, one)
        assert (again.run.entity, again.run.project, again.run.run_id) == ("team", "other", first.run.run_id)
        assert (numbers(again.history), again.config["full"]) == (numbers(first.history), first.config["full"])


def test_a_copy_that_fails_is_one_sentence_and_costs_nothing(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    before = sorted(copied.rglob("*"))
    assert main(["sync", str(copied)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("caldera-wandb: tiny-") and "No API key" in errors and errors.count("\n") == 1
    assert set(before) <= set(copied.rglob("*"))


@pytest.mark.parametrize("wrong", [["nowhere"], ["{copied}", "--sweep", "other"]])
def test_nothing_to_copy_is_one_sentence(wrong, copied, capsys):
    assert main(["sync", *(part.format(copied=copied) for part in wrong)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
