"""What a composed configuration says, group by group, checked without a model. Raises UserError naming the field."""

import math
from dataclasses import fields

from omegaconf import DictConfig, OmegaConf

from caldera.correction import Correction
from caldera.errors import UserError
from caldera.method import Method
from caldera.quantizers import HALVES, get_quantizer
from sweeps.models import ModelSource
from sweeps.wording import known_keys

CODELESS = (*HALVES, "none")  # families that have neither bits nor scales to choose


def check_keys(cfg: DictConfig) -> None:
    """An override with a leading + may add any key; only those of the schema are settings."""
    known = set(known_keys())
    groups = {name: node for name, node in cfg.items_ex(resolve=False) if OmegaConf.is_dict(node)}
    extra = [key for key in map(str, cfg) if key not in known]
    extra += [f"{name}.{key}" for name, node in groups.items() for key in node if f"{name}.{key}" not in known]
    if extra:
        raise UserError(f"{extra[0]} is no setting: remove it, or see conf/ for those there are")


def check_numbers(config: dict) -> None:
    groups = {name: value for name, value in config.items() if isinstance(value, dict)}
    for field, value in ((f"{g}.{k}", v) for g, settings in groups.items() for k, v in settings.items()):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field}={value} must be a finite number")
        if field.endswith((".name", ".label")) and value and "/" in value:
            raise UserError(f"{field}={value!r} names files: leave out the slash")
    if "/" in config["sweep"] or config["sweep"] in ("", ".", ".."):
        raise UserError(f"sweep={config['sweep']!r} names files: give it a word without slashes")
    if config["checkpoint"]["keep"] not in ("all", "pareto", "none"):
        raise UserError(f"checkpoint.keep={config['checkpoint']['keep']!r} must be all, pareto or none")
    positive = {"calibration": ("sequences", "length"), "evaluation": ("rows", "length", "batch_size", "limit")}
    positive |= {"search": ("trials", "batch", "screen", "blocks")}
    least_of = {f"{g}.{n}": 2 if n == "length" else 1 for g, names in positive.items() for n in names}
    least_of |= {"evaluation.stride": 1, "evaluation.kl_tokens": 0}
    least_of |= dict.fromkeys(("compute.threads", "compute.workers", "compute.spill_mb", "search.prune_margin"), 0)
    for field, least in least_of.items():
        group, name = field.split(".")
        value = config[group][name]
        if value is not None and value < least:
            raise UserError(f"{field}={value} must be at least {least}")
    stride, most = config["evaluation"]["stride"], config["evaluation"]["length"] - config["evaluation"]["bos"]
    if stride is not None and stride > most:
        raise UserError(f"evaluation.stride={stride} must be at most {most}, or tokens between windows are left out")


def method_of(config: dict) -> Method | None:
    """The method, of rank 0 where a budget is to choose the rank; None for the uncompressed model."""
    settings = {f.name: config["method"][f.name] for f in fields(Method) if f.name in config["method"]}
    names = {part: quantizer_name(part, config[part]) for part in "qlr"}
    rank, strategy = config["rank"]["k"], config["budget"]["strategy"]
    if config["method"]["name"] == "none":
        return None
    if rank is not None and rank < 0:
        raise UserError(f"rank.k={rank} must be a whole number of at least 0")
    if strategy != "none" and rank:
        raise UserError(f"rank.k={rank} and budget={strategy} are both set: set rank.k=0 for a budget to choose it")
    if rank is None and strategy == "none":
        raise UserError("rank.k is null and no budget is set: give rank.k=... or budget=uniform budget.bits=...")
    least = int(strategy != "none" and names["q"] == "none")  # without a backbone a budget has to buy some rank
    if names["q"] == "none" and not (rank or least):
        raise UserError(f"rank.k={rank} with q.family=none leaves nothing of the matrices: set rank.k or quantizer@q")
    try:
        return Method(rank=rank or least, seed=config["seed"], **names, **settings)
    except UserError as error:
        raise UserError(f"method.{error}") from error


def correction_of(settings: dict) -> Correction | None:
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


def source_of(model: dict) -> ModelSource:
    return ModelSource(**{f.name: model[f.name] for f in fields(ModelSource)} | {"path": model["path"] or ""})


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
