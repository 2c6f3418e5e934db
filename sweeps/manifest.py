"""What a sweep consists of: a sealed list of every point ever planned under its name, as it was configured."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from sweeps.store import read_sealed, write_sealed

if TYPE_CHECKING:
    from sweeps.point import Point


def remember(points: Iterable["Point"]) -> None:
    """Add points to the manifests of their sweeps; of one that was planned before, the configuration is renewed."""
    planned: dict[Path, dict[str, dict]] = {}
    for point in points:
        file = manifest_of(point.results, point.config["sweep"])
        config = point.config | {"force": False}  # what was asked of one run, not of the point
        entry = {"name": point.name, "key": point.key, "config": config}
        planned.setdefault(file, {})[point.name] = entry
    for file, entries in planned.items():
        _merge(file, entries)


def _merge(file: Path, entries: dict[str, dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        found = read_sealed(file) or {"sweep": file.stem, "points": []}
        found |= {"created": found.get("created") or datetime.now(UTC).isoformat(timespec="seconds")}
        points = list(({entry["name"]: entry for entry in found["points"]} | entries).values())
        if points != found["points"]:
            write_sealed(file, found | {"points": points})


def manifest_of(results: Path, sweep: str) -> Path:
    return results / "sweeps" / f"{sweep}.json"


def manifests(results: Path) -> list[Path]:
    """Those of a results folder, by the names of their sweeps."""
    return sorted((results / "sweeps").glob("*.json"))


def results_below(root: Path) -> list[Path]:
    """The results folders among `root` and what it holds."""
    if not root.is_dir():
        return []
    return [f for f in (root, *sorted(root.iterdir())) if (f / "points").is_dir() or manifests(f)]
