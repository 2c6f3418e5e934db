"""Codes of any width from 1 to 32 bits in bytes, little end first, with no bit between them."""

import math
from functools import reduce

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes (any shape, 0 <= code < 2^bits) as uint8 (packed_bytes,)."""
    codes = codes.reshape(-1).to(torch.int64)
    if bits % 8 == 0:
        shifts = torch.arange(0, bits, 8, device=codes.device)
        return ((codes[:, None] >> shifts) & 255).to(torch.uint8).reshape(-1)
    stream = (codes[:, None] >> torch.arange(bits, device=codes.device)) & 1
    stream = torch.nn.functional.pad(stream.reshape(-1), (0, -codes.numel() * bits % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: int64 (count,)."""
    unit = bits // math.gcd(bits, 8)  # the fewest bytes that hold whole codes
    if unit > 7:  # no quantizer has such codes: bit by bit
        stream = ((data[:, None] >> torch.arange(8, device=data.device)) & 1).reshape(-1)[: count * bits]
        return (stream.reshape(count, bits) << torch.arange(bits, device=data.device)).sum(1)
    words, codes = _words(data, unit), 8 * unit // bits
    if codes > 1:
        words = torch.stack([(words >> bits * i) & (2**bits - 1) for i in range(codes)], 1).reshape(-1)[:count]
    return words.to(torch.int64)


def _words(data: Tensor, unit: int) -> Tensor:
    """Bytes as integers of `unit` bytes, at most seven. Shifts are scalars: by a tensor they take ten times as long."""
    data = torch.nn.functional.pad(data, (0, -data.numel() % unit)).reshape(-1, unit)
    wide = torch.int32 if unit < 4 else torch.int64
    return reduce(torch.bitwise_or, (data[:, i].to(wide) << 8 * i for i in range(unit)))
