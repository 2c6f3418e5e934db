"""What is kept on disk: named by the hash of exactly what it depends on, and with a checksum of its own.

A sealed file is JSON with a checksum in it. A noted file is any other file with a sealed note beside it, written after
it, that has its checksum. What is damaged is named, and counts as not there: whoever needs it makes it again.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from caldera.errors import UserError
from caldera.files import committed, sha256, write_json
from sweeps.progress import warn

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "checksum"


def digest(data: object) -> str:
    """sha256 (hex) of JSON-like data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError naming the file when it is unreadable."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): delete it and run again") from error


# --------------------------------------------------------------------------------------------------------- sealed files
def write_sealed(path: Path, data: dict) -> None:
    """Commit a JSON object with a checksum of it."""
    write_json(path, data | {CHECKSUM: digest(data)})


def read_sealed(path: Path) -> dict | None:
    """The object in a sealed file without its checksum; None, and a warning, if it is damaged; None if it is not there.

    A record of the first schema, which had no checksum, is taken as it is.
    """
    what = "is damaged"
    try:
        data = json.loads(path.read_bytes())
        expected = data.pop(CHECKSUM, None)
        what = what if expected else "has no checksum (an earlier version's?)"
        if expected == digest(data) or (expected is None and data.get("schema_version") == 1):
            return data
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):  # no JSON, or no object
        pass
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): see to the disk or its permissions") from error
    warn(f"{path} {what}: it is made again")
    return None


def once(path: Path, make: Callable[[], dict]) -> tuple[dict, bool]:
    """The object in a sealed file, and whether it was there; if not, one process makes it and others wait for it."""
    if (found := read_sealed(path)) is not None:
        return found, True
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if (found := read_sealed(path)) is not None:
            return found, True
        found = make()
        write_sealed(path, found)
    return found, False


# ---------------------------------------------------------------------------------------------------------- noted files
def note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def write_note(path: Path, facts: dict, note: Path | None = None) -> None:
    """Commit a note about a file that was just written; it lies beside the file unless `note` says where."""
    write_sealed(note or note_of(path), {"sha256": _sum_of(path), "facts": facts})


def noted(path: Path, note: Path | None = None) -> dict | None:
    """The facts about a file that is as its note says; None, and a warning if it is damaged, otherwise."""
    found = read_sealed(note or note_of(path))
    if found is None or not path.is_file():
        return None
    if _sum_of(path) != found["sha256"]:
        warn(f"{path} is damaged: it is made again")
        return None
    return found["facts"]


def _sum_of(path: Path) -> str:
    stat = path.stat()
    return _sum(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


def write_tensors_noted(path: Path, tensors: dict[str, "Tensor"], facts: dict) -> None:
    """Commit a safetensors file, wherever its tensors are, and the note about it."""
    from safetensors.torch import save_file

    with committed(path) as part:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, part)
    write_note(path, facts)


def read_tensors_noted(path: Path) -> tuple[dict[str, "Tensor"], dict] | None:
    """The tensors and the facts about them of a file that is as its note says; the note tells when it was used last."""
    from safetensors.torch import load_file

    if (facts := noted(path)) is None:
        return None
    note_of(path).touch()
    return load_file(path), facts


@functools.lru_cache(maxsize=4096)
def _sum(path: Path, _size: int, _mtime: int, _inode: int) -> str:
    """Checksum of a file, computed once a process for as long as the file is the same."""
    return sha256(path)


# -------------------------------------------------------------------------------------------------------------- folders
def require_writable(folder: Path, field: str) -> None:
    """Create `folder` and try a file in it. Raises UserError naming the config field when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{field}={folder} cannot be written to ({error.strerror}): choose another folder") from error
