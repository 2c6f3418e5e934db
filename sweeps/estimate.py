"""What a point will take, stage by stage: operations, seconds, memory, disk. From shapes, rates and what is cached.

Between counted and real time stand the factors of SLACK, memory beside the tensors is BASE; all were found on points of
SmolLM2-135M (docs/scaling.md says which, and how far off the predictions were).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from sweeps import costs
from sweeps.costs import Work
from sweeps.machine import Machine
from sweeps.sizes import (
    Sizes,
    bits,
    factors_bytes,
    hidden_bytes,
    moments_bytes,
    rest_bytes,
    stored_bytes,
    subspaces_bytes,
)

STAGES = ("baseline", "calibrate", "allocate", "compress", "load", "perplexity", "tasks")
# documents, requests a document, mean and largest number of tokens of a request, with SmolLM2's tokenizer
TASKS = {
    "arc_challenge": (299, 4, 37, 131), "arc_easy": (570, 4, 32, 105), "boolq": (3270, 2, 146, 1292),
    "hellaswag": (10042, 4, 79, 155), "openbookqa": (500, 4, 15, 65), "piqa": (1838, 2, 36, 242),
    "rte": (277, 2, 80, 278), "sciq": (1000, 4, 107, 571), "winogrande": (1267, 2, 23, 39),
}  # fmt: skip
UNKNOWN_TASK = (1000, 4, 100, 500)  # assumed of any other
# real seconds of each kind of work over those at the machine's rate; `steps`: seconds for a row, a request or a matrix
SLACK = {
    "calibrate": {"model": 2.0, "mixed": 1.3, "moved": 1.5, "disk": 1.0, "steps": 0.002},
    "compress": {"model": 1.6, "mixed": 1.3, "single": 1.7, "solves": 2.0, "alone": 1.5, "moved": 1.5, "search": 1.1,
                 "steps": 0.005},
    "load": {"moved": 1.5, "steps": 0.0},
    "perplexity": {"model": 1.8, "single": 1.3, "moved": 1.5, "steps": 0.002},
    "tasks": {"model": 1.3, "single": 1.3, "moved": 1.5, "steps": 0.003},
}  # fmt: skip
STARTED = {"workers": 4.0, "load": 0.4, "tasks": 0.4, "compress": 2.0}  # seconds that pass whatever the shapes are
FURTHER = 0.6  # of what the first thread of a process does, what each further one does: not all work is shared out
BASE = 950e6  # bytes of a process with its libraries
WORKER_BASE = 560e6  # of one that only compresses
FILES = 6e6  # bytes of a checkpoint's tokenizer and configuration


@dataclass(frozen=True)
class Stage:
    """`seconds` by what limits them; `memory` at its peak and `disk` that stays, in bytes."""

    work: Work = field(default_factory=Work)
    limits: dict[str, float] = field(default_factory=dict)
    memory: float = 0.0
    disk: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.limits.values())


@dataclass(frozen=True)
class Estimate:
    """Stages by name; those that cost nothing, as the cache has what they make, are left out."""

    stages: dict[str, Stage]
    stored_bits: float | None = None
    model_bits: float | None = None
    nominal_bits: float | None = None
    made: frozenset[str] = frozenset()  # what the cache has afterwards

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def memory(self) -> float:
        return max((stage.memory for stage in self.stages.values()), default=0.0)

    @property
    def disk(self) -> float:
        return sum(stage.disk for stage in self.stages.values())


def estimate(sizes: Sizes, machine: Machine, keys: dict[str, str] | None = None, held: Iterable[str] = ()) -> Estimate:
    """The stages that are left to do. `keys` names what each makes for others to use; `held` says which are there."""
    keys, held, stages = keys or {}, set(held), {}
    if keys.get("done") in held:
        return Estimate({}, *bits(sizes))
    if keys.get("baseline") not in held:
        exact = [replace(sizes, itemsize=4)] if sizes.noise_floor and sizes.itemsize < 4 else []
        parts = (_load_original, _perplexity, _tasks)
        stages["baseline"] = joined([part(own, machine) for own in [sizes, *exact] for part in parts])
    if sizes.method is not None:
        if keys.get("moments") not in held:
            stages["calibrate"] = _calibrate(sizes, machine)
        if sizes.budget and not {keys.get("curves"), keys.get("sensitivity")} <= held | {None}:
            stages["allocate"] = _allocate(sizes, machine)
        stages["compress"] = _compress(sizes, machine, keys.get("factors") in held, keys.get("subspaces") in held)
        stages["load"] = _load(sizes, machine)
        stages["perplexity"], stages["tasks"] = _perplexity(sizes, machine), _tasks(sizes, machine)
    return Estimate(stages, *bits(sizes), made=frozenset(keys.values()))


def joined(stages: list[Stage]) -> Stage:
    """Stages one after the other, as one."""
    limits: dict[str, float] = {}
    for stage in stages:
        for kind, seconds in stage.limits.items():
            limits[kind] = limits.get(kind, 0.0) + seconds
    memory, disk = max(stage.memory for stage in stages), sum(stage.disk for stage in stages)
    return Stage(costs.total(stage.work for stage in stages), limits, memory, disk)


def _stage(
    name: str, work: Work, machine: Machine, memory: float, disk: float = 0.0, fixed: float = 0.0, processes: int = 1
) -> Stage:
    threads = max(1, machine.threads // processes)
    slower = threads / (1 + FURTHER * (threads - 1))  # than rates that count all threads as equals
    limits = {kind: slower * seconds for kind, seconds in machine.seconds(work, SLACK[name]).items()}
    return Stage(work, limits | ({} if machine.kernel_s else {"start": fixed}), memory, disk)


# -------------------------------------------------------------------------------------------------------------- stages
def _calibrate(sizes: Sizes, machine: Machine) -> Stage:
    model, length = sizes.model, sizes.calibration[1]
    groups, disk = sizes.all_groups(), moments_bytes(sizes) + hidden_bytes(sizes)
    writers = sum(model.matrices[name][0] == model.hidden for name in model.matrices) / model.blocks
    probes = length * (2 + min(writers, 3))  # rows on which groups and residual writers are found
    work = costs.forward(model, sizes.tokens + probes, length, sizes.itemsize)
    work += costs.total(costs.second_moments(g.width, sizes.tokens * g.share) for g in groups)
    work += Work(moved=24.0 * sum(g.width**2 for g in groups), disk=disk + sizes.itemsize * model.in_blocks)
    work += Work(disk=2 * model.blocks * _spilled(sizes, sizes.stream))
    squares = 4.0 * sum(g.width**2 for g in groups) / model.blocks
    memory = BASE + _opened(sizes) + min(sizes.stream, sizes.spill) + 3 * squares + _activations(sizes)
    return _stage("calibrate", work, machine, memory, disk)


def _spilled(sizes: Sizes, size: float) -> float:
    """Bytes of rows that take so many together and do not stay in memory."""
    return size if size > sizes.spill else 0.0


def _opened(sizes: Sizes) -> float:
    """Bytes of a model that is read block by block: embeddings and a block."""
    return sizes.itemsize * (sizes.model.embedded + sizes.model.in_blocks / sizes.model.blocks)


def _activations(sizes: Sizes) -> float:
    """Bytes of one row on its way through a block."""
    sides = [m + n for m, n in sizes.model.matrices.values()]
    return 3.0 * sizes.calibration[1] * max(sides) * sizes.itemsize


def _compress(sizes: Sizes, machine: Machine, factors: bool, subspaces: bool) -> Stage:
    method, jobs, groups = sizes.method, sizes.jobs(), sizes.fitted_groups()
    work = costs.total(costs.basis(n, method) * count for n, count in Counter(g.width for g in groups).items())
    if factors and not sizes.corrected:
        work += Work(alone=-sum(g.width**3 / 3 for g in groups))
    if not subspaces or sizes.corrected:
        ranked = [
            (shape, costs.dimensions(own.rank, *shape), count) for (shape, own), count in jobs.items() if own.rank
        ]
        work += costs.total(costs.subspace(*shape, wide) * count for shape, wide, count in ranked)
    for part in (costs.decomposition, costs.measurement, costs.prediction):
        work += costs.total(part(*shape, own) * count for (shape, own), count in jobs.items())
    written = stored_bytes(sizes) + rest_bytes(sizes)
    shared = (0 if factors else factors_bytes(sizes)) + (0 if subspaces else subspaces_bytes(sizes))
    work += Work(disk=2 * written + shared + 4.0 * sizes.model.in_blocks)
    work = work + _prefix(sizes) if sizes.corrected else work
    kept = written + FILES if sizes.keep else 0.0
    fixed = STARTED["compress"] + STARTED["workers"] * (sizes.workers > 1)
    return _stage("compress", work, machine, _fitting_memory(sizes), kept + shared, fixed, sizes.workers)


def _allocate(sizes: Sizes, machine: Machine) -> Stage:
    """Predicted errors of a menu's choices, and gradients on a few rows."""
    budget, shapes = sizes.budget, Counter(sizes.shapes())
    widths = Counter(group.width for group in sizes.fitted_groups())
    work = costs.total(costs.basis(n, sizes.method) * count for n, count in widths.items())
    for (m, n), count in shapes.items():
        choices = budget.choices([m, n], budget.ranks)
        wide = costs.dimensions(max(choice.rank for choice in choices), m, n)
        known = costs.transforms(m, n) + costs.subspace(m, n, wide) + Work(single=2.0 * m * n**2)
        predicted = costs.total(costs.prediction(m, n, choice.applied(sizes.method)) for choice in choices)
        work += (known + predicted) * count
    if budget.sensitivity == "fisher":
        work += _gradients(sizes, budget.sensitivity_rows)
    return _stage("compress", work, machine, _fitting_memory(sizes) + _opened(sizes))


def _gradients(sizes: Sizes, rows: int) -> Work:
    """Rows forth, forth once more and back, which is twice as much; the sums of all matrices' g^T g."""
    model, length = sizes.model, sizes.calibration[1]
    passes = costs.forward(model, rows * length, length, sizes.itemsize, head=True) * 4
    return passes + Work(single=2.0 * rows * sum(m * n**2 for m, n in sizes.shapes()))


def _prefix(sizes: Sizes) -> Work:
    """The original's and the compressed model's rows through every block, side by side, and corrected targets."""
    model, (rows, length) = sizes.model, sizes.calibration
    chosen = {model.block_of(name) for name in sizes.names}
    busy = len(chosen) / model.blocks  # the other blocks are only gone through
    passes = sizes.tokens * (1 + busy) + 3 * length * busy  # and, on one row, the plan of each block's replay
    work = costs.forward(model, passes, length, sizes.itemsize) + Work(disk=4 * hidden_bytes(sizes) * busy)
    work += Work(disk=2 * model.blocks * _spilled(sizes, sizes.stream))
    for g in (g for g in sizes.all_groups() if g.share == 1 and model.block_of(g.name) in chosen):
        work += costs.corrected_moments(g.width, model.hidden, sizes.tokens, g.writes)
        work += costs.correction(g.width, model.hidden, g.writes) + Work(steps=2 * rows)
        # inputs of a group, of either model, are written, read for its moments and read by the next group's run
        work += Work(disk=2 * 3 * _spilled(sizes, float(sizes.tokens * g.width * sizes.itemsize)))
    return work + costs.total(
        costs.corrected_target(*shape) * count for shape, count in Counter(sizes.shapes()).items()
    )


def _fitting_memory(sizes: Sizes) -> float:
    """Matrices in float32 with their moments; behind a prefix also two blocks and what flows through them."""
    m, n = max(sizes.shapes(), key=math.prod)
    one = 4.0 * (10 * m * n + 8 * n**2)
    if not sizes.corrected:
        block = 4.0 * sizes.model.in_blocks / sizes.model.blocks
        shared = (factors_bytes(sizes) + moments_bytes(sizes)) / sizes.model.blocks
        if sizes.workers == 1:
            return BASE + one + block + shared
        return BASE + _opened(sizes) + sizes.workers * (WORKER_BASE + one + block + shared)
    widest = max(g.width for g in sizes.all_groups())
    flowing = 2 * min(sizes.tokens * widest * sizes.itemsize, sizes.spill) + 2 * min(sizes.stream, sizes.spill)
    return BASE + 2 * _opened(sizes) + one + 5 * 4.0 * widest**2 + flowing + moments_bytes(sizes) / sizes.model.blocks


def _load(sizes: Sizes, machine: Machine) -> Stage:
    """Matrices decoded, transformed back and cast."""
    decoded = costs.total(costs.transforms(*shape) * count for shape, count in Counter(sizes.shapes()).items())
    work = decoded + Work(moved=60.0 * sum(map(math.prod, sizes.shapes())), disk=stored_bytes(sizes))
    work += Work(disk=2 * rest_bytes(sizes))
    block = 4.0 * sizes.model.in_blocks / sizes.model.blocks
    return _stage("load", work, machine, BASE + _dense(sizes) + 4 * block, fixed=STARTED["load"])


def _load_original(sizes: Sizes, machine: Machine) -> Stage:
    work = Work(disk=4.0 * sizes.model.parameters, moved=6.0 * sizes.model.parameters)
    return _stage("load", work, machine, BASE + 1.3 * _dense(sizes), fixed=STARTED["load"])


def _dense(sizes: Sizes) -> float:
    """Bytes of the model as it is evaluated."""
    return float(sizes.itemsize * sizes.model.parameters)


def _perplexity(sizes: Sizes, machine: Machine) -> Stage:
    rows, length = sizes.evaluation
    work = costs.forward(sizes.model, rows * length, length, sizes.itemsize, head=True)
    logits = float(length * sizes.model.vocabulary * sizes.itemsize)
    return _stage("perplexity", work, machine, BASE + _dense(sizes) + 1.5 * logits)


def _tasks(sizes: Sizes, machine: Machine) -> Stage:
    """All requests of all tasks, each a row of its mean length; logits are kept in float32 too."""
    work, longest = Work(), 0
    for name in sizes.tasks:
        documents, requests, mean, most = TASKS.get(name, UNKNOWN_TASK)
        documents = min(documents, sizes.limit or documents)
        work += costs.forward(sizes.model, documents * requests * mean, mean, sizes.itemsize, head=True)
        longest = max(longest, most if documents > 100 else min(most, 3 * mean))
    logits = sizes.batch * longest * sizes.model.vocabulary * (sizes.itemsize + 8.0)
    fixed = STARTED["tasks"] * len(sizes.tasks)
    return _stage("tasks", work, machine, BASE + _dense(sizes) + logits, fixed=fixed)
