"""A sweep over a tiny real model, from the console script to the frontier: what it leaves and what it repeats."""

import csv
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from analysis.frontier import frontier_table
from caldera import relative_error
from caldera.checkpoint import block_file, load_dense, read_manifest, read_matrices
from sweeps import pipeline, tokens
from sweeps.calibration import Calibration
from sweeps.compress import notes_of
from sweeps.perplexity import Windows, text_scores
from sweeps.progress import Reporter
from sweeps.store import read_sealed, write_sealed
from tests.sweeps.swept import NO_TASKS, TOP_LEVEL, Swept

TEXT = ("perplexity", "word_perplexity", "byte_perplexity", "kl", "kl_median", "kl_p90", "kl_p99", "agreement")
METRICS = {f"{kind}/heldout_256" for kind in TEXT} | {"arc_easy/acc", "arc_easy/acc_norm"}


@pytest.fixture(scope="module")
def arguments(settings, tmp_path_factory) -> list[str]:
    """With a cache of its own: what other tests have measured is not measured again."""
    folder, own = tmp_path_factory.mktemp("sweep"), [s for s in settings if not s.startswith("cache=")]
    return ["-m", *own, "rank.k=0,8", f"cache={folder / 'cache'}", f"results={folder / 'results'}"]


@pytest.fixture(scope="module")
def swept(arguments, console) -> Swept:
    """Two ranks, by the console script."""
    done = console(*arguments)
    return Swept(Path(arguments[-1].removeprefix("results=")), done.stdout, done.stderr, done.returncode)


# -------------------------------------------------------------------------------------------------- what a sweep leaves
def test_a_sweep_ends_well_and_quietly(swept):
    assert (swept.code, swept.errors) == (0, "")
    assert "2 points, 2 of them to compute" in swept.output
    assert "point 2/2: tiny-caldera-r8-" in swept.output
    assert str(swept.results / "frontier.png") in swept.output


def test_every_point_and_the_uncompressed_model_have_a_record(swept):
    assert [(r["point"]["method"], r["point"]["rank"]) for r in swept.records] == [
        ("caldera", 0), ("caldera", 8), ("none", None),
    ]  # fmt: skip
    for record in swept.records:
        assert set(record) == TOP_LEVEL
        assert (record["schema_version"], record["status"], record["error"]) == (2, "done", None)
        assert record["name"].endswith(record["key"][:8])
        assert swept.folder(record).name == record["name"]


def test_a_record_says_how_it_came_about(swept):
    for record in swept.records:
        assert record["config"]["calibration"]["sequences"] == 4
        assert record["seeds"] == {"seed": 0, "calibration_shuffle": 0}
        assert record["memory"]["peak_rss_bytes"] > 100e6
        assert {"python", "versions", "processor", "threads", "gpu", "memory_bytes", "platform"} <= set(
            record["environment"]
        )
        assert {"torch", "transformers", "lm-eval", "hydra-core"} <= set(record["environment"]["versions"])
    stages = {"calibrate", "compress", "load", "perplexity", "tasks"}
    perhaps = {"reference", "noise_floor"}  # of the uncompressed model: what other tests have in the cache is not made
    assert all(set(r["timings_s"]) - perhaps == stages for r in swept.records if r["matrices"])
    assert set(swept.of(method="none")["timings_s"]) - perhaps == stages - {"calibrate", "compress"}


def test_metrics_are_complete_and_comparable(swept):
    for record in swept.records:
        assert set(record["metrics"]) == METRICS
        for name, metric in record["metrics"].items():
            assert math.isfinite(metric["value"]) and math.isfinite(metric["stderr"])
            assert metric["measured_on"] == swept.records[0]["metrics"][name]["measured_on"]
    perplexity = swept.records[0]["metrics"]["perplexity/heldout_256"]
    assert (len(perplexity["samples"]), perplexity["higher_is_better"]) == (2, False)
    assert (
        perplexity["measured_on"] | {"text": "embedded_heldout", "rows": 2, "length": 256, "tokens": 510}
        == (perplexity["measured_on"])
    )
    assert len(swept.records[0]["metrics"]["arc_easy/acc"]["samples"]) == 4


# ----------------------------------------------------------------------------------------------------------------- bits
@pytest.mark.parametrize("rank", [0, 8])
def test_bits_are_those_of_the_files(swept, rank, tiny_llama_dir):
    record = swept.of(rank=rank)
    folder, bits = swept.checkpoint(record), record["bits"]
    original = load_file(tiny_llama_dir / "model.safetensors")
    names = {m["name"] for m in record["matrices"]}
    compressed = sum(original[f"{name}.weight"].numel() for name in names)
    assert len(names) == 14 and bits["parameters"] == compressed
    assert bits["model_parameters"] == sum(t.numel() for t in original.values())
    packed = [t for i in range(2) for t in load_file(folder / block_file(i)).values()]
    assert bits["stored_bytes"] == sum(t.numel() * t.element_size() for t in packed)
    assert bits["stored"] == pytest.approx(8 * bits["stored_bytes"] / compressed)
    assert bits["model_bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert bits["model"] == pytest.approx(8 * bits["model_bytes"] / bits["model_parameters"])
    sides = [original[f"{name}.weight"].shape for name in names]
    codes = sum(2 * m * n + 2 * rank * (m + n) for m, n in sides)
    assert bits["nominal"] == pytest.approx(codes / compressed)
    scales = 14 * (3 if rank else 1)  # float32, one for each of Q, L and R
    assert bits["stored"] == pytest.approx(bits["nominal"] + 32 * scales / compressed)


@pytest.mark.parametrize("rank", [0, 8])
def test_matrices_add_up_to_the_model(swept, rank):
    record = swept.of(rank=rank)
    assert sum(m["stored_bytes"] for m in record["matrices"]) == record["bits"]["stored_bytes"]
    for matrix in record["matrices"]:
        factor = "e8p_2bit" if rank else "none"
        assert (matrix["rank"], matrix["q"], matrix["l"], matrix["r"]) == (rank, "trellis_2bit", factor, factor)
        assert matrix["stored_bits"] == 8 * matrix["stored_bytes"] / math.prod(matrix["shape"])
        errors = ("relative_error", "predicted_error", "output_error")
        assert all(0 < matrix[key] < 1 for key in errors) and matrix["seconds"] > 0
        assert matrix["trace"] and {"iteration", "step", "error"} == set(matrix["trace"][0])
        assert (matrix["sigma"], matrix["jitters"], matrix["init_rank"]) == (3e-3, [], 0)


def test_the_uncompressed_model_has_the_bits_of_its_dtype(swept):
    record = swept.of(method="none")
    width = {"float32": 32, "bfloat16": 16}[record["metrics"]["perplexity/heldout_256"]["measured_on"]["dtype"]]
    assert [record["bits"][kind] for kind in ("nominal", "stored", "model")] == [width] * 3
    assert record["matrices"] == []


# ------------------------------------------------------------------------------------------------------- the checkpoint
@pytest.mark.parametrize("rank", [0, 8])
def test_a_checkpoint_reloads_to_the_very_model_that_was_measured(swept, rank):
    record = swept.of(rank=rank)
    folder, metric = swept.checkpoint(record), record["metrics"]["perplexity/heldout_256"]
    one, other = (load_dense(folder).state_dict() for _ in range(2))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    for matrix in (m for i in range(2) for m in read_matrices(folder, block_file(i))):
        assert one[f"{matrix.spec.name}.weight"].equal(matrix.dequantize())
    assert set(read_manifest(folder)["matrices"]) == {m["name"] for m in record["matrices"]}
    rows = tokens.token_windows_of(folder, "embedded_heldout", 2, 256, 256, False, None)
    model = load_dense(folder, getattr(torch, metric["measured_on"]["dtype"]))
    again = text_scores(model, Windows(rows, 256), "x")["perplexity/x"]
    assert again["samples"] == pytest.approx(metric["samples"], rel=1e-5)


def test_errors_are_those_of_the_deployed_weights(application, point, tiny_llama_dir, tmp_path):
    """On the original model's inputs, where the weights themselves are the target."""
    assert application("rank.k=8", "method.inputs=original", NO_TASKS)[0] == 0
    swept, original = Swept(tmp_path / "results"), load_file(tiny_llama_dir / "model.safetensors")
    record = swept.of(rank=8)
    calibration = Calibration(point().moments_folder)
    recorded = {m["name"]: (m["relative_error"], m["output_error"]) for m in record["matrices"]}
    deployed = load_dense(swept.checkpoint(record)).state_dict()
    assert sum(calibration.tokens(0).values()) == 4 * 1024
    for block in range(2):
        for group in calibration.groups(block):
            for member in group.members:
                name = f"model.layers.{block}.{member}"
                h, w_hat = calibration.moments(block)[group.name], deployed[f"{name}.weight"]
                error = relative_error(original[f"{name}.weight"], w_hat, h)
                assert recorded.pop(name) == (pytest.approx(error, rel=1e-5), pytest.approx(error, rel=1e-5))
    assert not recorded


def test_more_rank_is_less_error(swept):
    before, after = ({m["name"]: m["relative_error"] for m in swept.of(rank=k)["matrices"]} for k in (0, 8))
    assert all(after[name] < before[name] for name in before)


def test_what_is_not_compressed_is_the_model_s_own(swept, tiny_llama_dir):
    record, original = swept.of(rank=8), load_file(tiny_llama_dir / "model.safetensors")
    rest = load_file(swept.checkpoint(record) / "model-rest.safetensors")
    matrices = {f"{m['name']}.weight" for m in record["matrices"]}
    assert set(rest) == set(original) - matrices
    assert all(tensor.equal(original[name].to(tensor.dtype)) for name, tensor in rest.items())


# ------------------------------------------------------------------------------------------------------------- frontier
def test_the_frontier_is_drawn_and_tabulated(swept):
    assert (swept.results / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (swept.results / "frontier.svg").read_text()
    rows = list(csv.DictReader((swept.results / "frontier.csv").open()))
    assert {row["name"] for row in rows} == {record["name"] for record in swept.records}
    for row in rows:
        record = next(r for r in swept.records if r["name"] == row["name"])
        assert float(row["bits_stored"]) == pytest.approx(record["bits"]["stored"])
        assert float(row["perplexity/heldout_256"]) == pytest.approx(
            record["metrics"]["perplexity/heldout_256"]["value"]
        )


# ----------------------------------------------------------------------------------------------------------- repetition
def test_a_second_start_does_nothing(swept, arguments, console):
    before, start = swept.state(), time.perf_counter()
    done = console(*arguments)
    assert time.perf_counter() - start < 15
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 points, 0 of them to compute" in done.stdout
    assert done.stdout.count(": done before") == 2
    assert swept.state() == before


def test_by_force_the_same_seed_gives_the_same_bytes(swept, application, tmp_path):
    results = Path(shutil.copytree(swept.results, tmp_path / "results"))
    code, output, errors = application("rank.k=8", "force=true")
    assert (code, errors) == (0, "") and "done before" not in output
    before, after = swept.of(rank=8), Swept(results).of(rank=8)
    assert after["created"] >= before["created"] and after["timings_s"] != before["timings_s"]
    assert after["metrics"] == before["metrics"]
    assert after["bits"] == before["bits"]
    for one, other in zip(before["matrices"], after["matrices"], strict=True):
        assert one | {"seconds": None} == other | {"seconds": None}
    shards = sorted(swept.checkpoint(before).glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        assert shard.read_bytes() == (results / shard.relative_to(swept.results)).read_bytes()


def test_a_record_of_a_newer_version_is_refused(swept, application, tmp_path):
    results = Path(shutil.copytree(swept.results, tmp_path / "results"))
    record = results / "points" / swept.of(rank=8)["name"] / "record.json"
    write_sealed(record, read_sealed(record) | {"schema_version": 99})
    code, output, errors = application("-m", "rank.k=0,8")
    assert code == 1 and "point 1" not in output
    assert errors.startswith(f"caldera-run: {record} has schema 99, newer than the known 2: update this package or")


def test_another_seed_is_another_point(swept, point):
    assert point("rank.k=8", "seed=1").key != swept.of(rank=8)["key"] == point("rank.k=8").key


def test_the_uncompressed_models_record_is_the_points_own(swept, point):
    """It is measured once for all names that the weights go by, but a sweep shows its own name and settings."""
    other = point("model.name=renamed", "sweep=other", NO_TASKS)
    pipeline.run_baseline(point(NO_TASKS), Reporter("first"))
    record = pipeline.run_baseline(other, Reporter("second"))
    assert record["name"] == other.uncompressed.name == other.uncompressed.folder.name
    assert (record["point"]["model"], record["sweep"]) == ("renamed", "other")


# --------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("keep", ["pareto", "none"])
def test_checkpoints_of_dominated_points_may_go(application, tmp_path, keep):
    """The 16-bit factors cost more than they gain here, or else the others do: one point at least is dominated."""
    sweep = ["-m", "quantizer@q=e8p_2bit,uniform_1bit", "rank.k=0,4", "quantizer@l=bf16", "quantizer@r=bf16", NO_TASKS]
    code, _, errors = application(*sweep, "method=fast", f"checkpoint.keep={keep}")
    swept = Swept(tmp_path / "results")
    table = frontier_table(swept.records)
    best = set(table.loc[table["pareto"], "name"]) if keep == "pareto" else set()
    points = [r for r in swept.records if r["checkpoint"]]
    assert (code, errors) == (0, "") and len(points) == 4 and len(best) < 4
    assert {r["name"] for r in points if swept.checkpoint(r).exists()} == best
    assert {r["name"] for r in points if notes_of(swept.checkpoint(r)).exists()} == best


# -------------------------------------------------------------------------------------------------------- other methods
def test_methods_are_an_axis_of_a_sweep(application, tmp_path):
    """Those whose moments and first factors are not the measured ones' and zero: their basis is prepared for them."""
    code, _, errors = application("-m", "method=rtn,loftq,odlri", "rank.k=2", NO_TASKS, "evaluation.rows=1")
    found = Swept(tmp_path / "results")
    assert (code, errors) == (0, "")
    assert {r["point"]["method"] for r in found.records} == {"rtn", "loftq", "odlri", "none"}
    assert {m["init_rank"] for m in found.of(method="odlri")["matrices"]} == {2}
    assert {m["q"] for m in found.of(method="loftq")["matrices"]} == {"nf_4bit_g64"}


# ------------------------------------------------------------------------------------------ the uncompressed as a point
def test_the_uncompressed_model_may_be_a_point_of_its_own(application, swept, tmp_path):
    code, output, errors = application("method=none", "rank.k=8")
    assert "uncompressed" in output and "no finished compressed point" in errors  # a table, but no frontier
    found = Swept(tmp_path / "results")
    (record,) = found.records
    before = swept.of(method="none")
    assert (code, record["point"], record["bits"]) == (0, before["point"], before["bits"])
    assert (record["key"], record["metrics"]) == (before["key"], before["metrics"])
    assert record["matrices"] == [] and record["checkpoint"] is None
    assert "done before" in application("method=none")[1]


def test_the_noise_floor_is_what_float32_changes(application, tmp_path):
    lines = ("method=none", "evaluation.noise_floor=true")
    assert application(*lines, "compute.dtype=bfloat16")[0] == 0
    (record,) = Swept(tmp_path / "results").records
    floor, metrics = record["noise_floor"], record["metrics"]
    assert (
        set(floor) == set(metrics) == {f"{kind}/heldout_256" for kind in TEXT} | {"arc_easy/acc", "arc_easy/acc_norm"}
    )
    assert metrics["kl/heldout_256"]["value"] < 1e-5 < floor["kl/heldout_256"] < floor["kl_p99/heldout_256"] < 0.1
    assert 0.8 < floor["agreement/heldout_256"] < metrics["agreement/heldout_256"]["value"] == 1.0
    assert application(*lines, "compute.dtype=float32")[0] == 0
    (exact,) = (r for r in Swept(tmp_path / "results").records if r["name"] != record["name"])
    values = [r["metrics"]["perplexity/heldout_256"]["value"] for r in (record, exact)]
    assert exact["noise_floor"] is None  # it is its own
    assert floor["perplexity/heldout_256"] == pytest.approx(values[0] - values[1], rel=1e-6) and values[0] != values[1]
    task = "arc_easy/acc"
    assert floor[task] == record["metrics"][task]["value"] - exact["metrics"][task]["value"]


def test_what_is_kept_of_the_uncompressed_model_is_made_again(application, point, tmp_path):
    """Its own scores are there, and what others are measured by is not: it is loaded again."""
    lines, folder = ("rank.k=2", NO_TASKS, "evaluation.length=78", "method=rtn"), point().cache / "references"
    others = set(folder.glob("*"))
    assert application("method=none", *lines[:3])[0] == 0
    (file,) = (path for path in folder.glob("*.safetensors") if path not in others)
    file.unlink()
    assert application(*lines)[0] == 0
    found = Swept(tmp_path / "results").of(method="rtn")
    assert "reference" in found["timings_s"] and found["metrics"]["kl/heldout_78"]["value"] > 0.01


def test_a_failed_uncompressed_point_is_made_up_for(application, monkeypatch, tmp_path):
    def out_of_memory(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipeline, "_uncompressed", out_of_memory)
    # an evaluation that no other test has in the shared cache
    lines = ("method=none,caldera", "rank.k=2", NO_TASKS, "evaluation.length=77")
    assert application("-m", *lines)[0] == 1
    assert [r["status"] for r in Swept(tmp_path / "results").records] == ["failed", "failed"]
    monkeypatch.undo()
    assert application(*lines[1:], "method=caldera")[0] == 0
    found = Swept(tmp_path / "results")
    assert {r["status"] for r in found.records} == {"done"} and len(found.records) == 2
