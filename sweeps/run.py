"""`caldera-run`: a Hydra application whose task is one point. Configuration errors are one sentence and exit code 1."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach main(), which words them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not take cores from those that work

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from caldera.errors import CalderaError
from sweeps.schema import register
from sweeps.wording import refuse, sentence

register()


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def app(cfg: DictConfig) -> tuple[float, ...] | None:
    """One point; in a multirun, its costs. There a failed point is recorded, has none, and the next one follows."""
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        return _run(cfg, single)
    except Exception as error:  # whatever it is, the other points of a multirun go on
        if single and isinstance(error, CalderaError):
            refuse([sentence(error)])
        if single:
            raise
        print(f"  failed: {sentence(error)}", file=sys.stderr, flush=True)
    return None


def _run(cfg: DictConfig, single: bool) -> tuple[float, ...] | None:
    if cfg.plan and not single:
        return None  # the callback has said all
    from sweeps.callback import show
    from sweeps.pipeline import check_inputs, finished, run_point
    from sweeps.plan import resolve
    from sweeps.progress import SWEEP, Reporter
    from sweeps.search.objectives import costs

    point = resolve(cfg)
    if point.config["plan"]:
        from sweeps.preview import show_plan

        show_plan([point])
        return None
    if point.config["compute"]["threads"]:
        import torch

        torch.set_num_threads(point.config["compute"]["threads"])
    reporter = Reporter(point.name)
    if record := finished(point):
        reporter.say(f"{point.name}: done before")
    else:
        if single:  # the whole grid of a multirun was checked before its first point
            check_inputs(point)
        with SWEEP.point() as heading:
            reporter.say(heading(point.name))
            record = run_point(point, reporter)
    if single:
        show(Path(point.config["results"]))
        return None
    return costs(record, point.config["search"]["objectives"])


def main() -> None:
    """Console script. Interrupted or asked to end, it leaves what is finished, and says how to go on."""
    signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except KeyboardInterrupt:
        print("caldera-run: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except (CalderaError, HydraException, OmegaConfBaseException) as error:
        refuse([sentence(error)])
    except OSError as error:  # Hydra makes the results folder before any code of ours runs
        refuse([f"{error.filename} cannot be written to ({error.strerror}): choose another folder by results=..."])


def _end(*_: object) -> None:
    """Let everything that is open be closed."""
    raise SystemExit(143)


if __name__ == "__main__":
    main()
