"""Activations, a tensor for every row of tokens: in memory while they are few, in a file where they are many.

Files are read and written a row at a time, and never mapped, so that what is on disk takes no resident memory.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from caldera.tensorfile import place_of, raw

LIMIT = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Spill:
    """Rows that take more than `limit` bytes together go to a file below `folder`: one without a name, which is gone
    with the rows or the process."""

    folder: Path
    limit: int = LIMIT


@dataclass(frozen=True)
class Slot:
    """A row's place in a file: `room` bytes from `start` on."""

    start: int
    room: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device


class Rows:
    """A list of tensors that spills. What is read from a file is the caller's own: to change a row, set it."""

    def __init__(self, rows: Iterable[Tensor] = (), spill: Spill | None = None):
        self._rows: list[Tensor | Slot] = []
        self._file: BinaryIO | None = None
        self._spill = spill
        for row in rows:
            self.append(row)

    @classmethod
    def stored(cls, path: Path, name: str, device: torch.device | str = "cpu") -> "Rows":
        """The rows (1, ...) of a tensor in a safetensors file, to be read only."""
        start, dtype, (count, *shape) = place_of(path, name)
        size = dtype.itemsize * math.prod(shape)
        rows = cls()
        rows._file = path.open("rb")
        device = torch.device(device)
        rows._rows = [Slot(start + i * size, size, dtype, (1, *shape), device) for i in range(count)]
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        row = self._rows[index]
        return row if isinstance(row, Tensor) else self._read(row)

    def __setitem__(self, index: int, row: Tensor) -> None:
        before = self._rows[index]
        self._rows[index] = row if self._file is None else self._write(row, before)
        self._spill_if_many()

    def append(self, row: Tensor) -> None:
        self._rows.append(row if self._file is None else self._write(row))
        self._spill_if_many()

    @property
    def spilled(self) -> bool:
        return self._file is not None

    def _spill_if_many(self) -> None:
        if self._spill is None or self._file is not None:
            return
        if sum(row.nbytes for row in self._rows) > self._spill.limit:
            self._spill.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._spill.folder)  # noqa: SIM115 (it lives as long as the rows)
            for index, row in enumerate(self._rows):
                self._rows[index] = self._write(row)

    def _write(self, row: Tensor, before: Slot | None = None) -> Slot:
        """Put a row in the place of another where it fits, else at the end."""
        fits = before is not None and row.nbytes <= before.room
        start = self._file.seek(before.start) if fits else self._file.seek(0, 2)
        self._file.write(raw(row))
        return Slot(start, before.room if fits else row.nbytes, row.dtype, tuple(row.shape), row.device)

    def _read(self, slot: Slot) -> Tensor:
        row = torch.empty(slot.shape, dtype=slot.dtype)
        self._file.seek(slot.start)
        if self._file.readinto(raw(row)) != row.nbytes:
            raise OSError(f"{self._file.name} was cut short while it was read")
        return row.to(slot.device)
