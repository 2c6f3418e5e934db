"""Which checkpoints stay when their points are evaluated: `checkpoint.keep`."""

from filelock import FileLock, Timeout

from analysis.frontier import frontier_table
from analysis.records import RecordError, load_records
from sweeps.point import Point


def tidy(point: Point) -> None:
    """Drop what the point's configuration does not want to be kept; what another process works on stays."""
    keep = point.config["checkpoint"]["keep"]
    if keep == "none" and point.method is not None:
        _drop_unless_held(point, point.checkpoint.name)
    elif keep == "pareto":
        for name in dominated(point):
            _drop_unless_held(point, name)


def dominated(point: Point) -> list[str]:
    """Checkpoints of the point's sweep and model that no Pareto-optimal point uses."""
    model = point.config["model"]["name"]
    try:
        records = load_records(point.results)
        own = [r for r in records if (r["sweep"], r["point"]["model"]) == (point.config["sweep"], model)]
        table = frontier_table(own)
    except RecordError:  # nothing that could be compared
        return []
    used = {record["name"]: record.get("checkpoint") for record in own}
    best = {used[name] for name in table.loc[table["pareto"], "name"]}
    done = {used[name] for name in table.loc[table["status"] == "done", "name"]} - {None}
    return sorted(path.rpartition("/")[2] for path in done - best)


def _drop_unless_held(point: Point, name: str) -> None:
    from sweeps.compress import drop

    folder = point.checkpoint.with_name(name)
    if not folder.is_dir():
        return
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            drop(folder)
    except Timeout:
        return
