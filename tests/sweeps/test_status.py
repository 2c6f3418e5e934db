"""What `caldera-status` and the live table say is what the files of a sweep say, at any moment."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.heartbeat import SILENCE, beating, is_alive, read_heartbeat
from sweeps.manifest import manifest_of
from sweeps.overview import Overview, Results, Status
from sweeps.progress import LIVE, Reporter, warn
from sweeps.status import main, view
from sweeps.store import read_sealed, write_sealed
from tests.sweeps.swept import NO_TASKS, Swept
from tests.sweeps.terminal import Terminal

SCRIPT = Path(sys.executable).with_name("caldera-run")


@pytest.fixture(scope="module")
def dead(tiny_llama_dir, tmp_path_factory) -> Path:
    """A model in which no token reaches the MLP of block 1: its compression fails."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path_factory.mktemp("models") / "dead"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def swept(settings, dead, tiny_llama_dir, console, tmp_path_factory) -> Swept:
    """Two points, of which one fails."""
    results = tmp_path_factory.mktemp("sweep") / "results"
    models = f"model.path={dead},{tiny_llama_dir}"
    done = console("-m", *settings, models, "rank.k=4", NO_TASKS, "sweep=two", f"results={results}")
    return Swept(results, done.stdout, done.stderr, done.returncode)


@pytest.fixture
def results(swept, tmp_path) -> Path:
    return Path(shutil.copytree(swept.results, tmp_path / "results"))


@pytest.fixture
def status(capsys):
    """status(*arguments): (exit code, stdout, stderr) of the console script."""

    def _status(*arguments) -> tuple[int, str, str]:
        return main(list(map(str, arguments))), *capsys.readouterr()

    return _status


def add_points(results: Path, *names: str) -> None:
    """Plan points that never run."""
    file = manifest_of(results, "two")
    found = read_sealed(file)
    found["points"] += [{"name": name, "key": name, "config": {}} for name in names]
    write_sealed(file, found)


# --------------------------------------------------------------------------------------------------------- the manifest
def test_the_manifest_lists_what_was_planned_with_its_configuration(swept):
    found = read_sealed(manifest_of(swept.results, "two"))
    records = {r["name"]: r for r in swept.records if r["point"]["method"] != "none"}
    assert found["sweep"] == "two" and {p["name"] for p in found["points"]} == set(records)
    for point in found["points"]:
        record = records[point["name"]]
        assert (point["key"], point["config"]) == (record["key"], record["config"])


def test_a_single_run_joins_its_sweep_and_a_plan_does_not(application, tmp_path):
    file = manifest_of(tmp_path / "results", "default")
    assert application("rank.k=1", "plan=true")[0] == 0
    assert application("-m", "rank.k=1,2", "plan=true")[0] == 0
    assert not file.exists()
    assert application("rank.k=2", NO_TASKS)[0] == 0
    before = file.stat().st_mtime_ns
    assert len(read_sealed(file)["points"]) == 1
    assert application("rank.k=2", NO_TASKS)[0] == 0
    assert file.stat().st_mtime_ns == before
    file.write_text(file.read_text()[:100])
    assert f"{file} is damaged: it is made again" in application("rank.k=2", NO_TASKS)[2]
    assert len(read_sealed(file)["points"]) == 1


# ----------------------------------------------------------------------------------------------------------- the states
def test_a_sweep_with_a_failed_point(swept, status):
    code, output, errors = status(swept.results)
    failed, done = swept.of(model="dead", method="caldera"), swept.of(model="tiny", method="caldera")
    assert (code, errors) == (1, "")
    assert "2 points: 1 failed, 1 done" in output
    assert f"failed: {failed['name']}: compress, block 1, {failed['error']['matrix']}: NumericalError" in output
    assert done["name"] in output


def test_json_has_the_numbers_of_the_records(swept, status):
    code, output, _ = status(swept.results, "--json", "--sweep", "two")
    (folder,) = json.loads(output)["folders"]
    points = {p["name"]: p for p in folder["points"]}
    record = swept.of(model="tiny", method="caldera")
    found = points[record["name"]]
    assert code == 1 and set(points) == {r["name"] for r in swept.records}
    assert (found["state"], found["stored_bits"]) == ("done", record["bits"]["stored"])
    assert (found["metric"], found["value"]) == (
        "perplexity/heldout_256", record["metrics"]["perplexity/heldout_256"]["value"],
    )  # fmt: skip
    assert found["seconds"] == pytest.approx(sum(record["timings_s"].values()))
    assert folder["best"] == [record["name"]] and folder["seconds_left"] is None
    assert folder["counts"] == {"running": 0, "failed": 1, "interrupted": 0, "waiting": 0, "done": 1}


def test_what_waits_is_counted_and_its_time_estimated(results, swept):
    add_points(results, "a", "b")
    overview = Results(results).look()
    pace = sum(swept.of(model="tiny", method="caldera")["timings_s"].values())
    assert overview.counts["waiting"] == 2
    assert overview.seconds_left == pytest.approx(2 * pace)


@pytest.mark.parametrize(("began", "state"), [(-60, "failed"), (60, "interrupted")])
def test_what_a_killed_process_left_counts_if_its_failure_is_not_recorded(results, swept, began, state):
    name = swept.of(model="dead", method="caldera")["name"]
    record = results / "points" / name / "record.json"
    times = dict.fromkeys(("started", "updated", "stage_started"), record.stat().st_mtime + began)
    left = {"pid": 2**22 + 1, "host": platform.node(), "stage": "compress", "done": 1, "total": 4} | times
    record.with_name("progress.json").write_text(json.dumps(left))
    (found,) = [point for point in Results(results).look().points if point.name == name]
    assert found.state == state


def test_a_damaged_record_is_named_and_waits(results, swept, status):
    name = swept.of(model="tiny", method="caldera")["name"]
    record = results / "points" / name / "record.json"
    record.write_text(record.read_text()[:1000])
    _, output, errors = status(results)
    assert str(record) in errors and "damaged" in errors and len(errors.splitlines()) == 1
    assert "1 waiting" in output
    shutil.rmtree(results / "sweeps")  # as versions without manifests left it
    assert "1 waiting" in status(results)[1]


def test_a_record_of_a_newer_version_is_refused(results, status):
    record = next(results.glob("points/*/record.json"))
    write_sealed(record, read_sealed(record) | {"schema_version": 99})
    code, output, errors = status(results)
    assert (code, output) == (1, "") and len(errors.splitlines()) == 1
    assert f"{record} has schema 99, newer than" in errors and "update this package" in errors


def test_a_folder_of_several_results_shows_each(results, status, tmp_path):
    shutil.copytree(results, tmp_path / "other")
    code, output, _ = status(tmp_path)
    assert code == 1 and output.count("2 points: 1 failed, 1 done") == 2


@pytest.mark.parametrize("what", ["empty", "absent"])
def test_a_folder_without_points_is_one_sentence(status, tmp_path, what):
    folder = tmp_path / what
    what == "empty" and folder.mkdir()
    assert status(folder) == (
        1, "", f"caldera-status: {folder} holds no points: give the results folder of a sweep\n",
    )  # fmt: skip


def test_an_unknown_sweep_is_one_sentence_with_the_known_ones(results, status):
    code, _, errors = status(results, "--sweep", "nope")
    assert code == 1 and "--sweep=nope has no points" in errors and errors.endswith("known are two\n")


def test_watching_ends_when_nothing_is_left_to_do(results, status):
    code, output, _ = status(results, "--watch")
    assert code == 1 and "2 points: 1 failed, 1 done" in output


def test_the_status_loads_no_model_library():
    script = "import sys, sweeps.status, sweeps.live, sweeps.cache; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "transformers", "numba", "matplotlib", "safetensors"} & set(done.stdout.split())


# ------------------------------------------------------------------------------------------------------- signs of life
def test_a_heartbeat_says_what_is_done_and_goes_when_it_ends(tmp_path):
    path = tmp_path / "folder" / "progress.json"
    with beating([path], {"name": "x"}) as pulse:
        reporter = Reporter("x", pulse=pulse)
        with reporter.stage("compress") as progress:
            progress(3, 12)
            pulse.write()
            beat = read_heartbeat(path)
            assert is_alive(beat)
    assert [beat[key] for key in ("name", "stage", "done", "total", "pid")] == ["x", "compress", 3, 12, os.getpid()]
    assert beat["host"] == platform.node() and beat["started"] <= beat["stage_started"] <= beat["updated"]
    assert not any(path.parent.iterdir())


@pytest.mark.parametrize(("error", "stays"), [(ValueError, False), (KeyboardInterrupt, True)])
def test_an_interruption_leaves_the_last_sign(tmp_path, error, stays):
    path = tmp_path / "progress.json"
    with pytest.raises(error), beating([path], {}):
        raise error
    assert path.exists() == stays


def test_a_heartbeat_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").touch()
    with beating([tmp_path / "file" / "progress.json"], {}) as pulse:
        pulse.begin("compress")


def test_a_process_is_told_from_a_later_one_of_its_number():
    beat = {"pid": os.getpid(), "host": platform.node(), "started": time.time(), "updated": time.time()}
    assert is_alive(beat)
    assert not is_alive(beat | {"started": time.time() - 10 * 86400 * 365})
    assert is_alive(beat | {"host": "another"})
    assert not is_alive(beat | {"host": "another", "updated": time.time() - SILENCE - 1})


def test_a_killed_point_is_interrupted_and_made_up_for(settings, console, status, tmp_path):
    results = tmp_path / "results"
    arguments = [SCRIPT, *settings, f"results={results}", "rank.k=3", NO_TASKS, "calibration.sequences=60"]
    process = subprocess.Popen(list(map(str, arguments)), stdout=subprocess.DEVNULL)
    while not any(
        (read_heartbeat(f) or {}).get("stage") == "calibrate" for f in results.glob("points/*/progress.json")
    ):
        assert process.poll() is None
        time.sleep(0.05)
    running = status(results)
    process.kill()
    process.wait()
    code, output, _ = status(results)
    assert "1 running" in running[1] and (code, "1 interrupted" in output) == (1, True)
    again = console("retry=default", f"results={results}")
    assert (again.returncode, again.stderr) == (0, "") and "1 points of default" in again.stdout
    cache = next(s for s in settings if s.startswith("cache=")).removeprefix("cache=")
    assert status(results)[0] == 0 and not list(results.glob("points/*/*progress.json*"))
    assert not list(Path(cache, "running").iterdir())


# ------------------------------------------------------------------------------------------------------- the live table
@pytest.mark.parametrize("launcher", ["basic", "processes"])
def test_the_table_is_live_on_a_terminal_and_stays_at_the_end(settings, tmp_path, launcher):
    results = f"results={tmp_path / 'results'}"
    terminal = Terminal([SCRIPT, "-m", *settings, results, "rank.k=0,5", NO_TASKS, f"hydra/launcher={launcher}"])
    terminal.wait_for("point", "state", "running: ", "2 points: ")
    assert terminal.screen.cursor.hidden
    assert terminal.finish() == 0
    assert not terminal.screen.cursor.hidden
    assert "2 points: 2 done" in terminal.text and terminal.text.count("2 points: ") == 1
    assert "frontier.png" in terminal.text
    assert "  compress: 0:" not in terminal.text  # points are quiet, their log files are not
    assert all("compress: 0:" in f.read_text() for f in tmp_path.glob("results/points/*caldera*/log.txt"))
    assert not list(tmp_path.glob("results/sweeps/.live-*"))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_leaves_the_terminal_as_it_was(settings, tmp_path, sent, code):
    results = f"results={tmp_path / 'results'}"
    terminal = Terminal([SCRIPT, "-m", *settings, results, "rank.k=0,5", "calibration.sequences=300", NO_TASKS])
    terminal.wait_for("running: ")
    terminal.process.send_signal(sent)
    assert terminal.finish() == code
    assert not terminal.screen.cursor.hidden and "Traceback" not in terminal.text


def test_without_a_terminal_there_are_plain_lines(swept):
    assert "\x1b" not in swept.output + swept.errors and "  compress: 0:" in swept.output


def test_warnings_go_above_a_live_table_from_any_process(tmp_path, monkeypatch, capsys):
    board = tmp_path / "board"
    board.touch()
    monkeypatch.setenv(LIVE, str(board))
    warn("first")
    Reporter("x").say("said")
    board.unlink()
    warn("second")  # the table has gone meanwhile
    assert capsys.readouterr() == ("", "  warning: second\n") and not board.exists()


def test_a_warning_of_another_process_stands_above_the_table(swept):
    script = f"""
import subprocess, sys, time
from pathlib import Path
from sweeps.live import end_live, show_live
from sweeps.overview import Results
show_live(Results(Path({str(swept.results)!r})))
subprocess.run([sys.executable, "-c", "from sweeps.progress import warn; warn('odd')"], check=True)
time.sleep(1.5)
end_live()
"""
    terminal = Terminal([sys.executable, "-c", script])
    assert terminal.finish() == 0
    lines = terminal.text.splitlines()
    assert lines.count("  warning: odd") == 1 and terminal.text.count("2 points: 1 failed, 1 done") == 1
    assert lines.index("  warning: odd") < lines.index(str(swept.results)[:120])


@pytest.mark.parametrize("height", [25, 30, 60])
def test_many_points_fit_on_the_screen(height, tmp_path):
    states = ["done"] * 25 + ["running"] * 2 + ["failed"] * 9 + ["waiting"] * 24
    facts = {"running": {"stage": "compress"}, "failed": {"reason": "compress, block 1: RuntimeError: out of memory"}}
    numbers = {"stored_bits": 2.125, "metric": "perplexity/heldout_1024", "value": 1234.5, "seconds": 7000.0}
    points = [
        Status(f"a-rather-long-name-of-a-point-{i:03d}", "s", state, ended=float(i), **facts.get(state, numbers))
        for i, state in enumerate(states)
    ]
    console = Console(width=80, height=height, file=(tmp_path / "out").open("w+"))
    console.print(view(Overview(tmp_path, points, 100.0), height))
    console.file.seek(0)
    lines = console.file.read().splitlines()
    assert len(lines) <= height
    assert sum("running: compress" in line for line in lines) == 2
    assert sum(line.startswith("failed: a-rather") for line in lines) == 3
    assert any("60 points: 2 running, 9 failed, 24 waiting, 25 done" in line for line in lines)
    assert any("of them are not shown" in line for line in lines)
    newest = next(line for line in lines if line.split()[:1] == ["024"])
    assert newest.split() == ["024", "done", "2.125", "1,234.50", "1:56:40"]
