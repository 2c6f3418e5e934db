"""A run, ready to go: what was asked for and what it depends on, by hashes of exactly that."""

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from caldera.correction import Correction
from caldera.method import Method
from caldera.quantizers import get_quantizer
from sweeps.budget import CHOSEN, Budget, Choice, Scale, Table, as_json, method_of_matrix
from sweeps.parallel import Workers, gpu_count, thread_count
from sweeps.paths import default_cache
from sweeps.shared import VERSION as SHARED_VERSION
from sweeps.store import digest
from sweeps.texts import text_digest

WORTHWHILE = 20_000_000  # weights to compress for which it pays to start processes
MIXED = "mixed"
FIT_VERSION = 3  # counts up when the same settings give another checkpoint


@dataclass(frozen=True)
class Point:
    """A run, ready to go. Keys are hashes of exactly what a stage depends on."""

    config: dict
    method: Method | None  # None: the point is the uncompressed model
    correction: Correction | None  # None: the original model's inputs
    source: Path  # folder of the uncompressed model
    tokenizer: str  # digest
    dtype: str
    device: str
    moments_key: str
    evaluation_key: str
    model_key: str  # fingerprint of the uncompressed model
    inventory: dict[str, list[int]]  # shape (m, n) of every matrix that is compressed
    budget: Budget | None = None
    scale: Scale | None = None  # what the budget is measured by
    table: Table = field(default_factory=dict)  # of matrices that differ; an allocated one is known once it runs

    @cached_property
    def fit_key(self) -> str:
        """What the weights that are evaluated depend on."""
        if self.method is None:
            return digest([self.model_key, self.dtype])
        fit = asdict(self.method) | ({} if self.method.rank else {"l": None, "r": None}) | self._mixture
        corrected = self.correction and asdict(self.correction)
        names = sorted(self.inventory)
        return digest([FIT_VERSION, self.moments_key, fit, corrected, names, self.config["method"]["name"], self.dtype])

    @cached_property
    def key(self) -> str:
        return digest([self.fit_key, self.evaluation_key])

    @property
    def keys(self) -> dict[str, str]:
        """All of them, for the record."""
        kinds = ("fit", "evaluation", "model") if self.method is None else ("fit", "moments", "evaluation", "model")
        found = {kind: getattr(self, f"{kind}_key") for kind in kinds}
        return found if self.method is None else found | {"shared": self.shared_key}

    @property
    def allocated(self) -> bool:
        """Whether ranks and bits are chosen when the point runs."""
        return self.budget is not None and self.budget.strategy == "allocated"

    def method_of(self, name: str) -> Method:
        """How the matrix of that full name is decomposed."""
        return method_of_matrix(name, self.method, self.table)

    @property
    def stored_bits(self) -> float | None:
        """Bits a parameter of the compressed matrices; None for the uncompressed model and as long as it is open."""
        if self.method is None or self.allocated:
            return None
        specs = [self.method_of(name).spec(tuple(shape), name) for name, shape in self.inventory.items()]
        return 8 * sum(s.stored_bytes for s in specs) / sum(s.parameters for s in specs)

    @property
    def _mixture(self) -> dict:
        """What the fit depends on where matrices differ: the choices, or what they follow from."""
        if not (self.table or self.allocated):
            return {}
        same = dict.fromkeys(CHOSEN)
        return same | {"table": as_json(self.table)} if self.table else same | {"budget": self.budget.facts}

    @property
    def shared_key(self) -> str:
        """What factorised moments and leading subspaces depend on."""
        return digest([SHARED_VERSION, self.moments_key, self.method.basis_options])

    @property
    def workers(self) -> Workers:
        """Who compresses. Behind a compressed prefix one process with all threads is as quick as several."""
        settings, gpus = self.config["compute"], gpu_count() if self.device == "cuda" else 0
        cores = settings["threads"] or thread_count()
        small = sum(m * n for m, n in self.inventory.values()) < WORTHWHILE
        pays = 1 if self.correction or small else max(gpus, 1) if self.device != "cpu" else cores
        count = settings["workers"] or pays
        devices = tuple(f"cuda:{i}" for i in range(gpus)) or (self.device,)
        return Workers(count, max(1, cores // count), settings["backend"], devices if count > 1 else (self.device,))

    @property
    def texts(self) -> str:
        """What the inputs of calibration and evaluation depend on."""
        return digest([self.model_key, self.moments_key, self.evaluation_key])

    @cached_property
    def uncompressed(self) -> "Point":
        """The point that this one is compared with: the same evaluation of the model as it is."""
        if self.method is None:
            return self
        config = self.config | {"method": self.config["method"] | {"name": "none"}, "force": False}
        nothing = {"method": None, "correction": None, "budget": None, "scale": None, "table": {}}
        return replace(self, config=config, **nothing)

    @property
    def label(self) -> str:
        """What is fitted, readable."""
        if self.method is None:
            return f"{self.config['model']['name']}-uncompressed"
        m = self.method
        what = [f"r{m.rank}", m.q, *([f"l_{m.l}", f"r_{m.r}"] if m.rank else [])]
        what = [self.budget.label] if self.table or self.allocated else what
        return "-".join([self.config["model"]["name"], self.config["method"]["name"], *what])

    @property
    def name(self) -> str:
        """Readable, and unique by the key."""
        return f"{self.label}-{self.key[:8]}"

    @property
    def cache(self) -> Path:
        return cache_of(self.config)

    @property
    def moments_folder(self) -> Path:
        """Of the cache: what the matrices receive."""
        return self.cache / "moments" / self.moments_key[:24]

    @property
    def shared_folder(self) -> Path:
        """Of the cache: what points share of the fit."""
        return self.cache / "shared" / self.shared_key[:24]

    @property
    def results(self) -> Path:
        return Path(self.config["results"])

    @property
    def folder(self) -> Path:
        """Where the record lies."""
        return self.results / "points" / self.name

    @property
    def checkpoint(self) -> Path:
        """The packed model, which points that differ only in their evaluation share."""
        return self.results / "checkpoints" / f"{self.label}-{self.fit_key[:8]}"


def cache_of(config: dict) -> Path:
    return Path(config["cache"]).expanduser() if config["cache"] else default_cache()


def moments_key(config: dict, model_key: str, dtype: str) -> str:
    c = config["calibration"]
    return digest([4, model_key, text_digest(c["text"]), c["sequences"], c["length"], c["shuffle_seed"], dtype])


def axes(point: Point) -> dict:
    """What distinguishes the point, flat: the columns that people plot against."""
    if point.method is None:
        return uncompressed_axes(point)
    m, config = point.method, point.config
    quantizers = {part: _common(point, part) for part in "qlr"}
    bits = {f"{part}_bits": _bits(name) for part, name in quantizers.items()}
    names = {"model": config["model"]["name"], "method": config["method"]["name"], "rank": _common(point, "rank")}
    names |= {"inputs": "corrected" if point.correction else "original"}
    text = {"calibration_tokens": config["calibration"]["sequences"] * config["calibration"]["length"]}
    budget = {"budget": point.budget and point.budget.strategy, "budget_bits": config["budget"]["bits"]}
    return names | quantizers | bits | text | budget | {"seed": m.seed}


def _common(point: Point, field: str) -> int | str | None:
    """The rank or quantizer of all matrices that have one; where they differ, None or "mixed"."""
    if point.allocated:
        found = set(point.budget.ranks if field == "rank" else getattr(point.budget, field)) - {"none"}
    else:
        choices = set(point.table.values()) or {Choice.of(point.method, point.method.rank)}
        found = {getattr(choice, field) for choice in choices} - {"none"}
    if len(found) > 1:
        return None if field == "rank" else MIXED
    return next(iter(found), None)


def _bits(quantizer: str | None) -> int | None:
    return None if quantizer in (None, MIXED) else get_quantizer(quantizer).bits


def uncompressed_axes(point: Point) -> dict:
    """The axes of the uncompressed model, to which most do not apply."""
    bits = ("q_bits", "l_bits", "r_bits", "budget_bits")
    nothing = dict.fromkeys(("inputs", "q", "l", "r", "rank", *bits, "budget"))
    return {"model": point.config["model"]["name"], "method": "none", "seed": point.config["seed"]} | nothing
