"""A packed checkpoint on disk: one safetensors file a decoder block, one for the rest, and a manifest written last.

A folder without `manifest.json` is unfinished. The manifest lists every file with its size and sha256, and the spec
of every compressed matrix; tensors of a matrix are called `<matrix>.<part>_<tensor>`, say `...q_proj.l_codes`.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from caldera.blocks import named_matrices
from caldera.errors import CheckpointError
from caldera.files import committed, sha256, write_json
from caldera.packed import MatrixSpec, PackedMatrix

VERSION = 1
MANIFEST, REST = "manifest.json", "model-rest.safetensors"


def block_file(index: int) -> str:
    """Name of the shard that holds block `index`."""
    return f"model-block-{index:05d}.safetensors"


def write_matrices(directory: Path, file: str, matrices: Iterable[PackedMatrix]) -> None:
    """Commit one shard; the specs travel in its metadata, so that a shard is readable alone."""
    matrices = list(matrices)
    tensors = {f"{m.spec.name}.{key}": t.contiguous().cpu() for m in matrices for key, t in m.tensors.items()}
    specs = json.dumps([m.spec.to_json() for m in matrices])
    _write(directory / file, tensors, {"format": "pt", "matrices": specs})


def write_rest(directory: Path, state: dict[str, Tensor], covered: set[str], dtype: torch.dtype) -> None:
    """Commit all tensors of `state` but the `covered` ones, floating ones as `dtype`; shared tensors once."""
    seen, rest = set(), {}
    for name, tensor in state.items():
        same = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if name in covered or same in seen:
            continue
        seen.add(same)
        rest[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    _write(directory / REST, rest, {"format": "pt"})


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Commit a safetensors file whose header is sorted: the library orders metadata at random, and the same tensors
    are to give the same bytes."""
    data = save(tensors, metadata)
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    with committed(path) as part, part.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.write(memoryview(data)[8 + size :])


def write_manifest(directory: Path, details: dict) -> None:
    """Check nothing, list everything: the last act of saving. `details` is free JSON about the fit."""
    shards = sorted(directory.glob("model-*.safetensors"))
    matrices = {s["name"]: s for shard in shards for s in _specs(shard)}
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(directory.glob("[!.]*")) if f.is_file()
    }
    files.pop(MANIFEST, None)
    write_json(
        directory / MANIFEST, {"format": "caldera", "version": VERSION, "matrices": matrices, "files": files} | details
    )


def _specs(shard: Path) -> list[dict]:
    with safe_open(shard, "pt") as opened:
        return json.loads((opened.metadata() or {}).get("matrices", "[]"))


def read_manifest(directory: Path, verify: bool = True) -> dict:
    """The manifest; with `verify` every file is there, whole and unchanged. Raises CheckpointError by name."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}: it is no finished CALDERA checkpoint")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): it was cut short or changed") from error
    if not isinstance(manifest, dict) or not {"format", "version", "matrices", "files"} <= set(manifest):
        raise CheckpointError(f"{path} is no whole manifest of a checkpoint: it was cut short or changed")
    if manifest.get("format") != "caldera" or manifest.get("version", 0) > VERSION:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('version')} is not known here"
        )
    for name, listed in manifest["files"].items() if verify else ():
        _verify(Path(directory) / name, listed)
    return manifest


def _verify(file: Path, listed: dict) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: compress again, or copy the whole folder")
    if file.stat().st_size != listed["bytes"]:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {listed['bytes']}: it was cut short")
    if sha256(file) != listed["sha256"]:
        raise CheckpointError(f"{file} differs from its checksum in {MANIFEST}: it was changed")


def read_matrices(directory: Path, file: str) -> list[PackedMatrix]:
    """The matrices of one shard. Raises CheckpointError when it is unreadable or not as its specs declare."""
    shard = Path(directory) / file
    try:
        with safe_open(shard, "pt") as opened:
            specs = [MatrixSpec.from_json(s) for s in json.loads((opened.metadata() or {})["matrices"])]
            return [PackedMatrix(s, {k: opened.get_tensor(f"{s.name}.{k}") for k in s.layout()}) for s in specs]
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{shard} is unreadable: {error}") from error


def load_dense(directory: Path, dtype: torch.dtype = torch.float32, verify: bool = True) -> nn.Module:
    """The causal LM of a checkpoint with its matrices dequantized to `dtype`, one block at a time, in eval mode."""
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(directory)
    manifest = read_manifest(directory, verify)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
    rest = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(directory / REST).items()}
    model.load_state_dict(rest, strict=False, assign=True)
    places = named_matrices(model)
    for file in (f for f in manifest["files"] if f.startswith("model-block-")):
        for matrix in read_matrices(directory, file):
            places[matrix.spec.name].write(matrix.dequantize().to(dtype))
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise CheckpointError(f"{directory} holds no value for {', '.join(missing[:3])}")
    return model.eval()
