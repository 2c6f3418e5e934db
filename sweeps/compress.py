"""A model's linear layers decomposed block by block into a packed checkpoint."""

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from caldera import Basis, Decomposition, Method, decompose, predict_error, prepare
from caldera.blocks import covered, named_matrices
from caldera.checkpoint import block_file, write_manifest, write_matrices, write_rest
from caldera.devices import release
from caldera.matrices import matrices
from caldera.streamed import Source
from sweeps.inputs import CorrectedPrefix, Given, Original
from sweeps.progress import Stage

COPIED = ("*.json", "*.jinja", "*.model", "*.txt")  # configuration and tokenizer, as the source has them
Inputs = Original | CorrectedPrefix


@dataclass(frozen=True)
class Fit:
    """What every matrix is compressed with: the method, which matrices (full names), where to compute."""

    method: Method
    names: frozenset[str]
    device: torch.device


def compress(
    source: Path, model: Source, inputs: Inputs, fit: Fit, target: Path, dtype: torch.dtype, progress: Stage
) -> list[dict]:
    """Write the packed checkpoint of `model` (as it is stored in the folder `source`) to `target`.

    What is not compressed is stored as `dtype`. Returns a summary of every matrix, as a record lists them.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in (f for pattern in COPIED for f in source.glob(pattern) if ".safetensors." not in f.name):
        shutil.copyfile(file, target / file.name)
    names = {full for full in named_matrices(model.model) if full in fit.names}
    summaries = []
    for index in range(model.count):
        packed = []
        for d, facts in compress_block(model, names, inputs, index, fit, progress.at):
            packed.append(d.packed)
            summaries.append(summary(d) | facts)
            release()
        write_matrices(target, block_file(index), packed)
        release()
        _name_few_tokens(summaries[len(summaries) - len(packed) :], progress)
        progress(index + 1, model.count)
    if left := sorted(names - {s["name"] for s in summaries}):
        progress.reporter.say(f"  warning: not compressed, as no calibration token reaches them: {', '.join(left)}")
    held = covered(model.model, {s["name"] for s in summaries})
    write_rest(target, model.state(), held, dtype, model.read)
    write_manifest(target, {"method": vars(fit.method)})
    return summaries


def _name_few_tokens(summaries: list[dict], progress: Stage) -> None:
    if few := [f"{s['name']} ({s['tokens']})" for s in summaries if s["few_tokens"]]:
        progress.reporter.say(
            "  warning: experts with fewer tokens than inputs are fitted to the other experts' tokens too; raise"
            f" calibration.sequences: {', '.join(few)}"
        )


def compress_block(
    model: Source, names: set[str], inputs: Inputs, index: int, fit: Fit, at: Callable
) -> Iterator[tuple[Decomposition, dict]]:
    """Decompositions of a block's matrices, and what else a record says of each; a group shares one basis."""
    block = f"{model.name}.{index}"
    layers = {f"{block}.{own}": m for own, m in matrices(model.block(index)).items() if f"{block}.{own}" in names}
    for given in itertools.chain.from_iterable(inputs.stages(index)):
        members = [name for name in given.group.members if f"{block}.{name}" in layers]
        if not members:
            continue
        at(f"{block}.{given.group.name}")
        basis = prepare(given.moments, name=f"{block}.{given.group.name}", **fit.method.basis_options)
        for name in members:
            at(f"{block}.{name}")
            weight = layers[f"{block}.{name}"].read().to(fit.device, torch.float32)
            found, approximation, facts = _compress_matrix(weight, given, name, f"{block}.{name}", basis, fit.method)
            inputs.install(name, approximation)
            yield found, facts


def _compress_matrix(
    weight: Tensor, given: Given, name: str, full: str, basis: Basis, method: Method
) -> tuple[Decomposition, Tensor, dict]:
    start = time.perf_counter()
    wanted = given.target(name, weight)
    found = decompose(wanted, given.moments, method, name=full, basis=basis)
    seconds = time.perf_counter() - start
    # theory speaks of the moments that were fitted to, and for H = I these are not the measured ones
    predicted = None if basis.identity else predict_error(wanted, given.moments, method, name=full, basis=basis)
    approximation = found.dequantize()
    error = given.output_error(weight, approximation)
    error = found.relative_error if error is None else error
    errors = {"predicted_error": predicted, "output_error": error}
    return found, approximation, {"tokens": given.tokens, "few_tokens": given.few, "seconds": seconds} | errors


def summary(d: Decomposition) -> dict:
    """What a record says of one matrix."""
    spec = d.spec
    axes = {"shape": list(spec.shape), "rank": spec.rank, "q": spec.q, "l": spec.l, "r": spec.r}
    bits = {"nominal_bits": d.nominal_bits, "stored_bits": d.stored_bits, "stored_bytes": d.stored_bytes}
    fit = {"relative_error": d.relative_error, "trace": d.trace}
    numerics = {"sigma": d.sigma, "jitters": d.jitters, "init_rank": d.init_rank}
    return {"name": spec.name} | axes | bits | fit | numerics
