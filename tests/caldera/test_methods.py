"""What each choice of a method means, against dense linear algebra in float64."""

import pytest
import torch

from caldera import Decomposition, Method, UserError, decompose, prepare
from caldera.basis import Basis, downdated, out_of, restricted
from caldera.initial import initial_basis, initial_factors, initial_rank, split
from caldera.ldlq import ldlq
from caldera.quantizers import get_quantizer
from tests.caldera.oracles import (
    basis_of,
    best_left,
    dense_product,
    downdated_by_definition,
    error_by_definition,
    gaussian,
    kept_channels,
    second_moments,
    split_by_force,
    weighted_loss,
)

HALF = {"l": "bf16", "r": "bf16", "rotate": False}
SCALAR = {"q": "uniform_asym_3bit_g32", "transform": False, "rank": 0}
QERA = HALF | {"rank": 6, "order": "q_first", "outer_iterations": 1, "inner_iterations": 1}
SIGMA = 1e-6  # damping small beside the smallest moments, so that the oracles need none


def problem(m: int = 24, n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with two large directions, and the moments of its inputs."""
    weight = gaussian(m, n, seed=seed) + 2 * gaussian(m, 2, seed=seed + 10) @ gaussian(2, n, seed=seed + 11)
    return weight, second_moments(n, seed)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def mean_error(seeds: int = 5, **options) -> float:
    """Mean relative error over problems with rank 4 unless told."""
    method = Method(**{"rank": 4, "outer_iterations": 1, "inner_iterations": 2} | options)
    return sum(decompose(*problem(48, 64, seed), method).relative_error for seed in range(seeds)) / seeds


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


# ------------------------------------------------------------------------------------------------------ initial factors
def initial_product(method: Method, weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """L0 R0 (m, n), brought back to the original coordinates."""
    basis = prepare(moments, name="x", **method.basis_options)
    left, right, *_ = initial_factors(basis.forward(weight, "x"), basis, method, generator(), "x", [])
    return back(left.values.T @ right.values, basis)


def back(x: torch.Tensor, basis: Basis) -> torch.Tensor:
    return out_of(x, basis.seed, basis.name, basis.name) if basis.transformed else x


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("init", ["svd", "whitened", "odlri"])
def test_initial_factors_are_the_dense_solution(init, k, transform):
    """bf16 factors: all that separates them from float64 is their rounding."""
    weight, moments = problem()
    method = Method(rank=8, init=init, init_rank=k, init_channels=12, transform=transform, sigma=SIGMA, **HALF)
    fitted_to = {"svd": torch.eye(40), "whitened": moments, "odlri": kept_channels(moments, 12)}[init]
    expected = dense_product(weight, fitted_to, k, SIGMA)
    assert close(initial_product(method, weight, moments), expected, 0.02)


@pytest.mark.parametrize("transform", [False, True])
def test_as_many_dimensions_as_outlier_channels_keep_these_exactly(transform):
    weight, moments = problem()
    method = Method(rank=8, init="odlri", init_rank=6, init_channels=6, transform=transform, sigma=SIGMA, **HALF)
    product, largest = initial_product(method, weight, moments), moments.diagonal().topk(6).indices
    assert close(product[:, largest], weight[:, largest], 0.02)


@pytest.mark.parametrize("transformed", [False, True])
def test_channels_are_chosen_in_the_original_coordinates(transformed):
    basis = basis_of(40, transformed=transformed)
    found = restricted(basis, 7, [])
    expected = basis_of_moments(kept_channels(second_moments(40), 7), transformed)
    torch.testing.assert_close(found.moments, expected.moments, rtol=1e-4, atol=1e-4)


def basis_of_moments(moments: torch.Tensor, transformed: bool) -> Basis:
    return prepare(moments, name="input", sigma=1e-2, transformed=transformed)


def test_more_channels_than_there_are_is_the_whole_of_the_moments():
    basis = basis_of(40, transformed=True)
    torch.testing.assert_close(restricted(basis, 100, []).moments, basis.moments, rtol=1e-4, atol=1e-5)


def test_initial_factors_are_rounded_as_all_others():
    weight, moments = problem()
    method = Method(rank=6, init="svd", l="e8p_2bit", r="uniform_3bit_row")
    basis = prepare(moments, name="x")
    pair = initial_factors(weight, basis, method, generator(), "x", [])
    for factor, name, width in zip(pair, (method.l, method.r), weight.shape):
        assert torch.equal(get_quantizer(name).decode(factor.codes, factor.scales, width), factor.values)


@pytest.mark.parametrize("options", [{}, {"init": "zero", "init_rank": 4}, {"rank": 0, "init": "whitened"}])
def test_without_an_initialisation_there_is_nothing(options):
    weight, moments = problem()
    method, basis = Method(**{"rank": 6} | options), prepare(moments, name="x")
    assert initial_factors(weight, basis, method, generator(), "x", []) is None
    assert initial_basis(basis, method, []) is basis


@pytest.mark.parametrize(("init_rank", "expected"), [(None, 6), (2, 2), (6, 6), (100, 6)])
def test_initial_rank_is_at_most_the_rank(init_rank, expected):
    weight, moments = problem()
    method = Method(rank=6, init="whitened", init_rank=init_rank, outer_iterations=1)
    assert initial_rank(weight, prepare(moments, name="x"), method, generator()) == expected
    assert decompose(weight, moments, method).init_rank == expected


def test_q_first_rounds_what_the_initial_factors_leave():
    weight, moments = problem()
    method = Method(rank=6, init="whitened", order="q_first", outer_iterations=1, **HALF)
    trace = decompose(weight, moments, method).trace
    plain = decompose(weight, moments, Method(rank=6, order="q_first", outer_iterations=1, **HALF)).trace
    assert trace[0]["step"] == "Q" and trace[0]["error"] < 0.9 * plain[0]["error"]


def test_factors_of_a_part_of_the_rank_are_completed():
    """Whatever they began with, L and R are stored with all their dimensions, and the rest of them serves."""
    weight, moments = problem()
    for order in ("lr_first", "q_first"):
        for warm_start in (True, False):
            options = {"order": order, "warm_start": warm_start, "outer_iterations": 2, "q": "uniform_4bit"}
            found = decompose(weight, moments, Method(rank=8, init="svd", init_rank=2, **options))
            assert found.packed.tensors.keys() == {f"{p}_{k}" for p in "qlr" for k in ("codes", "scale")}
            assert found.spec.rank == 8
            assert found.relative_error < decompose(weight, moments, Method(rank=2, **options)).relative_error


def test_lr_first_starts_from_the_initial_factors():
    """With 16-bit factors one alternation follows: from the optimum it stays there, from elsewhere it shows."""
    weight, moments = problem()
    options = HALF | {"rank": 4, "q": "none", "sigma": SIGMA}
    errors = {i: decompose(weight, moments, Method(init=i, **options)).relative_error for i in ("whitened", "odlri")}
    best = error_by_definition(weight, dense_product(weight, moments, 4, SIGMA), moments)
    assert errors["whitened"] == pytest.approx(best, rel=1e-3)
    other = decompose(weight, moments, Method(init="odlri", init_channels=1, init_rank=4, **options))
    assert other.relative_error > 1.001 * best


# -------------------------------------------------------------------------------------------------- the split of a rank
@pytest.mark.parametrize("rank", [1, 6, 24])
def test_the_split_is_that_of_the_criterion(rank):
    for seed in range(3):
        weight, basis = problem(seed=seed)[0], basis_of(40, seed)
        products = split_by_force(weight, basis.damped, rank, generator())
        found = split(weight, basis, rank, generator())
        assert 0 <= found <= rank and products[found] == pytest.approx(min(products), rel=1e-4, abs=1e-9)


def test_the_split_keeps_what_is_of_low_rank():
    basis = prepare(torch.eye(64), name="x")
    low = 100 * gaussian(48, 3) @ gaussian(3, 64)
    assert split(low + gaussian(48, 64, seed=5), basis, 12, generator()) >= 3
    assert split(low + gaussian(48, 64, seed=5), basis, 3, generator()) == 3
    assert split(torch.zeros(48, 64), basis, 12, generator()) == 0


def test_automatic_split_is_recorded():
    weight, moments = problem()
    found = decompose(weight, moments, Method(rank=8, init="whitened", init_rank="auto", order="q_first"))
    assert 0 < found.init_rank <= 8


# ----------------------------------------------------------------------------------------------------- Hessian downdate
@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("k", [1, 5, 39])
def test_downdated_moments_leave_what_a_refit_of_l_cannot_absorb(k, transformed):
    basis, right, error = basis_of(40, transformed=transformed), gaussian(k, 40, seed=3), gaussian(9, 40, seed=4)
    found = downdated(basis, right, "x", [])
    expected = downdated_by_definition(basis.moments, right)
    torch.testing.assert_close(found.moments.double(), expected, rtol=1e-3, atol=1e-3)
    refit = error.double() - best_left(error, basis.moments, right) @ right.double()
    left_over = weighted_loss(refit, basis.moments)
    assert weighted_loss(error, found.moments) == pytest.approx(left_over, rel=1e-3, abs=1e-2)
    torch.testing.assert_close(found.chol @ found.chol.T, found.damped, rtol=1e-3, atol=1e-3)


def test_q_is_rounded_against_the_downdated_moments():
    weight, moments = problem()
    method = Method(rank=6, downdate=True, transform=False, outer_iterations=1, q="uniform_2bit")
    basis, found = prepare(moments, name="x", **method.basis_options), decompose(weight, moments, method, name="x")
    left, right = found.packed.part("l"), found.packed.part("r")
    rounded = ldlq(weight - left.T @ right, downdated(basis, right, "x", []), get_quantizer("uniform_2bit"))
    assert torch.equal(found.packed.part("q"), rounded.values)


def test_downdate_makes_the_q_step_worse_and_its_refit_better():
    """Why it hurts: Q alone gives up on what only a perfect refit of L would take up."""
    weight, moments = problem(48, 64)
    options = {"rank": 16, "order": "lr_first", "outer_iterations": 3, "patience": 9}
    on, off = (decompose(weight, moments, Method(downdate=d, **options)).trace for d in (True, False))
    assert on[1]["error"] > off[1]["error"] and on[2]["error"] < on[1]["error"]


# ------------------------------------------------------------------------------------------------------------- identity
def test_rounding_without_moments_is_rounding_to_nearest():
    weight, moments = problem(24, 70)
    for q in ("uniform_asym_3bit_g32", "nf_3bit_row", "e8p_2bit"):
        found = decompose(weight, moments, Method(**SCALAR | {"q": q}, moments="identity", tune_passes=2))
        assert torch.equal(found.dequantize(), get_quantizer(q).round(weight))


def test_group_scales_and_feedback_are_plain_ldlq():
    weight, moments = problem(24, 70)
    found, quantizer = decompose(weight, moments, Method(**SCALAR), name="x"), get_quantizer(SCALAR["q"])
    expected = ldlq(weight, prepare(moments, name="x", transformed=False), quantizer).values
    assert torch.equal(found.dequantize(), expected)


@pytest.mark.parametrize("transform", [False, True])
def test_a_fit_without_moments_is_measured_with_them(transform):
    weight, moments = problem()
    other = second_moments(40, 7)
    options = {"rank": 4, "moments": "identity", "transform": transform, "outer_iterations": 2}
    one, two = (decompose(weight, h, Method(**options), name="x") for h in (moments, other))
    assert all(torch.equal(t, two.packed.tensors[key]) for key, t in one.packed.tensors.items())
    for found, h in ((one, moments), (two, other)):
        assert found.relative_error == pytest.approx(error_by_definition(weight, found.dequantize(), h), rel=1e-3)
    plain = float((weight - one.dequantize()).norm() / weight.norm())
    assert min(t["error"] for t in one.trace[1:]) == pytest.approx(plain, rel=1e-3)


def test_a_basis_of_other_moments_than_the_method_wants_is_refused():
    weight, moments = problem()
    with pytest.raises(UserError, match="basis_options"):
        decompose(weight, moments, Method(rank=4, moments="identity"), basis=prepare(moments, name="x"))


def test_loftq_rounds_the_weight_first_and_corrects_by_svd():
    weight, moments = problem()
    loftq = HALF | {"rank": 6, "q": "nf_4bit_g32", "order": "q_first", "moments": "identity", "transform": False}
    found = decompose(weight, moments, Method(**loftq, outer_iterations=1))
    rounded = get_quantizer("nf_4bit_g32").round(weight)
    assert torch.equal(found.packed.part("q"), rounded)
    assert close(found.dequantize() - rounded, dense_product(weight - rounded, torch.eye(40), 6, 0.0), 0.02)


def test_qera_is_the_closed_form():
    weight, moments = problem()
    found = decompose(weight, moments, Method(**QERA, transform=False, sigma=SIGMA))
    rest = weight - found.packed.part("q")
    expected = dense_product(rest, moments, 6, SIGMA)
    best = weighted_loss(rest - expected, moments)
    assert weighted_loss(weight - found.dequantize(), moments) == pytest.approx(best, rel=0.01)


# ------------------------------------------------------------------------------------------- what is better, on average
def test_feedback_is_no_worse_than_rounding_to_nearest():
    assert mean_error(**SCALAR) < 0.95 * mean_error(**SCALAR, moments="identity")


def test_a_fit_to_the_moments_is_no_worse_than_the_svd():
    alone = HALF | {"q": "none"}
    assert mean_error(**alone, init="whitened") < 0.99 * mean_error(**alone, moments="identity")


def test_a_correction_that_knows_the_moments_is_no_worse():
    plain = QERA | {"q": "nf_4bit_g32", "transform": False}
    assert mean_error(**plain) < 0.95 * mean_error(**plain, moments="identity")


# --------------------------------------------------------------------------------------------------- fit equals deploy
@pytest.mark.parametrize("order", ["lr_first", "q_first"])
@pytest.mark.parametrize(
    "options",
    [
        {"init": "svd"}, {"init": "whitened", "init_rank": 3}, {"init": "odlri", "init_channels": 4},
        {"init": "whitened", "init_rank": "auto", "warm_start": False}, {"downdate": True},
        {"init": "svd", "q": "none"}, {"init": "odlri", "l": "bf16"},
        {"downdate": True, "init": "whitened", "transform": False, "tune_passes": 1},
    ],
    ids=str,
)  # fmt: skip
def test_reported_error_is_that_of_the_packed_tensors(options, order):
    weight, moments = problem(30, 43)
    found = decompose(weight, moments, Method(**{"rank": 8, "outer_iterations": 2, "order": order} | options))
    expected = error_by_definition(weight, found.dequantize(), moments)
    assert found.relative_error == pytest.approx(expected, rel=1e-3)
    assert found.relative_error == pytest.approx(min(complete_errors(found, options)), rel=2e-3)


def complete_errors(found: Decomposition, options: dict) -> list[float]:
    """Errors of the iterates that can be deployed; the first half step is one if initial factors have all the rank."""
    whole = found.init_rank == found.spec.rank and found.trace[0]["step"] == "Q"
    return [step["error"] for step in found.trace[0 if whole or options.get("q") == "none" else 1 :]]


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "mine"}, "moments='mine' must be one of measured, identity"),
        ({"init": "random"}, "init='random' must be one of zero, svd, whitened, odlri"),
        ({"init_rank": 0}, "init_rank=0 must be a whole number of at least 1, auto, or null for all"),
        ({"init_rank": True}, "init_rank=True must be a whole number"),
        ({"init_rank": "half"}, "init_rank='half' must be a whole number"),
        ({"init_channels": 0}, "init_channels=0 must be a whole number of at least 1"),
        ({"init": "odlri", "moments": "identity"}, "init='odlri' looks for .*: set moments=measured"),
        ({"downdate": "no"}, "downdate='no' must be true or false"),
    ],
)
def test_wrong_choices_are_refused_before_any_work(options, message):
    with pytest.raises(UserError, match=message):
        Method(**options)
