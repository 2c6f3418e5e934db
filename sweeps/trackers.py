"""Copies of a record for dashboards. The record on disk is the truth: no tracker can cost a point."""

import logging
from collections.abc import Callable
from pathlib import Path

from caldera.errors import UserError

logger = logging.getLogger("caldera.sweeps")

RUN_ID = 16  # digits of a point's key


def wandb_tracker(record: dict, config: dict, folder: Path) -> None:
    """A W&B run a point, in its sweep's group: axes flat in the config, the rest as `sweeps.mirror` shows it.

    The run is named by the point's key and not resumed: a copy made later takes the place of the earlier one.
    """
    import wandb

    from sweeps.mirror import show

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=20)
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        dir=folder, project=config["project"], entity=config["entity"], mode=config["mode"], settings=settings,
        name=record["name"], id=record["key"][:RUN_ID], group=record["sweep"], job_type=record["point"]["method"],
        config=record["point"] | {"full": record["config"]}, reinit="finish_previous",
    )  # fmt: skip
    with run:
        show(run, record, folder, config["artifact"])
        run.finish(exit_code=int(record["status"] != "done"))


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
