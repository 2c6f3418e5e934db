"""One matrix to decompose, seen in its basis: what neither ranks nor bits change, so that points may share it."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from caldera.basis import Basis
from caldera.linalg import energy, power_of_4
from caldera.lowrank import Subspace, top_subspace

LEAST = 64


def generator_of(seed: int, name: str) -> torch.Generator:
    """The stream of random numbers of that name: order and parallelism change nothing."""
    digest = hashlib.shake_256(f"{seed}/{name}".encode()).digest(8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass
class Problem:
    """`weight` = W~ / unit (m, n), where `unit` is a power of 4 near the largest |w|; `name` is the matrix'."""

    name: str
    basis: Basis
    weight: Tensor
    unit: float
    _found: dict[int, Subspace] = field(default_factory=dict)

    @classmethod
    def of(cls, weight: Tensor, basis: Basis, name: str) -> "Problem":
        """The problem of W (m, n), finite."""
        unit = power_of_4(weight)
        return cls(name, basis, basis.forward(weight.float() / unit, name), unit)

    @cached_property
    def energy(self) -> float:
        """tr(W~ H~ W~^T) / unit^2, the loss of storing nothing."""
        return energy(self.weight, self.basis.moments)

    @cached_property
    def image(self) -> Tensor:
        """W~ C / unit (m, n), where H~ + sigma I = C C^T."""
        return self.weight @ self.basis.chol

    def dimensions(self, rank: int) -> int:
        """How many dimensions are looked for to serve a rank: the same for many ranks, or none could share them."""
        return min(max(LEAST, 1 << (rank - 1).bit_length()), *self.weight.shape)

    def subspace(self, rank: int) -> Subspace:
        """The largest singular values of the image, at least `rank` of them; their sketch depends on nothing else."""
        k = self.dimensions(rank)
        if k not in self._found:
            found = top_subspace(self.image, k, generator_of(self.basis.seed, f"{self.name}/subspace/{k}"))
            # as it comes back from a file: a product's last bits depend on how its factors lie in memory
            self._found[k] = Subspace(*(x.contiguous() for x in found))
        return self._found[k]

    def give(self, subspace: Subspace) -> None:
        """Take a subspace that was found before."""
        self._found[len(subspace.s)] = subspace
