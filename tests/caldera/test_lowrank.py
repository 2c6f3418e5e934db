"""Low-rank factors against dense linear algebra in float64."""

import pytest
import torch

from caldera.linalg import solve_gram
from caldera.lowrank import Factor, Regression, lplr, rank_constrained_regression, rotated, top_subspace
from caldera.quantizers import Scales, get_quantizer
from tests.caldera.oracles import basis_of, dense_regression, gaussian, never_rises, weighted_loss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_of(a, left, right, basis) -> float:
    return weighted_loss(a - left @ right, basis.damped)


def pair_loss(a, pair, basis) -> float:
    return loss_of(a, pair[0].values.T, pair[1].values, basis)


def quantizers(left: str, right: str) -> tuple:
    return get_quantizer(left), get_quantizer(right)


# ---------------------------------------------------------------------------------------------------------- closed form
# 24 x 40 takes the dense SVD, the others the randomized one.
@pytest.mark.parametrize(
    ("m", "n", "k"), [(24, 40, 1), (24, 40, 7), (24, 40, 24), (130, 96, 4), (96, 200, 16), (300, 64, 1)]
)
@pytest.mark.parametrize("transformed", [False, True])
def test_regression_is_the_dense_optimum(m, n, k, transformed):
    a, basis = gaussian(m, n), basis_of(n, transformed=transformed)
    left, right = rank_constrained_regression(a, basis, k, generator())
    assert left.shape == (m, k) and right.shape == (k, n)
    best = dense_regression(a, basis.damped, k)
    error = loss_of(a, left, right, basis) ** 0.5
    assert error <= 1.01 * best + 1e-4 * dense_regression(a, basis.damped, 0)


def test_regression_of_a_low_rank_matrix_is_exact():
    a, basis = gaussian(90, 5) @ gaussian(5, 100), basis_of(100)
    left, right = rank_constrained_regression(a, basis, 5, generator())
    assert loss_of(a, left, right, basis) < 1e-8 * weighted_loss(a, basis.damped)


def test_regression_gives_both_factors_the_same_singular_values():
    a, basis = gaussian(30, 40), basis_of(40)
    left, right = rank_constrained_regression(a, basis, 6, generator())
    weighted = right @ basis.chol
    torch.testing.assert_close(left.T @ left, weighted @ weighted.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(200, 150), (150, 200)])
def test_randomized_subspace_has_the_dense_singular_values(shape):
    x = gaussian(*shape) * torch.linspace(3, 0.1, shape[1])
    u, s, v = top_subspace(x, 8, generator())
    expected = torch.linalg.svdvals(x.double())[:8]
    torch.testing.assert_close(s.double(), expected, rtol=0.01, atol=0)
    torch.testing.assert_close(u.T @ u, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(v.T @ v, torch.eye(8), rtol=0, atol=1e-5)


def test_largest_rank_contains_the_smaller_ones():
    """What lets a sweep over ranks compute one factorisation."""
    a, basis = gaussian(24, 40), basis_of(40)
    left, right = rank_constrained_regression(a, basis, 12, generator())
    small = rank_constrained_regression(a, basis, 5, generator())
    expected = loss_of(a, *small, basis)
    assert loss_of(a, left[:, :5], right[:5], basis) == pytest.approx(expected, rel=1e-3)


def test_the_generator_alone_decides():
    x = gaussian(100, 120)
    a, b, c = (top_subspace(x, 4, generator(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ------------------------------------------------------------------------------------------------------------- rotation
@pytest.mark.parametrize("k", [1, 2, 7, 32])
def test_rotation_keeps_the_product(k):
    left, right = gaussian(50, k), gaussian(k, 40, seed=1) * torch.logspace(0, -3, k)[:, None]
    turned = rotated(left, right, generator())
    torch.testing.assert_close(turned[0] @ turned[1], left @ right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned[1].T @ turned[1], right.T @ right, rtol=1e-4, atol=1e-4)


def test_rotation_spreads_the_singular_values():
    right = gaussian(16, 400) * torch.logspace(0, -2, 16)[:, None]
    norms = rotated(torch.eye(16), right, generator())[1].norm(dim=1)
    assert norms.max() / norms.min() < 10 < right.norm(dim=1).max() / right.norm(dim=1).min()


# ----------------------------------------------------------------------------------------------------------------- LPLR
@pytest.mark.parametrize("transformed", [False, True])
def test_loss_from_products_is_the_loss(transformed):
    a, basis = gaussian(20, 36), basis_of(36, transformed=transformed)
    problem = Regression(a, basis)
    for k in (1, 5, 20):
        left, right = gaussian(20, k, seed=k), gaussian(k, 36, seed=k + 1)
        cross, gram = problem.products(right)
        torch.testing.assert_close(cross, a @ basis.damped @ right.T)
        torch.testing.assert_close(gram, right @ basis.damped @ right.T, rtol=1e-4, atol=1e-4)
        assert problem.loss(left, cross, gram) == pytest.approx(loss_of(a, left, right, basis), rel=1e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(24, 40, 1), (24, 40, 8), (60, 33, 12)])
def test_unrounded_alternation_solves_both_least_squares_problems(m, n, k, monkeypatch):
    """Each half step in float32, hence without rounding, is at the minimum over its factor."""
    keep = classmethod(lambda cls, x, quantizer: cls(x, Scales(torch.ones(1, 1)), x))
    monkeypatch.setattr(Factor, "round", keep)
    a, basis = gaussian(m, n), basis_of(n)
    left, right, _ = lplr(a, gaussian(k, n, seed=3), basis, quantizers("bf16", "bf16"), 30, "x")
    best = dense_regression(a, basis.damped, k)
    assert pair_loss(a, (left, right), basis) ** 0.5 <= 1.01 * best
    assert loss_of(a, left.values.T + 1e-2 * gaussian(m, k), right.values, basis) > pair_loss(a, (left, right), basis)


@pytest.mark.parametrize(
    "names",
    [("e8p_4bit", "e8p_4bit"), ("e8p_2bit", "uniform_4bit_row"), ("bf16", "e8p_2bit"), ("nf_4bit", "bf16")],
)
def test_best_pair_is_never_worse_than_the_start(names):
    a, basis = gaussian(48, 64), basis_of(64)
    right = rank_constrained_regression(a, basis, 6, generator())[1]
    pair = lplr(a, right, basis, quantizers(*names), 1, "x")
    losses = [pair_loss(a, pair, basis)]
    for iterations in (1, 3, 5):
        pair = lplr(a, pair[1].values, basis, quantizers(*names), iterations, "x", start=pair)
        losses.append(pair_loss(a, pair, basis))
    assert never_rises(losses)


@pytest.mark.parametrize("names", [("e8p_4bit", "e8p_4bit"), ("e8p_2bit", "uniform_2bit_row")])
def test_more_iterations_never_give_a_worse_pair(names):
    a, basis = gaussian(48, 64), basis_of(64)
    right = rank_constrained_regression(a, basis, 6, generator())[1]
    losses = [pair_loss(a, lplr(a, right, basis, quantizers(*names), i, "x"), basis) for i in range(1, 8)]
    assert never_rises(losses)


def test_a_start_that_cannot_be_improved_is_returned():
    a, basis = gaussian(20, 32), basis_of(32)
    names = quantizers("e8p_4bit", "e8p_4bit")
    good = lplr(a, rank_constrained_regression(a, basis, 4, generator())[1], basis, names, 10, "x")
    target = good[0].values.T @ good[1].values  # the start reproduces the target: nothing can beat it
    again = lplr(target, good[1].values, basis, names, 3, "x", start=good)
    assert torch.equal(again[0].codes, good[0].codes) and torch.equal(again[1].codes, good[1].codes)


def test_alternation_compensates_for_rounding():
    """What the inner loop is for: rounding both factors of the closed form alone is worse."""
    a, basis, names = gaussian(64, 96), basis_of(96, transformed=True), quantizers("e8p_2bit", "e8p_2bit")
    left, right = rotated(*rank_constrained_regression(a, basis, 16, generator()), generator())
    plain = Factor.round(left.T.contiguous(), names[0]), Factor.round(right, names[1])
    assert pair_loss(a, lplr(a, right, basis, names, 5, "x"), basis) < 0.98 * pair_loss(a, plain, basis)


@pytest.mark.parametrize("names", [("bf16", "fp16"), ("e8p_2bit", "e8p_4bit"), ("uniform_4bit", "nf_4bit_row")])
def test_factors_hold_the_codes_of_their_values(names):
    a, basis = gaussian(20, 30), basis_of(30)
    left, right, _ = lplr(a, gaussian(3, 30, seed=1), basis, quantizers(*names), 2, "x")
    for factor, quantizer, width in ((left, names[0], 20), (right, names[1], 30)):
        decoded = get_quantizer(quantizer).decode(factor.codes, factor.scales, width)
        assert factor.values.shape == (3, width) and torch.equal(decoded, factor.values)


def test_nothing_that_is_passed_in_changes():
    a, basis, right = gaussian(20, 40), basis_of(40), gaussian(4, 40, seed=1)
    start = lplr(a, right, basis, quantizers("e8p_2bit", "e8p_2bit"), 1, "x")
    passed = [a, right, basis.moments, basis.chol, start[0].values, start[1].values, start[0].codes]
    before = [t.clone() for t in passed]
    rank_constrained_regression(a, basis, 4, generator())
    rotated(gaussian(20, 4), right, generator())
    lplr(a, right, basis, quantizers("e8p_2bit", "e8p_2bit"), 2, "x", start=start)
    assert all(torch.equal(x, y) for x, y in zip(passed, before))


# ---------------------------------------------------------------------------------------------------- singular problems
@pytest.mark.parametrize("true_rank", [0, 1, 2])
def test_targets_of_less_rank_than_the_factors_are_finite(true_rank):
    a, basis = gaussian(12, true_rank) @ gaussian(true_rank, 20), basis_of(20)
    right = rank_constrained_regression(a, basis, 6, generator())[1]
    left, right, _ = lplr(a, right, basis, quantizers("bf16", "bf16"), 3, "x")
    assert left.values.isfinite().all() and right.values.isfinite().all()
    assert pair_loss(a, (left, right), basis) <= 1e-4 * weighted_loss(a, basis.damped)


def test_gram_solve_is_the_solution_and_survives_dependence():
    x = gaussian(30, 5)
    gram, right = x.T @ x, gaussian(5, 7, seed=1)
    torch.testing.assert_close(solve_gram(gram, right, "x"), torch.linalg.solve(gram, right), rtol=1e-3, atol=1e-4)
    twice = torch.cat([x, x], 1)
    solved = solve_gram(twice.T @ twice, twice.T @ gaussian(30, 7, seed=1), "x")
    expected = x @ torch.linalg.lstsq(x, gaussian(30, 7, seed=1)).solution
    torch.testing.assert_close(twice @ solved, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(solve_gram(torch.zeros(3, 3), torch.zeros(3, 2), "x"), torch.zeros(3, 2))
