"""All matrices of SmolLM2 decomposed at 15 x 10 iterations, and by `method=fast`."""

import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from torch import Tensor

from bench.pipeline import checkpoint
from bench.problems import METHOD, warm_up
from bench.rows import Row
from bench.timing import once
from caldera import Method, decompose, prepare
from caldera.blocks import decoder_blocks, named_matrices
from caldera.streamed import Whole
from sweeps.calibration import Calibration, ensure_calibration
from sweeps.models import load_model, load_tokenizer
from sweeps.parallel import Workers
from sweeps.schema import register
from sweeps.texts import load_texts, token_rows

Problem = tuple[str, list[tuple[str, Tensor]], Tensor]  # a group's name, its matrices W (m, n) by name, its H (n, n)
RANK = 32
ROWS, LENGTH = 4, 256  # of calibration: the moments cost nothing here, and are as hard as any


def matrices(quick: bool) -> list[Row]:
    """Seconds for all matrices by either method, and by how much the preset's errors are larger on average."""
    warm_up()
    method = replace(METHOD, rank=RANK)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        problems = list(model_problems(Path(folder)))
        count = sum(len(members) for _, members, _ in problems)
        return matrix_rows(problems, method, preset(method), f"rank {RANK}, {count} matrices")


def matrix_rows(problems: list[Problem], method: Method, fast: Method, case: str) -> list[Row]:
    """Either method in one process with all threads, and in as many processes of one thread."""
    threads, rows, found = torch.get_num_threads(), [], {}
    for name, chosen in (("15 x 10", method), ("method=fast", fast)):
        for workers in (Workers(), Workers(threads)):
            run = once(lambda: errors(problems, chosen, workers))  # noqa: B023 (called at once)
            processes = f"1 process, {threads} threads" if workers.count == 1 else f"{threads} processes"
            rows.append(Row("all matrices", f"{case}, {name}, {processes}", run.seconds, error=mean(run.result)))
            found[name] = run.result
    loss = mean([100 * (a / b - 1) for a, b in zip(found["method=fast"], found["15 x 10"])])
    return [*rows, Row("loss of relative error by method=fast", case, loss, "%")]


def model_problems(folder: Path) -> Iterator[Problem]:
    """Every group of matrices with the moments of a small calibration, collected in `folder`."""
    directory = checkpoint()
    model = load_model(directory, "float32")
    source = Whole(model)
    rows = token_rows(load_texts("embedded_calibration"), load_tokenizer(directory), ROWS, LENGTH, 0)
    calibration = ensure_calibration(folder, lambda: source, lambda: rows, lambda _done, _total: None)
    return of_calibration(model, calibration)


def of_calibration(model, calibration: Calibration) -> Iterator[Problem]:
    """Every group of matrices with its moments."""
    (prefix, blocks), found = decoder_blocks(model), named_matrices(model)
    for index in range(len(blocks)):
        moments = calibration.moments(index)
        for group in calibration.groups(index):
            names = [f"{prefix}.{index}.{member}" for member in group.members]
            yield f"{prefix}.{index}.{group.name}", [(name, found[name].read()) for name in names], moments[group.name]


def errors(problems: list[Problem], method: Method, workers: Workers) -> list[float]:
    """Relative errors of all matrices, in order."""
    found = dict(workers.map(partial(group_errors, method), range(len(problems)), problems.__getitem__))
    return [error for index in range(len(problems)) for error in found[index]]


def group_errors(method: Method, problem: Problem, _device: torch.device) -> list[float]:
    """Of the matrices of a group, which share a basis, as in a sweep."""
    group, members, moments = problem
    basis = prepare(moments, name=group, **method.basis_options)
    return [decompose(w.float(), moments, method, name=name, basis=basis).relative_error for name, w in members]


def preset(like: Method) -> Method:
    """method=fast with rank and quantizers of `like`."""
    register()
    with initialize_config_module("conf", version_base="1.3"):
        settings = compose("config", ["method=fast"]).method
    return replace(like, **{f.name: settings[f.name] for f in fields(Method) if f.name in settings})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
