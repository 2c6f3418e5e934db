"""A packed checkpoint on disk: one safetensors file a decoder block, one for the rest, and a manifest written last.

Beside them are transformers' files: an index of the shards, and a config.json that says that they are packed. A folder
without `manifest.json` is unfinished. The manifest lists every file with its size and sha256, and the spec of every
compressed matrix; tensors of a matrix are called `<matrix>.<part>_<tensor>`, say `...q_proj.l_codes`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from caldera.blocks import named_matrices
from caldera.errors import CheckpointError
from caldera.files import sha256, write_json
from caldera.layers import place
from caldera.packed import MatrixSpec, PackedMatrix
from caldera.shards import mark_config, read_specs, verify_metadata, write_index
from caldera.tensorfile import Layout, file_bytes, write_tensors

VERSION = 1
MANIFEST, REST = "manifest.json", "model-rest.safetensors"


def block_file(index: int) -> str:
    """Name of the shard that holds block `index`."""
    return f"model-block-{index:05d}.safetensors"


def write_matrices(directory: Path, file: str, matrices: Iterable[PackedMatrix]) -> None:
    """Commit one shard; the specs travel in its metadata, so that a shard is readable alone."""
    matrices = list(matrices)
    tensors = {f"{m.spec.name}.{key}": t.contiguous().cpu() for m in matrices for key, t in m.tensors.items()}
    layout, metadata = _shard([m.spec for m in matrices])
    write_tensors(directory / file, layout, lambda name: [tensors[name]], metadata)


def shard_bytes(specs: list[MatrixSpec]) -> int:
    """Size of the file that `write_matrices` makes of such matrices."""
    return file_bytes(*_shard(specs))


def _shard(specs: list[MatrixSpec]) -> tuple[Layout, dict[str, str]]:
    layout = {f"{s.name}.{key}": (t.dtype, tuple(t.shape)) for s in specs for key, t in s.layout().items()}
    return layout, {"format": "pt", "matrices": json.dumps([s.to_json() for s in specs])}


def write_rest(
    directory: Path,
    state: dict[str, Tensor],
    covered: set[str],
    dtype: torch.dtype,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Commit all tensors of `state` but the `covered` ones, floating ones as `dtype`; shared tensors once.

    `read(name)` gives a tensor's values, one at a time, where `state` has them without data.
    """
    layout, read = _rest(state, covered, dtype), read or state.__getitem__
    write_tensors(directory / REST, layout, lambda name: [read(name).to(layout[name][0])], {"format": "pt"})


def rest_bytes(state: dict[str, Tensor], covered: set[str], dtype: torch.dtype) -> int:
    """Size of the file that `write_rest` makes of a state."""
    return file_bytes(_rest(state, covered, dtype), {"format": "pt"})


def _rest(state: dict[str, Tensor], covered: set[str], dtype: torch.dtype) -> Layout:
    seen, layout = set(), {}
    for name, tensor in state.items():
        same = id(tensor) if tensor.is_meta else (tensor.data_ptr(), tensor.shape, tensor.stride())
        if name in covered or same in seen:
            continue
        seen.add(same)
        layout[name] = (dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
    return layout


def write_manifest(directory: Path, details: dict) -> None:
    """Check nothing, list everything: the last act of saving. `details` is free JSON about the fit.

    Before that, an index and a mark in config.json make the folder one that transformers loads.
    """
    write_index(directory)
    if (directory / "config.json").is_file():
        mark_config(directory, VERSION, _dtype_of(directory / REST))
    specs = read_specs(sorted(directory.glob("model-*.safetensors")))
    matrices = {name: spec.to_json() for name, spec in specs.items()}
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(directory.glob("[!.]*")) if f.is_file()
    }
    files.pop(MANIFEST, None)
    write_json(
        directory / MANIFEST, {"format": "caldera", "version": VERSION, "matrices": matrices, "files": files} | details
    )


def _dtype_of(rest: Path) -> str:
    """The type of the floating tensors that are not compressed: `write_rest` gives all of them one."""
    with safe_open(rest, "pt") as opened:
        types = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    known = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    return next((known[t] for t in sorted(types) if t in known), "float32")


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


def verified_specs(shards: list[Path]) -> dict[str, MatrixSpec]:
    """Specs of the matrices in a checkpoint's shards, which are whole and unchanged. Raises CheckpointError by name.

    Only the weights are looked at, not the configuration and the tokenizer, which people edit.
    """
    directory = shards[0].parent
    files = read_manifest(directory, verify=False)["files"] if (directory / MANIFEST).is_file() else None
    for shard in shards:
        if files is None:
            verify_metadata(shard)
        elif shard.name in files:
            _verify(shard, files[shard.name])
        else:
            raise CheckpointError(f"{shard} is not in {MANIFEST}: save a model into an empty folder")
    return read_specs(shards)


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
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is built is an ordinary model
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    rest = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(directory / REST).items()}
    model.load_state_dict(rest, strict=False, assign=True)
    shards = (file for file in manifest["files"] if file.startswith("model-block-"))
    place(named_matrices(model), (matrix for shard in shards for matrix in read_matrices(directory, shard)), dtype)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise CheckpointError(f"{directory} holds no value for {', '.join(missing[:3])}")
    return model.eval()
