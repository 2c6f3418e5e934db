"""The trellis code: what a code means, that the search finds the best sequence, compiled and on any device alike."""

import itertools

import pytest
import torch

from caldera.basis import prepare
from caldera.ldlq import ldlq, tune
from caldera.quantizers import get_quantizer
from caldera.quantizers import trellis as format_
from caldera.quantizers.base import nearest_columns
from tests.caldera.oracles import gaussian, second_moments

BITS = (1, 2, 3, 4)
every_bits = pytest.mark.parametrize("bits", BITS)


def book(bits: int) -> format_.Trellis:
    return get_quantizer(f"trellis_{bits}bit").codebook


def error(bits: int, z: torch.Tensor, codes: torch.Tensor) -> float:
    return float((book(bits).decode_columns(codes) - z).square().mean())


def test_levels_are_quantiles_of_a_gaussian_each_once():
    levels = format_.levels()
    assert len(set(levels.tolist())) == len(levels) == 4096
    assert abs(levels.mean()) < 1e-6 and levels.var() == pytest.approx(1, abs=0.01)
    assert levels[:3].tolist() == pytest.approx([-0.6581, -0.2118, 0.8634], abs=1e-4)  # part of the checkpoint format


@every_bits
def test_a_value_depends_on_its_own_and_the_codes_before_it_round_the_end(bits):
    """The register by definition, one value at a time."""
    codes = torch.randint(0, 2**bits, (50, 2), generator=torch.Generator().manual_seed(0))
    values, levels = book(bits).decode_columns(codes), format_.levels()
    for t, column in itertools.product(range(50), range(2)):
        state = 0
        for back in reversed(range(12 // bits)):
            state = state << bits | int(codes[(t - back) % 50, column])
        assert values[t, column] == levels[state]


@pytest.mark.parametrize(
    ("rows", "edges"), [(1, [0, 1]), (256, [0, 256]), (257, [0, 128, 257]), (576, [0, 192, 384, 576])]
)
def test_long_columns_are_cut_into_equal_sequences(rows, edges):
    assert book(2).edges(rows) == edges
    codes = torch.randint(0, 4, (rows, 1), generator=torch.Generator().manual_seed(0))
    whole = book(2).decode_columns(codes)
    if rows > 100:
        parts = torch.cat([book(2).decode_columns(codes[a:b]) for a, b in itertools.pairwise(edges)])
        assert torch.equal(whole, parts)


@every_bits
def test_compiled_search_is_as_good_as_that_of_tensors(bits):
    """Not the same codes: the compiled one keeps its choice in the last bits of a cost."""
    z = gaussian(90, 5)
    compiled, plain = error(bits, z, nearest_columns(book(bits), z)), error(bits, z, book(bits).encode_columns(z))
    assert compiled == pytest.approx(plain, rel=5e-3)


def test_the_search_finds_the_best_sequence():
    """All sequences of 12 one-bit codes that close, tried one by one, behind a register that is given."""
    z = gaussian(24, 3)
    found = error(1, z, book(1).encode_columns(z))
    generator = torch.Generator().manual_seed(0)
    others = torch.randint(0, 2, (24, 20000), generator=generator)
    values = book(1).decode_columns(others)
    for column in range(3):
        tried = (values - z[:, column : column + 1]).square().mean(0).min()
        assert found * 3 < 3 * float(tried) * 1.01
    # nor does any change of one code make a found sequence better
    codes = book(1).encode_columns(z)
    for t in range(24):
        changed = codes.clone()
        changed[t] ^= 1
        assert error(1, z, changed) >= found * 0.999


@pytest.mark.parametrize("rows", [1, 2, 5, 11])
def test_short_columns_are_rounded_one_by_one(rows):
    z = gaussian(rows, 40)
    codes = nearest_columns(book(2), z)
    assert torch.equal(codes, book(2).encode_columns(z))
    values = book(2).decode_columns(codes)
    levels = (torch.arange(4) - 1.5) * 0.9957
    expected = levels[(z[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_is_below_that_of_the_lattice(bits):
    x = gaussian(512, 64)
    errors = [float((get_quantizer(f"{name}_{bits}bit").round(x) - x).square().mean()) for name in ("trellis", "e8p")]
    assert errors[0] < 0.82 * errors[1]


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("shape", [(40, 24), (300, 17)])
def test_feedback_and_descent_compiled_and_on_tensors_alike(shape, passes, monkeypatch):
    m, n = shape
    weight, basis = gaussian(m, n), prepare(second_moments(n), name="x")
    quantizer = get_quantizer("trellis_2bit")

    def loss() -> float:
        start = ldlq(weight, basis, quantizer)
        found = tune(weight, basis, quantizer, start, passes)
        assert torch.equal(quantizer.decode(found.codes, found.scales, n), found.values)
        rest = weight - found.values
        return float(((rest @ basis.damped) * rest).sum())

    compiled = loss()
    monkeypatch.setattr("caldera.ldlq.compiled", lambda *_: None)
    monkeypatch.setattr("caldera.quantizers.base.compiled", lambda *_: None)
    assert loss() == pytest.approx(compiled, rel=0.05)  # a first different choice makes all later ones different


def test_descent_never_makes_it_worse():
    weight, basis = gaussian(64, 48), prepare(second_moments(48), name="x")
    quantizer = get_quantizer("trellis_2bit")
    start = ldlq(weight, basis, quantizer)
    losses = []
    for passes in range(4):
        rest = weight - tune(weight, basis, quantizer, start, passes).values
        losses.append(float(((rest @ basis.damped) * rest).sum()))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_code(threads):
    before = torch.get_num_threads()
    z = gaussian(600, 6)
    expected = nearest_columns(book(2), z)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(nearest_columns(book(2), z), expected)
    finally:
        torch.set_num_threads(before)


def test_many_sequences_are_searched_a_few_at_a_time(monkeypatch):
    """What tensor code remembers of the search grows with the sequences side by side."""
    book, x = format_.CODEBOOKS[2], gaussian(30, 7)
    together = book.encode_columns(x)
    monkeypatch.setattr("caldera.quantizers.trellis.TOGETHER", 3)
    assert torch.equal(book.encode_columns(x), together)
