"""Codes of every width fill their bytes without a gap, and come back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caldera.packing import pack, packed_bytes, unpack
from tests.caldera.oracles import packed_bit_by_bit

WIDTHS = range(1, 33)


def random_codes(count: int, bits: int) -> torch.Tensor:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits))
    codes[: min(count, 2)] = torch.tensor([2**bits - 1, 0])[:count]  # both ends of the range
    return codes


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_round_trip_of_every_width(bits, count):
    codes = random_codes(count, bits)
    data = pack(codes, bits)
    assert data.dtype == torch.uint8 and data.shape == (packed_bytes(count, bits),)
    assert data.numel() == -(-count * bits // 8)
    back = unpack(data, bits, count)
    assert back.dtype == torch.int64 and torch.equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_are_the_little_endian_digits(bits):
    """The layout is part of the checkpoint's format."""
    codes = random_codes(37, bits)
    assert bytes(pack(codes, bits).tolist()) == packed_bit_by_bit(codes.tolist(), bits)


def test_four_2bit_codes_share_a_byte():
    assert pack(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00_11_10_01, 0b10]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_shape_and_integer_type_of_the_codes_do_not_matter(dtype):
    codes = random_codes(24, 3)
    assert torch.equal(pack(codes.reshape(2, 3, 4).to(dtype), 3), pack(codes, 3))
    assert torch.equal(pack(codes.reshape(4, 6).T, 3), pack(codes.reshape(4, 6).T.contiguous(), 3))


@pytest.mark.parametrize("bits", [3, 8])
def test_codes_are_not_changed(bits):
    codes = random_codes(20, bits)
    before = codes.clone()
    pack(codes, bits).zero_()
    assert torch.equal(codes, before)


@given(st.integers(1, 32).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1)))))
@settings(max_examples=200, deadline=None)
def test_any_codes_of_any_width(case):
    bits, codes = case
    data = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert bytes(data.tolist()) == packed_bit_by_bit(codes, bits)
    assert unpack(data, bits, len(codes)).tolist() == codes
