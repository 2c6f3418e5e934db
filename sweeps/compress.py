"""A model's linear layers decomposed block by block into a packed checkpoint."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from caldera import Decomposition, Method, decompose, predict_error, prepare
from caldera.blocks import decoder_blocks, linears
from caldera.checkpoint import block_file, write_manifest, write_matrices, write_rest
from sweeps.calibration import Moments
from sweeps.progress import Stage

COPIED = ("*.json", "*.jinja", "*.model", "*.txt")  # configuration and tokenizer, as the source has them


def compress(
    source: Path,
    model: nn.Module,
    moments: Moments,
    method: Method,
    target: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Stage,
) -> list[dict]:
    """Write the packed checkpoint of `model` (float32, from the folder `source`) to `target`.

    What is not compressed is stored as `dtype`. Returns a summary of every matrix, as a record lists them.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in (f for pattern in COPIED for f in source.glob(pattern) if ".safetensors." not in f.name):
        shutil.copyfile(file, target / file.name)
    name, blocks = decoder_blocks(model)
    summaries = []
    for index, block in enumerate(blocks):
        found = compress_block(block, f"{name}.{index}", moments, index, method, device, progress.at)
        write_matrices(target, block_file(index), [d.packed for d, *_ in found])
        summaries += [summary(*matrix) for matrix in found]
        progress(index + 1, len(blocks))
    write_rest(target, model.state_dict(), {s["name"] for s in summaries}, dtype)
    write_manifest(target, {"method": vars(method)})
    return summaries


def compress_block(
    block: nn.Module, name: str, moments: Moments, index: int, method: Method, device: torch.device, at: Callable
) -> list[tuple[Decomposition, float, float]]:
    """Decompositions of a block's matrices, each with seconds and predicted error; shared moments share a basis."""
    layers, found = linears(block), []
    options = {"seed": method.seed, "sigma": method.sigma, "transformed": method.transform}
    loaded = moments.load(index)
    for group in moments.groups(index):
        h = loaded[group.name].to(device)
        at(f"{name}.{group.name}")
        basis = prepare(h, name=f"{name}.{group.name}", **options)
        for member in group.members:
            at(f"{name}.{member}")
            start = time.perf_counter()
            weight = layers[member].weight.detach().to(device, torch.float32)
            result = decompose(weight, h, method, name=f"{name}.{member}", basis=basis)
            seconds = time.perf_counter() - start
            predicted = predict_error(weight, h, method, name=f"{name}.{member}", basis=basis)
            found.append((result, seconds, predicted))
    return found


def summary(d: Decomposition, seconds: float, predicted: float) -> dict:
    """What a record says of one matrix; `predicted` is the error that theory expects it to have."""
    spec = d.spec
    axes = {"shape": list(spec.shape), "rank": spec.rank, "q": spec.q, "l": spec.l, "r": spec.r}
    bits = {"nominal_bits": d.nominal_bits, "stored_bits": d.stored_bits, "stored_bytes": d.stored_bytes}
    errors = {"relative_error": d.relative_error, "predicted_error": predicted}
    fit = errors | {"trace": d.trace, "sigma": d.sigma, "seconds": seconds}
    return {"name": spec.name} | axes | bits | fit
