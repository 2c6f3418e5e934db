"""The table of quantizers. A name says family, bits and, after an underscore, where scales are kept.

`e8p_2bit`, `uniform_4bit`, `uniform_asym_3bit_g64` (one scale for 64 columns of a row), `nf_4bit_row`, `bf16`, `fp16`.
"""

import difflib
import re
from functools import cache

import torch

from caldera.errors import UserError
from caldera.quantizers.base import Codebook, Quantizer, Scales, TensorSpec
from caldera.quantizers.e8p import CODEBOOKS as E8P_CODEBOOKS
from caldera.quantizers.half import Half
from caldera.quantizers.scalar import ScalarCodebook, normal_float_levels, uniform_levels
from caldera.quantizers.trellis import CODEBOOKS as TRELLIS_CODEBOOKS

# family -> bits -> codebook
FAMILIES: dict[str, dict[int, Codebook]] = {
    "e8p": E8P_CODEBOOKS,
    "uniform": {b: ScalarCodebook(b, uniform_levels) for b in range(1, 9)},
    "uniform_asym": {b: ScalarCodebook(b, uniform_levels) for b in range(1, 9)},
    "trellis": TRELLIS_CODEBOOKS,
    "nf": {b: ScalarCodebook(b, normal_float_levels) for b in range(2, 9)},
}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAME = re.compile(r"(?P<family>[a-z]\w*?)_(?P<bits>\d+)bit(?P<where>_row|_g(?P<columns>\d+))?")


def quantizer_names() -> list[str]:
    """Every name with one scale a matrix; `_row` or `_g<columns>` may be appended to those with bits."""
    return [f"{family}_{bits}bit" for family, books in FAMILIES.items() for bits in books] + list(HALVES)


@cache
def get_quantizer(name: str) -> "Quantizer | Half":
    """The quantizer of that name. Raises UserError for an unknown family, or bits that the family does not have."""
    if name in HALVES:
        return Half(name, HALVES[name])
    match = NAME.fullmatch(name)
    if match is None or match["family"] not in FAMILIES:
        near = difflib.get_close_matches(name, quantizer_names(), 3, 0.3)
        raise UserError(
            f"quantizer {name!r} is not known; the nearest names are {', '.join(near or quantizer_names())}"
        )
    books, bits = FAMILIES[match["family"]], int(match["bits"])
    if bits not in books:
        have = ", ".join(map(str, books))
        raise UserError(f"quantizer {name!r}: {match['family']} has no {bits}-bit variant; it has {have} bits")
    return Quantizer(name, books[bits], _granularity(name, match), symmetric=match["family"] != "uniform_asym")


def _granularity(name: str, match: re.Match) -> int:
    if match["columns"] is None:
        return -1 if match["where"] else 0
    columns = int(match["columns"])
    group = FAMILIES[match["family"]][int(match["bits"])].group
    if columns == 0 or columns % group:
        raise UserError(f"quantizer {name!r}: a scale group of {columns} columns is no positive multiple of {group}")
    return columns


__all__ = ["Codebook", "Half", "Quantizer", "Scales", "TensorSpec", "get_quantizer", "quantizer_names"]
