"""Names of things on disk: the hash of exactly what a stage depends on, and JSON that is read back."""

import hashlib
import json
from pathlib import Path

from caldera.errors import UserError


def digest(data: object) -> str:
    """sha256 (hex) of JSON-like data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError naming the file when it is unreadable."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): delete it and run again") from error


def require_writable(folder: Path, field: str) -> None:
    """Create `folder` and try a file in it. Raises UserError naming the config field when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{field}={folder} cannot be written to ({error.strerror}): choose another folder") from error
