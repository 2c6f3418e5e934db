"""On a real GPU: the same decompositions as on the processor, and no wait inside a column loop."""

import contextlib

import pytest
import torch

from caldera import Method, decompose, get_quantizer, prepare
from caldera.ldlq import _walk, ldlq, tune
from tests.caldera.oracles import gaussian, second_moments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@contextlib.contextmanager
def no_waits():
    """Where torch raises an error instead of waiting for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("q", ["e8p_2bit", "trellis_2bit"])
def test_a_gpu_finds_as_good_a_decomposition(q):
    """Sums in another order flip single codes, so it is the errors that agree."""
    weight, moments = gaussian(96, 64), second_moments(64)
    method = Method(rank=8, q=q, outer_iterations=2, inner_iterations=3)
    here, there = (decompose(weight.to(d), moments.to(d), method) for d in ("cpu", "cuda"))
    assert there.relative_error == pytest.approx(here.relative_error, rel=0.02)
    assert all(t.is_cuda for t in there.packed.tensors.values()) and there.dequantize().is_cuda


@pytest.mark.parametrize("name", ["e8p_2bit", "e8p_4bit", "trellis_2bit", "uniform_asym_4bit_g32", "nf_4bit"])
def test_a_gpu_reads_what_the_processor_stored(name):
    quantizer, x = get_quantizer(name), gaussian(64, 48)
    scales = quantizer.fit(x)
    stored = quantizer.pack(quantizer.encode(x, scales), scales)
    there = quantizer.unpack({key: t.cuda() for key, t in stored.items()}, 64, 48)
    torch.testing.assert_close(there.cpu(), quantizer.unpack(stored, 64, 48))


@pytest.mark.parametrize("name", ["e8p_2bit", "e8p_3bit", "trellis_2bit", "uniform_asym_4bit_g32", "nf_4bit", "bf16"])
def test_column_loops_do_not_wait_for_the_gpu(name, monkeypatch):
    weight, basis = gaussian(64, 32).cuda(), prepare(second_moments(32).cuda(), name="x")
    quantizer = get_quantizer(name)
    rounded = tune(weight, basis, quantizer, ldlq(weight, basis, quantizer), 1)  # constants reach the GPU
    inverses = basis.block_inverses(quantizer.group)  # which the solver checks
    monkeypatch.setattr(type(basis), "block_inverses", lambda _self, _group: inverses)
    with no_waits():
        found = _walk(weight, basis, quantizer, rounded.scales)
        tune(weight, basis, quantizer, found, 1)
    assert found.values.isfinite().all()


def test_a_point_computed_on_the_gpu(application, tmp_path):
    """Calibration, compression and evaluation of the tiny model."""
    few = ["rank.k=4", "method.outer_iterations=1", "method.inner_iterations=2", "compute.workers=1"]
    code, _, errors = application("compute.device=cuda", "method=caldera", *few)
    assert code == 0, errors
    assert list((tmp_path / "results").rglob("record.json"))
