"""A sweep on disk, as the tests look at it."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

TOP_LEVEL = {
    "schema_version", "status", "name", "key", "keys", "checkpoint", "checksum", "sweep", "created", "config", "point",
    "bits", "metrics", "noise_floor", "matrices", "allocation",
    "timings_s", "reused", "memory", "environment", "seeds", "error",
}  # fmt: skip
NO_TASKS = "evaluation.tasks=[]"


@dataclass
class Swept:
    """A finished sweep on disk."""

    results: Path
    output: str = ""
    errors: str = ""
    code: int = 0
    records: list[dict] = field(init=False)

    def __post_init__(self):
        self.records = [json.loads(f.read_text()) for f in sorted(self.results.glob("points/*/record.json"))]

    def of(self, **point) -> dict:
        """The only record whose axes are these."""
        (found,) = [r for r in self.records if all(r["point"][key] == value for key, value in point.items())]
        return found

    def folder(self, record: dict) -> Path:
        return self.results / "points" / record["name"]

    def checkpoint(self, record: dict) -> Path:
        return self.results / (record["checkpoint"] or "none")

    def state(self) -> dict:
        """Bytes and time of every file of the points."""
        files = [f for f in sorted(self.results.glob("points/**/*")) if f.is_file() and f.name != ".lock"]
        return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files}
