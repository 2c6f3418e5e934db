"""Files written piece by piece are the library's own, byte for byte."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file

from caldera.tensorfile import NAMES, place_of, write_tensors
from tests.caldera.oracles import gaussian


def written(path, tensors, metadata=None, pieces=None) -> bytes:
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(path, layout, pieces or (lambda name: [tensors[name]]), metadata)
    return path.read_bytes()


def test_every_type_and_shape_comes_as_the_library_writes_it(tmp_path):
    """Types in the library's order, names in theirs, odd sizes, scalars, empty tensors, views."""
    tensors = {f"{i}.{dtype}": (3 * gaussian(3, 5, seed=i)).abs().to(dtype) for i, dtype in enumerate(NAMES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": gaussian(3, 5).T, "ü": gaussian(1)}
    plain = {name: t.contiguous() for name, t in tensors.items()}
    assert written(tmp_path / "file", tensors) == save(plain)


def test_a_header_with_metadata_is_sorted(tmp_path):
    tensors = {"b": gaussian(3), "a": torch.arange(5), "c": torch.tensor([True])}
    data = written(tmp_path / "file", tensors, {"format": "pt", "and": "so on"})
    size = int.from_bytes(data[:8], "little")
    expected = save(tensors, {"format": "pt", "and": "so on"})
    start = 8 + int.from_bytes(expected[:8], "little")
    assert data[8 + size :] == expected[start:]
    header = json.loads(expected[8:start])
    assert data[8 : 8 + size].decode().rstrip() == json.dumps(header, sort_keys=True) and size % 8 == 0


def test_parts_make_the_same_file(tmp_path):
    whole = gaussian(6, 4).bfloat16()
    save_file({"x": whole}, tmp_path / "whole")
    assert written(tmp_path / "parts", {"x": whole}, pieces=lambda _: whole.split(1)) == (
        (tmp_path / "whole").read_bytes()
    )


def test_parts_that_do_not_add_up_leave_no_file(tmp_path):
    with pytest.raises(AssertionError):
        written(tmp_path / "file", {"x": gaussian(6, 4)}, pieces=lambda _: [gaussian(5, 4)])
    assert not list(tmp_path.iterdir())


def test_the_place_of_a_tensor(tmp_path):
    tensors = {"a": torch.arange(5), "b": gaussian(3, 4).bfloat16()}
    data = written(tmp_path / "file", tensors)
    start, dtype, shape = place_of(tmp_path / "file", "b")
    assert (dtype, shape) == (torch.bfloat16, (3, 4))
    assert data[start:] == tensors["b"].view(torch.uint8).numpy().tobytes()
    (tmp_path / "file").write_bytes(data[:-1])
    with pytest.raises(SafetensorError):
        place_of(tmp_path / "file", "b")
