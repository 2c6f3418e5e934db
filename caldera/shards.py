"""A packed checkpoint as transformers finds it: an index of the shards, a mark in config.json, and checksums.

A folder that `compress` made is protected by its manifest. One that transformers' `save_pretrained` made has none;
there every shard carries the specs and a checksum of each tensor in its metadata.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from caldera.errors import CheckpointError
from caldera.files import write_json
from caldera.packed import MatrixSpec

METHOD = "caldera"  # the quant_method of config.json
INDEX = "model.safetensors.index.json"
SPECS, CHECKSUMS = "matrices", "sha256"  # keys of a shard's metadata


def write_index(directory: Path) -> None:
    """Commit the list that says which shard holds which tensor."""
    shards, sizes = {}, 0
    for shard in sorted(directory.glob("model-*.safetensors")):
        with safe_open(shard, "pt") as opened:
            shards |= dict.fromkeys(opened.keys(), shard.name)
        with shard.open("rb") as stream:
            sizes += shard.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    write_json(directory / INDEX, {"metadata": {"total_size": sizes}, "weight_map": shards})


def mark_config(directory: Path, version: int, dtype: str) -> None:
    """Let config.json say that the weights are packed, and, where it is silent, what type the rest of them has."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if not config.get("dtype") and not config.get("torch_dtype"):
        config["dtype"] = dtype
    mark = {"quant_method": METHOD, "version": version, "materialize": False}
    write_json(path, config | {"quantization_config": mark})


def metadata(specs: Iterable[MatrixSpec], tensors: dict[str, Tensor]) -> dict[str, str]:
    """What shards without a manifest carry: the specs, and the checksums of these and of every tensor."""
    text = json.dumps([spec.to_json() for spec in specs])
    sums = {name: _tensor_sum(name, t) for name, t in tensors.items()}
    return {SPECS: text, CHECKSUMS: json.dumps({SPECS: _text_sum(text)} | sums)}


def verify_metadata(shard: Path) -> None:
    """Raises CheckpointError unless every tensor of the shard is as its checksum says."""
    try:
        with safe_open(shard, "pt") as opened:
            found = opened.metadata() or {}
            sums = json.loads(found.get(CHECKSUMS, "null"))
            if sums is None:
                raise CheckpointError(f"{shard} has no checksums, and its folder no manifest: copy the whole folder")
            good = sums.get(SPECS) == _text_sum(found.get(SPECS, ""))
            # one tensor at a time: a shard may be as large as the memory
            good = good and all(sums.get(k) == _tensor_sum(k, opened.get_tensor(k)) for k in opened.keys())  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{shard} is unreadable ({error}): it was cut short or changed") from error
    if not good:
        raise CheckpointError(f"{shard} differs from the checksums in it: it was changed")


def read_specs(shards: Iterable[Path]) -> dict[str, MatrixSpec]:
    """The specs that the shards' metadata holds, by the name of the matrix."""
    specs = {}
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            listed = json.loads((opened.metadata() or {}).get(SPECS, "[]"))
        specs |= {s["name"]: MatrixSpec.from_json(s) for s in listed}
    return specs


def tensor_names(shards: Iterable[Path]) -> set[str]:
    names: set[str] = set()
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            names |= set(opened.keys())
    return names


def _text_sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor_sum(name: str, tensor: Tensor) -> str:
    """Of the type, the shape and the bytes."""
    if tensor.is_meta:
        raise CheckpointError(f"{name} is offloaded, so it cannot be saved: load the model without offloading")
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy())
    return digest.hexdigest()
