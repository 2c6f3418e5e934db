"""`caldera-wandb sync RESULTS_DIR`: W&B's copies of the records of a results folder, made again."""

import argparse
import shutil
import sys
from pathlib import Path

from rich.progress import track as counted

from analysis.records import RecordError, load_records
from caldera.errors import UserError
from sweeps.schema import TrackerConfig
from sweeps.trackers import RUN_ID, wandb_tracker


def sync(results: Path, mode: str, sweep: str | None = None, project: str | None = None, artifact: bool = False) -> int:
    """Copy every record, or those of a sweep; how many there were.

    What a point was tracked by says where it goes, unless `project` (a name, or ENTITY/PROJECT) does. A new offline
    run takes the place of a point's earlier ones. Raises UserError at the first that fails; those before it are made.
    """
    records = [r for r in load_records(results) if sweep in (None, r.get("sweep"))]
    if not records:
        raise UserError(f"--sweep={sweep} has no record in {results}: leave it out, or give one that has")
    records.sort(key=lambda record: bool(record["matrices"]))  # the last, which `wandb leet` opens, has curves
    for index, record in enumerate(counted(records, "copied", disable=not sys.stdout.isatty())):
        before = offline_runs(results, record)
        try:
            wandb_tracker(record, destination(record, project) | {"mode": mode, "artifact": artifact}, results)
        except Exception as error:  # of W&B: an outage, a missing key, no permission
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{record['name']} could not be copied ({reason}): {index} of {len(records)} are; see to your key and"
                " the network, or use --mode offline"
            ) from error
        if offline_runs(results, record) > before:
            for folder in before:
                shutil.rmtree(folder, ignore_errors=True)
    return len(records)


def offline_runs(results: Path, record: dict) -> set[Path]:
    return set((results / "wandb").glob(f"offline-run-*-{record['key'][:RUN_ID]}"))


def destination(record: dict, project: str | None) -> dict:
    """Project and entity of a record's run."""
    own = record["config"].get("tracker", {})
    if project is None:
        return {"project": own.get("project", TrackerConfig.project), "entity": own.get("entity")}
    entity, _, name = project.rpartition("/")
    return {"project": name, "entity": entity or None}


def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-wandb`; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        count = sync(options.results_dir, options.mode, options.sweep, options.project, options.artifact)
    except (RecordError, UserError, OSError) as error:
        print(f"caldera-wandb: {error}", file=sys.stderr)
        return 1
    print(
        f"{count} runs written {'to ' + str(options.results_dir / 'wandb') if options.mode == 'offline' else 'to W&B'}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="caldera-wandb", description="W&B's copies of the records of a folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    copied = commands.add_parser("sync", help="make every copy again; those that are there are replaced")
    copied.add_argument("results_dir", type=Path, help="a sweep's output folder, with points/*/record.json")
    copied.add_argument(
        "--mode", choices=("online", "offline"), default="online", help="online: upload; offline: write"
    )
    copied.add_argument("--sweep", help="only its points")
    copied.add_argument("--project", metavar="[ENTITY/]PROJECT", help="where to (default: as the points were tracked)")
    copied.add_argument("--artifact", action="store_true", help="the packed checkpoints too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
