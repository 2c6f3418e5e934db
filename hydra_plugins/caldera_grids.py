"""`hydra/sweeper=grids`: several grids one after the other, where one would be too many points. See `sweeps.grid`."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from sweeps.grid import jobs_of


class Grids(BasicSweeper):
    """`grids`: by any name, what `params` is of Hydra's own sweeper. The command line wins over every one of them."""

    def __init__(self, grids: DictConfig, params: DictConfig | None, max_batch_size: int | None = None) -> None:
        super().__init__(max_batch_size, params or {})
        self.grids = grids

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        jobs = jobs_of(self.grids, overrides)
        size = max_batch_size or len(jobs)
        return [jobs[first : first + size] for first in range(0, len(jobs), size)]
