"""`python -m bench`: every section in a process of its own, one table, one JSON file."""

import argparse
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from bench.sections import FULL_ONLY, SECTIONS
from bench.table import show
from caldera.files import write_json
from sweeps.record import environment
from sweeps.store import read_json

SCHEMA_VERSION = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller cases, under 2 minutes on 2 quiet cores")
    parser.add_argument("--output", type=Path, default=Path("results/bench/bench.json"), help="the JSON file")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="only this one; may be repeated")
    return parser.parse_args()


def measured(name: str, quick: bool) -> dict | None:
    """A section's result from a new process, whose peak of memory is the section's own; None if it failed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder, "section.json")
        options = ["--quick"] if quick else []
        subprocess.run([sys.executable, "-m", "bench.sections", name, str(file), *options], check=False)
        return read_json(file) if file.exists() else None


def main() -> None:
    chosen = arguments()
    names = chosen.section or [name for name in SECTIONS if not (chosen.quick and name in FULL_ONLY)]
    report = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": chosen.quick,
        "environment": environment(),
        "sections": {},
    }
    for name in names:
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        if found := measured(name, chosen.quick):
            report["sections"][name] = found
        write_json(chosen.output, report)  # what is measured is kept, whatever happens to the rest
    show(report)
    print(chosen.output)
    if failed := [name for name in names if name not in report["sections"]]:
        sys.exit(f"bench: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
