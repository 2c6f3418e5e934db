"""The lattice codebooks against brute force over all their points, compiled and in tensor form."""

import pytest
import torch

from caldera.quantizers import e8p, get_quantizer
from caldera.quantizers.base import nearest
from tests.caldera.oracles import distance_by_force, e8p_points, e8p_sizes, gaussian, squared_distances

TWO = e8p.CODEBOOKS[2]
SCALES = [0.3, 1.03, 3.0]  # mostly one type of pattern, the working point, mostly outside the table


def compiled(bits: int, x: torch.Tensor) -> torch.Tensor:
    return nearest(e8p.CODEBOOKS[bits], x)


def tensor_form(bits: int, x: torch.Tensor) -> torch.Tensor:
    return e8p.CODEBOOKS[bits].encode(x)


SEARCHES = [pytest.param(compiled, id="compiled"), pytest.param(tensor_form, id="tensor")]


def awkward_vectors() -> torch.Tensor:
    """Zeros, signed zeros, codewords, points half way between codewords, and coordinates that tie."""
    points = e8p_points()[::999]
    return torch.cat(
        [
            torch.zeros(1, 8),
            -torch.zeros(1, 8),
            points,
            (points + points.roll(1, 0)) / 2,
            (gaussian(500, 8) * 4).round() / 4,
            (gaussian(500, 8, seed=1) * 2).round() / 2,
            torch.tensor([0.25, 0.5, 0.75, 1.0, 1.25, 2.0, 3.0])[:, None].expand(7, 8),
            5 * torch.eye(8),
        ]
    )


# --------------------------------------------------------------------------------------------------------------- tables
def test_patterns_are_the_published_256():
    ours = (torch.from_numpy(e8p.patterns()) + 0.5).float()
    assert ours.shape == (256, 8)
    assert {tuple(row) for row in ours.tolist()} == {tuple(row) for row in e8p_sizes().tolist()}
    norms = ours.square().sum(1)
    assert (norms <= 10).sum() == 227 and (norms == 12).sum() == 29


def test_all_codes_are_the_65536_distinct_codewords():
    words = TWO.decode(torch.arange(65536))
    assert words.shape == (65536, 8) and words.dtype == torch.float32
    assert len(words.unique(dim=0)) == 65536
    assert torch.equal(words.unique(dim=0), e8p_points().unique(dim=0))


def test_codewords_are_half_integers_of_even_sum_moved_by_a_quarter():
    codes = torch.arange(65536)
    v = TWO.decode(codes) - torch.where(codes % 2 == 0, 0.25, -0.25)[:, None]
    assert torch.equal(v - v.floor(), torch.full_like(v, 0.5))
    assert torch.equal(v.sum(1) % 2, torch.zeros(65536))


def test_code_is_pattern_signs_and_shift():
    """Part of the checkpoint's format."""
    pattern, signs, shift = 17, 0b1010011, 1
    word = TWO.decode(torch.tensor([pattern << 8 | signs << 1 | shift]))[0] + 0.25
    sizes = torch.from_numpy(e8p.patterns()[pattern]) + 0.5
    assert torch.equal(word.abs(), sizes.float())
    assert [int(x < 0) for x in word[:7]] == [signs >> i & 1 for i in range(7)]


def test_residual_points_are_256_of_the_e8_lattice():
    """Integers, or half-integers, of even sum: the 240 roots, 0, and 15 of norm 4."""
    points = torch.from_numpy(e8p.e81_points())
    assert points.shape == (256, 8) and len(points.unique(dim=0)) == 256
    integral = (points == points.round()).all(1)
    halves = ((points - 0.5) == (points - 0.5).round()).all(1)
    assert (integral | halves).all() and (points.sum(1) % 2 == 0).all()
    norms = points.square().sum(1).tolist()
    assert {n: norms.count(n) for n in set(norms)} == {0.0: 1, 2.0: 240, 4.0: 15}


# ------------------------------------------------------------------------------------------------------------ exactness
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("search", "count"), [pytest.param(compiled, 20000, id="compiled"), pytest.param(tensor_form, 3000, id="tensor")]
)
def test_search_finds_the_nearest_codeword(search, count, scale):
    x = gaussian(count, 8, seed=round(scale * 100)) * scale
    found = squared_distances(x, TWO.decode(search(2, x)))
    forced = distance_by_force(x, e8p_points())
    torch.testing.assert_close(found, forced, rtol=0, atol=1e-5)


@pytest.mark.parametrize("search", SEARCHES)
def test_search_finds_the_nearest_codeword_of_awkward_vectors(search):
    x = awkward_vectors()
    found = squared_distances(x, TWO.decode(search(2, x)))
    torch.testing.assert_close(found, distance_by_force(x, e8p_points()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("spread", [0.2, 0.5])
def test_search_finds_the_nearest_codeword_around_the_rare_patterns(search, spread):
    """The 29 of norm 12, with signs of either parity: a Gaussian meets few of them, and each way to repair a sign."""
    sizes = e8p_sizes()[227:].repeat(100, 1)
    x = sizes * gaussian(2900, 8, seed=2).sign() + spread * gaussian(2900, 8) + 0.25
    found = squared_distances(x, TWO.decode(search(2, x)))
    torch.testing.assert_close(found, distance_by_force(x, e8p_points()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("search", SEARCHES)
def test_search_is_right_for_outliers(search):
    """One coordinate a hundred times the others: what an untransformed weight looks like."""
    x = gaussian(500, 8)
    x[torch.arange(500), torch.arange(500) % 8] *= 100
    found = squared_distances(x, TWO.decode(search(2, x)))
    torch.testing.assert_close(found, distance_by_force(x, e8p_points()), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("scale", [0.3, 0.9, 3.0])
def test_search_finds_the_nearest_residual_point(search, scale):
    """Of the 3-bit code, given its first part: no other of the 256 residual points ends nearer."""
    book, x = e8p.CODEBOOKS[3], gaussian(3000, 8) * scale
    codes = search(3, x)
    rest = (x - e8p.decode_2bit(codes & 0xFFFF)) * book.residual
    points = torch.from_numpy(e8p.e81_points())
    torch.testing.assert_close(
        squared_distances(rest, points[codes >> 16]), distance_by_force(rest, points), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("search", SEARCHES)
def test_second_part_of_the_4bit_code_is_the_nearest_codeword_to_what_remains(search):
    book, x = e8p.CODEBOOKS[4], gaussian(1000, 8) * 0.9
    codes = search(4, x)
    rest = (x - e8p.decode_2bit(codes & 0xFFFF)) * book.residual
    found = squared_distances(rest, e8p.decode_2bit(codes >> 16))
    torch.testing.assert_close(found, distance_by_force(rest, e8p_points()), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_search_is_exact_on_a_million_vectors():
    """Certified by the free lattice, which no codeword can beat; a sample of the other third by brute force."""
    x = gaussian(1_000_000, 8) * 1.03
    found = squared_distances(x, TWO.decode(compiled(2, x)))
    bound = torch.minimum(*(free_lattice_distance(x - shift) for shift in (0.25, -0.25)))
    assert (found >= bound - 1e-5).all()
    rest = (found > bound + 1e-5).nonzero()[:, 0]
    assert 0.2 < len(rest) / len(x) < 0.5
    rest = rest[:15_000]
    torch.testing.assert_close(found[rest], distance_by_force(x[rest], e8p_points()), rtol=0, atol=1e-5)


def free_lattice_distance(y: torch.Tensor) -> torch.Tensor:
    """Squared distance from y (N, 8) to the nearest half-integer point of even sum, of any norm."""
    y = y.double()
    v = y.floor() + 0.5
    rest = y - v
    odd = v.sum(1) % 2 == 1
    repaired = rest.square().sum(1) + 1 - 2 * rest.abs().amax(1)  # the cheapest coordinate goes to its next value
    return torch.where(odd, repaired, rest.square().sum(1))


# ------------------------------------------------------------------------------------------------------------ the forms
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compiled_and_tensor_search_give_the_same_codes(bits, scale):
    x = gaussian(4001, 8, seed=bits) * scale  # no multiple of any lane width
    a, b = compiled(bits, x), tensor_form(bits, x)
    same = a == b
    assert same.float().mean() > 0.999
    book = e8p.CODEBOOKS[bits]  # a near tie may fall either way
    errors = [squared_distances(x[~same], book.decode(codes[~same])) for codes in (a, b)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 63, 64, 65])
def test_the_number_of_vectors_does_not_matter(bits, count):
    x = gaussian(100, 8)
    assert torch.equal(compiled(bits, x[:count]), compiled(bits, x)[:count])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_threads_give_the_same_codes(bits):
    x = gaussian(1000, 8)
    expected = compiled(bits, x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(compiled(bits, x), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_fit_their_bits_and_depend_on_the_input_alone(bits, search):
    x = torch.cat([awkward_vectors(), gaussian(500, 8)])
    before, codes = x.clone(), search(bits, x)
    assert codes.dtype == torch.int64 and codes.shape == (len(x),)
    assert codes.min() >= 0 and codes.max() < 2 ** (8 * bits)
    assert torch.equal(search(bits, x), codes) and torch.equal(x, before)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1e4, 3e9, 1e18, 1e19, 1e30, 3e38])
def test_huge_inputs_give_valid_codes(size, bits, search):
    """A tiny scale next to fed-back errors makes such inputs; an index out of a table would end the process."""
    x = gaussian(300, 8).clamp(-1, 1) * size
    x[:100, 1:] = 0.1
    codes = search(bits, x)
    assert codes.min() >= 0 and codes.max() < 2 ** (8 * bits)
    assert e8p.CODEBOOKS[bits].decode(codes).isfinite().all()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outliers_keep_their_direction(bits, search):
    """A coordinate far outside the table is given the largest value that the table has, with its sign."""
    x = torch.cat([1000 * torch.eye(8), -1000 * torch.eye(8)]) + 0.1
    values = e8p.CODEBOOKS[bits].decode(search(bits, x))
    large = values[torch.arange(16), torch.arange(16) % 8]
    assert (large * x[torch.arange(16), torch.arange(16) % 8].sign() > 2).all()


# ---------------------------------------------------------------------------------------------------------------- error
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_documented_error_is_reproduced(bits):
    book, x = e8p.CODEBOOKS[bits], gaussian(60_000, 8)
    z = x * book.gaussian_scale
    error = (book.decode(compiled(bits, z)) - z).square().mean() / book.gaussian_scale**2
    assert float(error) == pytest.approx(book.gaussian_mse, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gaussian_scale_is_near_the_best(bits):
    book, x = e8p.CODEBOOKS[bits], gaussian(20_000, 8)

    def error(scale: float) -> float:
        return float((book.decode(compiled(bits, x * scale)) / scale - x).square().mean())

    assert error(book.gaussian_scale) < 1.002 * min(error(book.gaussian_scale * f) for f in (0.9, 0.96, 1.04, 1.1))


def test_bits_pay_as_the_mathematics_says():
    """Two bits beat scalar Lloyd-Max (0.1175); 3 and 4 bits beat the published residual scales (0.0300, 0.0096)."""
    mse = {bits: get_quantizer(f"e8p_{bits}bit").codebook.gaussian_mse for bits in (2, 3, 4)}
    assert mse[2] < 0.092 and mse[3] < 0.0300 and mse[4] < 0.0096
