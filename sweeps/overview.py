"""How far the points of a results folder are, read from manifests, records and signs of life alone."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from analysis.frontier import frontier_table, headline
from analysis.records import RecordError, checked, failure
from sweeps.heartbeat import PROGRESS, is_alive, read_heartbeat
from sweeps.manifest import manifests
from sweeps.store import read_sealed

STATES = ("running", "failed", "interrupted", "waiting", "done")
TO_RETRY = ("failed", "interrupted", "waiting")


@dataclass(frozen=True)
class Status:
    """One point. Seconds are those of work; what is not known is None."""

    name: str
    sweep: str | None
    state: str  # one of STATES
    stage: str | None = None  # of a running or interrupted point, with the share of it that is done
    share: float | None = None
    stage_left: float | None = None  # seconds
    reason: str | None = None  # why it failed
    stored_bits: float | None = None
    metric: str | None = None  # the name of `value`: the first perplexity, or else the first metric
    value: float | None = None
    seconds: float | None = None
    beside: bool = False  # the uncompressed model that the others are compared with, unless it is a point itself
    ended: float = 0.0  # when its record was written, seconds since 1970
    best: bool = False  # no other point has as few stored bits and as good a metric


@dataclass(frozen=True)
class Overview:
    folder: Path
    points: list[Status]
    seconds_left: float | None  # to the end; None: nothing is left to do, or nothing is known

    @property
    def counts(self) -> dict[str, int]:
        """How many points are in each state."""
        found = Counter(point.state for point in self.points if not point.beside)
        return {state: found[state] for state in STATES}


@dataclass
class Results:
    """A results folder, to be looked at once or again and again: files are read when they have changed.

    Only the points of `sweep`, or those of `names`, count where these are given.
    """

    folder: Path
    sweep: str | None = None
    names: frozenset[str] | None = None
    _read: dict[Path, tuple[tuple, dict | None]] = field(default_factory=dict)
    _best: tuple[list, frozenset[str]] = ([], frozenset())

    def look(self) -> Overview:
        """How far all is. Raises RecordError for a record that a newer version wrote."""
        planned, records = self._planned(), self._records()
        begun = [file.parent.name for kind in ("record.json", PROGRESS) for file in self._files(kind)]
        found = [self._status(name, planned, records.get(name)) for name in dict.fromkeys([*planned, *begun])]
        chosen = [s for s in found if self._counts(s, planned)]
        best = self._front({s.name: records[s.name] for s in chosen if s.state == "done"})
        points = [replace(s, best=s.name in best) for s in chosen]
        return Overview(self.folder, points, _seconds_left(points))

    def sweeps(self) -> list[str]:
        """The names of the sweeps that have points here."""
        known = {file.stem for file in manifests(self.folder)}
        return sorted(known | {record["sweep"] for record in self._records().values() if record.get("sweep")})

    def _counts(self, status: Status, planned: dict[str, str]) -> bool:
        if self.names is not None:
            return status.name in self.names
        return self.sweep is None or status.name in planned or status.sweep == self.sweep

    def _planned(self) -> dict[str, str]:
        """The sweep of every planned point."""
        files = [file for file in manifests(self.folder) if self.sweep in (None, file.stem)]
        lists = ((file.stem, self._json(file)) for file in files)
        return {point["name"]: sweep for sweep, found in lists for point in (found or {}).get("points", ())}

    def _records(self) -> dict[str, dict]:
        found = ((file, self._json(file)) for file in self._files("record.json"))
        return {file.parent.name: record for file, record in found if record is not None}

    def _files(self, name: str) -> Iterator[Path]:
        return iter(sorted(self.folder.glob(f"points/*/{name}")))

    def _json(self, path: Path) -> dict | None:
        """A sealed file; None, and once a warning that names it, if it is damaged."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        signature = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if self._read.get(path, (None,))[0] != signature:
            found = read_sealed(path)
            if found is not None and path.name == "record.json":
                found = _slim(checked(found, path)) | {"ended": stat.st_mtime}
            self._read[path] = (signature, found)
        return self._read[path][1]

    def _status(self, name: str, planned: dict[str, str], record: dict | None) -> Status:
        """A process at work outranks a record, and what a killed one left a failed record that is older."""
        sweep = planned.get(name)
        beat = read_heartbeat(self.folder / "points" / name / PROGRESS)
        if beat and is_alive(beat):
            return _begun(name, sweep, beat)
        if beat and (record is None or (record["status"] != "done" and record["ended"] < beat["started"])):
            return replace(_begun(name, sweep, beat), state="interrupted", stage_left=None)
        if record is None:  # there is none, or a damaged one
            return Status(name, sweep, "waiting", beside=bool(planned) and sweep is None)
        return _ended(name, sweep, record)

    def _front(self, records: dict[str, dict]) -> frozenset[str]:
        """The names of the points on the Pareto front."""
        found = list(records.values())
        if self._best[0] != found:
            try:
                table = frontier_table(found) if found else None
            except RecordError:  # there is no metric
                table = None
            names = frozenset() if table is None else frozenset(table.loc[table["pareto"], "name"])
            self._best = (found, names)
        return self._best[1]


def _slim(record: dict) -> dict:
    """A record without what takes room: samples, matrices, its environment and a traceback."""
    kept = ("value", "stderr", "higher_is_better")
    metrics = {name: {key: m.get(key) for key in kept} for name, m in (record["metrics"] or {}).items()}
    return record | {"metrics": metrics, "matrices": [], "config": None, "environment": None}


def _begun(name: str, sweep: str | None, beat: dict) -> Status:
    done, total = beat.get("done"), beat.get("total")
    share = done / total if done and total else None
    spent = beat["updated"] - beat.get("stage_started", beat["updated"])
    left = spent * (1 - share) / share if share else None
    facts = {"stage": beat["stage"], "share": share, "stage_left": left, "seconds": beat["updated"] - beat["started"]}
    beside = sweep is None and beat.get("uncompressed", False)
    return Status(name, sweep or beat.get("sweep"), "running", beside=beside, **facts)


def _ended(name: str, sweep: str | None, record: dict) -> Status:
    metric = headline(sorted(record["metrics"])) if record["metrics"] else None
    facts = {
        "reason": failure(record),
        "stored_bits": (record["bits"] or {}).get("stored"),
        "metric": metric,
        "value": metric and record["metrics"][metric]["value"],
        "seconds": sum((record.get("timings_s") or {}).values()),
        "beside": sweep is None and record["point"].get("method") == "none",
        "ended": record["ended"],
    }
    return Status(name, sweep or record.get("sweep"), "done" if record["status"] == "done" else "failed", **facts)


def _seconds_left(points: Iterable[Status]) -> float | None:
    """What is left at the mean pace of the finished points, by as many processes as are at work now."""
    by_state = {state: [p for p in points if p.state == state] for state in STATES}
    finished = [p.seconds for p in by_state["done"] if p.seconds and not p.beside]
    running, todo = by_state["running"], by_state["waiting"] + by_state["interrupted"]
    if not (running or todo):
        return None
    if not finished:
        return None
    mean = sum(finished) / len(finished)
    rest = sum(max(mean - p.seconds, p.stage_left or 0.0) for p in running) + mean * len(todo)
    return rest / max(1, len(running))
