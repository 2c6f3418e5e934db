"""The plain version that speeds are compared to finds what the project's code finds."""

from dataclasses import replace

import pytest
import torch

from bench import textbook
from bench.problems import METHOD, problem
from caldera import decompose, prepare
from caldera.ldlq import ldlq
from caldera.quantizers import get_quantizer


def prepared(m: int, n: int):
    weight, moments = problem(m, n)
    basis = prepare(moments, name="input", **METHOD.basis_options)
    return weight, moments, basis, basis.forward(weight, "matrix")


@pytest.mark.parametrize("bits", [2, 4])
def test_search_finds_the_codebook_s_nearest_point(bits):
    z = 1.5 * torch.randn(2000, 8, generator=torch.Generator().manual_seed(bits))
    codebook = get_quantizer(f"e8p_{bits}bit").codebook
    errors = [(z - x).square().sum(1) for x in (textbook.nearest(z, bits), codebook.decode(codebook.encode(z)))]
    torch.testing.assert_close(*errors)


def test_ldlq_has_the_same_error():
    _, _, basis, w = prepared(64, 128)
    quantizer = get_quantizer("e8p_2bit")
    ours = ldlq(w, basis, quantizer, quantizer.fit(w)).values
    plain = textbook.ldlq(w, basis.damped, 2)
    losses = [textbook.loss(w - q, basis.damped) for q in (ours, plain)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)  # a tie that rounding decides changes what follows it


def test_decomposition_has_the_same_error():
    weight, moments, basis, w = prepared(192, 192)
    method = replace(METHOD, rank=16, outer_iterations=6, inner_iterations=4, warm_start=False)
    run = textbook.decompose(w, basis.moments, basis.sigma, rank=16, outer=6, inner=4)
    assert run.error == pytest.approx(decompose(weight, moments, method).relative_error, rel=1e-2)
    assert run.error <= min(run.ldlq_errors) and len(run.lplr_seconds) == len(run.ldlq_seconds) == 6
