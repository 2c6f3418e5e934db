"""What the points of a sweep share of the fit itself: factorised moments and the leading subspaces of W C.

Both depend on the calibration, the seed, the damping and the transform, not on ranks and bits. They lie in the cache,
a noted file each; whoever needs one that is not there makes it, while others that need it wait. Only fits to the
original model's inputs share: behind a compressed prefix every point has moments of its own.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from torch import Tensor

from caldera import Basis, prepare
from caldera.basis import Factorised
from caldera.lowrank import Subspace
from caldera.problem import Problem
from sweeps.store import read_tensors_noted, write_tensors_noted

VERSION = 2  # counts up when the same settings give other factors or subspaces

Made = tuple[dict[str, Tensor], dict]  # tensors, and JSON-like facts about them


@dataclass(frozen=True)
class Shared:
    """A folder of the cache; None: nothing is kept."""

    folder: Path | None = None

    def block(self, index: int) -> "SharedBlock":
        """What is known of a block."""
        return SharedBlock(self.folder and self.folder / f"{index:05d}")


@dataclass
class SharedBlock:
    """Factors and subspaces of one block. `reused` and `made` count them by kind."""

    folder: Path | None
    reused: Counter = field(default_factory=Counter)
    made: Counter = field(default_factory=Counter)
    _last: tuple[str, Basis] | None = None

    def basis(self, moments: Tensor, name: str, options: dict) -> Basis:
        """`prepare(moments, name=name, **options)`, the factorisation perhaps from the cache.

        The last one is kept for the other matrices of its group; the cache has all.
        """
        if self._last is None or self._last[0] != name:
            self._last = None  # let go of it before the next takes its memory
            self._last = name, self._prepared(moments, name, options)
        return self._last[1]

    def _prepared(self, moments: Tensor, name: str, options: dict) -> Basis:
        fresh: list[Basis] = []

        def make() -> Made:
            basis = prepare(moments, name=name, **options)
            fresh.append(basis)
            return {"chol": basis.chol}, {"sigma": basis.sigma, "jitters": basis.jitters}

        tensors, facts = self._once("factorisations", f"factors-{name}", make)
        if fresh:
            return fresh[0]
        known = Factorised(tensors["chol"].to(moments.device), facts["sigma"], facts["jitters"])
        return prepare(moments, name=name, **options, known=known)

    def problem(self, weight: Tensor, basis: Basis, name: str, rank: int) -> Problem:
        """`Problem.of(weight, basis, name)` with the subspace for that rank (0: none), perhaps from the cache."""
        problem = Problem.of(weight, basis, name)
        if rank:
            file = f"subspaces-{problem.dimensions(rank)}-{name}"
            tensors, _ = self._once("subspaces", file, lambda: (problem.subspace(rank)._asdict(), {}))
            problem.give(Subspace(*(tensors[key].to(weight.device) for key in "usv")))
        return problem

    def _once(self, kind: str, name: str, make: Callable[[], Made]) -> Made:
        """What the file of that name holds; made, by one process, unless it is there."""
        if self.folder is None:
            self.made[kind] += 1
            return make()
        path = self.folder / f"{name}.safetensors"
        if (found := read_tensors_noted(path)) is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.folder}.lock"):
                if (found := read_tensors_noted(path)) is None:
                    self.made[kind] += 1
                    made = make()
                    write_tensors_noted(path, *made)
                    return made
        self.reused[kind] += 1
        return found
