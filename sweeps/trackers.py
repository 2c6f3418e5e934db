"""Copies of a record for dashboards. The record on disk is the truth: no tracker can cost a point."""

import logging
from collections.abc import Callable
from pathlib import Path

from caldera.errors import UserError

logger = logging.getLogger("caldera.sweeps")


def flat_summary(record: dict) -> dict:
    """The numbers of a record by name: metrics and their standard errors, bits, seconds, memory."""
    metrics = {name: m["value"] for name, m in record["metrics"].items()}
    errors = {f"{name}_stderr": m["stderr"] for name, m in record["metrics"].items() if m["stderr"] is not None}
    bits = {f"bits/{k}": v for k, v in (record["bits"] or {}).items()}
    seconds = {f"seconds/{stage}": s for stage, s in record["timings_s"].items()}
    return metrics | errors | bits | seconds | {"status": record["status"], **record["memory"]}


def wandb_tracker(record: dict, config: dict, folder: Path) -> None:
    """A W&B run a point, in its sweep's group: axes flat in the config, numbers in the summary, a table of matrices."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=20)
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        dir=folder, project=config["project"], entity=config["entity"], mode=config["mode"], settings=settings,
        name=record["name"], id=record["key"][:16], group=record["sweep"], job_type=record["point"]["method"],
        config=record["point"] | {"full": record["config"]}, resume="allow", reinit="finish_previous",
    )  # fmt: skip
    with run:
        run.define_metric("*", summary="none")
        if record["matrices"]:
            columns = ["name", "rank", "q", "stored_bits", "relative_error", "seconds"]
            rows = [[m[c] for c in columns] for m in record["matrices"]]
            run.log({"matrices": wandb.Table(columns=columns, data=rows)})
        run.summary.update(flat_summary(record))


TRACKERS: dict[str, Callable[[dict, dict, Path], None]] = {"wandb": wandb_tracker, "none": lambda *_: None}


def check_tracker(config: dict) -> None:
    """Raises UserError for a tracker or a mode that does not exist."""
    for field, known in (("name", tuple(TRACKERS)), ("mode", ("offline", "online", "disabled"))):
        if config[field] not in known:
            raise UserError(f"tracker.{field}={config[field]!r} must be one of {', '.join(known)}")


def track(record: dict, config: dict, folder: Path) -> None:
    """Hand the record to the tracker that `config["name"]` names; a failure there is a line in the log."""
    try:
        TRACKERS[config["name"]](record, config, folder)
    except Exception as error:  # an outage, a missing key, a full disk: none is worth a point
        logger.warning("tracker %s failed (%s: %s); the record is kept", config["name"], type(error).__name__, error)
