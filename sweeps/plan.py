"""From a composed configuration to a point: checked against the model, named by what it depends on."""

import functools
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from caldera.correction import Correction
from caldera.errors import UserError
from caldera.files import write_json
from caldera.matrices import chosen
from caldera.method import Method
from caldera.quantizers import HALVES, get_quantizer
from sweeps.evaluate import check_tasks
from sweeps.models import ModelSource, checkpoint_dir, described_dir, fingerprint, tokenizer_digest
from sweeps.parallel import Workers, check_backend, gpu_count, thread_count
from sweeps.paths import default_cache
from sweeps.shared import VERSION as SHARED_VERSION
from sweeps.store import digest, require_writable
from sweeps.texts import text_digest
from sweeps.trackers import check_tracker
from sweeps.wording import known_keys

CODELESS = (*HALVES, "none")  # families that have neither bits nor scales to choose
WORTHWHILE = 20_000_000  # weights to compress for which it pays to start processes
FIT_VERSION = 3  # counts up when the same settings give another checkpoint


@dataclass(frozen=True)
class Point:
    """A run, ready to go. Keys are hashes of exactly what a stage depends on."""

    config: dict
    method: Method | None  # None: the point is the uncompressed model
    correction: Correction | None  # None: the original model's inputs
    checkpoint: Path  # the uncompressed model
    tokenizer: str  # digest
    dtype: str
    device: str
    moments_key: str
    evaluation_key: str
    model_key: str  # fingerprint of the uncompressed model
    inventory: dict[str, list[int]]  # shape (m, n) of every matrix that is compressed

    @property
    def key(self) -> str:
        if self.method is None:
            return self.baseline_key
        fit = asdict(self.method) | ({} if self.method.rank else {"l": None, "r": None})
        corrected = self.correction and asdict(self.correction)
        names = sorted(self.inventory)
        stored = [FIT_VERSION, self.moments_key, fit, corrected, names, self.config["method"]["name"], self.dtype]
        return digest([stored, self.evaluation_key])

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

    @property
    def baseline_key(self) -> str:
        return digest([self.model_key, self.evaluation_key])

    @property
    def name(self) -> str:
        """Readable, and unique by the key."""
        if self.method is None:
            return self.baseline_name
        m = self.method
        factors = [f"l_{m.l}", f"r_{m.r}"] if m.rank else []
        parts = [self.config["model"]["name"], self.config["method"]["name"], f"r{m.rank}", m.q, *factors]
        return "-".join([*parts, self.key[:8]])

    @property
    def baseline_name(self) -> str:
        return f"{self.config['model']['name']}-uncompressed-{self.baseline_key[:8]}"

    @property
    def cache(self) -> Path:
        return cache_of(self.config)

    def folder(self, name: str) -> Path:
        """Where the record of the point `name` lies."""
        return Path(self.config["results"]) / "points" / name


def resolve(cfg: DictConfig) -> Point:
    """The point that a configuration describes. Raises UserError naming field, value and remedy."""
    _check_keys(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} has no value: set it, for example {missing[0]}=...")
    config = OmegaConf.to_container(cfg, resolve=True)
    if not (config["model"]["path"] or config["model"]["gguf_package"]):
        raise UserError("model.path is empty: set model.path to a model's folder, a .gguf file or a hub id")
    config["model"]["name"] = config["model"]["name"] or Path(config["model"]["path"] or "").name
    _check_numbers(config)
    check_tracker(config["tracker"])
    require_writable(Path(config["results"]), "results")
    cache = cache_of(config)
    require_writable(cache, "cache")
    check_tasks(config["evaluation"]["tasks"])
    check_backend(config["compute"]["backend"])
    method = _method(config)
    source = _source(config["model"])
    directory = (described_dir if config["plan"] else checkpoint_dir)(source, cache)
    shapes = _chosen(inventory(directory, cache, source.trust_remote_code), config["model"])
    if method is not None:
        method = _fitted(method, config, shapes)
        _check_rank(method.rank, shapes)
    device, dtype = placement(config["compute"])
    model_key = fingerprint(directory, cache)
    keys = {"moments_key": _moments_key(config, model_key, dtype), "evaluation_key": _evaluation_key(config, dtype)}
    tokenizer = tokenizer_digest(directory, cache)
    fit = {"method": method, "correction": _correction(config["method"])}
    place = {"checkpoint": directory, "tokenizer": tokenizer, "dtype": dtype, "device": device}
    return Point(config, **fit, **place, **keys, model_key=model_key, inventory=shapes)


def _check_keys(cfg: DictConfig) -> None:
    """An override with a leading + may add any key; only those of the schema are settings."""
    known = set(known_keys())
    groups = {name: node for name, node in cfg.items_ex(resolve=False) if OmegaConf.is_dict(node)}
    extra = [key for key in map(str, cfg) if key not in known]
    extra += [f"{name}.{key}" for name, node in groups.items() for key in node if f"{name}.{key}" not in known]
    if extra:
        raise UserError(f"{extra[0]} is no setting: remove it, or see conf/ for those there are")


def cache_of(config: dict) -> Path:
    return Path(config["cache"]).expanduser() if config["cache"] else default_cache()


def _check_numbers(config: dict) -> None:
    groups = {name: value for name, value in config.items() if isinstance(value, dict)}
    for field, value in ((f"{g}.{k}", v) for g, settings in groups.items() for k, v in settings.items()):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field}={value} must be a finite number")
        if field.endswith(".name") and value and "/" in value:
            raise UserError(f"{field}={value!r} names files: leave out the slash")
    positive = {"calibration": ("sequences", "length"), "evaluation": ("rows", "length", "batch_size", "limit")}
    least_of = {f"{g}.{n}": 2 if n == "length" else 1 for g, names in positive.items() for n in names}
    for field, least in (least_of | {"compute.threads": 0, "compute.workers": 0, "compute.spill_mb": 0}).items():
        group, name = field.split(".")
        value = config[group][name]
        if value is not None and value < least:
            raise UserError(f"{field}={value} must be at least {least}")


def _method(config: dict) -> Method | None:
    """The method, of rank 0 where a budget is to choose the rank; None for the uncompressed model."""
    settings = {f.name: config["method"][f.name] for f in fields(Method) if f.name in config["method"]}
    names = {part: quantizer_name(part, config[part]) for part in "qlr"}
    rank, bits = config["rank"]["k"], config["budget"]["bits"]
    if config["method"]["name"] == "none":
        return None
    if rank is not None and rank < 0:
        raise UserError(f"rank.k={rank} must be a whole number of at least 0")
    if bits is not None and rank:
        raise UserError(f"rank.k={rank} and budget.bits={bits} are both set: set rank.k=0 for a budget to choose it")
    if rank is None and bits is None:
        raise UserError("rank.k is null and no budget is set: give rank.k=... or budget=uniform budget.bits=...")
    least = int(bits is not None and names["q"] == "none")  # without a backbone a budget has to buy some rank
    if names["q"] == "none" and not (rank or least):
        raise UserError(f"rank.k={rank} with q.family=none leaves nothing of the matrices: set rank.k or quantizer@q")
    try:
        return Method(rank=rank or least, seed=config["seed"], **names, **settings)
    except UserError as error:
        raise UserError(f"method.{error}") from error


def _correction(settings: dict) -> Correction | None:
    """The correction of the targets, or None. Raises UserError naming the field."""
    if settings["inputs"] not in ("original", "corrected"):
        raise UserError(f"method.inputs={settings['inputs']!r} must be original or corrected")
    names = {"correction": "strength", "correction_last": "strength_last", "correction_sigma": "sigma"}
    names |= {"residual": "residual", "residual_last": "residual_last", "correction_preserve": "preserve"}
    try:
        correction = Correction(**{field: settings[key] for key, field in names.items()})
    except UserError as error:
        field = {v: k for k, v in names.items()}[str(error).partition("=")[0]]
        raise UserError(f"method.{field}={str(error).partition('=')[2]}") from error
    return correction if settings["inputs"] == "corrected" else None


def _chosen(shapes: dict[str, list[int]], model: dict) -> dict[str, list[int]]:
    """The matrices that the patterns choose. Raises UserError when there is none."""
    found = {name: shape for name, shape in shapes.items() if chosen(name, model["include"], model["exclude"])}
    if not found:
        raise UserError(
            f"model.include={model['include']} and model.exclude={model['exclude']} choose no matrix: a full name is,"
            f" for example, {next(iter(shapes))}"
        )
    return found


def quantizer_name(part: str, settings: dict) -> str:
    """Name of the quantizer that a config node describes. Raises UserError naming the node."""
    family, bits, scale = settings["family"], settings["bits"], settings["scale"]
    if family == "none" and part != "q":
        raise UserError(f"{part}.family=none: a factor needs a quantizer; rank.k=0 leaves both factors out")
    if family in CODELESS and bits != 16:
        has = "no" if family == "none" else "16"
        raise UserError(f"{part}.bits={bits}: {family} has {has} bits; leave bits out or choose another family")
    name = family if family in CODELESS else f"{family}_{bits}bit" + ("" if scale == "matrix" else f"_{scale}")
    try:
        name == "none" or get_quantizer(name)
    except UserError as error:
        raise UserError(f"{part}: {error}") from error
    return name


def _check_rank(rank: int, shapes: dict[str, list[int]]) -> None:
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        sides = " x ".join(map(str, shape))
        raise UserError(f"rank.k={rank} exceeds the smaller side of {name} ({sides}): use at most {min(shape)}")


def _source(model: dict) -> ModelSource:
    return ModelSource(**{f.name: model[f.name] for f in fields(ModelSource)} | {"path": model["path"] or ""})


def _fitted(method: Method, config: dict, shapes: dict[str, list[int]]) -> Method:
    """The method with the largest rank whose stored bits over all matrices stay within the budget, if there is one."""
    bits = config["budget"]["bits"]
    if bits is None:
        return method
    low, high = method.rank, min(min(s) for s in shapes.values())
    least = _stored_bits(method, low, shapes)
    if least > bits:
        alone = f"rank {low} takes" if low else f"{method.q} takes alone"
        raise UserError(f"budget.bits={bits} is below the {least:.3f} bits that {alone}: raise it")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _stored_bits(method, middle, shapes) <= bits else (low, middle - 1)
    return replace(method, rank=low)


def _stored_bits(method: Method, rank: int, shapes: dict[str, list[int]]) -> float:
    specs = [replace(method, rank=rank).spec(tuple(shape), name) for name, shape in shapes.items()]
    return 8 * sum(s.stored_bytes for s in specs) / sum(s.parameters for s in specs)


@functools.cache
def inventory(directory: Path, cache: Path, trust_remote_code: bool = False) -> dict[str, list[int]]:
    """Shape (m, n) of every matrix that is compressed, by name; found once, on a model without data."""
    file = cache / "inventories" / f"{fingerprint(directory, cache)}.json"
    if not file.is_file():
        write_json(file, _shapes(directory, trust_remote_code))
    return json.loads(file.read_text())


def _shapes(directory: Path, trust_remote_code: bool) -> dict[str, list[int]]:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from caldera.blocks import named_matrices

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path={directory} is no causal language model: {str(error).splitlines()[0]}") from error
    return {name: list(matrix.shape) for name, matrix in named_matrices(model).items()}


def placement(compute: dict) -> tuple[str, str]:
    """Device and dtype of models under evaluation; auto: the GPU if there is one, bfloat16 where it is native."""
    import torch

    device = compute["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
        raise UserError(f"compute.device={device!r} is no device to compute on: use auto, cpu, cuda or cuda:0")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"compute.device={device}: this torch sees no GPU; use compute.device=cpu")
    dtype = compute["dtype"]
    if dtype == "auto":
        native = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
        dtype = "bfloat16" if device != "cpu" or native else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"compute.dtype={dtype!r} must be auto, float32, bfloat16 or float16")
    return device, dtype


def _moments_key(config: dict, model_key: str, dtype: str) -> str:
    c = config["calibration"]
    return digest([3, model_key, text_digest(c["text"]), c["sequences"], c["length"], c["shuffle_seed"], dtype])


def _evaluation_key(config: dict, dtype: str) -> str:
    e = config["evaluation"]
    return digest(
        [1, text_digest(e["text"]), *(e[k] for k in ("rows", "length", "tasks", "limit", "batch_size")), dtype]
    )


def axes(point: Point) -> dict:
    """What distinguishes the point, flat: the columns that people plot against."""
    if point.method is None:
        return uncompressed_axes(point)
    m, config = point.method, point.config
    parts = {"q": m.q, "l": m.l if m.rank else "none", "r": m.r if m.rank else "none"}
    quantizers = {part: None if name == "none" else name for part, name in parts.items()}
    bits = {f"{part}_bits": name and get_quantizer(name).bits for part, name in quantizers.items()}
    names = {"model": config["model"]["name"], "method": config["method"]["name"], "rank": m.rank}
    names |= {"inputs": "corrected" if point.correction else "original"}
    text = {"calibration_tokens": config["calibration"]["sequences"] * config["calibration"]["length"]}
    return names | quantizers | bits | text | {"budget_bits": config["budget"]["bits"], "seed": m.seed}


def uncompressed_axes(point: Point) -> dict:
    """The axes of the uncompressed model, to which most do not apply."""
    nothing = dict.fromkeys(("inputs", "q", "l", "r", "rank", "q_bits", "l_bits", "r_bits", "budget_bits"))
    return {"model": point.config["model"]["name"], "method": "none", "seed": point.config["seed"]} | nothing
