"""What theory expects of a decomposition, against what the decomposition measures."""

import statistics

import pytest
import torch

from caldera import Method, NumericalError, decompose, predict_error, prepare
from caldera.quantizers import get_quantizer
from tests.caldera.oracles import gaussian, never_rises, second_moments


def problem(m: int = 96, n: int = 160, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with a few larger directions, and moments whose eigenvalues fall as 1/i, in random directions."""
    weight = gaussian(m, n, seed=seed) + gaussian(m, 4, seed=seed + 10) @ gaussian(4, n, seed=seed + 11)
    turn = torch.linalg.qr(gaussian(n, n, seed=seed + 12)).Q
    return weight, (turn / torch.arange(1, n + 1)) @ turn.T


def method(**options) -> Method:
    return Method(**{"rank": 0, "outer_iterations": 3, "inner_iterations": 5} | options)


def deviation(weight: torch.Tensor, moments: torch.Tensor, tried: Method, **options) -> float:
    """Predicted over measured error, less one."""
    measured = decompose(weight, moments, tried, **options).relative_error
    return predict_error(weight, moments, tried, **options) / measured - 1


# ------------------------------------------------------------------------------------------------------- limiting cases
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("q", ["e8p_2bit", "e8p_3bit", "e8p_4bit", "uniform_2bit", "uniform_4bit", "nf_3bit"])
def test_white_inputs_cost_the_error_of_the_codebook(q, transform):
    """Without correlations there is nothing to feed back."""
    predicted = predict_error(gaussian(128, 256), torch.eye(256), method(q=q, transform=transform))
    assert predicted == pytest.approx(get_quantizer(q).codebook.gaussian_mse ** 0.5, rel=0.015)


def test_an_almost_exact_backbone_leaves_almost_nothing():
    weight, moments = problem()
    assert 0 < predict_error(weight, moments, method(q="bf16")) < 5e-3


@pytest.mark.parametrize("q", ["none", "e8p_2bit"])
def test_full_rank_in_16_bits_leaves_almost_nothing(q):
    weight, moments = problem()
    assert predict_error(weight, moments, method(rank=96, q=q, l="bf16", r="bf16")) < 5e-3


def test_low_rank_alone_leaves_the_tail_of_the_singular_values():
    weight, moments = problem()
    basis = prepare(moments, name="w", sigma=1e-8, transformed=False)
    s = torch.linalg.svdvals(weight @ basis.chol)
    options = method(rank=8, q="none", l="bf16", r="bf16", transform=False, sigma=1e-8)
    expected = float(s[8:].square().sum() / s.square().sum()) ** 0.5
    assert predict_error(weight, moments, options, name="w", basis=basis) == pytest.approx(expected, rel=0.02)


def test_a_zero_weight_has_no_error():
    assert predict_error(torch.zeros(24, 40), second_moments(40), method(rank=4)) == 0


def test_more_bits_and_more_rank_are_expected_to_help():
    weight, moments = problem()
    for family, bits in (("e8p", (2, 3, 4)), ("uniform", range(1, 9)), ("nf", range(2, 9))):
        assert never_rises([predict_error(weight, moments, method(q=f"{family}_{b}bit")) for b in bits])
    assert never_rises([predict_error(weight, moments, method(rank=k)) for k in (0, 2, 4, 16, 64)], slack=1e-2)
    assert never_rises([predict_error(weight, moments, method(tune_passes=t)) for t in range(4)])


# ---------------------------------------------------------------------------------------------- against decompositions
@pytest.mark.parametrize(
    "options",
    [{}, {"q": "trellis_2bit"}, {"q": "uniform_asym_2bit"}, {"q": "e8p_3bit", "rank": 8},
     {"rank": 4, "l": "e8p_2bit", "r": "uniform_4bit"}, {"rank": 4, "q": "none"}, {"tune_passes": 2},
     {"rank": 16, "l": "bf16", "r": "bf16"}, {"transform": False}, {"sigma": 0.1}],
    ids=str,
)  # fmt: skip
def test_synthetic_matrices_turn_out_as_expected(options):
    assert abs(deviation(*problem(), method(**options))) < 0.15


@pytest.mark.parametrize("q", ["uniform_3bit_row", "nf_4bit_g32", "e8p_2bit_row"])
def test_finer_scales_turn_out_as_expected(q):
    """On rows of one size: where they differ, finer scales gain more than theory knows."""
    assert abs(deviation(gaussian(96, 160), problem()[1], method(q=q))) < 0.15


@pytest.mark.parametrize(("m", "n", "rank"), [(1, 9, 1), (5, 3, 0), (40, 77, 7), (77, 41, 41)])
def test_any_shape(m, n, rank):
    assert 0 < predict_error(gaussian(m, n), second_moments(n), method(rank=rank, q="uniform_3bit_g64")) < 1


def test_prediction_depends_on_seed_and_name_alone():
    weight, moments = problem()
    kept, tried = (weight.clone(), moments.clone()), method(rank=4)
    first = predict_error(weight, moments, tried, name="a")
    torch.manual_seed(123)
    assert first == predict_error(weight, moments, tried, name="a") != predict_error(weight, moments, tried, name="b")
    assert first == pytest.approx(predict_error(weight, 1e4 * moments, tried, name="a"), rel=1e-3)
    assert torch.equal(weight, kept[0]) and torch.equal(moments, kept[1])


def test_moments_that_are_not_finite_are_refused():
    weight, moments = problem()
    with pytest.raises(NumericalError, match="layer"):
        predict_error(weight, moments * float("nan"), method(), name="layer")


# ------------------------------------------------------------------------------------------------------ real matrices
LAYERS = (1, 5)
GROUPS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def real_matrices(smollm2_dir):
    """(name, weight, moments, basis) of one matrix of every kind from two blocks, with moments over 4096 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sweeps.texts import load_texts, token_rows

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    model.model.layers = model.model.layers[: max(LAYERS) + 1]
    tokens = token_rows(load_texts("embedded_calibration"), AutoTokenizer.from_pretrained(smollm2_dir), 8, 512, 0)
    blocks = {f"model.layers.{i}": model.model.layers[i] for i in LAYERS}
    sums: dict[str, torch.Tensor] = {}

    def add(name: str):
        def hook(_module, args):
            x = args[0].reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    for prefix, block in blocks.items():
        for group in GROUPS:
            block.get_submodule(group).register_forward_pre_hook(add(f"{prefix}.{group}"))
    with torch.inference_mode():
        for row in tokens:
            model.model(row[None], use_cache=False)
    found = []
    for (prefix, block), (group, members) in ((b, g) for b in blocks.items() for g in GROUPS.items()):
        moments = sums[f"{prefix}.{group}"].clone() / tokens.numel()
        basis = prepare(moments, name=f"{prefix}.{group}")
        found += [(f"{prefix}.{m}", block.get_submodule(m).weight.detach(), moments, basis) for m in members]
    return found[3:10]  # o, gate, up and down of the first, q, k and v of the second block


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"q": "e8p_2bit"}, {"q": "e8p_4bit", "tune_passes": 2}, {"q": "e8p_3bit", "rank": 16},
     {"rank": 64, "l": "e8p_2bit", "r": "e8p_2bit", "tune_passes": 2}, {"q": "nf_4bit"}],
    ids=str,
)  # fmt: skip
def test_real_matrices_turn_out_as_expected(real_matrices, options):
    tried = method(**options)
    found = {name: deviation(w, h, tried, name=name, basis=basis) for name, w, h, basis in real_matrices}
    assert all(abs(d) < 0.15 for d in found.values()), found
    assert statistics.median(map(abs, found.values())) < 0.04
