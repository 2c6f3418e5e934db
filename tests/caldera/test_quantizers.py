"""One conformance suite over the whole table of quantizers, and what single families promise beyond it."""

import itertools

import pytest
import torch

from caldera.errors import UserError
from caldera.quantizers import FAMILIES, HALVES, Scales, get_quantizer, quantizer_names
from caldera.quantizers.base import nearest
from tests.caldera.oracles import even_gaussian, gaussian

PLAIN = quantizer_names()  # one scale a matrix
CODED = [name for name in PLAIN if name not in HALVES]
# Finer scales with the fewest, a middling and the most bits of each family: what is between them runs the same code.
SPREAD = [f"{family}_{bits}bit" for family, books in FAMILIES.items() for bits in sorted({min(books), 4, max(books)})]
GRANULAR = [name + where for name in SPREAD for where in ("_row", "_g64", "_g32")]
ALL = PLAIN + GRANULAR
REPRESENTATIVE = [*HALVES, *(name + where for name in SPREAD for where in ("", "_row", "_g64"))]
RESIDUAL = ("e8p_3bit", "e8p_4bit")
ODD_SHAPES = [(1, 8), (3, 1), (1, 1), (7, 33)]

every_name = pytest.mark.parametrize("name", ALL)


def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
    return get_quantizer(name).round(x)


def mean_squared_error(name: str, x: torch.Tensor) -> float:
    return float((rounded(name, x) - x).square().mean(dtype=torch.float64))


def random_storage(quantizer, m: int, n: int) -> tuple[torch.Tensor, Scales]:
    """Any codes the storage can hold, with scales as `fit` gives them."""
    scales = quantizer.fit(gaussian(m, n))
    if quantizer.name in HALVES:
        return quantizer.encode(gaussian(m, n), scales), scales
    groups, bits = -(-n // quantizer.group), round(quantizer.bits * quantizer.group)
    return torch.randint(0, 2**bits, (m, groups), generator=torch.Generator().manual_seed(0)), scales


# -------------------------------------------------------------------------------------------------------------- storage
@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, (7, 33)) for name in ALL]
    + [(name, shape) for name in REPRESENTATIVE for shape in ((1, 8), (3, 1), (1, 1))],
)
def test_storage_is_as_declared_and_read_back_to_the_bit(name, shape):
    quantizer = get_quantizer(name)
    codes, scales = random_storage(quantizer, *shape)
    tensors, declared = quantizer.pack(codes, scales), quantizer.layout(*shape)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == declared
    assert {key: t.nbytes for key, t in tensors.items()} == {key: spec.bytes for key, spec in declared.items()}
    values = quantizer.unpack(tensors, *shape)
    assert values.shape == shape and values.dtype == torch.float32
    assert torch.equal(values, quantizer.decode(codes, scales, shape[1]))


@pytest.mark.parametrize("name", ["e8p_3bit_g64", "uniform_5bit_row", "uniform_asym_3bit_g32", "nf_4bit", "bf16"])
def test_a_large_odd_matrix_goes_to_storage_and_back(name):
    quantizer, x = get_quantizer(name), gaussian(830, 545)
    scales = quantizer.fit(x)
    codes = quantizer.encode(x, scales)
    tensors = quantizer.pack(codes, scales)
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == quantizer.layout(830, 545)
    assert torch.equal(quantizer.unpack(tensors, 830, 545), quantizer.decode(codes, scales, 545))
    assert (quantizer.unpack(tensors, 830, 545) - x).norm() < 0.25 * x.norm()


@pytest.mark.parametrize("name", CODED)
def test_codes_take_their_nominal_bits(name):
    """2-bit codes take 2 bits on disk: 64 x 96 values are a whole number of bytes and of groups."""
    quantizer = get_quantizer(name)
    assert quantizer.layout(64, 96)["codes"].bytes == 64 * 96 * quantizer.bits / 8
    assert int(name.split("_")[-1].removesuffix("bit")) == quantizer.bits


@pytest.mark.parametrize(
    ("name", "shape", "total"),
    [
        ("e8p_2bit", (64, 96), 1536 + 4),  # one float32 scale
        ("uniform_2bit_row", (64, 96), 1536 + 2 * 64),  # a bfloat16 scale a row
        ("uniform_2bit_g32", (64, 96), 1536 + 2 * 64 * 3),
        ("uniform_asym_2bit_g64", (64, 96), 1536 + 2 * 2 * 64 * 2),  # and as many zeros; 96 columns are two granules
        ("uniform_3bit", (3, 1), 2 + 4),
        ("e8p_3bit", (3, 1), 9 + 4),  # a group of eight for each row
        ("bf16", (64, 96), 2 * 64 * 96),
    ],
)
def test_declared_bytes(name, shape, total):
    assert sum(spec.bytes for spec in get_quantizer(name).layout(*shape).values()) == total


# ------------------------------------------------------------------------------------------------------------- rounding
@every_name
def test_scales_have_the_shape_of_the_storage(name):
    quantizer, (m, n) = get_quantizer(name), (5, 100)
    scales = quantizer.fit(gaussian(m, n))
    if name in HALVES:
        return
    columns = {"row": 1, "g64": 2, "g32": 4}.get(name.split("_")[-1])
    assert scales.scale.shape == ((m, columns) if columns else (1, 1))
    assert scales.scale.dtype == (torch.bfloat16 if columns else torch.float32)
    assert (scales.zero is not None) == name.startswith("uniform_asym")
    for wide in quantizer.columns(scales, n):
        assert wide.dtype == torch.float32 and wide.shape[0] in (1, m) and wide.shape[1] in (1, n)


@every_name
def test_rounding_twice_with_the_same_scales_is_rounding_once(name):
    quantizer, x = get_quantizer(name), gaussian(48, 80)
    scales = quantizer.fit(x)
    once = quantizer.decode(quantizer.encode(x, scales), scales, 80)
    twice = quantizer.decode(quantizer.encode(once, scales), scales, 80)
    if name.startswith(RESIDUAL):
        # The residual code is searched greedily, so a point of it may be read as another one nearby. That is rare.
        assert (twice - once).square().mean() < 0.05 * (once - x).square().mean()
        assert (twice != once).float().mean() < 0.1
    else:
        assert torch.equal(twice, once)


@every_name
def test_same_input_gives_the_same_codes_and_is_not_changed(name):
    quantizer, x = get_quantizer(name), gaussian(20, 70)
    before, scales = x.clone(), quantizer.fit(x)
    kept = [t.clone() for t in scales if t is not None]
    codes = quantizer.encode(x, scales)
    quantizer.decode(codes, scales, 70).zero_()
    quantizer.unpack(quantizer.pack(codes, scales), 20, 70).zero_()
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip([t for t in scales if t is not None], kept))
    assert torch.equal(quantizer.encode(x.clone(), quantizer.fit(x.clone())), codes)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_memory_order_does_not_matter(name):
    x = gaussian(70, 24).T
    assert not x.is_contiguous() and torch.equal(rounded(name, x), rounded(name, x.contiguous()))


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_odd_shapes_are_rounded_as_well_as_any(name, shape):
    x = gaussian(*shape)
    values = rounded(name, x)
    assert values.shape == x.shape and values.isfinite().all()
    assert (values - x).norm() < 0.8 * x.norm()  # 1 bit leaves 0.6 of a Gaussian


@every_name
def test_a_zero_matrix_is_read_back_as_zeros(name):
    assert torch.equal(rounded(name, torch.zeros(6, 40)), torch.zeros(6, 40))


@pytest.mark.parametrize("name", [n for n in GRANULAR if n.endswith("_row")])
def test_a_zero_row_beside_others_is_read_back_as_zeros(name):
    x = gaussian(6, 40)
    x[2] = 0
    assert torch.equal(rounded(name, x)[2], torch.zeros(40))


@every_name
def test_constant_rows_stay_finite_and_near(name):
    x = torch.tensor([1.0, 2.0, 1.0, -1.0])[:, None].repeat(1, 64)
    error = (rounded(name, x) - x).norm() / x.norm()
    # Two scales of one matrix and, for E8P, no codeword on the diagonal: half is the worst that 1 and 2 bits do.
    assert error < (0.55 if get_quantizer(name).bits <= 2 else 0.2)


@pytest.mark.parametrize("name", [n for n in GRANULAR if n.startswith("uniform_asym")])
def test_an_offset_is_free_for_asymmetric_scales(name):
    """One value in all columns of a row is its zero, to the precision in which zeros are stored."""
    x = torch.tensor([[0.7], [-3.0], [100.0]]).expand(3, 40)
    torch.testing.assert_close(rounded(name, x), x, rtol=2**-8, atol=0)


@pytest.mark.parametrize("size", [1e2, -1e6])
@every_name
def test_one_huge_outlier_is_finite_and_no_worse_than_zeros(name, size):
    x = gaussian(16, 64)
    x[5, 7] = size
    values = rounded(name, x)
    assert values.isfinite().all()
    # a sign and one scale, which the outlier makes too large for all others, is the only format that zeros beat
    assert (values - x).norm() <= x.norm() * (1.2 if name.startswith("trellis_1bit") else 1)


@pytest.mark.parametrize("name", ["uniform_8bit", "uniform_asym_8bit", "nf_8bit"])
def test_the_place_of_an_outlier_does_not_matter(name):
    """The search for a scale looks at a part of a large matrix; an outlier elsewhere counts as much."""
    errors = []
    for at in ((0, 0), (0, 1), (511, 511)):
        x = gaussian(512, 512)
        x[at] = 1000.0
        errors.append(float((rounded(name, x) - x).norm() / x.norm()))
    assert max(errors) < 1.05 * min(errors)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4])
@pytest.mark.parametrize("name", [n for n in REPRESENTATIVE if n != "fp16"])  # whose range is that of the format
def test_the_unit_of_the_weights_does_not_matter(name, scale):
    x = gaussian(24, 64)
    expected = float((rounded(name, x) - x).norm() / x.norm())
    error = float((rounded(name, x * scale) - x * scale).norm() / (x * scale).norm())
    assert error == pytest.approx(expected, rel=0.05)  # scales are rounded to bfloat16, at most


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_halves_are_the_nearest_16bit_floats_and_saturate(name):
    x = torch.tensor([[1.0, 1 / 3, -2.5e-3, 1e6, -1e6, 0.0]])
    top = torch.finfo(HALVES[name]).max
    expected = x.clamp(-top, top).to(HALVES[name]).float()
    assert torch.equal(rounded(name, x), expected) and rounded(name, x).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- error
@pytest.mark.parametrize("name", PLAIN)
def test_error_on_a_unit_gaussian_is_the_documented_one(name):
    expected = get_quantizer(name).codebook.gaussian_mse
    measured = mean_squared_error(name, even_gaussian(512, 512))
    if name in HALVES:
        assert expected / 2 < measured < 2 * expected
    else:
        assert measured == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("where", ["", "_row", "_g64", "_g32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_falls_with_every_bit(family, where):
    x = gaussian(48, 128)
    errors = [mean_squared_error(f"{family}_{bits}bit{where}", x) for bits in sorted(FAMILIES[family])]
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors))  # a quarter, were it not for tails and formats


@pytest.mark.parametrize("name", [n for n in CODED if not n.startswith(("e8p", "trellis"))])
def test_finer_scales_are_no_worse_than_one_for_the_matrix(name):
    """Families that search their scale: a granule may always use the scale that serves the matrix."""
    x = gaussian(64, 128)
    assert mean_squared_error(f"{name}_g32", x) < 1.02 * mean_squared_error(name, x)


@pytest.mark.parametrize(
    "name", ["uniform_1bit_row", "uniform_4bit_g32", "uniform_asym_3bit_row", "nf_4bit_g32", "nf_2bit"]
)
def test_searched_scales_are_near_the_best_of_a_fine_grid(name):
    quantizer, x = get_quantizer(name), gaussian(32, 256)
    scales, n = quantizer.fit(x), x.shape[1]

    def errors(factor: float) -> torch.Tensor:
        """Squared error of every granule at scales that are `factor` times the fitted ones."""
        tried = Scales(scales.scale.float() * factor, scales.zero)
        error = (quantizer.decode(quantizer.encode(x, tried), tried, n) - x).square()
        return error.reshape(scales.scale.shape[0], scales.scale.shape[1], -1).sum(2)

    best = torch.stack([errors(1.01**i) for i in range(-70, 71)]).amin(0)
    assert errors(1.0).sum() < 1.05 * best.sum()


# ------------------------------------------------------------------------------------------------------ single families
@pytest.mark.parametrize("name", ["uniform_2bit", "uniform_2bit_row", "uniform_asym_2bit", "nf_2bit"])
def test_two_bits_are_four_levels(name):
    """Published "2-bit uniform" rounds to three: -1, 0, 1."""
    values = rounded(name, gaussian(1, 4000))
    assert len(values.unique()) == 4


def test_uniform_levels_are_symmetric_and_equally_spaced():
    values = rounded("uniform_3bit", gaussian(40, 100)).unique()
    assert len(values) == 8
    torch.testing.assert_close(values, -values.flip(0))
    torch.testing.assert_close(values.diff(), values.diff()[:1].expand(7))


def test_normal_float_levels_are_the_published_nf4():
    """The sixteen values of QLoRA (Dettmers et al. 2023, appendix E)."""
    published = [
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ]  # fmt: skip
    levels = get_quantizer("nf_4bit").codebook.levels
    torch.testing.assert_close(torch.from_numpy(levels), torch.tensor(published), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CODED if not n.startswith(("e8p", "trellis"))])
def test_compiled_and_tensor_search_give_the_same_level(name):
    """Ties and huge values included."""
    book = get_quantizer(name).codebook
    levels = torch.from_numpy(book.levels)
    middles = (levels[1:] + levels[:-1]) / 2
    z = torch.cat([levels, middles, gaussian(2000) * levels.abs().max(), torch.tensor([1e30, -1e30, 0.0])])[:, None]
    assert torch.equal(nearest(book, z), book.encode(z))
    distance = (z - book.decode(book.encode(z))).abs()[:, 0]
    torch.testing.assert_close(distance, (z - levels).abs().amin(1), rtol=0, atol=1e-6)  # ties fall either way


# ---------------------------------------------------------------------------------------------------------------- names
def test_names_are_unique_and_stable_objects():
    assert len(set(ALL)) == len(ALL)
    assert all(get_quantizer(name).name == name and get_quantizer(name) is get_quantizer(name) for name in ALL)


@pytest.mark.parametrize(
    ("name", "near"),
    [("e8p_2bits", "e8p_2bit"), ("E8P_2bit", "e8p_2bit"), ("unifrom_4bit", "uniform_4bit"), ("bfloat16", "bf16"),
     ("uniform_4bit_", "uniform_4bit"), ("nf4_4bit_row", "nf_4bit")],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest_ones(name, near):
    with pytest.raises(UserError, match=rf"quantizer {name!r} is not known; the nearest names are .*\b{near}\b"):
        get_quantizer(name)


@pytest.mark.parametrize("name", ["", "none", "%%%", "_row", "bf16_row"])
def test_any_other_name_is_a_user_error_that_quotes_it(name):
    with pytest.raises(UserError) as raised:
        get_quantizer(name)
    assert str(raised.value).startswith(f"quantizer {name!r} is not known; the nearest names are ")


@pytest.mark.parametrize(
    ("name", "have"),
    [("e8p_5bit", "2, 3, 4"), ("uniform_9bit", "1, 2, 3, 4, 5, 6, 7, 8"), ("nf_1bit_row", "2, 3, 4, 5, 6, 7, 8"),
     ("uniform_asym_0bit_g64", "1, 2, 3, 4, 5, 6, 7, 8"), ("e8p_1bit", "2, 3, 4")],
)  # fmt: skip
def test_bits_that_a_family_lacks_are_answered_with_those_it_has(name, have):
    with pytest.raises(UserError, match=f"no .*-bit variant; it has {have} bits"):
        get_quantizer(name)


@pytest.mark.parametrize("name", ["e8p_2bit_g12", "e8p_4bit_g4", "uniform_4bit_g0"])
def test_a_scale_group_that_cuts_a_codeword_is_refused(name):
    with pytest.raises(UserError, match="is no positive multiple of"):
        get_quantizer(name)
