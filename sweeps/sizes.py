"""How large what a point makes will be: the settings that its size depends on, and the bytes of each thing it keeps."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from caldera.method import Method
from caldera.packed import MatrixSpec
from sweeps import costs
from sweeps.budget import Budget, Table, guessed_table, method_of_matrix
from sweeps.outline import Group, Outline
from sweeps.point import Point

ALL_TOKENS = 340_000  # of a text of which all is asked for: WikiText-2's test split has about so many


@dataclass(frozen=True)
class Sizes:
    """All that a prediction depends on: a point's settings without its files."""

    model: Outline
    names: tuple[str, ...]  # of the matrices that are compressed
    method: Method | None
    corrected: bool
    calibration: tuple[int, int]  # rows, length
    evaluation: tuple[int, int]
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    batch: int = 8
    itemsize: int = 2
    workers: int = 1
    spill: float = 256 * 2**20
    keep: bool = True
    table: Table = field(default_factory=dict)  # of matrices that differ from the method
    budget: Budget | None = None  # if it is one that allocates
    noise_floor: bool = False  # the uncompressed model is evaluated in float32 too

    @classmethod
    def of(cls, point: Point, model: Outline) -> "Sizes":
        c, e, compute = (point.config[key] for key in ("calibration", "evaluation", "compute"))
        return cls(
            model, tuple(point.inventory), point.method, point.correction is not None,
            (c["sequences"], c["length"]), (e["rows"] or ALL_TOKENS // e["length"], e["length"]),
            tuple(e["tasks"]), e["limit"], e["batch_size"],
            4 if point.dtype == "float32" else 2, point.workers.count if point.method else 1,
            compute["spill_mb"] * 2**20, point.config["checkpoint"]["keep"] != "none",
            guessed_table(point.budget, point.scale) if point.allocated else point.table,
            point.budget if point.allocated else None, e["noise_floor"],
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.calibration[0] * self.calibration[1]

    @property
    def stream(self) -> float:
        """Bytes of the hidden states of all calibration rows."""
        return float(self.tokens * self.model.hidden * self.itemsize)

    def method_of(self, name: str) -> Method:
        return method_of_matrix(name, self.method, self.table)

    def jobs(self) -> Counter[tuple[tuple[int, int], Method]]:
        """How many matrices there are of every shape and method."""
        return Counter(zip(self.shapes(), map(self.method_of, self.names)))

    def specs(self) -> list[MatrixSpec]:
        return [self.method_of(name).spec(shape, name) for name, shape in zip(self.names, self.shapes())]

    def shapes(self) -> Iterable[tuple[int, int]]:
        return (tuple(self.model.matrices[name]) for name in self.names)

    def all_groups(self) -> list[Group]:
        return self.model.groups(self.model.matrices)

    def fitted_groups(self) -> list[Group]:
        return self.model.groups(self.names)


def stored_bytes(sizes: Sizes) -> int:
    """Of the packed matrices, exactly."""
    return sum(spec.stored_bytes for spec in sizes.specs())


def rest_bytes(sizes: Sizes) -> float:
    """Of the checkpoint's tensors that are not packed."""
    return float((sizes.model.parameters - sum(map(math.prod, sizes.shapes()))) * sizes.itemsize)


def moments_bytes(sizes: Sizes) -> float:
    """Of the second moments in the cache."""
    return 4.0 * sum(group.width**2 for group in sizes.all_groups())


def hidden_bytes(sizes: Sizes) -> float:
    """Of the hidden states in the cache, which only `corrected` wants."""
    return sizes.model.blocks * sizes.stream * sizes.corrected


def factors_bytes(sizes: Sizes) -> float:
    """Of the Cholesky factors that points share."""
    return 0.0 if sizes.corrected else 4.0 * sum(group.width**2 for group in sizes.fitted_groups())


def subspaces_bytes(sizes: Sizes) -> float:
    """Of the leading subspaces that points share."""
    if sizes.corrected:
        return 0.0
    ranked = [(method.rank, *shape, count) for (shape, method), count in sizes.jobs().items() if method.rank]
    return 4.0 * sum(costs.dimensions(k, m, n) * (m + n + 1) * count for k, m, n, count in ranked)


def bits(sizes: Sizes) -> tuple[float, float, float]:
    """Stored, model and nominal bits a parameter."""
    if sizes.method is None:
        return (8.0 * sizes.itemsize,) * 3
    parameters, stored = sum(map(math.prod, sizes.shapes())), stored_bytes(sizes)
    nominal = sum(spec.nominal_bits * spec.parameters for spec in sizes.specs()) / parameters
    return 8 * stored / parameters, 8 * (stored + rest_bytes(sizes)) / sizes.model.parameters, nominal
