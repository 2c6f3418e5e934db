"""Calibration, compression and evaluation stay on the device: all of them run on tensors that have one but no data."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import conf
import sweeps.calibration
import sweeps.fitting
from caldera import Decomposition, Method, PackedMatrix, decompose, predict_error, prepare
from caldera.blocks import Stream, decoder_blocks, input_groups, residual_writers
from caldera.correction import Correction, Target
from caldera.devices import precision
from caldera.matrices import matrices
from caldera.moments import collect, pooled
from caldera.packed import MatrixSpec
from caldera.quantizers import FAMILIES
from caldera.replay import Replay
from caldera.rows import Rows
from caldera.streamed import Whole
from caldera.theory import _measured
from caldera.wiring import replay_plan
from sweeps.calibration import ensure_calibration
from sweeps.compress import CheckpointFolder, compress
from sweeps.fitting import Fit, MatrixJob, fit_block, fit_matrix
from sweeps.inputs import CorrectedPrefix
from sweeps.parallel import Workers
from sweeps.perplexity import _window_scores
from sweeps.progress import Reporter
from sweeps.reference import Kept, Reference
from sweeps.settings import method_of
from sweeps.shared import SharedBlock
from tests.caldera.tiny_models import HEADS, SIZES, TOKENS, llama, token_rows
from tests.caldera.watching import DEVICE, Watch, empty, reads

PLACE = torch.device(DEVICE)
METHODS = sorted(p.stem for p in (Path(conf.__path__[0]) / "method").glob("*.yaml") if p.stem != "none")
PLAIN = Method(rank=2, q="e8p_2bit", l="bf16", r="bf16", outer_iterations=1)


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


def on_device(*tensors: torch.Tensor) -> bool:
    return bool(tensors) and all(isinstance(t, FakeTensor) and t.device.type == DEVICE for t in tensors)


def model_of(kind: str = "Llama"):
    """A tiny model on the device, without data."""
    with torch.device(DEVICE):
        config = getattr(transformers, f"{kind}Config")(**SIZES, **HEADS, **TOKENS)
        return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def entered(model) -> tuple[torch.nn.Module, Stream]:
    """The model's first block, and rows of tokens that come from the host, in front of it."""
    return decoder_blocks(model)[1][0], Stream.open(model, torch.zeros(2, 9, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------- calibration
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_moments_are_collected_on_the_device(kind, fake):
    block, stream = entered(model_of(kind))
    assert on_device(*stream.hidden)
    with Watch() as watch, reads() as found:
        groups, writers = input_groups(block, stream, 0), residual_writers(block, stream, 0)
        moments, few = pooled(groups, collect(block, stream, 0, groups, "block"))
    assert [g.width for g in groups] == [32, 32, 32, 44] and writers == [] == few
    assert on_device(*stream.hidden, *moments.values())
    assert not watch.waits and not watch.to_host and len(found) <= 2 + len(groups)  # the writers; NaN in a group


def test_a_replay_stays_on_the_device(fake):
    block, stream = entered(model_of())
    groups = input_groups(block, stream, 0)
    with Watch() as watch, reads() as found:
        plan = replay_plan(block, stream, 0, groups, None)
    assert not watch.waits and not watch.to_host and len(found) == 2  # what matters; whether a replay shows the same
    replay = Replay(block, stream, 0, plan)
    assert all(on_device(*replay.inputs(step)) for step in range(len(groups))) and on_device(*replay.outputs())


def test_precision_is_full_while_moments_are_collected_and_matrices_are_fitted(tmp_path, monkeypatch):
    """And the process' own setting is back afterwards."""
    matmul, seen = torch.backends.cuda.matmul, {}

    def noting(owner, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args, **kwargs):
            seen.setdefault(name, set()).add(matmul.fp32_precision)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in (
        (sweeps.calibration, "collect"), (sweeps.fitting, "decompose"), (Target, "of"), (Replay, "_run"),
    ):  # fmt: skip
        noting(owner, name)
    model, rows = Whole(llama()), token_rows(6, 24)
    (tmp_path / "source").mkdir()
    with precision(matmul, "tf32"):
        found = ensure_calibration(tmp_path / "moments", lambda: model, lambda: rows, lambda *_: None, hidden=True)
        inputs, fit = CorrectedPrefix(found, model, rows, Correction()), Fit(PLAIN, NAMES, torch.device("cpu"))
        with Reporter("x").stage("compress") as progress:
            compress(
                tmp_path / "source",
                lambda: model,
                inputs,
                fit,
                CheckpointFolder(tmp_path / "packed"),
                torch.float32,
                progress,
            )
        assert matmul.fp32_precision == "tf32"
    assert seen == {key: {"ieee"} for key in ("collect", "decompose", "of", "_run")}


# ---------------------------------------------------------------------------------------------------------- compression
NAMES = frozenset({"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"})


@dataclass
class Known:
    """A calibration as it is read: from files, by the host."""

    stream: Stream
    found: list

    def groups(self, _block: int) -> list:
        return self.found

    def residual_writers(self, _block: int) -> list[str]:
        return ["self_attn.o_proj", "mlp.down_proj"]

    def tokens(self, _block: int) -> dict[str, int]:
        return {g.name: 18 for g in self.found}

    def moments(self, _block: int, names: list[str]) -> dict[str, torch.Tensor]:
        return {g.name: torch.empty(g.width, g.width) for g in self.found}

    def hidden(self, _block: int, device: torch.device) -> Rows:
        return Rows([torch.empty(x.shape).to(device) for x in self.stream.hidden])


def test_a_block_behind_a_compressed_prefix_stays_on_the_device(fake, monkeypatch):
    """Both streams, what the correction asks for, the fit of every matrix, and its place in the compressed block."""
    model = model_of()
    block, stream = entered(model)
    groups = input_groups(block, stream, 0)
    source = Whole(model)
    monkeypatch.setattr(source, "block", lambda index: source.blocks[index])  # modules of fake tensors have no copies
    inputs = CorrectedPrefix(Known(stream, groups), source, torch.zeros(2, 9, dtype=torch.long), Correction())
    layers = {f"model.layers.0.{name}": m for name, m in matrices(block).items() if f"model.layers.0.{name}" in NAMES}
    fit = Fit(PLAIN, NAMES, PLACE)
    with Watch() as watch:
        found = fit_block(layers, "model.layers.0", inputs, 0, fit, SharedBlock(None, 0), Workers(devices=(DEVICE,)))
    assert not watch.to_host and set(watch.waits) <= {"_linalg_check_errors", "_linalg_svd"}
    assert set(found) == NAMES and on_device(*inputs.stream.hidden)
    assert all(on_device(*d.packed.tensors.values(), d.dequantize()) for d, _ in found.values())


def test_a_fit_in_another_process_moves_what_it_is_given(fake):
    weight, moments = torch.empty(24, 16), torch.empty(16, 16)
    basis = prepare(moments, name="x", **PLAIN.basis_options)
    found = fit_matrix(MatrixJob("x", weight, moments, basis, PLAIN), PLACE).found
    assert isinstance(found, Decomposition) and on_device(*found.packed.tensors.values())


def test_a_basis_that_is_there_already_is_not_moved():
    basis = prepare(torch.eye(4), name="x")
    assert basis.to(torch.device("cpu")) is basis


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stays_on_the_device(name, composed, fake):
    few = ["method.outer_iterations=1", "method.inner_iterations=1"]
    config = OmegaConf.to_container(composed(f"method={name}", "rank.k=4", *few))
    config["method"]["tune_passes"] = min(config["method"]["tune_passes"], 1)
    config["rank"]["k"] = 4 if config["l"]["family"] != "none" and name not in ("gptq", "rtn", "q_only") else 0
    method = method_of(config)
    if "trellis" in method.q:  # slow without data, and tested by itself
        method = replace(method, q="e8p_2bit")
    with Watch() as watch:
        found = decompose(empty(24, 8), empty(8, 8), method)
    assert on_device(*found.packed.tensors.values(), found.dequantize())
    assert not watch.to_host and set(watch.waits) <= {"_linalg_check_errors", "_linalg_svd"}


def test_a_prediction_stays_on_the_device_and_its_curves_on_the_host(fake):
    """The curves are kept for every later prediction, so they are real even in a dry run."""
    _measured.cache_clear()
    with reads() as found:
        predict_error(empty(24, 16), empty(16, 16), Method(rank=2, q="uniform_2bit", l="bf16", r="bf16"))
    assert found[-1] == () and all(np.isfinite(x).all() for x in _measured("uniform_2bit", 16, 1.0))


# ----------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transformed", [True, False])
def test_packed_matrices_are_read_on_the_device(family, transformed, fake):
    name = f"{family}_{max(FAMILIES[family])}bit"
    spec = MatrixSpec("x", "y", (24, 16), 4, name, name, "bf16", transformed=transformed)
    packed = PackedMatrix(spec, {key: empty(*t.shape, dtype=t.dtype) for key, t in spec.layout().items()})
    with Watch() as watch, reads() as found:
        made = packed.dequantize(), packed.product(empty(2, 5, 16)), packed.product(empty(3, 16, dtype=torch.bfloat16))
    assert on_device(*made) and not found and not watch.waits and not watch.to_host
    assert [t.shape for t in made] == [(24, 16), (2, 5, 24), (3, 24)] and made[2].dtype == torch.bfloat16


def test_a_window_is_scored_on_the_device(fake):
    known = Kept(empty(299, 24, dtype=torch.long), empty(299, 24), empty(299))
    for reference, lines in ((None, 1), (Reference(24, known), 4)):
        with Watch() as watch, reads() as found:
            _window_scores(empty(300, 50), empty(300, dtype=torch.long), 1, reference)
        assert not watch.waits and not watch.to_host and found == [(lines, 299)]  # once a window
