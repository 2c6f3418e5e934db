"""One section in a process of its own, so that its peak memory is its own: `python -m bench.sections NAME FILE`."""

import argparse
import importlib
import time
from pathlib import Path

import bench  # noqa: F401  (its environment variables, before torch)
from caldera.files import write_json
from sweeps.record import peak_rss

# name -> module with a function of that name, which takes `quick` and returns rows
SECTIONS = {
    "encoder": "bench.kernels",
    "shapes": "bench.shapes",
    "growth": "bench.kernels",
    "point": "bench.model",
    "sweep": "bench.model",
    "matrices": "bench.matrices",
}
FULL_ONLY = ("matrices",)


def run_section(name: str, quick: bool) -> dict:
    """Rows, seconds and peak resident memory of a section, run in this process."""
    start = time.perf_counter()
    rows = getattr(importlib.import_module(SECTIONS[name]), name)(quick)
    peaks = [peak_rss(), *(row.peak_bytes for row in rows)]
    found = {"peak_rss_bytes": max((p for p in peaks if p), default=None), "seconds": time.perf_counter() - start}
    return found | {"rows": [row.as_dict() for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    write_json(arguments.file, run_section(arguments.name, arguments.quick))


if __name__ == "__main__":
    main()
