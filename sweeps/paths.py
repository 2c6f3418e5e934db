"""The cache folder and the files in it: costly to make, safe to delete."""

import hashlib
import os
from pathlib import Path

import platformdirs

from caldera.files import flush, sha256
from sweeps.store import once


def default_cache() -> Path:
    """The cache folder: $CALDERA_CACHE if set, else the user's own cache folder. It may not exist yet."""
    return Path(os.environ.get("CALDERA_CACHE") or platformdirs.user_cache_dir("caldera-sweeps")).expanduser()


def file_digest(file: Path, cache: Path) -> str:
    """sha256 of a file, remembered in the cache under (path, size, modification time in ns)."""
    file = file.resolve()
    stat = file.stat()
    key = hashlib.sha256(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    found, _ = once(cache / "digests" / f"{key}.json", lambda: {"file": str(file), "sha256": sha256(file)})
    return found["sha256"]


def to_disk(folder: Path) -> None:
    """Waits until a flat folder's files and names have reached the disk."""
    for path in [*folder.iterdir(), folder]:
        flush(path)
