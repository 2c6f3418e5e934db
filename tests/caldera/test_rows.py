"""Rows behave as a list does, wherever they lie."""

import pytest
import torch
from safetensors.torch import save_file

from caldera.rows import Rows, Spill
from tests.caldera.oracles import gaussian

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.bool]


def equal(rows: Rows, expected: list[torch.Tensor]) -> bool:
    same = [torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(rows, expected, strict=True)]
    return all(same) and len(rows) == len(expected) and torch.equal(rows[-1], expected[-1])


@pytest.mark.parametrize("limit", [0, 3 * 60, 10**6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_a_list(tmp_path, dtype, limit):
    """Of rows of one size, then of others: smaller and larger ones in the place of one in the middle."""
    tensors = [gaussian(1, 3, 5, seed=i).to(dtype) for i in range(6)]
    rows, expected = Rows(tensors[:4], Spill(tmp_path / "new", limit)), tensors[:4]
    assert equal(rows, expected)
    for change in (tensors[4], tensors[4][:, :1], gaussian(1, 9, 5).to(dtype), tensors[5].mT, gaussian(2, 2)):
        rows[2] = expected[2] = change
        rows.append(change)
        expected.append(change)
        assert equal(rows, expected)
    assert rows.spilled == (sum(t.nbytes for t in expected) > limit)


def test_they_spill_when_they_are_too_many_together(tmp_path):
    rows = Rows(spill=Spill(tmp_path, 100))
    spilled = []
    for i in range(4):
        rows.append(gaussian(10, seed=i))  # 40 bytes
        spilled.append(rows.spilled)
    assert spilled == [False, False, True, True]
    assert equal(rows, [gaussian(10, seed=i) for i in range(4)])


def test_what_spills_has_no_name_and_is_not_changed_through_what_is_read(tmp_path):
    rows = Rows([gaussian(10)], Spill(tmp_path, 0))
    assert rows.spilled and not list(tmp_path.iterdir())
    rows[0].zero_()
    assert torch.equal(rows[0], gaussian(10))


def test_without_a_place_to_spill_they_stay():
    kept = gaussian(10)
    rows = Rows([kept])
    assert rows[0] is kept and not rows.spilled


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_stored_tensor(tmp_path, dtype):
    stored = gaussian(4, 3, 5).to(dtype)
    save_file({"a": torch.arange(3), "x": stored}, tmp_path / "file")
    assert equal(Rows.stored(tmp_path / "file", "x"), list(stored.split(1)))
