"""The whole decomposition: what is reported is what is deployed, more work is never worse, refusals are sentences."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caldera import Decomposition, MatrixSpec, Method, NumericalError, UserError, decompose, prepare, relative_error
from caldera.basis import into, out_of
from caldera.ldlq import ldlq, tune
from caldera.quantizers import get_quantizer, quantizer_names
from tests.caldera.oracles import error_by_definition, gaussian, never_rises, second_moments

QUICK = {"outer_iterations": 2, "inner_iterations": 2}
CODED = [name for name in quantizer_names() if name.endswith("bit")]
# Every family and granularity, and 16-bit factors beside 2-bit ones: the published code crashes on those.
FACTORS = [
    ("bf16", "e8p_2bit"), ("e8p_2bit", "bf16"), ("fp16", "bf16"), ("e8p_3bit", "e8p_4bit"),
    ("uniform_2bit", "nf_4bit_row"), ("uniform_asym_4bit_g32", "e8p_2bit_row"), ("nf_2bit_g64", "uniform_1bit"),
]  # fmt: skip


def problem(m: int = 24, n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with a few large directions and columns, and the moments of its inputs."""
    weight = gaussian(m, n, seed=seed) + gaussian(m, 2, seed=seed + 10) @ gaussian(2, n, seed=seed + 11)
    return weight * gaussian(1, n, seed=seed + 12).exp(), second_moments(n, seed)


def quick(**options) -> Method:
    return Method(**{"rank": 4} | QUICK | options)


def assert_honest(found: Decomposition, weight: torch.Tensor, moments: torch.Tensor) -> None:
    """The reported error is that of the packed tensors, and it is the smallest that the loop saw."""
    expected = error_by_definition(weight, found.dequantize(), moments)
    assert found.relative_error == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found.relative_error == pytest.approx(min(complete_errors(found.trace)), rel=2e-3, abs=2e-6)


def complete_errors(trace: list[dict]) -> list[float]:
    """Errors of all iterates that can be deployed: with two parts, the first half step has made only one of them."""
    return [step["error"] for step in trace[1:] or trace]


# ---------------------------------------------------------------------------------------------------- fit equals deploy
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("q", quantizer_names())
def test_reported_error_is_that_of_the_packed_backbone(q, transform):
    weight, moments = problem()
    assert_honest(decompose(weight, moments, quick(rank=0, q=q, transform=transform)), weight, moments)


@pytest.mark.parametrize("where", ["row", "g64", "g32"])
@pytest.mark.parametrize("q", ["e8p_3bit", "uniform_asym_2bit", "nf_4bit"])
def test_reported_error_is_that_of_a_backbone_with_fine_scales(q, where):
    weight, moments = problem(18, 70)
    for transform in (True, False):
        found = decompose(weight, moments, quick(rank=0, q=f"{q}_{where}", transform=transform))
        assert_honest(found, weight, moments)


@pytest.mark.parametrize("q", CODED)
def test_reported_error_is_that_of_packed_factors_of_every_quantizer(q):
    weight, moments = problem()
    assert_honest(decompose(weight, moments, quick(l=q, r=q)), weight, moments)


@pytest.mark.parametrize("order", ["lr_first", "q_first"])
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize(("left", "right"), FACTORS)
def test_reported_error_is_that_of_mixed_factors(left, right, transform, order):
    weight, moments = problem(30, 43)
    method = quick(l=left, r=right, q="uniform_4bit", transform=transform, order=order)
    assert_honest(decompose(weight, moments, method), weight, moments)


@pytest.mark.parametrize("rank", [1, 7, 8, 12, 24])
@pytest.mark.parametrize("factors", ["e8p_2bit", "e8p_4bit", "uniform_4bit", "bf16"])
def test_every_rank_works(rank, factors):
    """The published code packs no rank that is not a multiple of 16."""
    weight, moments = problem()
    assert_honest(decompose(weight, moments, quick(rank=rank, l=factors, r=factors)), weight, moments)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 0, "tune_passes": 2}, {"q": "none", "l": "bf16", "r": "bf16"}, {"transform": False}]
)
def test_error_is_measured_with_the_moments_as_given(options):
    """Not with the damped ones, and whatever their unit is."""
    weight, moments = problem()
    for sigma in (1e-4, 1.0):
        for unit in (1.0, 1e4, 1e-6):
            found = decompose(weight, moments * unit, quick(sigma=sigma, **options))
            assert_honest(found, weight, moments)


def test_relative_error_by_definition():
    weight, moments = problem()
    other, zeros = weight + 0.1 * gaussian(24, 40, seed=5), torch.zeros(24, 40)
    expected = error_by_definition(weight, other, moments)
    assert relative_error(weight, other, moments) == pytest.approx(expected, rel=1e-5)
    assert relative_error(weight, zeros, moments) == pytest.approx(1)
    assert relative_error(weight, weight, moments) == relative_error(zeros, zeros, moments) == 0
    assert relative_error(zeros, weight, moments) == math.inf


def test_matrices_with_one_input_share_a_basis():
    """As q, k and v do: each is deployed under its own name."""
    _, moments = problem()
    basis = prepare(moments, name="qkv", seed=3)
    for name, rows in (("q", 24), ("k", 16), ("v", 5)):
        weight = gaussian(rows, 40, seed=rows)
        found = decompose(weight, moments, quick(seed=3), name=name, basis=basis)
        assert (found.spec.name, found.spec.input_name) == (name, "qkv")
        assert_honest(found, weight, moments)


@pytest.mark.parametrize("made", [{"transformed": False}, {"seed": 1}])
def test_a_basis_made_otherwise_than_the_method_says_is_followed_or_refused(made):
    """Deploying with other signs than those of the fit gives noise."""
    weight, moments = problem()
    basis = prepare(moments, name="x", **made)
    try:
        found = decompose(weight, moments, quick(), basis=basis)
    except UserError:
        return
    assert_honest(found, weight, moments)


def test_basis_of_other_moments_is_refused_by_shape():
    weight, moments = problem()
    with pytest.raises(UserError, match="40"):
        decompose(weight, moments, quick(), basis=prepare(torch.eye(32), name="x"))
    with pytest.raises(UserError, match="32"):
        decompose(weight, torch.eye(32), quick())


# ------------------------------------------------------------------------------------------------------- more is better
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [{}, {"warm_start": False}, {"order": "q_first"}, {"rotate": False}, {"l": "bf16", "r": "bf16"},
     {"l": "e8p_2bit", "r": "e8p_2bit", "rank": 8, "warm_start": False}, {"tune_passes": 1}, {"transform": False}],
    ids=str,
)  # fmt: skip
def test_more_outer_iterations_are_never_worse(options, seed):
    weight, moments = problem(seed=seed)
    errors = [
        decompose(weight, moments, quick(seed=seed, patience=9, **options | {"outer_iterations": i})).relative_error
        for i in range(1, 6)
    ]
    assert never_rises(errors, slack=1e-5)


def test_best_iterate_is_kept_and_not_the_last():
    """Restarted factors make later iterations worse: the last one would be the wrong answer."""
    found = 0
    for seed in range(4):
        weight, moments = problem(seed=seed)
        method = quick(rank=12, l="e8p_2bit", r="e8p_2bit", warm_start=False, outer_iterations=6, patience=9)
        result = decompose(weight, moments, method)
        found += result.trace[-1]["error"] > 1.001 * result.relative_error
        assert_honest(result, weight, moments)
    assert found > 0


def test_error_falls_with_rank_and_with_bits():
    weight, moments = problem(48, 64)
    ranks = [decompose(weight, moments, quick(rank=k)).relative_error for k in (0, 4, 16, 48)]
    bits = [decompose(weight, moments, quick(q=q)).relative_error for q in ("e8p_2bit", "e8p_3bit", "e8p_4bit")]
    assert ranks == sorted(ranks, reverse=True) and bits == sorted(bits, reverse=True)


def test_fine_backbone_and_full_rank_leave_nothing():
    weight, moments = problem()
    method = quick(rank=24, q="uniform_8bit", l="bf16", r="bf16", outer_iterations=5)
    assert decompose(weight, moments, method).relative_error < 1e-3


def test_inner_iterations_serve_every_factor_that_is_rounded():
    """Two 16-bit factors need no alternation; one beside a 2-bit factor does."""
    weight, moments = problem()

    def run(left: str, right: str, iterations: int) -> Decomposition:
        return decompose(weight, moments, quick(l=left, r=right, inner_iterations=iterations, outer_iterations=1))

    assert same_bytes(run("bf16", "bf16", 1), run("bf16", "bf16", 8))
    for names in (("bf16", "e8p_2bit"), ("e8p_2bit", "bf16")):
        assert run(*names, 8).trace[0]["error"] < run(*names, 1).trace[0]["error"]


def test_16bit_factors_alone_reproduce_a_low_rank_weight():
    weight, moments = gaussian(24, 3) @ gaussian(3, 40), second_moments(40)
    assert decompose(weight, moments, quick(rank=3, q="none", l="bf16", r="bf16")).relative_error < 5e-3


def test_transform_pays_where_there_are_outliers():
    weight, moments = problem(48, 64)
    weight[3, 5] = weight[20, 60] = 60.0
    on, off = (decompose(weight, moments, quick(rank=0, transform=t)).relative_error for t in (True, False))
    assert on < 0.8 * off


# -------------------------------------------------------------------------------------------------------- special cases
@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("q", ["e8p_2bit", "uniform_3bit_row"])
def test_rank_0_is_plain_ldlq(q, transform, passes):
    weight, moments = problem(20, 45)
    method = Method(rank=0, q=q, transform=transform, tune_passes=passes, seed=7)
    found = decompose(weight, moments, method, name="w")
    basis, quantizer = prepare(moments, name="w", seed=7, transformed=transform), get_quantizer(q)
    target = into(weight, 7, "w", "w") if transform else weight
    rounded = tune(target, basis, quantizer, ldlq(target, basis, quantizer), passes)
    assert {f"q_{k}" for k in quantizer.pack(rounded.codes, rounded.scales)} == set(found.packed.tensors)
    assert torch.equal(found.packed.part("q"), rounded.values)
    expected = out_of(rounded.values, 7, "w", "w") if transform else rounded.values
    assert torch.equal(found.dequantize(), expected)
    assert len(found.trace) == 1  # a second round would do the same again


def test_no_backbone_is_low_rank_alone():
    weight, moments = problem()
    found = decompose(weight, moments, quick(q="none", rank=6))
    assert set(found.packed.tensors) == {"l_codes", "l_scale", "r_codes", "r_scale"}
    assert found.packed.part("q") is None and torch.linalg.matrix_rank(found.packed.inner()) == 6
    assert_honest(found, weight, moments)


@pytest.mark.parametrize(("order", "first"), [("lr_first", "LR"), ("q_first", "Q")])
def test_trace_has_every_half_step(order, first):
    weight, moments = problem()
    trace = decompose(weight, moments, quick(order=order, outer_iterations=3, patience=9)).trace
    second = {"LR": "Q", "Q": "LR"}[first]
    assert [(t["iteration"], t["step"]) for t in trace] == [(i, s) for i in range(3) for s in (first, second)]
    assert all(math.isfinite(t["error"]) and t["error"] > 0 for t in trace)


def test_loop_stops_when_it_no_longer_improves():
    """After two rounds in a row that gained less than 5%, and not before."""
    weight, moments = problem()
    trace = decompose(weight, moments, quick(outer_iterations=50, patience=2, tolerance=0.05)).trace
    rounds = trace[-1]["iteration"] + 1
    best = [math.inf] + [min(complete_errors(trace[: 2 * (i + 1)])) for i in range(rounds)]
    gained = [b < a * 0.95 for a, b in itertools.pairwise(best)]
    assert rounds < 50 and gained[-3:] == [True, False, False]
    assert [False, False] not in [gained[i : i + 2] for i in range(rounds - 2)]


# ---------------------------------------------------------------------------------------------------------- determinism
def same_bytes(a: Decomposition, b: Decomposition) -> bool:
    return all(torch.equal(t, b.packed.tensors[key]) for key, t in a.packed.tensors.items())


def test_same_seed_gives_the_same_bytes():
    weight, moments = problem(60, 90)
    a, b = (decompose(weight, moments, quick(seed=5), name="w") for _ in range(2))
    assert a.spec == b.spec and same_bytes(a, b) and a.trace == b.trace
    torch.manual_seed(123)  # nor does the global state of the process matter
    assert same_bytes(a, decompose(weight, moments, quick(seed=5), name="w"))


def test_another_seed_gives_other_signs():
    weight, moments = problem()
    a, b = (decompose(weight, moments, quick(seed=seed, rank=0)) for seed in (0, 1))
    assert a.spec.seed == 0 and b.spec.seed == 1 and not same_bytes(a, b)
    assert not torch.equal(into(weight, 0, "x", "w"), into(weight, 1, "x", "w"))


def test_randomness_is_named():
    """Without the transform only the generator of the factors is left to depend on the name."""
    weight, moments = problem(60, 90)  # wide enough for the randomized subspace
    a, b, c = (decompose(weight, moments, quick(transform=False), name=n) for n in ("a", "b", "a"))
    assert same_bytes(a, c) and not same_bytes(a, b)


@pytest.mark.parametrize(
    "options", [{}, {"transform": False}, {"rank": 0}, {"rank": 0, "transform": False, "tune_passes": 2}, {"q": "none"}]
)
def test_neither_weight_nor_moments_change(options):
    """The published code scales W in place, so that later iterations measure against another matrix."""
    weight, moments = problem()
    kept = weight.clone(), moments.clone()
    decompose(weight, moments, quick(**options)).dequantize().zero_()
    assert torch.equal(weight, kept[0]) and torch.equal(moments, kept[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_types_are_taken(dtype):
    weight, moments = problem()
    weight = weight.to(dtype)
    found = decompose(weight, moments.double() if dtype == torch.float64 else moments, quick())
    assert found.dequantize().dtype == torch.float32
    assert_honest(found, weight.double(), moments)


@pytest.mark.parametrize("transform", [True, False])
def test_memory_order_does_not_matter(transform):
    weight, moments = problem()
    a = decompose(weight, moments, quick(transform=transform))
    b = decompose(weight.T.contiguous().T, moments.T.contiguous().T, quick(transform=transform))
    assert same_bytes(a, b)


@pytest.mark.parametrize("transform", [True, False])
def test_the_parameter_of_a_layer_is_taken_as_it_is(transform):
    """`decompose(layer.weight, ...)`: a leaf that wants a gradient, beside moments collected in inference mode."""
    weight, moments = problem()
    layer = torch.nn.Linear(40, 24)
    layer.weight.data.copy_(weight)
    with torch.inference_mode():
        collected = moments.clone()
    expected = decompose(weight, moments, quick(transform=transform))
    found = decompose(layer.weight, collected, quick(transform=transform))
    assert same_bytes(found, expected) and not found.dequantize().requires_grad


# -------------------------------------------------------------------------------------------------------------- storage
def test_nominal_bits_are_those_of_the_slides():
    spec = MatrixSpec("w", "x", (4096, 4096), 64, "e8p_2bit", "e8p_4bit", "e8p_4bit")
    assert spec.nominal_bits == 2.125
    assert spec.stored_bytes == 4096 * 4096 // 4 + 2 * 64 * 4096 // 2 + 3 * 4  # and three scales
    assert spec.stored_bits == pytest.approx(2.125, abs=1e-5)


@pytest.mark.parametrize(("m", "n", "rank"), [(576, 1536, 16), (1536, 576, 64), (40, 24, 1)])
def test_nominal_bits_by_the_formula(m, n, rank):
    spec = Method(rank=rank, q="e8p_3bit", l="bf16", r="uniform_5bit").spec((m, n))
    assert spec.nominal_bits == pytest.approx(3 + rank * (m * 16 + n * 5) / (m * n))
    assert Method(rank=0, q="e8p_3bit").spec((m, n)).nominal_bits == 3
    assert spec.parameters == m * n


@pytest.mark.parametrize(
    "options", [{}, {"rank": 0}, {"q": "none"}, {"l": "bf16", "r": "nf_3bit_row"}, {"q": "uniform_asym_3bit_g32"}]
)
@pytest.mark.parametrize(("m", "n"), [(24, 40), (13, 21)])
def test_stored_bytes_are_those_of_the_tensors(m, n, options):
    found = decompose(*problem(m, n), quick(**options))
    assert found.stored_bytes == sum(t.nbytes for t in found.packed.tensors.values())
    assert found.stored_bits == 8 * found.stored_bytes / (m * n) >= found.nominal_bits
    assert {k: (tuple(t.shape), t.dtype) for k, t in found.packed.tensors.items()} == found.spec.layout()


def test_spec_survives_json():
    spec = quick(seed=3, transform=False).spec((24, 40), "a.b", "a")
    assert MatrixSpec.from_json(spec.to_json()) == spec


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("rank", [-1, 1.5, True, False, "4", None, float("nan")])
def test_a_rank_that_is_no_whole_number_is_refused(rank):
    with pytest.raises(UserError) as raised:
        Method(rank=rank)
    assert str(raised.value) == f"rank={rank!r} must be a whole number of at least 0"


@pytest.mark.parametrize("field", ["outer_iterations", "inner_iterations", "patience"])
def test_a_count_of_zero_is_refused(field):
    with pytest.raises(UserError, match=f"{field}=0 must be a whole number of at least 1"):
        Method(**{field: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune_passes": -1}, "tune_passes=-1 must be a whole number of at least 0"),
        ({"order": "lrq"}, "order='lrq' must be one of lr_first, q_first"),
        ({"sigma": 0.0}, r"sigma=0\.0 must be above 0 and at most 1"),
        ({"sigma": 2}, "sigma=2 must be above 0 and at most 1"),
        ({"sigma": float("nan")}, "sigma=nan must be above 0"),
        ({"q": "e8p_2"}, "quantizer 'e8p_2' is not known; the nearest names are"),
        ({"l": "uniform_9bit"}, "uniform has no 9-bit variant"),
        ({"r": "bf17"}, "quantizer 'bf17' is not known"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(options, message):
    with pytest.raises(UserError, match=message):
        Method(**options)


@pytest.mark.parametrize("options", [{"l": "none"}, {"r": "none"}, {"q": "none", "rank": 0}])
def test_a_method_that_leaves_nothing_or_half_a_product_is_refused_before_any_work(options):
    """One factor alone is no approximation; neither is an empty list of steps, which once gave zeros."""
    with pytest.raises(UserError):
        Method(**{"rank": 4} | options)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_rank_above_the_smaller_side_is_refused_with_the_largest_one(shape):
    weight, moments = problem(*shape)
    with pytest.raises(UserError) as raised:
        decompose(weight, moments, quick(rank=25), name="layer.q")
    size = f"{shape[0]} x {shape[1]}"
    assert str(raised.value) == f"rank=25 exceeds the smaller side of layer.q ({size}); use at most 24"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    weight, moments = problem()
    weight[1, 2] = weight[3, 4] = bad
    with pytest.raises(NumericalError, match=r"layers\.3\.q_proj: weights: 2 of 960 entries are NaN or infinite"):
        decompose(weight, moments, quick(), name="layers.3.q_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused_by_name(bad):
    weight, moments = problem()
    moments[5, 5] = bad
    with pytest.raises(
        NumericalError, match=r"layers\.3\.q_proj: second moments: 1 of 1600 entries are NaN or infinite"
    ):
        decompose(weight, moments, quick(), name="layers.3.q_proj")


def test_zero_moments_are_refused_by_name():
    with pytest.raises(NumericalError, match="expert: the second moments are zero"):
        decompose(gaussian(8, 8), torch.zeros(8, 8), quick(), name="expert")


def test_moments_of_no_inputs_are_refused_after_the_last_damping():
    """Indefinite beyond repair: never a silent identity in its place."""
    moments = torch.eye(16)
    moments[0, 1] = moments[1, 0] = 10
    with pytest.raises(NumericalError, match="w: second moments: the Cholesky factorisation fails even with 1 added"):
        decompose(gaussian(8, 16), moments, quick(), name="w")


def test_damping_that_had_to_rise_is_recorded():
    moments = torch.eye(16)
    moments[0, 1] = moments[1, 0] = 1.05
    found = decompose(gaussian(8, 16), moments, quick(sigma=1e-3))
    assert found.sigma == pytest.approx(0.1)
    assert decompose(*problem(), quick(sigma=1e-3)).sigma == 1e-3


# --------------------------------------------------------------------------------------------------------- odd problems
def outlier_column() -> torch.Tensor:
    weight = gaussian(24, 40)
    weight[:, 7] = 1e5
    return weight


def zero_columns():
    weight, moments = problem()
    weight[:, ::3] = 0
    moments[::3] = moments[:, ::3] = 0
    return weight, moments


def scaled(weight_scale: float, moments_scale: float):
    weight, moments = problem()
    return weight * weight_scale, moments * moments_scale


ODD = {
    "zero weight": (torch.zeros(24, 40), second_moments(40)),
    "zero rows": (torch.cat([gaussian(8, 40), torch.zeros(16, 40)]), second_moments(40)),
    "weight of rank 1": (gaussian(24, 1) @ gaussian(1, 40), second_moments(40)),
    "constant weight": (torch.full((24, 40), 0.3), second_moments(40)),
    "moments of rank 3": (gaussian(24, 40), second_moments(40, tokens=3)),
    "moments of rank 1": (gaussian(24, 40), torch.ones(40, 40)),
    "one live input": (gaussian(24, 40), torch.diag(torch.eye(40)[7])),
    "zero columns": zero_columns(),
    "8 columns": (gaussian(24, 8), second_moments(8)),
    "1 row": (gaussian(1, 40), second_moments(40)),
    "1 column": (gaussian(24, 1), torch.full((1, 1), 2.0)),
    "1 entry": (gaussian(1, 1), torch.full((1, 1), 2.0)),
    "tiny": scaled(1e-8, 1e-12),
    "large": scaled(1e5, 1e8),
    "outlier column": (outlier_column(), second_moments(40)),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 0},
        {"order": "q_first", "tune_passes": 1},
        {"transform": False, "q": "uniform_2bit_g32"},
        {"l": "bf16", "r": "bf16", "warm_start": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ODD)
def test_odd_problems_are_finite_and_honest(case, options):
    weight, moments = ODD[case]
    rank = min(options.get("rank", 4), *weight.shape)
    found = decompose(weight, moments, quick(**options | {"rank": rank}))
    assert found.dequantize().isfinite().all() and math.isfinite(found.relative_error)
    assert all(math.isfinite(t["error"]) for t in found.trace)
    assert found.relative_error == pytest.approx(relative_error(weight, found.dequantize(), moments), rel=1e-3)
    assert found.relative_error < 1.05


def test_a_zero_weight_becomes_zeros():
    factors_alone = {"q": "none", "l": "bf16", "r": "e8p_2bit"}
    for options in ({}, {"rank": 0, "q": "uniform_3bit"}, factors_alone, {"transform": False}):
        found = decompose(torch.zeros(16, 24), second_moments(24), quick(**options))
        assert torch.equal(found.dequantize(), torch.zeros(16, 24)) and found.relative_error == 0


@given(
    m=st.integers(1, 40), n=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 10**6),
    q=st.sampled_from(["e8p_2bit", "e8p_4bit_g32", "uniform_2bit", "nf_3bit_row", "bf16", "none"]),
    left=st.sampled_from(["e8p_2bit", "uniform_4bit", "bf16"]),
    right=st.sampled_from(["e8p_4bit", "nf_2bit_row", "fp16"]),
    transform=st.booleans(), order=st.sampled_from(["lr_first", "q_first"]), tune_passes=st.integers(0, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape_and_rank(m, n, share, seed, q, left, right, transform, order, tune_passes):
    rank = round(share * min(m, n))
    rank = max(rank, 1) if q == "none" else rank
    weight, moments = gaussian(m, n, seed=seed), second_moments(n, seed)
    method = quick(
        rank=rank, q=q, l=left, r=right, transform=transform, order=order, tune_passes=tune_passes, seed=seed
    )
    found = decompose(weight, moments, method)
    assert found.dequantize().shape == (m, n) and found.dequantize().isfinite().all()
    assert found.stored_bytes == sum(t.nbytes for t in found.packed.tensors.values())
    assert_honest(found, weight, moments)
