"""Trackers get a copy of each record, read back here from W&B's own files, and cannot cost a point."""

import json
from pathlib import Path

from sweeps import trackers
from tests.sweeps.swept import NO_TASKS, Swept


def test_a_budget_is_kept_and_the_point_is_tracked(application, tmp_path):
    code, *_ = application("budget=uniform", "budget.bits=2.5", "tracker=wandb", "sweep=tracked", NO_TASKS)
    swept = Swept(tmp_path / "results")
    record = swept.of(method="caldera")
    assert (code, record["status"], record["point"]["budget_bits"]) == (0, "done", 2.5)
    assert 2.4 < record["bits"]["stored"] <= 2.5
    runs = {r["key"][:16]: offline_run(swept.results, r["key"][:16]) for r in swept.records}
    for one in swept.records:
        run, config, summary, tables = runs[one["key"][:16]]
        assert (run.project, run.run_group, run.display_name) == ("caldera-sweeps", "tracked", one["name"])
        assert {key: config[key] for key in one["point"]} == one["point"]
        assert config["full"] == one["config"]
        assert summary["perplexity/heldout_256"] == one["metrics"]["perplexity/heldout_256"]["value"]
        assert summary["perplexity/heldout_256_stderr"] == one["metrics"]["perplexity/heldout_256"]["stderr"]
        assert (summary["bits/stored"], summary["status"]) == (one["bits"]["stored"], "done")
        assert {f"seconds/{stage}" for stage in one["timings_s"]} <= set(summary)
        assert [len(table["data"]) for table in tables] == ([14] if one["matrices"] else [])


def offline_run(results: Path, run_id: str) -> tuple:
    """The run, its config, its summary and its tables, from W&B's own files of an offline run."""
    (folder,) = (results / "wandb").glob(f"offline-run-*-{run_id}")
    (run,) = [r.run for r in wandb_records(folder / f"run-{run_id}.wandb") if r.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    summary = {}
    for record in wandb_records(folder / f"run-{run_id}.wandb"):
        summary |= {i.key: json.loads(i.value_json) for i in record.summary.update if i.key}
    tables = [json.loads(f.read_text()) for f in folder.glob("files/media/table/*.json")]
    return run, config, summary, tables


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
    trackers.track(record, {"name": "wandb", "mode": "online", "project": "p", "entity": None}, tmp_path)
    assert "tracker wandb failed (UsageError: No API key configured" in caplog.text
