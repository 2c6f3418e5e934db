"""Runs of a Weights & Biases project as records: what `sweeps.trackers` wrote there, read back through W&B's API.

A run has a point's axes and settings, metrics, bits, seconds and memory. What only the record on disk has (samples,
matrices, environment) is empty: figures that need it say so.
"""

import re
from collections.abc import Iterable
from typing import Protocol

from analysis.records import RecordError

PREFIX = "wandb:"
PATTERN = re.compile(r"(?P<project>[^/]+/[^/]+)(?:/(?P<sweep>.+))?")
FALLS = ("perplexity/", "kl/")  # metrics of which less is better; a summary does not say
OWN = ("status", "bits/", "seconds/", "noise_floor/")


class Run(Protocol):
    """What is read of a run of `wandb.Api().runs(...)`."""

    name: str
    config: dict
    summary_metrics: dict


def load_runs(source: str) -> list[dict]:
    """Records of the runs of `wandb:ENTITY/PROJECT`, or of one sweep there, `wandb:ENTITY/PROJECT/SWEEP`.

    Raises RecordError: no such form, W&B cannot be reached, or nothing there is a point of a sweep.
    """
    found = PATTERN.fullmatch(source.removeprefix(PREFIX))
    if not found:
        raise RecordError(f"{source} is no W&B project: write wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/SWEEP.")
    import wandb

    try:
        filters = {"group": found["sweep"]} if found["sweep"] else {}
        records = records_of(wandb.Api(timeout=20).runs(found["project"], filters=filters))
    except (wandb.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RecordError(f"{source} cannot be read ({reason}): check the name and `wandb login`.") from error
    if not records:
        raise RecordError(f"{source} holds no finished point: run a sweep with tracker.mode=online.")
    return records


def records_of(runs: Iterable[Run]) -> list[dict]:
    """A record for each run that has a point's status, sorted by name."""
    found = [_record(run) for run in runs if "status" in run.summary_metrics]
    return sorted(found, key=lambda record: record["name"])


def _record(run: Run) -> dict:
    summary = run.summary_metrics
    axes = {key: value for key, value in run.config.items() if key != "full" and not key.startswith("_")}
    return {
        "schema_version": 2,
        "status": summary["status"],
        "name": run.name,
        "config": run.config.get("full") or {},
        "point": axes,
        "bits": _below("bits/", summary) or None,
        "metrics": _metrics(summary),
        "noise_floor": _below("noise_floor/", summary) or None,
        "matrices": [],
        "timings_s": _below("seconds/", summary),
        "memory": {key: value for key, value in summary.items() if key.endswith("_bytes") and "/" not in key},
        "environment": {},
        "error": None,
    }


def _below(prefix: str, summary: dict) -> dict:
    return {key.removeprefix(prefix): value for key, value in summary.items() if key.startswith(prefix)}


def _metrics(summary: dict) -> dict:
    names = [key for key in summary if "/" in key and not key.startswith(OWN) and not key.endswith("_stderr")]
    return {name: _metric(name, summary) for name in names}


def _metric(name: str, summary: dict) -> dict:
    falls = name.startswith(FALLS) or name.endswith("/kl")
    return {"value": summary[name], "stderr": summary.get(f"{name}_stderr"), "higher_is_better": not falls}
