"""Nothing reads a value on the host or mixes devices: the numerics run on tensors that have a device but no data.

A run that ends proves it: reading a fake tensor's value raises, and so does an operation across two devices.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from caldera import Method, decompose, get_quantizer, prepare, quantizer_names
from caldera.devices import _cached, constant, is_fake, read
from caldera.ldlq import ldlq, tune
from caldera.lowrank import top_subspace
from caldera.moments import Accumulator
from caldera.quantizers import Quantizer, Scales, e8p, scalar
from tests.caldera.oracles import gaussian, second_moments
from tests.caldera.watching import DEVICE, empty

NAMES = [*quantizer_names(), "e8p_2bit_row", "e8p_3bit_g64", "uniform_3bit_g32", "uniform_asym_4bit_g64", "nf_4bit_row"]


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


def on_device(*tensors: torch.Tensor) -> bool:
    return all(isinstance(t, FakeTensor) and t.device.type == DEVICE for t in tensors)


# ------------------------------------------------------------------------------------------------------------ the proof
def test_a_read_or_a_mixture_would_be_noticed(fake):
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        float(empty(3).sum())
    with pytest.raises(RuntimeError, match="device"):
        empty(3) + torch.ones(3)
    with pytest.raises(RuntimeError, match="device"):
        empty(3, 3) @ torch.ones(3, 3)


def test_reading_is_nan_in_a_dry_run(fake):
    assert is_fake(empty(3)) and read(empty(3).sum()) != read(empty(3).sum())


# --------------------------------------------------------------------------------------------------------- the numerics
@pytest.mark.parametrize(
    "name", ["e8p_2bit", "e8p_3bit_g64", "uniform_4bit", "uniform_asym_4bit_g64", "nf_4bit_row", "bf16"]
)
def test_scales_are_fitted_on_the_device(name, fake):
    assert on_device(*(t for t in get_quantizer(name).fit(empty(24, 100)) if t is not None))


@pytest.mark.parametrize("name", NAMES)
def test_quantizers_stay_on_the_device(name, fake):
    quantizer, x = get_quantizer(name), empty(24, 100)
    stored = {key: empty(*spec.shape, dtype=spec.dtype) for key, spec in quantizer.layout(24, 100).items()}
    scales = Scales(stored.get("scale", empty(1, 1)), stored.get("zero"))
    codes = quantizer.encode(x, scales)
    values = quantizer.decode(codes, scales, 100)
    tensors = quantizer.pack(codes, scales)
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == quantizer.layout(24, 100)
    unpacked = quantizer.unpack(tensors, 24, 100)
    assert values.shape == unpacked.shape == (24, 100)
    assert on_device(codes, values, unpacked, *tensors.values())


@pytest.mark.parametrize("transformed", [True, False])
def test_preparation_stays_on_the_device(transformed, fake):
    basis = prepare(empty(96, 96), name="x", transformed=transformed)
    assert on_device(basis.moments, basis.chol, basis.damped, *basis.feedback(8)[:2], basis.block_inverses(8))
    assert on_device(basis.forward(empty(24, 96), "w")) and basis.forward(empty(24, 96), "w").shape == (24, 96)


@pytest.mark.parametrize(
    ("q", "n"), [("e8p_2bit", 21), ("uniform_4bit", 21), ("uniform_asym_4bit_g32", 36), ("bf16", 9)]
)
def test_rounding_with_feedback_stays_on_the_device(q, n, fake, monkeypatch):
    monkeypatch.setattr("caldera.ldlq.PANEL", 16)  # so that there are several, the last one short
    basis, quantizer, weight = prepare(empty(n, n), name="x"), get_quantizer(q), empty(24, n)
    found = ldlq(weight, basis, quantizer)
    tuned = tune(weight, basis, quantizer, found, 1)
    assert on_device(found.codes, found.values, tuned.codes, tuned.values) and tuned.values.shape == (24, n)


@pytest.mark.parametrize(
    ("m", "n", "settings"),
    [
        (24, 20, {"rank": 0}),
        (24, 12, {"rank": 0, "q": "uniform_4bit"}),
        (24, 12, {"rank": 0, "q": "nf_4bit_g64"}),
        (24, 20, {"rank": 0, "transform": False, "tune_passes": 1}),
        (24, 12, {"rank": 4, "outer_iterations": 2}),  # the second warm-started
        (36, 40, {"rank": 1, "q": "none"}),  # the randomized subspace instead of the dense SVD
        (24, 12, {"rank": 4, "q": "uniform_4bit", "l": "uniform_4bit", "r": "nf_2bit_row"}),
        (24, 20, {"rank": 4, "l": "bf16", "r": "e8p_2bit", "order": "q_first"}),
        (24, 20, {"rank": 4, "q": "none", "l": "bf16", "r": "bf16"}),
        (24, 20, {"rank": 4, "transform": False, "rotate": False}),
        (24, 20, {"rank": 4, "init": "svd", "downdate": True}),
        (24, 20, {"rank": 4, "init": "odlri", "init_rank": 2, "order": "q_first"}),
        (24, 20, {"rank": 4, "init": "whitened", "init_rank": "auto"}),
        (24, 20, {"rank": 4, "moments": "identity", "tune_passes": 1}),
    ],
)
def test_decomposition_stays_on_the_device(m, n, settings, fake):
    method = Method(**{"outer_iterations": 1, "inner_iterations": 1} | settings)
    found = decompose(empty(m, n), empty(n, n), method)
    assert on_device(*found.packed.tensors.values(), found.dequantize())
    assert {k: (tuple(t.shape), t.dtype) for k, t in found.packed.tensors.items()} == found.spec.layout()
    assert found.dequantize().shape == (m, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_stay_on_the_device(dtype, fake):
    accumulator = Accumulator.zeros(50, torch.device(DEVICE))
    accumulator.add(empty(2, 7, 50, dtype=dtype))
    assert on_device(accumulator.total, accumulator.mean()) and accumulator.tokens == 14


def test_randomized_subspace_stays_on_the_device(fake):
    assert on_device(*top_subspace(empty(200, 300), 8, torch.Generator().manual_seed(0)))


# ------------------------------------------------------------------------------------------------------------- dry runs
def test_a_dry_run_leaves_nothing_behind():
    """Tables built while tensors are fake must not be met by real ones later, nor real ones by fake."""
    book, x = get_quantizer("e8p_2bit").codebook, gaussian(50, 8)
    before = book.encode(x)
    with FakeTensorMode():
        assert on_device(book.encode(empty(50, 8)))
    assert torch.equal(book.encode(x), before)
    with FakeTensorMode() as mode:
        book.encode(mode.from_tensor(x))


@pytest.mark.parametrize("make", [scalar.normal_float_levels, scalar.uniform_levels])
def test_the_first_use_of_levels_may_be_a_dry_run(make):
    """A process that plans before it computes: tables that are built lazily are real all the same."""
    make.cache_clear()
    quantizer = Quantizer("fresh", scalar.ScalarCodebook(3, make))
    with FakeTensorMode():
        assert on_device(quantizer.round(empty(8, 16)))
    assert quantizer.round(gaussian(8, 16)).isfinite().all()


def test_the_first_use_of_the_lattice_may_be_a_dry_run():
    for table in (e8p.patterns, e8p.pattern_lookup, e8p.extra_halves, e8p.e81_points):
        table.cache_clear()
    with FakeTensorMode():
        assert on_device(*(e8p.CODEBOOKS[bits].encode(empty(5, 8)) for bits in (2, 3, 4)))
    assert e8p.CODEBOOKS[3].decode(e8p.CODEBOOKS[3].encode(gaussian(5, 8))).isfinite().all()


@pytest.mark.parametrize("name", ["e8p_2bit", "e8p_3bit", "nf_3bit"])
def test_tables_made_in_inference_mode_serve_training(name):
    """The first decode may happen while moments are collected, the next while scales are trained."""
    _cached.cache_clear()
    quantizer, codes = get_quantizer(name), torch.zeros(2, 2, dtype=torch.int64)
    scale = torch.ones(1, 1)
    with torch.inference_mode():
        quantizer.decode(codes, Scales(scale), 2 * quantizer.group)
    quantizer.decode(codes, Scales(scale.requires_grad_()), 2 * quantizer.group).square().sum().backward()
    assert scale.grad.isfinite().all()


def test_constants_are_copied_once_a_device():
    x = torch.zeros(1)
    assert constant(e8p.patterns, x) is constant(e8p.patterns, x)


def test_real_and_fake_runs_have_the_same_shapes():
    method = Method(rank=4, outer_iterations=1, inner_iterations=1)
    real = decompose(gaussian(13, 21), second_moments(21), method)
    with FakeTensorMode():
        dry = decompose(empty(13, 21), empty(21, 21), method)
    assert {k: t.shape for k, t in real.packed.tensors.items()} == {k: t.shape for k, t in dry.packed.tensors.items()}
