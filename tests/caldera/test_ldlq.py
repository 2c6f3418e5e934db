"""LDLQ against the plain column loop, compiled against tensor loops, and what coordinate descent promises."""

import pytest
import torch

from caldera import ldlq as module
from caldera import prepare
from caldera.ldlq import PANEL, Rounded, ldlq, tune
from caldera.linalg import block_feedback, damped_cholesky, diagonal_blocks
from caldera.quantizers import get_quantizer
from tests.caldera.oracles import (
    basis_of,
    block_ldl,
    gaussian,
    ldlq_by_columns,
    ldlq_regret,
    never_rises,
    second_moments,
    tuned_by_columns,
    weighted_loss,
)  # fmt: skip

NAMES = ["e8p_2bit", "uniform_3bit", "nf_4bit_row", "uniform_asym_4bit_g32"]
MORE_NAMES = [*NAMES, "e8p_3bit", "e8p_4bit_g64", "e8p_2bit_row", "uniform_1bit", "bf16"]
WIDTHS = [8, 36, 150, 2 * PANEL + 13]  # no multiple of a group nor of a panel but the first


def weight(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Columns and rows of unequal size, as an untransformed weight has them."""
    return (
        gaussian(m, n, seed=seed) * gaussian(1, n, seed=seed + 50).abs() * (0.5 + gaussian(m, 1, seed=seed + 51).abs())
    )


@pytest.fixture
def tensor_form(monkeypatch):
    """What a GPU runs: the loops of torch operations instead of the compiled ones."""
    monkeypatch.setattr(module, "compiled", lambda *_: None)


def damped_loss(target, basis, rounded: Rounded) -> float:
    return weighted_loss(target - rounded.values, basis.damped)


# ------------------------------------------------------------------------------------------------------------- feedback
@pytest.mark.parametrize(("n", "group"), [(1, 1), (24, 1), (24, 8), (40, 4), (8, 8)])
def test_block_feedback_is_the_block_ldl_decomposition(n, group):
    h = second_moments(n) + 0.1 * torch.eye(n)
    found = block_feedback(torch.linalg.cholesky(h.double()), group)
    m, d = block_ldl(h, group)
    torch.testing.assert_close(found + torch.eye(n), m)
    torch.testing.assert_close(m @ d @ m.T, h.double())


@pytest.mark.parametrize("group", [1, 8])
def test_feedback_reproduces_the_damped_moments(group):
    basis = basis_of(96, transformed=True)
    m = (basis.feedback(group).matrix + torch.eye(96)).double()
    half = torch.linalg.solve(m, basis.chol.double())  # D^(1/2): block-diagonal
    blocks = torch.block_diag(*diagonal_blocks(half, group))
    torch.testing.assert_close(half, blocks, rtol=0, atol=1e-4)
    torch.testing.assert_close(m @ blocks @ blocks.T @ m.T, basis.damped.double(), rtol=0, atol=1e-4)


def test_feedback_is_strictly_block_lower_and_padded_columns_stand_alone():
    feedback = basis_of(13).feedback(8).matrix
    assert feedback.shape == (16, 16)
    assert torch.equal(feedback[:8], torch.zeros(8, 16)) and torch.equal(feedback[8:, 8:], torch.zeros(8, 8))
    assert torch.equal(feedback[13:], torch.zeros(3, 16))


# -------------------------------------------------------------------------------------------------------- the slow twin
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_ldlq_is_the_column_loop(name, n):
    quantizer, w, basis = get_quantizer(name), weight(20, n), basis_of(n)
    scales = quantizer.fit(w)
    found = ldlq(w, basis, quantizer, scales)
    codes, values = ldlq_by_columns(w, basis.damped, quantizer, scales)
    same = (found.codes == codes).all(1)
    assert same.float().mean() >= 0.9  # a tie that falls the other way changes the rest of its row
    torch.testing.assert_close(found.values[same], values[same].float(), rtol=1e-5, atol=1e-5)
    loss, expected = damped_loss(w, basis, found), weighted_loss(w - values, basis.damped)
    assert loss == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("n", [36, 2 * PANEL + 13])
@pytest.mark.parametrize("name", NAMES)
def test_tuning_is_the_column_loop(name, n):
    quantizer, w, basis = get_quantizer(name), weight(12, n), basis_of(n)
    start = ldlq(w, basis, quantizer)
    found = tune(w, basis, quantizer, start, 2)
    codes, values = tuned_by_columns(w, basis.damped, quantizer, start, 2)
    same = (found.codes == codes).all(1)
    assert same.float().mean() >= 0.8  # ties, as above
    torch.testing.assert_close(found.values[same], values[same].float(), rtol=1e-5, atol=1e-5)
    assert damped_loss(w, basis, found) == pytest.approx(weighted_loss(w - values, basis.damped), rel=0.01)


@pytest.mark.parametrize("n", [36, 2 * PANEL + 13])
@pytest.mark.parametrize("name", [n for n in MORE_NAMES if not n.startswith(("e8p_3", "e8p_4"))])  # greedy, not nearest
def test_every_code_is_the_nearest_given_those_before_it(name, n):
    quantizer, w, basis = get_quantizer(name), weight(70, n), basis_of(n)
    found = ldlq(w, basis, quantizer)
    assert ldlq_regret(w, basis.damped, quantizer, found.scales, found.codes) < 1e-4


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("name", MORE_NAMES)
def test_values_are_the_decoded_codes(name, n):
    quantizer, w = get_quantizer(name), weight(9, n)
    found = ldlq(w, basis_of(n), quantizer)
    assert found.codes.shape == (9, -(-n // quantizer.group)) and found.values.shape == (9, n)
    torch.testing.assert_close(found.values, quantizer.decode(found.codes, found.scales, n), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_identity_moments_are_plain_rounding(name):
    quantizer, w = get_quantizer(name), weight(12, 40)
    found = ldlq(w, prepare(torch.eye(40), name="x", transformed=False), quantizer)
    torch.testing.assert_close(found.values, quantizer.round(w))


# ---------------------------------------------------------------------------------------------- compiled and in tensors
@pytest.mark.parametrize("n", [36, 2 * PANEL + 13])
@pytest.mark.parametrize("name", MORE_NAMES)
def test_compiled_and_tensor_loops_agree(name, n, monkeypatch):
    quantizer, w, basis = get_quantizer(name), weight(66, n), basis_of(n)
    fast = ldlq(w, basis, quantizer)
    tuned = tune(w, basis, quantizer, fast, 2)
    monkeypatch.setattr(module, "compiled", lambda *_: None)
    slow = ldlq(w, basis, quantizer)
    slowly_tuned = tune(w, basis, quantizer, fast, 2)
    for a, b in ((fast, slow), (tuned, slowly_tuned)):
        same = (a.codes == b.codes).all(1)
        assert same.float().mean() >= 0.9
        torch.testing.assert_close(a.values[same], b.values[same])
        assert damped_loss(w, basis, a) == pytest.approx(damped_loss(w, basis, b), rel=0.01)


@pytest.mark.parametrize("name", ["e8p_2bit", "uniform_asym_4bit_g32"])
def test_threads_do_not_change_the_codes(name):
    quantizer, w, basis = get_quantizer(name), weight(70, 150), basis_of(150)
    one = tune(w, basis, quantizer, ldlq(w, basis, quantizer), 1)
    torch.set_num_threads(2)
    try:
        two = tune(w, basis, quantizer, ldlq(w, basis, quantizer), 1)
    finally:
        torch.set_num_threads(1)
    assert (one.codes == two.codes).float().mean() > 0.99  # matrix products may differ in their last bit


@pytest.mark.parametrize("name", ["e8p_2bit", "nf_4bit_row"])
def test_rows_are_independent(name):
    """Matrices that share their inputs may be stacked: with its scales given, a row does not see the others."""
    quantizer, w, basis = get_quantizer(name), weight(70, 48), basis_of(48)
    scales = quantizer.fit(w)
    everything = ldlq(w, basis, quantizer, scales)
    part = scales if scales.scale.shape[0] == 1 else type(scales)(scales.scale[:5], None)
    alone = ldlq(w[:5], basis, quantizer, part)
    assert (alone.codes == everything.codes[:5]).all(1).float().mean() >= 0.8


# ----------------------------------------------------------------------------------------------------------------- gain
@pytest.mark.parametrize("name", NAMES)
def test_feedback_beats_rounding_to_nearest(name):
    """On average over seeds, with the same scales."""
    quantizer, gains = get_quantizer(name), []
    for seed in range(5):
        w, basis = gaussian(32, 64, seed=seed), basis_of(64, seed, transformed=True)
        found, nearest = ldlq(w, basis, quantizer), quantizer.round(w)
        gains.append(damped_loss(w, basis, found) / weighted_loss(w - nearest, basis.damped))
    assert sum(gains) / len(gains) < 0.9


@pytest.mark.parametrize(("n", "seed"), [(76, 0), (76, 1), (PANEL + 22, 2)])
@pytest.mark.parametrize("name", MORE_NAMES)
def test_tuning_never_raises_the_damped_loss(name, n, seed):
    quantizer, w, basis = get_quantizer(name), weight(20, n, seed), basis_of(n, seed)
    found = ldlq(w, basis, quantizer)
    losses = [damped_loss(w, basis, tune(w, basis, quantizer, found, passes)) for passes in range(4)]
    assert losses[0] == pytest.approx(damped_loss(w, basis, found), rel=1e-6)
    assert never_rises(losses)


@pytest.mark.parametrize("name", ["e8p_2bit", "uniform_3bit"])
def test_tuning_never_raises_the_damped_loss_in_tensor_form(name, tensor_form):
    test_tuning_never_raises_the_damped_loss(name, PANEL + 22, 0)


@pytest.mark.parametrize("name", NAMES)
def test_tuning_repairs_plain_rounding(name):
    quantizer, w, basis = get_quantizer(name), gaussian(20, 64), basis_of(64, transformed=True)
    scales = quantizer.fit(w)
    codes = quantizer.encode(w, scales)
    start = Rounded(codes, scales, quantizer.decode(codes, scales, 64))
    assert damped_loss(w, basis, tune(w, basis, quantizer, start, 3)) < 0.9 * damped_loss(w, basis, start)


@pytest.mark.parametrize("name", MORE_NAMES)
def test_tuned_values_are_the_decoded_codes(name):
    quantizer, w, basis = get_quantizer(name), weight(9, 77), basis_of(77)
    tuned = tune(w, basis, quantizer, ldlq(w, basis, quantizer), 2)
    torch.testing.assert_close(tuned.values, quantizer.decode(tuned.codes, tuned.scales, 77), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------- contract
@pytest.mark.parametrize("n", [64, 77])
@pytest.mark.parametrize("name", ["e8p_2bit", "uniform_3bit", "bf16"])
def test_nothing_that_is_passed_in_changes(name, n):
    quantizer, w, basis = get_quantizer(name), weight(9, n), basis_of(n)
    scales = quantizer.fit(w)
    start = ldlq(w, basis, quantizer, scales)
    passed = [
        w,
        basis.moments,
        basis.chol,
        basis.feedback(quantizer.group).matrix,
        scales.scale,
        start.codes,
        start.values,
    ]
    before = [t.clone() for t in passed]
    ldlq(w, basis, quantizer, scales)
    tune(w, basis, quantizer, start, 2)
    assert all(torch.equal(a, b) for a, b in zip(passed, before))


@pytest.mark.parametrize("name", NAMES)
def test_memory_order_does_not_matter(name):
    quantizer, w, basis = get_quantizer(name), weight(24, 40).T.contiguous().T, basis_of(40)
    plain = ldlq(w.contiguous(), basis, quantizer)
    assert torch.equal(ldlq(w, basis, quantizer).codes, plain.codes)
    tuned = tune(w.contiguous(), basis, quantizer, plain, 1)
    assert torch.equal(tune(w, basis, quantizer, plain, 1).codes, tuned.codes)


@pytest.mark.parametrize("name", MORE_NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 1), (1, 130)])
def test_small_and_narrow_matrices(name, shape):
    w, basis, quantizer = gaussian(*shape), basis_of(shape[1]), get_quantizer(name)
    found = tune(w, basis, quantizer, ldlq(w, basis, quantizer), 1)
    assert found.values.shape == shape and found.values.isfinite().all()


@pytest.mark.parametrize("name", MORE_NAMES)
def test_a_granule_of_almost_nothing_stays_finite(name):
    """Errors fed back onto a granule with a tiny scale are huge in its units."""
    w, basis, quantizer = weight(8, 128), basis_of(128), get_quantizer(name)
    w[:, :64] *= 1e-12
    w[2] *= 1e-20
    found = tune(w, basis, quantizer, ldlq(w, basis, quantizer), 1)
    assert found.values.isfinite().all()


def test_damping_rises_tenfold_until_the_factorisation_succeeds():
    h = torch.eye(4)
    h[0, 1] = h[1, 0] = 1.05  # an eigenvalue of -0.05
    chol, sigma = damped_cholesky(h, 1e-3, 1.0, "x")
    assert sigma == pytest.approx(0.1)
    torch.testing.assert_close(chol @ chol.T, h + 0.1 * torch.eye(4))


@pytest.mark.parametrize("name", ["e8p_2bit", "e8p_3bit", "trellis_2bit", "uniform_2bit_row"])
def test_an_overloaded_scale_is_widened(name):
    """A few rows along the dominant direction of H, as in first layers: their errors go round and round in feedback."""
    n, direction = 96, gaussian(1, 96)
    weight = gaussian(200, n)
    weight[:3] += 3 * direction
    basis = prepare(second_moments(n) + 300 * direction.T @ direction, name="x", transformed=False)
    quantizer = get_quantizer(name)
    fitted = quantizer.fit(weight)

    def loss(found) -> float:
        rest = weight - found.values
        return float(((rest @ basis.damped) * rest).sum())

    found, plain = ldlq(weight, basis, quantizer), ldlq(weight, basis, quantizer, fitted)
    assert loss(found) < 0.9 * loss(plain)
    assert (found.scales.scale.float() > 1.1 * fitted.scale.float()).all()
    assert torch.equal(quantizer.decode(found.codes, found.scales, n), found.values)


def test_a_scale_that_is_not_overloaded_stays(name="e8p_2bit"):
    weight, basis = gaussian(64, 48), prepare(second_moments(48), name="x")
    assert torch.equal(ldlq(weight, basis, get_quantizer(name)).scales.scale, get_quantizer(name).fit(weight).scale)
