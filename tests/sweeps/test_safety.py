"""No code is run that nobody asked for, no path leaves its folder, no secret is written down."""

import json
from pathlib import Path

import pytest

from caldera.errors import UserError
from tests.sweeps.swept import NO_TASKS, Swept

SECRET = "0123456789abcdef0123456789abcdef01234567"  # as long as a key of W&B's


def test_secrets_are_in_no_file_and_in_nothing_that_is_said(console, settings, monkeypatch, tmp_path):
    """In a process of its own: W&B remembers a key for as long as it is loaded."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    results = tmp_path / "results"
    lines = ["rank.k=2", "method=fast", NO_TASKS, "tracker=wandb", f"results={results}"]
    done = console(*(s for s in settings if s != "tracker=none"), *lines)
    assert done.returncode == 0 and list(results.glob("wandb/offline-run-*"))
    files = [file for file in results.rglob("*") if file.is_file()]
    assert len(files) > 10 and not [file for file in files if SECRET.encode() in file.read_bytes()]
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("setting", ["model.name=../../up", "method.name=a/b", "sweep=../up", "sweep=..", "sweep=''"])
def test_names_lead_out_of_no_folder(point, setting):
    with pytest.raises(UserError, match=f"{setting.partition('=')[0]}=.* names files: "):
        point(setting)


@pytest.fixture
def coded(altered, tmp_path) -> tuple[Path, Path]:
    """A model whose folder brings code that would write a file, and that file."""
    folder, trace = altered("coded", lambda tensors: None), tmp_path / "was here"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Mine: pass\n")
    return folder, trace


def test_a_models_code_is_not_run_unless_it_is_asked_for(application, coded):
    folder, trace = coded
    code, _, errors = application(f"model.path={folder}", NO_TASKS)
    assert code == 1 and not trace.exists()
    assert (
        errors.startswith(f"caldera-run: model.path={folder} is no causal language model") and errors.count("\n") == 1
    )


def test_a_record_of_the_first_schema_is_read(application, tmp_path):
    assert application("rank.k=2", "method=fast", NO_TASKS)[0] == 0
    results = tmp_path / "results"
    (record,) = [r for r in Swept(results).records if r["checkpoint"]]
    file = results / "points" / record["name"] / "record.json"
    old = {key: value for key, value in record.items() if key not in ("checksum", "keys", "checkpoint")}
    file.write_text(json.dumps(old | {"schema_version": 1}))
    code, output, errors = application("rank.k=2", "method=fast", NO_TASKS)
    assert (code, errors) == (0, "") and "done before" in output
