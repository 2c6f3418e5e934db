"""Which matrices a model has, and which of them are compressed."""

import functools
from pathlib import Path

from caldera.errors import UserError
from caldera.matrices import chosen
from sweeps.models import fingerprint
from sweeps.store import once


@functools.cache
def inventory(directory: Path, cache: Path, trust_remote_code: bool = False) -> dict[str, list[int]]:
    """Shape (m, n) of every matrix that is compressed, by name; found once, on a model without data."""
    file = cache / "inventories" / f"{fingerprint(directory, cache)}.json"
    found, _ = once(file, lambda: _shapes(directory, trust_remote_code))
    return found


def _shapes(directory: Path, trust_remote_code: bool) -> dict[str, list[int]]:
    from caldera.blocks import named_matrices

    return {name: list(m.shape) for name, m in named_matrices(_without_data(directory, trust_remote_code)).items()}


@functools.cache
def rest_of_files(directory: Path, trust_remote_code: bool, names: frozenset[str], dtype: str) -> tuple[int, int]:
    """Of a checkpoint in which the matrices of these names are packed: bytes of the tensor files without them, and
    parameters of the whole model."""
    import torch

    from caldera.blocks import covered, decoder_blocks
    from caldera.checkpoint import rest_bytes, shard_bytes

    model = _without_data(directory, trust_remote_code)
    model.tie_weights()
    rest = rest_bytes(model.state_dict(keep_vars=True), covered(model, names), getattr(torch, dtype))
    blocks = len(decoder_blocks(model)[1])
    return rest + blocks * shard_bytes([]), sum(p.numel() for p in model.parameters())


def _without_data(directory: Path, trust_remote_code: bool):
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path={directory} is no causal language model: {str(error).splitlines()[0]}") from error


def chosen_of(shapes: dict[str, list[int]], model: dict) -> dict[str, list[int]]:
    """The matrices that the patterns choose. Raises UserError when there is none."""
    found = {name: shape for name, shape in shapes.items() if chosen(name, model["include"], model["exclude"])}
    if not found:
        raise UserError(
            f"model.include={model['include']} and model.exclude={model['exclude']} choose no matrix: a full name is,"
            f" for example, {next(iter(shapes))}"
        )
    return found
