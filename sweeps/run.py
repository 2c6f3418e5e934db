"""`caldera-run`: a Hydra application whose task is one point. Configuration errors are one sentence and exit code 1."""

import os
import sys
import time

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach main(), which words them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from caldera.errors import CalderaError
from sweeps.schema import register

register()


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def app(cfg: DictConfig) -> None:
    """One point. In a multirun a failed point is recorded and the next one follows."""
    from pathlib import Path

    from sweeps.callback import show
    from sweeps.pipeline import finished, run_point
    from sweeps.plan import resolve
    from sweeps.progress import SWEEP, Reporter

    single = HydraConfig.get().mode == RunMode.RUN
    point = resolve(cfg)
    if point.config["compute"]["threads"]:
        import torch

        torch.set_num_threads(point.config["compute"]["threads"])
    reporter, start = Reporter(point.name), time.perf_counter()
    if finished(point, point.name):
        reporter.say(f"{point.name}: done before")
    else:
        SWEEP.begun += 1
        reporter.say(SWEEP.heading(point.name))
    try:
        run_point(point, reporter)
    except Exception as error:
        if single:
            raise
        reporter.say(f"  failed: {error}")
    SWEEP.seconds.append(time.perf_counter() - start)
    if single:
        show(Path(point.config["results"]))


def sentence(error: Exception) -> str:
    """An error in one line; Hydra's and OmegaConf's messages are cut to what the user can act on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keep = [line for line in lines if not line.startswith(("To append", "full_key", "object_type", "reference_type"))]
    keys = [line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")]
    text = " ".join(dict.fromkeys(keep))
    return f"{keys[0]}: {text}" if keys and keys[0] not in text else text


def main() -> None:
    """Console script."""
    try:
        app()
    except (CalderaError, HydraException, OmegaConfBaseException, PermissionError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, CalderaError) else error
        print(f"caldera-run: {sentence(cause)}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
