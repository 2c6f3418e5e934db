"""The points of a multirun, composed as Hydra's sweeper will compose them, before its first job."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf


def expand(config: DictConfig) -> list[DictConfig]:
    """One composed configuration a job, in the order of the jobs; of a search, one for every value that it may take."""
    return [composed(config, job) for job in _jobs(config)]


def is_search(config: DictConfig) -> bool:
    """Whether points are suggested one after the other, so that there is no grid."""
    return config.hydra.sweeper._target_.endswith(".OptunaSweeper")


def parsed(config: DictConfig) -> list[Override]:
    """The sweeper's own lines, then those of the command line, which win."""
    own = _lines(config.hydra.sweeper.get("params"))
    return _parser().parse_overrides(own + list(config.hydra.overrides.task))


def jobs_of(grids: DictConfig | None, overrides: list[Override]) -> list[list[str]]:
    """The overrides of every job: of each grid in turn, or where there are none of the only one."""
    return [
        job
        for grid in (grids or {"": None}).values()
        for batch in BasicSweeper.split_arguments(_parser().parse_overrides(_lines(grid)) + overrides, None)
        for job in batch
    ]


def _parser() -> OverridesParser:
    return OverridesParser.create(GlobalHydra.instance().config_loader())


def _lines(params: DictConfig | None) -> list[str]:
    return [f"{key}={value}" for key, value in (params or {}).items()]


def composed(config: DictConfig, job: list[str]) -> DictConfig:
    """The configuration of the multirun with a job's overrides, without Hydra's own part."""
    found = GlobalHydra.instance().config_loader().load_sweep_config(config, list(job))
    OmegaConf.set_struct(found, False)
    found.pop("hydra", None)
    return found


def _jobs(config: DictConfig) -> list[list[str]]:
    overrides = parsed(config)
    if is_search(config):
        from sweeps.search.space import Space

        return Space.of(overrides).probes()
    return jobs_of(config.hydra.sweeper.get("grids"), overrides)
