"""Budgets when a point runs: predicted errors of all choices of a menu, what errors cost the model, and what is chosen.

Errors and costs depend on the calibration and not on the budget. They are kept in the cache, as is what was chosen.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from caldera import predict_error
from caldera.basis import Basis
from caldera.devices import full_precision, release
from caldera.linalg import require_finite
from caldera.matrices import matrices
from caldera.problem import Problem, generator_of
from caldera.rows import Spill
from caldera.sensitivity import divergence, gradient_moments
from caldera.streamed import Source
from sweeps.budget import CHOSEN, CLOSE, Budget, Choice, Scale, Table, allocated_table, as_json
from sweeps.calibration import Calibration
from sweeps.fitting import blamed
from sweeps.inputs import as_original
from sweeps.point import Point
from sweeps.progress import Reporter, Stage, warn
from sweeps.shared import Shared, SharedBlock
from sweeps.store import digest, once, read_sealed

VERSION = 1  # counts up, with FIT_VERSION, when the same settings give other errors, costs or choices
TINY = 1e-12
Errors = dict[str, dict[str, float]]  # relative errors of a matrix by `key_of` a choice


@dataclass(frozen=True)
class Probe:
    """What errors and costs are found with: the point's calibration, and what opens its uncompressed model, for its
    weights and for passes."""

    point: Point
    calibration: Calibration
    opened: Callable[[], Source]
    original: Callable[[], Source]
    rows: Callable[[], Tensor]
    spill: Spill
    shared: Shared


def decided(probe: Callable[[], Probe], point: Point, reporter: Reporter) -> Table:
    """The choices for matrices that differ, which a point of the strategy `allocated` does not know before."""
    if not point.allocated:
        return point.table
    found, there = once(_file(point), lambda: _allocate(probe(), reporter))
    reporter.reused["allocation"] = float(there)
    return {name: Choice(**entry) for name, entry in found["table"].items()}


def summary(point: Point, found: list[dict], bits: dict) -> dict | None:
    """What a record says of a budget: what was asked and reached, and the choice for every matrix that was `found`."""
    budget = point.budget
    if budget is None:
        return None
    known = (read_sealed(_file(point)) if point.allocated else None) or {}
    table = {m["name"]: {key: m[key] for key in CHOSEN} for m in found}
    size = bits["model_bytes" if budget.scope == "model" else "stored_bytes"]
    reached = {"bits": bits["model" if budget.scope == "model" else "stored"], "megabytes": size / 1e6}
    asked = {"bits": budget.bits, "megabytes": budget.megabytes, "scope": budget.scope}
    facts = {"strategy": budget.strategy, "asked": asked, "achieved": reached, "table": table}
    return facts | {"predicted_divergence": known.get("predicted_divergence")}


def report(point: Point, table: Table, reporter: Reporter) -> None:
    """Say what a budget came to, and warn where its menu is too coarse to come close."""
    budget, scale = point.budget, point.scale
    if budget is None or budget.strategy == "table":
        return
    table = table or {name: Choice.of(point.method, point.method.rank) for name in scale.shapes}
    scale = scale.only(table)
    reached, share = scale.amount(budget, scale.total(table)), scale.total(table) / scale.limit(budget)
    unit = "bits" if budget.megabytes is None else "megabytes"
    reporter.say(f"  budget: {budget.asked}, reached {reached:.4f} {unit}")
    if share < CLOSE:
        warn(f"budget.{budget.asked}: only {reached:.4f} {unit} are used; ranks and quantizers offer nothing between")


def _file(point: Point) -> Path:
    """Where the choices of a point are kept."""
    budget = [point.budget.facts, point.scale.parameters, point.scale.rest]
    facts = [VERSION, point.moments_key, asdict(point.method), sorted(point.inventory), budget]
    return point.cache / "allocations" / f"{digest(facts)[:24]}.json"


# -------------------------------------------------------------------------------------------------------------- choices
def _allocate(probe: Probe, reporter: Reporter) -> dict:
    """The choices as JSON, and the divergence (nats a token) that is expected of them, if it was asked for."""
    point, budget = probe.point, probe.point.budget
    with reporter.stage("curves") as progress:
        errors = once(curves_file(point), lambda: _curves(probe, progress))[0]
    costs = None
    if budget.sensitivity == "fisher":
        with reporter.stage("sensitivity") as progress:
            costs = once(costs_file(point), lambda: _costs(probe, progress))[0]
    return chosen(budget, point.scale, errors, costs)


def chosen(budget: Budget, scale: Scale, errors: Errors, costs: dict[str, float] | None) -> dict:
    """See `_allocate`. A matrix without errors has seen no token, and is left as it is."""
    lines = {name: _Line(budget, scale.shapes[name], found) for name, found in errors.items()}
    weights = dict.fromkeys(errors, 1.0) if costs is None else costs

    def loss(name: str, choice: Choice) -> float:
        return weights[name] * lines[name].error(choice) ** 2

    table = allocated_table(budget, scale.only(errors), loss)
    expected = None if costs is None else sum(loss(name, choice) for name, choice in table.items())
    return {"table": as_json(table), "predicted_divergence": expected}


def key_of(choice: Choice) -> str:
    return "/".join(map(str, (choice.q, choice.rank, choice.l, choice.r)))


class _Line:
    """The errors of a matrix at the ranks of the menu and, on a line in the logarithm, at all between."""

    def __init__(self, budget: Budget, shape: list[int], errors: dict[str, float]) -> None:
        self._logs: dict[tuple, dict[int, float]] = {}
        for choice in budget.choices(shape, budget.ranks):
            log = math.log(max(errors[key_of(choice)], TINY))
            factors = [(choice.l, choice.r)] if choice.rank else [("none", "none"), *product(budget.l, budget.r)]
            for l, r in factors:
                self._logs.setdefault((choice.q, l, r), {})[choice.rank] = log

    def error(self, choice: Choice) -> float:
        logs = self._logs[choice.q, choice.l, choice.r]
        return math.exp(np.interp(choice.rank, list(logs), list(logs.values())))


# --------------------------------------------------------------------------------------------------------------- errors
@dataclass(frozen=True)
class _BlockErrors:
    """The predicted errors of a block's matrices, for every choice of their menus at the ranks that it lists."""

    point: Point
    calibration: Calibration
    opened: Callable[[], Source]
    shared: Shared

    @full_precision()  # here for other processes
    @torch.no_grad()
    def __call__(self, index: int, device: torch.device) -> Errors:
        found: Errors = {}
        known = self.shared.block(index)
        for member in members(self.calibration, self.opened(), self.point, index, known, device):
            with blamed(member.name):
                found[member.name] = self._of(member, known)
        release()
        return found

    def _of(self, member: "Member", known: SharedBlock) -> dict[str, float]:
        budget, method, weight = self.point.budget, self.point.method, member.weight
        choices = budget.choices(list(weight.shape), budget.ranks)
        wide = max(choice.rank for choice in choices)
        options = {"name": member.name, "basis": member.basis}
        options["problem"] = known.problem(weight, member.basis, member.name, wide)
        return {key_of(c): predict_error(weight, member.moments, c.applied(method), **options) for c in choices}


def _curves(probe: Probe, progress: Stage) -> Errors:
    point, errors = probe.point, {}
    task = _BlockErrors(point, probe.calibration, probe.opened, probe.shared)
    blocks = range(probe.opened().count)
    for done, (_, found) in enumerate(point.workers.map(task, blocks), start=1):
        errors |= found
        progress(done, len(blocks))
    return dict(sorted(errors.items()))


def curves_file(point: Point) -> Path:
    method, budget, names = point.method, point.budget, sorted(point.inventory)
    menu = [budget.ranks, budget.q, budget.l, budget.r]
    facts = [VERSION, point.moments_key, asdict(method) | dict.fromkeys(CHOSEN), menu, names]
    return point.cache / "curves" / f"{digest(facts)[:24]}.json"


# ---------------------------------------------------------------------------------------------------------------- costs
@full_precision()
def _costs(probe: Probe, progress: Stage) -> dict[str, float]:
    """Nats a token for a squared relative error of 1, by matrix."""
    point, model = probe.point, probe.original()
    rows = probe.rows()[: point.budget.sensitivity_rows]
    steps, costs = itertools.count(1), {}
    options = {"generator": generator_of(point.method.seed, "sensitivity"), "spill": probe.spill}
    options["progress"] = lambda _: progress(next(steps), 2 * len(rows) * model.count)
    for index, sums in gradient_moments(model, rows, frozenset(point.inventory), **options):
        costs |= _block_costs(probe, index, sums, rows.numel())
        release()
    return dict(sorted(costs.items()))


@torch.no_grad()
def _block_costs(probe: Probe, index: int, sums: dict[str, Tensor], tokens: int) -> dict[str, float]:
    """Experts of a stage share its gradients in proportion to the calibration tokens that reach them."""
    point, known, costs = probe.point, probe.shared.block(index), {}
    for member in members(probe.calibration, probe.opened(), point, index, known, torch.device(point.device)):
        gradients = sums[member.key].to(point.device)
        require_finite(gradients, f"{member.name}: gradients")
        problem = Problem.of(member.weight, member.basis, member.name)
        costs[member.name] = member.share * divergence(gradients, member.basis, problem, tokens)
    return costs


def costs_file(point: Point) -> Path:
    rows, names = point.budget.sensitivity_rows, sorted(point.inventory)
    facts = [VERSION, point.moments_key, point.method.basis_options, rows, names]
    return point.cache / "sensitivity" / f"{digest(facts)[:24]}.json"


# ------------------------------------------------------------------------------------------------------------- matrices
@dataclass(frozen=True)
class Member:
    """A matrix with the original model's moments; `key` names its gradients, of which an expert has a `share`."""

    name: str
    weight: Tensor
    moments: Tensor
    basis: Basis
    key: str
    share: float


def members(
    calibration: Calibration, model: Source, point: Point, index: int, known: SharedBlock, device: torch.device
) -> Iterator[Member]:
    """The matrices of a block that are compressed and have seen a token."""
    block = f"{model.name}.{index}"
    layers, groups = matrices(model.block(index)), calibration.groups(index)
    tokens, stages = calibration.tokens(index), Counter()
    for group in groups:
        stages[group.stage] += tokens[group.name]
    for given in as_original(calibration, index, groups):
        group, moments = given.group, given.moments.to(device)
        names = [name for name in group.members if f"{block}.{name}" in point.inventory]
        if not names:
            continue
        with blamed(f"{block}.{group.name}"):
            basis = known.basis(moments, f"{block}.{group.name}", point.method.basis_options)
        share = given.tokens / max(stages[group.stage], 1) if group.expert else 1.0
        for name in names:
            matrix = layers[name]
            key = f"{block}.{matrix.stage if group.expert else name}"
            yield Member(f"{block}.{name}", matrix.read().to(device, torch.float32), moments, basis, key, share)
