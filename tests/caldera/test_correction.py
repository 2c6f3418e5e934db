"""Corrected targets against direct least squares in float64."""

import dataclasses

import pytest
import torch

from caldera import NumericalError, UserError
from caldera.correction import Correction, output_error
from tests.caldera.oracles import gaussian

N, M, TOKENS = 12, 8, 400
TINY = 1e-7  # sigma that damps next to nothing


@dataclasses.dataclass
class Prefix:
    """A matrix' inputs in the original, x, and behind a compressed prefix, y; what the stream lacks there, d."""

    weight: torch.Tensor  # (M, N)
    x: torch.Tensor  # (TOKENS, N)
    y: torch.Tensor  # (TOKENS, N)
    d: torch.Tensor  # (TOKENS, M)

    def moments(self, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """H^, C and D."""
        x, y, d = (t.double() for t in (self.x, self.y, self.d))
        return tuple((t.T @ y / TOKENS).to(dtype) for t in (y, x, d))


@pytest.fixture
def prefix():
    x = gaussian(TOKENS, N, seed=1) @ (torch.eye(N) + 0.3 * gaussian(N, N, seed=2))
    y = x + 0.4 * gaussian(TOKENS, N, seed=3) + 0.2 * x.roll(1, 1)
    d = y @ gaussian(N, M, seed=4) * 0.2 + 0.1 * gaussian(TOKENS, M, seed=5)
    return Prefix(gaussian(M, N), x, y, d)


def regression(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The matrix V (m, n) of least |outputs - inputs V^T|^2, float64."""
    return torch.linalg.lstsq(inputs.double(), outputs.double()).solution.T


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------- the rule
def test_taken_fully_it_is_the_regression_of_the_original_output(prefix):
    target = Correction(strength=1, residual=0, sigma=TINY, preserve=False).fit(*prefix.moments(), 0, "m")
    expected = regression(prefix.y, prefix.x @ prefix.weight.T)
    close(target.of(prefix.weight, writes=False), expected)
    close(target.of(prefix.weight, writes=True), expected)


def test_what_the_stream_lacks_is_made_up_for_by_its_writers(prefix):
    target = Correction(strength=1, residual=1, sigma=TINY, preserve=False).fit(*prefix.moments(), 0, "m")
    close(target.of(prefix.weight, writes=True), regression(prefix.y, prefix.x @ prefix.weight.T + prefix.d))
    close(target.of(prefix.weight, writes=False), regression(prefix.y, prefix.x @ prefix.weight.T))


def test_it_loses_less_than_the_matrix_itself(prefix):
    wanted = prefix.x @ prefix.weight.T + prefix.d
    losses = []
    for amount in (0, 0.5, 1):
        target = Correction(strength=amount, residual=amount, sigma=TINY, preserve=False).fit(*prefix.moments(), 0, "m")
        losses.append(float((wanted - prefix.y @ target.of(prefix.weight, True).T).square().mean()))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("sigma", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (0.0, 1.0), (1.0, 0.2)])
def test_in_between_it_follows_the_formula(prefix, a, b, sigma):
    h, c, d = prefix.moments(torch.float64)
    damping = sigma * h.diagonal().mean() * torch.eye(N)
    inverse = torch.linalg.inv(h + damping)
    expected = prefix.weight.double() @ ((1 - a) * torch.eye(N) + a * (c + damping) @ inverse) + b * d @ inverse
    target = Correction(strength=a, residual=b, sigma=sigma, preserve=False).fit(*prefix.moments(), 0, "m")
    close(target.of(prefix.weight, writes=True), expected)


def test_without_strength_a_matrix_stays_itself(prefix):
    target = Correction(strength=0, residual=0, preserve=False).fit(*prefix.moments(), 0, "m")
    assert torch.equal(target.of(prefix.weight, writes=True), prefix.weight)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_behind_the_original_itself_there_is_nothing_to_correct(prefix, a):
    h = prefix.x.T @ prefix.x / TOKENS
    target = Correction(strength=a, residual=1).fit(h, h, torch.zeros(M, N), 0.5, "m")
    close(target.of(prefix.weight, writes=True), prefix.weight.double(), 1e-5)


def test_without_what_is_lacking_nothing_is_added(prefix):
    h, c, _ = prefix.moments()
    assert Correction().fit(h, c, None, 0, "m").added is None


def test_the_size_of_the_inputs_does_not_matter(prefix):
    one = Correction().fit(*prefix.moments(), 0, "m")
    other = Correction().fit(*(1e6 * t for t in prefix.moments()), 0, "m")
    close(other.of(prefix.weight, True), one.of(prefix.weight, True).double())


@pytest.mark.parametrize(("depth", "a"), [(0.0, 0.2), (0.5, 0.5), (1.0, 0.8)])
def test_strengths_run_over_depth(prefix, depth, a):
    running = Correction(strength=0.2, strength_last=0.8, residual=0.4, residual_last=0.0)
    fixed = Correction(strength=a, residual=0.4 * (1 - depth))
    found, expected = (c.fit(*prefix.moments(), depth, "m").of(prefix.weight, True) for c in (running, fixed))
    close(found, expected.double(), 1e-6)


def test_nothing_that_is_given_is_changed(prefix):
    given = (*prefix.moments(), prefix.weight)
    before = [t.clone() for t in given]
    Correction().fit(*given[:3], 0, "m").of(given[3], True)
    assert all(torch.equal(a, b) for a, b in zip(given, before))


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("field", ["strength", "strength_last", "residual", "residual_last"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_strength_outside_its_range_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"^{field}={value} must lie between 0 \(no correction\) and 1 \(the full"):
        Correction(**{field: value})


@pytest.mark.parametrize("value", [0, -1e-3, 1.5, float("nan")])
def test_a_damping_outside_its_range_is_refused(value):
    with pytest.raises(UserError, match=r"^sigma=.* must be above 0 and at most 1"):
        Correction(sigma=value)


def test_moments_that_cannot_be_factorised_are_named():
    bad = torch.full((N, N), float("nan"))
    with pytest.raises(NumericalError, match=r"^layer\.3: moments of the correction"):
        Correction().fit(bad, bad, None, 0, "layer.3")


def test_where_nothing_arrives_the_weight_stays():
    """`prepare` refuses such moments by name."""
    nothing = torch.zeros(N, N)
    weight = gaussian(M, N)
    assert torch.equal(Correction().fit(nothing, nothing, nothing[:M], 0, "m").of(weight, True), weight)


# --------------------------------------------------------------------------------------------------------- output error
def test_output_error_by_definition(prefix):
    approximation = prefix.weight + 0.2 * gaussian(M, N, seed=9)
    h, c, _ = prefix.moments()
    found = output_error(prefix.weight, approximation, prefix.x.T @ prefix.x / TOKENS, c, h)
    wanted = (prefix.x @ prefix.weight.T).double()
    lost = wanted - (prefix.y @ approximation.T).double()
    assert found == pytest.approx(float((lost.square().sum() / wanted.square().sum()) ** 0.5), rel=1e-4)


def test_output_error_of_the_matrix_itself_on_the_same_inputs_is_zero(prefix):
    h = prefix.x.T @ prefix.x / TOKENS
    assert output_error(prefix.weight, prefix.weight, h, h, h) == pytest.approx(0, abs=1e-3)
    nothing = torch.zeros_like(prefix.weight)
    assert output_error(nothing, nothing, h, h, h) == 0
    assert output_error(nothing, prefix.weight, h, h, h) == float("inf")


def test_rows_keep_the_energy_that_they_have_behind_the_prefix(prefix):
    """Also that of matrices that write into the stream, and a row that becomes zero stays zero."""
    h, c, lack = prefix.moments()
    weight = prefix.weight.clone()
    weight[0] = 0
    for writes in (False, True):
        target = Correction(strength=0.8, residual=0.5).fit(h, c, lack, 0, "m").of(weight, writes)
        plain = Correction(strength=0.8, residual=0.5, preserve=False).fit(h, c, lack, 0, "m").of(weight, writes)
        before, after = (((w @ h) * w).sum(1) for w in (weight, target))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.nn.functional.normalize(target[1:]), torch.nn.functional.normalize(plain[1:]))
