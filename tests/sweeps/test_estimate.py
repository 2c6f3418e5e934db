"""Predictions: what is counted agrees with what torch counts, and with the bytes of a real point."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from caldera import Method, decompose, prepare
from caldera.blocks import Stream, input_groups
from caldera.decomposition import relative_error
from caldera.linalg import energy
from caldera.lowrank import lplr
from caldera.moments import Accumulator, add_product
from caldera.quantizers import get_quantizer
from sweeps import costs
from sweeps.costs import Work
from sweeps.estimate import estimate
from sweeps.machine import Machine
from sweeps.outline import Outline, outline, outline_of
from sweeps.pipeline import run_point
from sweeps.progress import Reporter
from sweeps.sizes import Sizes, factors_bytes, hidden_bytes, moments_bytes, stored_bytes, subspaces_bytes

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
MACHINE = Machine("test", 1, 1e9, 1e9, 1e9, 1e9, {"e8p_2bit": 1e6, "uniform_4bit": 1e6}, 1e9, 1e9)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def shape() -> Outline:
    return outline(CONFIG)


@pytest.fixture
def sizes(shape) -> Sizes:
    method = Method(rank=8, outer_iterations=2, inner_iterations=3)
    return Sizes(shape, tuple(shape.matrices), method, False, calibration=(4, 32), evaluation=(2, 32))


@pytest.fixture
def all_alternations(monkeypatch):
    """LPLR ends after as many alternations as it is told, in the code and in the counts."""
    monkeypatch.setattr(importlib.import_module("caldera.decomposition"), "GAIN", 0.0)
    monkeypatch.setattr(costs, "ALTERNATIONS", 99)


def counted(work) -> int:
    """Operations of the products that torch sees."""
    in_place = {torch.ops.aten.addmm_: lambda _sum, a, b, *_args, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    return counter.get_total_flops()


def test_an_outline_is_the_model(shape, model):
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.blocks, shape.hidden, shape.vocabulary, shape.attention) == (2, 64, 512, 64)
    assert (shape.prefix, shape.tied, shape.head) == ("model.layers", False, 512 * 64)
    assert shape.embedded == 512 * 64 + 64
    assert shape.block_of("model.layers.1.mlp.up_proj") == 1


def test_groups_by_name_are_those_that_a_pass_shows(shape, model):
    stream = Stream.open(model, torch.zeros(1, 8, dtype=torch.int64))
    seen = {
        tuple(f"model.layers.0.{name}" for name in g.members) for g in input_groups(model.model.layers[0], stream, 0)
    }
    assert {g.members for g in shape.groups([n for n in shape.matrices if ".0." in n])} == seen


def test_a_forward_pass_has_as_many_operations_as_torch_counts(shape, model):
    rows = torch.zeros(2, 24, dtype=torch.int64)
    with torch.no_grad():
        found = counted(lambda: model(rows, use_cache=False))
    assert costs.forward(shape, 48, 24, 4, head=True).single == pytest.approx(found, rel=0.02)


def test_moments_have_as_many_operations_as_torch_counts():
    x, accumulator = torch.randn(40, 64), Accumulator.zeros(64, torch.device("cpu"))
    assert costs.second_moments(64, 40).mixed == pytest.approx(counted(lambda: accumulator.add(x)), rel=0.02)
    totals = torch.zeros(64, 64), torch.zeros(16, 64)
    found = counted(lambda: (accumulator.add(x), add_product(totals[0], x, x), add_product(totals[1], x[:, :16], x)))
    assert costs.corrected_moments(64, 16, 40, True).mixed == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("settings", [{}, {"outer_iterations": 3}, {"inner_iterations": 5}, {"rank": 0}, {"rank": 32}])
def test_a_decomposition_has_as_many_products_as_torch_counts(settings, all_alternations):
    method = Method(**{"rank": 16, "outer_iterations": 1, "inner_iterations": 2, "patience": 9} | settings)
    (m, n), x = (192, 256), torch.randn(600, 256)
    weight, moments = torch.randn(m, n), x.T @ x / 600
    basis = prepare(moments, name="x", **method.basis_options)
    found = counted(lambda: decompose(weight, moments, method, basis=basis))
    parts = costs.decomposition(m, n, method) + costs.transforms(m, n) + Work(single=2.0 * m * n**2)  # and its error
    if method.rank:  # the product L R once more, and the subspace
        parts += costs.subspace(m, n, 64) + Work(single=2.0 * m * n * method.rank)
    assert parts.single == pytest.approx(found, rel=0.05)


def test_lplr_has_as_many_products_as_torch_counts(all_alternations):
    method, (m, n) = Method(rank=16, inner_iterations=4), (96, 128)
    x = torch.randn(400, n)
    basis = prepare(x.T @ x / 400, name="x", **method.basis_options)
    a, right = torch.randn(m, n), torch.randn(16, n)
    found = counted(lambda: lplr(a, right, basis, method.factor_quantizers, 4, "test"))
    assert costs.lplr(m, n, method, True).single == pytest.approx(found, rel=0.05)


def test_transforms_and_errors_have_as_many_products_as_torch_counts():
    weight, h = torch.randn(96, 160), torch.eye(160)
    method = Method(rank=0)
    basis = prepare(h, name="x", **method.basis_options)
    found = counted(lambda: basis.forward(weight, "w"))
    assert costs.transforms(96, 160).single == pytest.approx(found, rel=0.01)
    assert counted(lambda: energy(weight, h)) == 2 * 96 * 160**2
    assert counted(lambda: relative_error(weight, weight, h)) == 4 * 96 * 160**2


def test_searches_are_counted_by_weight_and_16_bits_search_nothing():
    method = Method(rank=16, q="trellis_2bit", l="bf16", r="bf16", outer_iterations=1)
    assert costs.decomposition(64, 96, method).search == {"trellis_2bit": 64 * 96}
    assert costs.rounding("e8p_2bit_row", 4, 8).search == {"e8p_2bit": 32}
    kernels = {name: costs.ldlq(512, 512, name).kernels for name in ("e8p_2bit", "trellis_2bit")}
    assert kernels["trellis_2bit"] > 100 * kernels["e8p_2bit"]


@pytest.mark.parametrize(("name", "tries"), [("uniform_2bit", 0), ("nf_4bit_g64", 69), ("uniform_3bit_row", 69)])
def test_scales_of_rows_and_groups_are_searched_by_rounding(name, tries):
    assert sum(costs.ldlq(32, 64, name).search.values()) == (1 + tries) * 32 * 64


def test_the_noise_floor_is_another_evaluation_in_float32(sizes):
    once, twice = (estimate(replace(sizes, noise_floor=floor), MACHINE).stages["baseline"] for floor in (False, True))
    assert twice.work.single == once.work.model > once.work.single == 0
    assert (twice.work.model, twice.disk) == (once.work.model, once.disk) and twice.memory > once.memory
    exact = replace(sizes, itemsize=4)  # is its own
    assert estimate(replace(exact, noise_floor=True), MACHINE) == estimate(exact, MACHINE)


def test_twice_the_tokens_are_twice_the_work(sizes):
    once, twice = (estimate(replace(sizes, calibration=(rows, 32)), MACHINE).stages for rows in (400, 800))
    assert twice["calibrate"].work.mixed == 2 * once["calibrate"].work.mixed
    assert twice["calibrate"].seconds == pytest.approx(2 * once["calibrate"].seconds, rel=0.1)
    assert twice["compress"].seconds == once["compress"].seconds
    longer = estimate(replace(sizes, evaluation=(4, 32)), MACHINE).stages
    assert longer["perplexity"].seconds == pytest.approx(2 * once["perplexity"].seconds)


def test_what_is_held_costs_nothing(sizes):
    keys = {name: name for name in ("done", "baseline", "moments", "factors", "subspaces")}
    everything = estimate(sizes, MACHINE, keys)
    assert list(everything.stages) == ["baseline", "calibrate", "compress", "load", "perplexity", "tasks"]
    again = estimate(sizes, MACHINE, keys, {"baseline", "moments", "factors", "subspaces"})
    assert list(again.stages) == ["compress", "load", "perplexity", "tasks"]
    assert again.stages["compress"].work.alone < everything.stages["compress"].work.alone
    assert again.stages["compress"].disk < everything.stages["compress"].disk
    assert estimate(sizes, MACHINE, keys, everything.made).stages == {}
    assert estimate(replace(sizes, method=None), MACHINE).stages.keys() == {"baseline"}


def test_a_corrected_point_takes_the_passes_of_two_models(sizes):
    plain, prefix = (estimate(replace(sizes, corrected=kind), MACHINE) for kind in (False, True))
    assert prefix.seconds > plain.seconds
    passes = costs.forward(sizes.model, 2 * sizes.tokens, 32, 2).model
    assert prefix.stages["compress"].work.model >= passes
    assert prefix.stages["calibrate"].disk - plain.stages["calibrate"].disk == hidden_bytes(
        replace(sizes, corrected=True)
    )


@pytest.mark.parametrize("inputs", ["original", "corrected"])
def test_bytes_are_those_of_a_real_point(inputs, point, settings):
    job = point("rank.k=8", f"method.inputs={inputs}", "evaluation.tasks=[]", f"seed={len(inputs)}")
    sizes = Sizes.of(job, outline_of(job.source, job.cache))
    record = run_point(job, Reporter(job.name))
    found = estimate(sizes, MACHINE)
    assert stored_bytes(sizes) == record["bits"]["stored_bytes"]
    assert found.stored_bits == record["bits"]["stored"]
    assert found.nominal_bits == pytest.approx(record["bits"]["nominal"])
    assert found.model_bits == pytest.approx(record["bits"]["model"], rel=0.02)
    moments = job.moments_folder
    shared = job.shared_folder
    assert moments_bytes(sizes) == pytest.approx(bytes_of(moments, "block-*.safetensors"), rel=0.05)
    if inputs == "corrected":
        assert hidden_bytes(sizes) == pytest.approx(bytes_of(moments, "hidden-*.safetensors"), rel=0.05)
        assert factors_bytes(sizes) == subspaces_bytes(sizes) == 0
    else:
        assert factors_bytes(sizes) == pytest.approx(bytes_of(shared, "*/factors-*.safetensors"), rel=0.05)
        assert subspaces_bytes(sizes) == pytest.approx(bytes_of(shared, "*/subspaces-*.safetensors"), rel=0.05)


def bytes_of(folder, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def test_a_machine_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr("sweeps.machine._measured", lambda dtype, folder: MACHINE)
    assert Machine.measured("float32", tmp_path) == MACHINE
    monkeypatch.setattr("sweeps.machine._measured", None)
    assert Machine.measured("float32", tmp_path) == MACHINE


def test_measured_rates_are_those_of_a_machine(tmp_path, monkeypatch):
    for name, value in {"SIDE": 64, "WEIGHTS": 1 << 13, "WRITTEN": 1 << 16}.items():
        monkeypatch.setattr(f"sweeps.machine.{name}", value)
    found = Machine.measured("float32", tmp_path)
    rates = [found.model, found.mixed, found.single, found.alone, found.memory, found.disk, *found.search.values()]
    assert all(rate > 1e4 for rate in rates)
    for name in found.search:
        get_quantizer(name)
