"""A failed point is recorded where it failed, the others go on, and the sweep says so at the end."""

from pathlib import Path

import pytest

from sweeps import fitting
from tests.sweeps.swept import NO_TASKS, TOP_LEVEL, Swept


@pytest.fixture
def dead(altered) -> Path:
    """A model in which no token reaches the MLP of block 1: its second moments are zero."""
    return altered("dead", lambda tensors: tensors["model.layers.1.post_attention_layernorm.weight"].zero_())


def test_a_failed_point_is_recorded_and_the_others_go_on(application, dead, tiny_llama_dir, tmp_path):
    models = f"model.path={dead},{tiny_llama_dir}"
    code, output, errors = application("-m", models, "rank.k=4", NO_TASKS)
    swept = Swept(tmp_path / "results")
    failed, done = swept.of(model="dead", method="caldera"), swept.of(model="tiny", method="caldera")
    assert (code, failed["status"], done["status"]) == (1, "failed", "done")
    assert set(failed) == TOP_LEVEL
    assert (failed["metrics"], failed["bits"], failed["matrices"]) == ({}, None, [])
    assert failed["error"]["type"] == "NumericalError"
    assert "mlp.gate_proj: the second moments are zero" in failed["error"]["message"]
    assert (failed["error"]["stage"], failed["error"]["block"]) == ("compress", 1)
    assert failed["error"]["matrix"] == "model.layers.1.mlp.gate_proj"
    assert "Traceback" in failed["error"]["traceback"] and "Traceback" not in output + errors
    assert f"failed: {failed['name']}" in errors and done["name"] not in errors
    assert (tmp_path / "results" / "frontier.png").is_file()
    assert "point failed" in (swept.folder(failed) / "log.txt").read_text()


def test_a_sweep_without_a_finished_point_fails_too(application, dead, tmp_path):
    code, _, errors = application("-m", f"model.path={dead}", "rank.k=0", NO_TASKS)
    failed = [r for r in Swept(tmp_path / "results").records if r["status"] == "failed"]
    assert (len(failed), code) == (1, 1)
    assert f"failed: {failed[0]['name']}" in errors


def test_an_error_from_elsewhere_is_one_failed_point_and_is_made_up_for(application, monkeypatch, tmp_path):
    real, name = fitting.decompose, "model.layers.1.self_attn.k_proj"

    def out_of_memory(weight, moments, method, **options):
        if method.rank == 4 and options["name"] == name:
            raise RuntimeError("out of memory")
        return real(weight, moments, method, **options)

    monkeypatch.setattr(fitting, "decompose", out_of_memory)
    sweep = ["-m", "rank.k=4,2", NO_TASKS, "checkpoint.keep=none"]
    code, _, errors = application(*sweep)
    swept = Swept(tmp_path / "results")
    error = swept.of(rank=4)["error"]
    assert (code, swept.of(rank=4)["status"], swept.of(rank=2)["status"]) == (1, "failed", "done")
    assert [error[key] for key in ("type", "message", "stage", "matrix", "block")] == [
        "RuntimeError", "out of memory", "compress", name, 1,
    ]  # fmt: skip
    assert f"failed: {swept.of(rank=4)['name']}" in errors

    monkeypatch.undo()
    before = swept.folder(swept.of(rank=2)).joinpath("record.json").stat().st_mtime_ns
    code, output, errors = application(*sweep)
    swept = Swept(tmp_path / "results")
    assert (code, errors, swept.of(rank=4)["status"]) == (0, "", "done")
    assert "2 points, 1 of them to compute" in output
    assert swept.folder(swept.of(rank=2)).joinpath("record.json").stat().st_mtime_ns == before
    assert not any(swept.checkpoint(record).exists() for record in swept.records)
