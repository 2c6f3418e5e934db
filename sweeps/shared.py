"""What the points of a sweep share of the fit itself: factorised moments and the leading subspaces of W C.

Both depend on the calibration, the seed, the damping and the transform, not on ranks and bits. They lie in the cache,
two files a block; whoever needs one that is not there makes it. Only fits to the original model's inputs share: behind
a compressed prefix every point has moments of its own.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from caldera import Basis, prepare
from caldera.basis import Factorised
from caldera.files import committed
from caldera.lowrank import Subspace
from caldera.problem import Problem

VERSION = 1  # counts up when the same settings give other factors or subspaces


@dataclass(frozen=True)
class Shared:
    """A folder of the cache; None: nothing is kept."""

    folder: Path | None = None

    @contextmanager
    def block(self, index: int) -> Iterator["SharedBlock"]:
        """What is known of a block; what it found is kept when the work on the block ends well."""
        found = SharedBlock(self.folder, index)
        yield found
        found.commit()


@dataclass
class SharedBlock:
    """Factors and subspaces of one block. `reused` and `made` count them by kind."""

    folder: Path | None
    index: int
    reused: Counter = field(default_factory=Counter)
    made: Counter = field(default_factory=Counter)
    _files: dict[str, "_File"] = field(default_factory=dict)
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
        file = self._file("factors")
        stored = file.entries.get(name)
        if stored:
            facts = file.facts[name]
            known = Factorised(stored["chol"].to(moments.device), facts["sigma"], facts["jitters"])
            self.reused["factorisations"] += 1
            return prepare(moments, name=name, **options, known=known)
        basis = prepare(moments, name=name, **options)
        self.made["factorisations"] += 1
        file.put(name, {"chol": basis.chol}, {"sigma": basis.sigma, "jitters": basis.jitters})
        return basis

    def problem(self, weight: Tensor, basis: Basis, name: str, rank: int) -> Problem:
        """`Problem.of(weight, basis, name)` with the subspace for that rank (0: none), perhaps from the cache."""
        problem = Problem.of(weight, basis, name)
        if rank == 0:
            return problem
        file = self._file(f"subspaces-{problem.dimensions(rank)}")
        stored = file.entries.get(name)
        if stored:
            problem.give(Subspace(*(stored[key].to(weight.device) for key in "usv")))
            self.reused["subspaces"] += 1
        else:
            file.put(name, problem.subspace(rank)._asdict(), {})
            self.made["subspaces"] += 1
        return problem

    def commit(self) -> None:
        for file in self._files.values():
            file.commit()

    def _file(self, kind: str) -> "_File":
        if kind not in self._files:
            self._files[kind] = _File.read(self.folder and self.folder / f"{kind}-{self.index:05d}.safetensors")
        return self._files[kind]


@dataclass
class _File:
    """Named sets of tensors, and a JSON object about each."""

    path: Path | None
    entries: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    facts: dict[str, dict] = field(default_factory=dict)
    changed: bool = False

    @classmethod
    def read(cls, path: Path | None) -> "_File":
        """The file's content; nothing when it is not there or unreadable, so that it is made anew."""
        file = cls(path)
        if path is None or not path.is_file():
            return file
        try:
            with safe_open(path, "pt") as opened:
                facts = json.loads(opened.metadata()["facts"])
                for key in opened.keys():  # noqa: SIM118 (no mapping)
                    name, _, part = key.rpartition("/")
                    file.entries.setdefault(name, {})[part] = opened.get_tensor(key)
            file.facts = facts
        except (SafetensorError, KeyError, ValueError, OSError):
            file.entries = {}
        return file

    def put(self, name: str, tensors: dict[str, Tensor], facts: dict) -> None:
        """Add what was found, if it is to be kept."""
        if self.path:
            self.entries[name] = {key: t.cpu() for key, t in tensors.items()}  # a GPU's memory is for what is computed
            self.facts[name], self.changed = facts, True

    def commit(self) -> None:
        """Write the file if something was added."""
        if self.changed:
            tensors = {f"{n}/{k}": t.contiguous() for n, entry in self.entries.items() for k, t in entry.items()}
            with committed(self.path) as part:
                save_file(tensors, part, {"facts": json.dumps(self.facts)})
