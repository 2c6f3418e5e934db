"""Safetensors files written piece by piece, byte for byte as the library writes them: no file is ever in memory."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from caldera.files import committed

# the format's name of every type, in the order in which the library sorts them (the last one comes first)
NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_tensors(
    path: Path, layout: Layout, pieces: Callable[[str], Iterable[Tensor]], metadata: dict[str, str] | None = None
) -> None:
    """Commit tensors of these types and shapes; `pieces(name)` yields one's parts along its first dimension.

    With metadata the header is sorted: the library orders metadata at random, and the same tensors are to give the
    same bytes.
    """
    names = _ordered(layout)
    with committed(path) as part, part.open("wb") as stream:
        stream.write(_header(names, layout, metadata))
        for name in names:
            written = sum(stream.write(raw(piece)) for piece in pieces(name))
            assert written == _size(*layout[name]), name


def file_bytes(layout: Layout, metadata: dict[str, str] | None = None) -> int:
    """How large the file of such tensors is."""
    return len(_header(_ordered(layout), layout, metadata)) + sum(_size(*entry) for entry in layout.values())


def _ordered(layout: Layout) -> list[str]:
    rank = {dtype: -place for place, dtype in enumerate(NAMES)}
    return sorted(layout, key=lambda name: (rank[layout[name][0]], name))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; of one that is contiguous and on the CPU, its own memory."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _header(names: list[str], layout: Layout, metadata: dict[str, str] | None) -> bytes:
    entries, end = {}, 0
    for name in names:
        (dtype, shape), start = layout[name], end
        end = start + _size(dtype, shape)
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    if metadata is None:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    else:
        text = json.dumps({"__metadata__": metadata} | entries, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def place_of(path: Path, name: str) -> tuple[int, torch.dtype, tuple[int, ...]]:
    """Where in a file a tensor begins (bytes), its type and its shape. Raises SafetensorError for a damaged file."""
    with safe_open(path, "pt"):  # which looks at the header and at the file's length
        pass
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(size))[name]
    dtypes = {text: dtype for dtype, text in NAMES.items()}
    return 8 + size + entry["data_offsets"][0], dtypes[entry["dtype"]], tuple(entry["shape"])
