"""Files that are either whole or not there: written under another name, flushed to disk, then renamed."""

import glob
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def committed(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(platform.node())}.*.part"):
        if not is_running(int(left.name.split(".")[-2])):  # its process was killed while it wrote
            left.unlink(missing_ok=True)
    try:
        yield part
        flush(part)
        part.replace(path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # there is one, of another user
        return True
    return True


def write_json(path: Path, data: object) -> None:
    """Commit `data` as JSON; NaN and infinity are refused (ValueError), since a missing value is null."""
    text = json.dumps(data, indent=1, allow_nan=False)
    with committed(path) as part:
        part.write_text(text + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
