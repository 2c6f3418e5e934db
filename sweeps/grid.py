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
    params = config.hydra.sweeper.get("params") or {}
    lines = [f"{key}={value}" for key, value in OmegaConf.to_container(params).items()] if params else []
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return parser.parse_overrides(lines + list(config.hydra.overrides.task))


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
    return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
