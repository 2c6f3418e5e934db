"""Points: what their names and keys depend on."""

import copy
import dataclasses

import pytest
from omegaconf import OmegaConf

from sweeps.plan import resolve
from sweeps.point import axes, uncompressed_axes
from sweeps.schema import Config

# Settings that change where, how fast or under what name a result is had, but not the result.
NEUTRAL = {
    "model.name", "model.path", "model.gguf_package", "model.gguf_file", "model.revision", "model.trust_remote_code",
    "calibration.allow_overlap", "tracker.name", "tracker.mode", "tracker.project", "tracker.entity",
    "tracker.artifact",
    "compute.device", "compute.threads", "compute.spill_mb", "compute.workers", "compute.backend",
    "sweep", "results", "cache", "plan", "retry", "force", "checkpoint.keep",
    "search.objectives", "search.trials", "search.batch", "search.screen", "search.blocks", "search.prune_margin",
}  # fmt: skip
TEXT = {"calibration.text": "embedded_validation", "evaluation.text": "embedded_validation"}
OTHER = TEXT | {
    "retry": "other", "search.objectives": ["bits/model", "perplexity"],
    "q.family": "uniform", "l.family": "uniform", "r.family": "uniform",
    "q.scale": "row", "l.scale": "row", "r.scale": "row",
    "model.include": ["*self_attn*"], "model.exclude": ["*.o_proj"], "method.inputs": "original",
    "method.correction_last": 0.1, "method.residual_last": 0.1, "method.name": "other",
    "method.order": "q_first", "method.moments": "identity", "method.init": "svd",
    "method.init_rank": "auto", "evaluation.tasks": [], "evaluation.stride": 2, "evaluation.join": " ",
    "evaluation.label": "x", "compute.dtype": "float16",
    "compute.device": "auto", "compute.backend": "ray", "model.name": "other",
    "checkpoint.keep": "pareto", "tracker.name": "wandb", "tracker.mode": "disabled",
    "tracker.project": "other", "tracker.entity": "other", "model.revision": "other", "sweep": "other",
}  # fmt: skip
LEFT_OUT = {"model.path", "model.gguf_package", "model.gguf_file", "results", "cache"}  # see below


def settings_of_schema() -> list[str]:
    found = []
    for f in dataclasses.fields(Config):
        inner = [f"{f.name}.{g.name}" for g in dataclasses.fields(f.type)] if dataclasses.is_dataclass(f.type) else []
        found += inner or [f.name]
    return [name for name in found if name not in LEFT_OUT and not name.startswith("budget.")]  # see test_budget.py


def changed(value):
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2


@pytest.fixture(scope="module")
def base(composed, settings, tmp_path_factory):
    results = f"results={tmp_path_factory.mktemp('results')}"
    return composed(*settings, "rank.k=8", "method.inputs=corrected", results, "compute.dtype=float32")


@pytest.mark.parametrize("name", settings_of_schema())
def test_the_key_follows_exactly_the_settings_that_change_a_result(name, base):
    config, before = copy.deepcopy(base), resolve(base)
    value = OTHER[name] if name in OTHER else changed(OmegaConf.select(config, name))
    OmegaConf.update(config, name, value)
    assert (resolve(config).key == before.key) == (name in NEUTRAL)


def test_the_key_follows_the_weights_and_not_the_folder(point, altered):
    same = altered("same", lambda tensors: None)
    other = altered("other", lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    keys = [p.key for p in (point(), point(f"model.path={same}"), point(f"model.path={other}"))]
    assert keys[0] == keys[1] != keys[2]
    assert point(f"model.path={same}").name.startswith("same-caldera-r0-")


def test_without_factors_their_quantizers_are_nothing(point):
    assert point("rank.k=0", "quantizer@l=bf16").key == point("rank.k=0").key
    assert point("rank.k=1", "quantizer@l=bf16").key != point("rank.k=1").key


def test_the_baseline_depends_on_the_evaluation_alone(point):
    one, other = point("rank.k=4", "seed=1", "calibration.sequences=3"), point()
    assert one.uncompressed.key == other.uncompressed.key
    assert one.uncompressed.key != point("evaluation.rows=3").uncompressed.key


@pytest.mark.parametrize("lines", [[], ["rank.k=8", "quantizer@q=e8p_3bit", "method.init=svd", "calibration.length=9"]])
def test_the_uncompressed_model_is_one_point_whatever_a_method_would_do(point, lines):
    found, other = point("method=none", *lines), point("rank.k=4")
    assert (found.key, found.name) == (other.uncompressed.key, other.uncompressed.name)
    assert axes(found) == uncompressed_axes(other)


def test_axes_are_flat_and_say_what_was_asked(point):
    found = axes(point("rank.k=8", "quantizer@l=bf16", "seed=3"))
    assert found == {
        "model": "tiny", "method": "caldera", "inputs": "corrected", "rank": 8,
        "q": "trellis_2bit", "l": "bf16", "r": "e8p_2bit",
        "q_bits": 2, "l_bits": 16, "r_bits": 2, "calibration_tokens": 1024, "budget": None, "budget_bits": None,
        "seed": 3,
    }  # fmt: skip
    assert {key: value for key, value in axes(point()).items() if key[0] in "lr"} == {
        "rank": 0, "l": None, "r": None, "l_bits": None, "r_bits": None,
    }  # fmt: skip


def test_the_inventory_is_every_linear_layer_of_the_blocks(point):
    shapes = {"q_proj": [64, 64], "k_proj": [32, 64], "v_proj": [32, 64], "o_proj": [64, 64]}
    mlp = {"gate_proj": [96, 64], "up_proj": [96, 64], "down_proj": [64, 96]}
    inner = {f"self_attn.{k}": v for k, v in shapes.items()} | {f"mlp.{k}": v for k, v in mlp.items()}
    assert point().inventory == {f"model.layers.{i}.{k}": v for i in range(2) for k, v in inner.items()}
