"""From a composed configuration to a point, checked against the model."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from caldera.errors import UserError
from caldera.method import Method
from sweeps.budget import Budget, Scale, budget_of, guessed_table, only_choice, read_table, uniform_table
from sweeps.evaluate import check_tasks, evaluation_key
from sweeps.inventory import chosen_of, inventory, rest_of_files
from sweeps.models import checkpoint_dir, described_dir, fingerprint, tokenizer_digest
from sweeps.parallel import check_backend
from sweeps.point import Point, cache_of, moments_key
from sweeps.search.objectives import check_objectives
from sweeps.settings import check_keys, check_numbers, correction_of, method_of, placement, source_of
from sweeps.store import require_writable
from sweeps.trackers import check_tracker


def resolve(cfg: DictConfig) -> Point:
    """The point that a configuration describes. Raises UserError naming field, value and remedy."""
    check_keys(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} has no value: set it, for example {missing[0]}=...")
    config = OmegaConf.to_container(cfg, resolve=True)
    if not (config["model"]["path"] or config["model"]["gguf_package"]):
        raise UserError("model.path is empty: set model.path to a model's folder, a .gguf file or a hub id")
    config["model"]["name"] = config["model"]["name"] or Path(config["model"]["path"] or "").name
    check_numbers(config)
    check_tracker(config["tracker"])
    require_writable(Path(config["results"]), "results")
    cache = cache_of(config)
    require_writable(cache, "cache")
    check_tasks(config["evaluation"]["tasks"])
    check_objectives(config["search"]["objectives"], config["evaluation"]["tasks"])
    check_backend(config["compute"]["backend"])
    method = method_of(config)
    source = source_of(config["model"])
    directory = (described_dir if config["plan"] else checkpoint_dir)(source, cache)
    shapes = chosen_of(inventory(directory, cache, source.trust_remote_code), config["model"])
    device, dtype = placement(config["compute"])
    budget = method and budget_of(config, method)
    decided = {}
    if budget:
        decided = _decided(budget, _scale(budget, method, shapes, directory, source.trust_remote_code, dtype))
    elif method:
        _check_rank(method.rank, shapes)
    model_key = fingerprint(directory, cache)
    keys = {"moments_key": moments_key(config, model_key, dtype)}
    keys |= {"evaluation_key": evaluation_key(config["evaluation"], dtype)}
    tokenizer = tokenizer_digest(directory, cache)
    fit = {"method": method, "correction": correction_of(config["method"])} | decided
    place = {"source": directory, "tokenizer": tokenizer, "dtype": dtype, "device": device}
    return Point(config, **fit, **place, **keys, model_key=model_key, inventory=shapes)


def _scale(budget: Budget, method: Method, shapes: dict, directory: Path, trusted: bool, dtype: str) -> Scale:
    if budget.scope == "matrices":
        return Scale(method, shapes, sum(m * n for m, n in shapes.values()))
    rest, parameters = rest_of_files(directory, trusted, frozenset(shapes), dtype)
    return Scale(method, shapes, parameters, rest, headers=True, itemsize=4 if dtype == "float32" else 2)


def _decided(budget: Budget, scale: Scale) -> dict:
    """What a budget settles before anything runs: fields of the point. Raises UserError where it cannot be met."""
    if budget.strategy == "allocated":
        guessed_table(budget, scale)
        return {"budget": budget, "scale": scale}
    if budget.strategy == "uniform":
        table = uniform_table(budget, scale)
    else:
        table = read_table(Path(budget.table), scale.method, scale.shapes)
    if choice := only_choice(table):
        return {"method": choice.applied(scale.method), "budget": budget, "scale": scale}
    return {"budget": budget, "scale": scale, "table": table}


def _check_rank(rank: int, shapes: dict[str, list[int]]) -> None:
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        sides = " x ".join(map(str, shape))
        raise UserError(f"rank.k={rank} exceeds the smaller side of {name} ({sides}): use at most {min(shape)}")
