"""The whole grid of a multirun, expanded as Hydra's sweeper will expand it, before its first job."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf


def expand(config: DictConfig) -> list[DictConfig]:
    """One composed configuration a job, in the order of the jobs."""
    loader = GlobalHydra.instance().config_loader()
    params = config.hydra.sweeper.get("params") or {}
    lines = [f"{key}={value}" for key, value in OmegaConf.to_container(params).items()] if params else []
    overrides = OverridesParser.create(loader).parse_overrides(lines + list(config.hydra.overrides.task))
    jobs = [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
    return [composed(loader, config, job) for job in jobs]


def composed(loader: ConfigLoader, config: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of one job, as its task gets it."""
    job = loader.load_sweep_config(config, list(overrides))
    OmegaConf.set_struct(job, False)
    job.pop("hydra", None)
    return job
