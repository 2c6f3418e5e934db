"""What a budget of stored bits asks for, what it may choose from, and what a choice costs; nothing here reads weights.

`budget.strategy` uniform buys one rank for all matrices, `table` repeats what was chosen before; both are known before
anything runs. What `allocated` chooses depends on moments and weights: `sweeps.allocation`.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path

from caldera.allocate import Option, allocate
from caldera.checkpoint import shard_bytes
from caldera.errors import UserError
from caldera.method import Method
from caldera.quantizers import FAMILIES, get_quantizer
from sweeps.store import read_json

STRATEGIES, SCOPES, SENSITIVITIES = ("none", "uniform", "allocated", "table"), ("matrices", "model"), ("fisher", "none")
CLOSE = 0.99  # of what was asked, from where on it counts as reached
OFFSETS = 20  # digits that a tensor's place in a large file has more than in one of its own, at most
WIDEST = 4  # bits of Q beyond which a menu does not go unasked


# --------------------------------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class Choice:
    """What a budget decides for a matrix: the fields of `caldera.Method` of these names."""

    rank: int
    q: str
    l: str = "none"
    r: str = "none"

    @classmethod
    def of(cls, method: Method, rank: int) -> "Choice":
        """That of a method, but for the rank."""
        return cls(rank, method.q, method.l, method.r) if rank else cls(0, method.q)

    def applied(self, method: Method) -> Method:
        return replace(method, **asdict(self))


CHOSEN = tuple(f.name for f in fields(Choice))
Table = dict[str, Choice]  # by full name


def method_of_matrix(name: str, method: Method, table: Table) -> Method:
    """How the matrix of that full name is decomposed: as the table says, where it is in it."""
    return table[name].applied(method) if name in table else method


def only_choice(table: Table) -> Choice | None:
    """What all matrices have in common, if it is everything."""
    choices = set(table.values())
    return next(iter(choices)) if len(choices) == 1 else None


def as_json(table: Table) -> dict[str, dict]:
    return {name: asdict(choice) for name, choice in table.items()}


def read_table(path: Path, method: Method, shapes: dict[str, list[int]]) -> Table:
    """The choice for every matrix from a record, whose matrices say it, or from JSON with a `table` by full name.

    Raises UserError naming file and matrix.
    """
    data, field = read_json(path), f"budget.table={path}"
    entries = data.get("table") or {m["name"]: m for m in data.get("matrices", [])}
    if lacking := sorted(set(shapes) - set(entries)):
        raise UserError(f"{field} has no entry for {lacking[0]}: give a record or table of this very model")
    table = {}
    for name, shape in shapes.items():
        if lacking := [key for key in CHOSEN if key not in entries[name]]:
            raise UserError(f"{field}: {name} has no {lacking[0]}: an entry needs {', '.join(CHOSEN)}")
        choice = Choice(**{key: entries[name][key] for key in CHOSEN})
        choice = choice if choice.rank else Choice(0, choice.q)
        try:
            choice.applied(method).spec(tuple(shape), name)
        except UserError as error:
            raise UserError(f"{field}: {name}: {error}") from error
        table[name] = choice
    return table


# -------------------------------------------------------------------------------------------------------------- budgets
@dataclass(frozen=True)
class Budget:
    """The settings of the group `budget`; the menu's quantizers by name."""

    strategy: str
    bits: float | None
    megabytes: float | None
    scope: str
    ranks: tuple[int, ...]
    q: tuple[str, ...]
    l: tuple[str, ...]
    r: tuple[str, ...]
    sensitivity: str
    sensitivity_rows: int
    table: str | None

    @property
    def asked(self) -> str:
        """The setting that says how much, as it was given."""
        return f"bits={self.bits:g}" if self.megabytes is None else f"megabytes={self.megabytes:g}"

    @property
    def label(self) -> str:
        """A part of points' names."""
        amount = "" if self.strategy == "table" else self.asked.replace("bits=", "b").replace("megabytes=", "mb") + "-"
        return amount + self.strategy + ("-model" if self.scope == "model" else "")

    @property
    def facts(self) -> dict:
        """What an allocation depends on, beside the model and its calibration."""
        found = asdict(self) | {"table": None}
        return found if self.sensitivity == "fisher" else found | {"sensitivity_rows": None}

    def choices(self, shape: list[int], ranks: Iterable[int]) -> list[Choice]:
        """The menu of a matrix (m, n) at those ranks, as far as its smaller side goes."""
        ranks = sorted({min(k, *shape) for k in ranks})
        without = [Choice(0, q) for q in self.q if q != "none"] if 0 in ranks else []
        return without + [Choice(k, q, l, r) for q, l, r, k in product(self.q, self.l, self.r, ranks) if k]

    def next_to(self, choice: Choice, shape: list[int]) -> list[Choice]:
        """That choice with a higher rank, below the menu's next one."""
        higher = [k for k in self.ranks if k > choice.rank]
        between = range(choice.rank + 1, min(higher[0], *shape)) if higher else ()
        found = [c for c in self.choices(shape, between) if c.q == choice.q]
        return [c for c in found if not choice.rank or (c.l, c.r) == (choice.l, choice.r)]


def budget_of(config: dict, method: Method) -> Budget | None:
    """The settings, checked. Raises UserError naming the field."""
    settings = config["budget"]
    strategy, bits, megabytes = settings["strategy"], settings["bits"], settings["megabytes"]
    for name, known in (("strategy", STRATEGIES), ("scope", SCOPES), ("sensitivity", SENSITIVITIES)):
        if settings[name] not in known:
            raise UserError(f"budget.{name}={settings[name]!r} must be one of {', '.join(known)}")
    given = {name: value for name, value in (("bits", bits), ("megabytes", megabytes)) if value is not None}
    for name, value in given.items():
        if strategy in ("none", "table"):
            remedy = "add budget=uniform or budget=allocated" if strategy == "none" else f"set budget.{name}=null"
            raise UserError(f"budget.{name}={value:g} has no use with budget.strategy={strategy}: {remedy}")
        if value <= 0:
            raise UserError(f"budget.{name}={value:g} must be above 0")
    if strategy == "none":
        return None
    if strategy == "table" and not settings["table"]:
        raise UserError("budget.table is empty: set it to a record.json or a table of this model")
    if strategy != "table" and len(given) != 1:
        both = "are both set" if given else "are both null"
        raise UserError(f"budget.bits and budget.megabytes {both}: set one of them, and the other one to null")
    return _with_menu(settings, method)


def _with_menu(settings: dict, method: Method) -> Budget:
    if settings["strategy"] == "allocated" and method.moments == "identity":
        raise UserError(
            "budget=allocated predicts errors for measured moments, and method.moments=identity: use budget=uniform"
        )
    ranks = settings["ranks"]
    if not ranks or min(ranks) < 0:
        raise UserError(f"budget.ranks={ranks} must list ranks of at least 0")
    if settings["sensitivity_rows"] < 1:
        raise UserError(f"budget.sensitivity_rows={settings['sensitivity_rows']} must be at least 1")
    names = {part: tuple(settings[part]) or _own(part, getattr(method, part)) for part in "qlr"}
    for part, found in names.items():
        for name in set(found) - ({"none"} if part == "q" else set()):
            try:
                get_quantizer(name)
            except UserError as error:
                raise UserError(f"budget.{part}: {error}") from error
    kept = {f.name: settings[f.name] for f in fields(Budget)}
    return Budget(**kept | names | {"ranks": tuple(sorted(set(ranks)))})


def _own(part: str, name: str) -> tuple[str, ...]:
    """The quantizers of a menu that names none: the point's own; of Q's family, all of up to WIDEST bits."""
    if part != "q" or name == "none" or getattr(get_quantizer(name), "codebook", None) is None:
        return (name,)
    family, _, rest = name.partition(f"_{get_quantizer(name).bits}bit")
    return tuple(f"{family}_{bits}bit{rest}" for bits in FAMILIES[family] if bits <= WIDEST)


# ---------------------------------------------------------------------------------------------------------------- costs
@dataclass(frozen=True)
class Scale:
    """What a budget is measured by: the bytes of every choice, `rest` bytes whatever is chosen, for so many parameters.

    In the scope `model` bytes are those of the checkpoint's tensor files. What a matrix adds to a file's header depends
    on the others in a few digits; here it is counted as if there were most of them, 0.05% of SmolLM2's files too much.
    """

    method: Method
    shapes: dict[str, list[int]]
    parameters: int
    rest: int = 0
    headers: bool = False
    itemsize: int = 2  # bytes of a number that is not compressed

    def only(self, names: Iterable[str]) -> "Scale":
        """Where the other matrices are left as they are."""
        shapes = {name: self.shapes[name] for name in names}
        left = sum(m * n for m, n in self.shapes.values()) - sum(m * n for m, n in shapes.values())
        if self.headers:
            return replace(self, shapes=shapes, rest=self.rest + left * self.itemsize)
        return replace(self, shapes=shapes, parameters=self.parameters - left)

    @cached_property
    def _input(self) -> str:
        return max(self.shapes, key=len)  # no input's name is longer: it is that of a matrix

    def bytes(self, name: str, choice: Choice) -> int:
        """Of one matrix."""
        spec = choice.applied(self.method).spec(tuple(self.shapes[name]), name, self._input)
        return shard_bytes([spec]) + OFFSETS * len(spec.layout()) if self.headers else spec.stored_bytes

    def total(self, table: Table) -> int:
        return self.rest + sum(self.bytes(name, choice) for name, choice in table.items())

    def limit(self, budget: Budget) -> int:
        """Bytes that a budget allows."""
        return int(budget.bits * self.parameters / 8 if budget.megabytes is None else budget.megabytes * 1e6)

    def amount(self, budget: Budget, size: float) -> float:
        """So many bytes in the unit that the budget was given in."""
        return 8 * size / self.parameters if budget.megabytes is None else size / 1e6


# ------------------------------------------------------------------------------------------------------------ decisions
def uniform_table(budget: Budget, scale: Scale) -> Table:
    """The largest rank that fits for all matrices, as far as their sides go; one more, in order, for those that fit.

    Raises UserError when nothing fits.
    """
    method, limit = scale.method, scale.limit(budget)

    def of_rank(k: int) -> Table:
        return {name: Choice.of(method, min(k, *shape)) for name, shape in scale.shapes.items()}

    low, high = int(method.q == "none"), max(map(min, scale.shapes.values()))
    least = scale.total(of_rank(low))
    if least > limit:
        alone = f"rank {low} takes" if low else f"{method.q} takes alone"
        raise _too_little(budget, scale.amount(budget, least), alone)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if scale.total(of_rank(middle)) <= limit else (low, middle - 1)
    table, more = of_rank(low), of_rank(low + 1)
    left = limit - scale.total(table)
    for name, choice in more.items():
        cost = scale.bytes(name, choice) - scale.bytes(name, table[name])
        if cost <= left:
            table[name], left = choice, left - cost
    return table


def allocated_table(budget: Budget, scale: Scale, loss: Callable[[str, Choice], float]) -> Table:
    """Of each matrix' menu the choice with which all losses add up to little; what is left then buys rank between
    those of the menu. Raises UserError when nothing fits.
    """
    menus = {name: budget.choices(shape, budget.ranks) for name, shape in scale.shapes.items()}
    least = scale.rest + sum(min(scale.bytes(name, choice) for choice in menu) for name, menu in menus.items())
    if least > scale.limit(budget):
        raise _too_little(budget, scale.amount(budget, least), "the cheapest choices of its menu take")
    table = _cheaply(budget, scale, menus, loss)
    return _cheaply(
        budget, scale, {name: [c, *budget.next_to(c, scale.shapes[name])] for name, c in table.items()}, loss
    )


def _cheaply(
    budget: Budget, scale: Scale, menus: dict[str, list[Choice]], loss: Callable[[str, Choice], float]
) -> Table:
    items = {name: [Option(scale.bytes(name, c), loss(name, c)) for c in menu] for name, menu in menus.items()}
    chosen = allocate(items, scale.limit(budget) - scale.rest)
    return {name: menus[name][index] for name, index in chosen.items()}


def guessed_table(budget: Budget, scale: Scale) -> Table:
    """What `allocated` might choose, by the bits alone: for a plan, which has no moments."""

    def loss(name: str, choice: Choice) -> float:
        (m, n), bits = scale.shapes[name], 0 if choice.q == "none" else get_quantizer(choice.q).bits
        return m * n * 4.0**-bits * (1 - choice.rank / (2 * min(m, n)))

    return allocated_table(budget, scale, loss)


def _too_little(budget: Budget, least: float, what: str) -> UserError:
    unit = " bits" if budget.megabytes is None else ""
    return UserError(f"budget.{budget.asked} is below the {least:.3f}{unit} that {what}: raise it")
