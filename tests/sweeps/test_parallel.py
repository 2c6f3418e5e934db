"""Workers: the same bytes whatever their number and kind, and what a killed one had not finished is done again."""

import hashlib
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from caldera import Method, decompose
from caldera.blocks import named_matrices
from caldera.correction import Correction
from caldera.errors import CalderaError, NumericalError, UserError
from sweeps.calibration import ensure_calibration
from sweeps.compress import CheckpointFolder, Fit, compress, notes_of
from sweeps.inputs import CorrectedPrefix, Original
from sweeps.models import open_model
from sweeps.parallel import Workers, check_backend
from sweeps.progress import Reporter
from sweeps.shared import Shared
from tests.caldera import tiny_models
from tests.caldera.oracles import gaussian, second_moments

ROWS = tiny_models.token_rows(4, 24)
METHOD = Method(rank=2, outer_iterations=1, inner_iterations=1, q="trellis_2bit", l="e8p_2bit", r="e8p_2bit")
LOKY, RAY = Workers(2), Workers(2, backend="ray")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(model, tmp_path_factory):
    """inputs(mode) of the tiny model, as `compress` wants them."""
    source = open_model(model, "float32")
    calibration = ensure_calibration(
        tmp_path_factory.mktemp("moments"), lambda: source, lambda: ROWS, lambda *_: None, True
    )

    def _inputs(mode: str):
        corrected = mode == "corrected"
        return CorrectedPrefix(calibration, source, ROWS, Correction()) if corrected else Original(calibration)

    return _inputs


def compressed(model, inputs, target, workers=Workers(), **options):  # noqa: B008 (frozen)
    names = frozenset(named_matrices(open_model(model).model))
    fit = Fit(METHOD, names, torch.device("cpu"))
    with Reporter("test").stage("compress") as progress:
        opened = partial(open_model, model)
        return compress(
            model, opened, inputs, fit, CheckpointFolder(target, "key"), torch.float32, progress, workers, **options
        )


def files(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.mark.parametrize("mode, workers", [("original", LOKY), ("corrected", LOKY), ("original", RAY)])
def test_workers_change_no_byte(model, inputs, tmp_path, mode, workers):
    alone = compressed(model, inputs(mode), tmp_path / "alone")
    together = compressed(model, inputs(mode), tmp_path / "together", workers)
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    assert [m["name"] for m in together.matrices] == [m["name"] for m in alone.matrices]
    assert together.peak_rss_bytes > 0


@pytest.mark.parametrize("q", ["trellis_2bit", "e8p_2bit"])
def test_threads_change_no_byte(q):
    """Of a size at which LAPACK and long sums split their work."""
    weight, moments = gaussian(600, 640), second_moments(640)
    method = Method(rank=16, q=q, l="e8p_2bit", r="e8p_2bit", outer_iterations=2, inner_iterations=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(decompose(weight, moments, method).packed.tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# ------------------------------------------------------------------------------------------------------------- survival
def once_killed(folder: Path, key: int, device: torch.device) -> int:
    """A task whose third job kills its process the first time."""
    with (folder / "log").open("a") as log:
        log.write(f"{key}\n")
    if key == 2 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return key * key


@pytest.mark.parametrize("workers", [LOKY, RAY], ids=["loky", "ray"])
def test_what_a_killed_worker_had_not_finished_is_done_again(tmp_path, workers):
    found = dict(workers.map(partial(once_killed, tmp_path), range(6)))
    assert (tmp_path / "killed").exists()
    assert found == {key: key * key for key in range(6)}
    assert (tmp_path / "log").read_text().split().count("2") == 2


def always_killed(key: int, device: torch.device) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_are_always_killed_end_in_one_sentence():
    with pytest.raises(CalderaError, match=r"killed 3 times before they finished anything .* compute.workers below 2"):
        list(LOKY.map(always_killed, range(2)))


def failing(key: int, device: torch.device) -> None:
    error = NumericalError("no number")
    error.matrix = f"model.layers.{key}.mlp.down_proj"
    raise error


def test_an_exception_comes_with_the_matrix_that_it_is_about():
    with pytest.raises(NumericalError, match="no number") as caught:
        list(LOKY.map(failing, range(2)))
    assert caught.value.matrix.endswith("mlp.down_proj")


def test_jobs_are_dealt_out_to_the_devices_in_turn():
    workers = Workers(2, devices=("cpu", "meta"))
    assert dict(workers.map(placed, range(4))) == {0: "cpu", 1: "meta", 2: "cpu", 3: "meta"}


def placed(key: int, device: torch.device) -> str:
    return str(device)


@pytest.mark.parametrize("mode", ["original", "corrected"])
def test_finished_blocks_stay_and_damaged_ones_are_done_again(model, inputs, tmp_path, mode):
    compressed(model, inputs(mode), tmp_path / "whole")
    target = tmp_path / "again"
    compressed(model, inputs(mode), target)
    first, second = sorted(target.glob("model-block-*"))
    kept = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    found = compressed(model, inputs(mode), target)
    assert first.stat().st_mtime_ns == kept and files(target) == files(tmp_path / "whole")
    assert found.shares()["blocks"] == 0.5 and len(found.matrices) == 14


def test_another_key_begins_anew(model, inputs, tmp_path):
    compressed(model, inputs("original"), tmp_path / "a")
    (notes_of(tmp_path / "a") / "key.json").write_text('{"key": "other"}')
    assert compressed(model, inputs("original"), tmp_path / "a").shares()["blocks"] == 0


# -------------------------------------------------------------------------------------------------------------- sharing
def test_factors_and_subspaces_are_shared_and_change_no_byte(model, inputs, tmp_path):
    shared = Shared(tmp_path / "shared")
    alone = compressed(model, inputs("original"), tmp_path / "alone")
    first = compressed(model, inputs("original"), tmp_path / "first", shared=shared)
    again = compressed(model, inputs("original"), tmp_path / "again", shared=shared)
    assert alone.shares() == first.shares() == {"blocks": 0, "factorisations": 0, "subspaces": 0}
    assert again.shares() == {"blocks": 0, "factorisations": 1, "subspaces": 1}
    assert files(tmp_path / "alone") == files(tmp_path / "first") == files(tmp_path / "again")
    damaged = next((tmp_path / "shared").glob("*/factors-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    mended = compressed(model, inputs("original"), tmp_path / "mended", shared=shared)
    assert mended.shares()["factorisations"] == 7 / 8
    assert files(tmp_path / "mended") == files(tmp_path / "alone")


def test_backends():
    check_backend("loky")
    check_backend("ray")
    with pytest.raises(UserError, match=r"compute.backend='dask' must be one of loky, ray"):
        check_backend("dask")
