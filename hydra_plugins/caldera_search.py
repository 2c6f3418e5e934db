"""`hydra/sweeper=optuna`. Hydra takes plug-ins from modules of this namespace alone; the search is `sweeps.search`."""

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Sends the points that a search suggests through any launcher. `params` are Hydra's, ranges and choices."""

    def __init__(self, params: DictConfig | None) -> None:
        self.params = params  # read where the whole multirun is parsed, in `sweeps.grid`

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from sweeps.search.sweep import search  # Hydra imports this module at every start

        search(self.config, self.context, self.launcher)
