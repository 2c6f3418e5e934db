"""`caldera-run`: a Hydra application whose task is one point. Configuration errors are one sentence and exit code 1."""

import os
import sys

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
from sweeps.ending import heeded, honour
from sweeps.schema import register
from sweeps.wording import refuse, sentence

register()


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def app(cfg: DictConfig) -> tuple[float, ...] | None:
    """One point; in a multirun, its costs. There a failed point is recorded, has none, and the next one follows."""
    honour()
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        return _run(cfg, single)
    except Exception as error:  # whatever it is, the other points of a multirun go on
        honour()
        if single and isinstance(error, CalderaError):
            refuse([sentence(error)])
        if single:
            raise
        from sweeps.progress import complain

        complain(f"  failed: {sentence(error)}")
    return None


def _run(cfg: DictConfig, single: bool) -> tuple[float, ...] | None:
    if cfg.plan and not single:
        return None  # the callback has said all
    if cfg.retry is not None:
        from sweeps.retry import retry

        retry(cfg, list(HydraConfig.get().overrides.task))
        return None
    from sweeps.job import show, work
    from sweeps.manifest import remember
    from sweeps.plan import resolve
    from sweeps.search.objectives import costs

    point = resolve(cfg)
    if point.config["plan"]:
        from sweeps.preview import show_plan

        show_plan([point])
        return None
    remember([point])
    record = work(point, check=single)  # the whole grid of a multirun was checked before its first point
    if single:
        show(point.results)
        return None
    return costs(record, point.config["search"]["objectives"])


def main() -> None:
    """Console script. Interrupted or asked to end, it leaves what is finished, and says how to go on."""
    try:
        with heeded():
            app()
    except KeyboardInterrupt:
        print("caldera-run: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except (CalderaError, HydraException, OmegaConfBaseException) as error:
        refuse([sentence(error)])
    except OSError as error:  # Hydra makes the results folder before any code of ours runs
        refuse([f"{error.filename} cannot be written to ({error.strerror}): choose another folder by results=..."])


if __name__ == "__main__":
    main()
