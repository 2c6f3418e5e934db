"""All matrices of SmolLM2 decomposed at 15 x 10 iterations, and by the preset `method=fast` if there is one."""

import importlib.resources
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from hydra import compose, initialize_config_module
from torch import Tensor

from bench.pipeline import checkpoint
from bench.problems import METHOD, warm_up
from bench.rows import Row
from bench.timing import once
from caldera import Method, decompose, prepare
from caldera.blocks import decoder_blocks, named_matrices
from sweeps.calibration import Calibration, ensure_calibration
from sweeps.models import load_model, load_tokenizer
from sweeps.schema import register
from sweeps.texts import load_texts, token_rows

RANK = 32
ROWS, LENGTH = 4, 256  # of calibration: the moments cost nothing here, and are as hard as any


def matrices(quick: bool) -> list[Row]:
    """Seconds for all matrices by either method, and by how much the preset's errors are larger on average."""
    warm_up()
    method = replace(METHOD, rank=RANK)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        problems = list(model_problems(Path(folder)))
        count = sum(len(members) for _, members, _ in problems)
        case = f"rank {RANK}, {count} matrices"
        slow = once(lambda: errors(problems, method))
        rows = [Row("all matrices", f"{case}, 15 x 10", slow.seconds, error=mean(slow.result))]
        if preset := fast(method):
            quick_run = once(lambda: errors(problems, preset))
            rows.append(Row("all matrices", f"{case}, method=fast", quick_run.seconds, error=mean(quick_run.result)))
            loss = mean([100 * (a / b - 1) for a, b in zip(quick_run.result, slow.result)])
            rows.append(Row("loss of relative error by method=fast", case, loss, "%"))
    return rows


Problem = tuple[str, list[tuple[str, Tensor]], Tensor]  # a group's name, its matrices W (m, n) by name, its H (n, n)


def model_problems(folder: Path) -> Iterator[Problem]:
    """Every group of matrices with the moments of a small calibration, collected in `folder`."""
    directory = checkpoint()
    model = load_model(directory, "float32")
    rows = token_rows(load_texts("embedded_calibration"), load_tokenizer(directory), ROWS, LENGTH, 0)
    calibration = ensure_calibration(folder, lambda: model, lambda: rows, lambda _done, _total: None)
    return of_calibration(model, calibration)


def of_calibration(model, calibration: Calibration) -> Iterator[Problem]:
    """Every group of matrices with its moments."""
    (prefix, blocks), found = decoder_blocks(model), named_matrices(model)
    for index in range(len(blocks)):
        moments = calibration.moments(index)
        for group in calibration.groups(index):
            names = [f"{prefix}.{index}.{member}" for member in group.members]
            yield f"{prefix}.{index}.{group.name}", [(name, found[name].read()) for name in names], moments[group.name]


def errors(problems: list[Problem], method: Method) -> list[float]:
    """Relative errors of all matrices; those of a group share a basis, as in a sweep."""
    found = []
    for group, members, moments in problems:
        basis = prepare(moments, name=group, **method.basis_options)
        found += [decompose(w.float(), moments, method, name=name, basis=basis).relative_error for name, w in members]
    return found


def fast(like: Method) -> Method | None:
    """The preset with rank and quantizers of `like`, None if there is none."""
    if not importlib.resources.files("conf").joinpath("method/fast.yaml").is_file():
        return None
    register()
    with initialize_config_module("conf", version_base="1.3"):
        settings = compose("config", ["method=fast"]).method
    return replace(like, **{f.name: settings[f.name] for f in fields(Method) if f.name in settings})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
