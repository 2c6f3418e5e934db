"""What matrices are fitted to, original or corrected, against plain forward passes; whole models through both."""

import copy
import json

import pytest
import torch

from caldera import Method, relative_error
from caldera.blocks import decoder_blocks, named_matrices
from caldera.checkpoint import block_file, load_dense, read_matrices
from caldera.correction import Correction
from caldera.matrices import chosen
from caldera.streamed import Whole
from sweeps.calibration import Calibration, ensure_calibration
from sweeps.compress import CheckpointFolder, Fit, compress
from sweeps.inputs import CorrectedPrefix, Original
from sweeps.progress import Reporter
from tests.caldera import tiny_models
from tests.caldera.oracles import gaussian
from tests.caldera.tiny_models import plain_inputs, weight_of

CORRECTION = Correction(strength=0.7, strength_last=0.4, residual=0.5, sigma=1e-2, preserve=False)
MIXTURES = ("mixtral", "qwen2_moe", "gpt_oss")
WRITERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gemma2": [],
    "phi3": ["self_attn.o_proj", "mlp.down_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "neox": ["attention.dense", "mlp.dense_4h_to_h"],
} | {key: ["self_attn.o_proj"] for key in MIXTURES}
ROWS = tiny_models.token_rows(6, 24)


def quiet(*_) -> None:
    """No progress."""


def calibrated(directory, model, rows=ROWS) -> Calibration:
    return ensure_calibration(directory / "moments", lambda: Whole(model), lambda: rows, quiet, hidden=True)


@pytest.fixture(scope="module", params=WRITERS)
def family(request, tmp_path_factory):
    """Name, model and calibration."""
    model = tiny_models.FAMILIES[request.param]()
    return request.param, model, calibrated(tmp_path_factory.mktemp(request.param), model)


def second_moments(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.double().T @ y.double() / max(len(x), 1)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    size = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(found.double() / size, expected.double() / size, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------- calibration
def test_a_calibration_is_collected_once_and_again_for_hidden_states(tmp_path):
    collected = []

    def model():
        collected.append(1)
        return Whole(tiny_models.llama())

    for hidden, count in ((False, 1), (False, 1), (True, 2), (True, 2), (False, 2)):
        found = ensure_calibration(tmp_path / "moments", model, lambda: ROWS, quiet, hidden)
        assert len(collected) == count
    assert found.residual_writers(0) == WRITERS["llama"]
    assert torch.cat(list(found.hidden(1))).shape == (*ROWS.shape, tiny_models.WIDTH)


# ------------------------------------------------------------------------------------------------------------- original
def test_original_moments_are_those_of_plain_passes(family):
    _, model, calibration = family
    inputs, original = plain_inputs(model, ROWS), Original(calibration)
    prefix, blocks = decoder_blocks(model)
    for index in range(len(blocks)):
        (stage,) = original.stages(index)
        for given in stage:
            for name in given.group.members:
                x, weight = inputs[f"{prefix}.{index}.{name}"], weight_of(model, f"{prefix}.{index}.{name}")
                assert given.tokens == len(x) and given.few == (given.group.expert and len(x) < x.shape[1])
                if not given.few:
                    close(given.moments, second_moments(x, x))
                assert given.target(name, weight) is weight
                assert given.output_error(weight, weight) is None
        assert {n for g in stage for n in g.group.members} == {
            name.removeprefix(f"{prefix}.{index}.")
            for name in named_matrices(model)
            if name.startswith(f"{prefix}.{index}.")
        }


# ------------------------------------------------------------------------------------------------------------ corrected
@torch.inference_mode()
def streams(model, names: list[str], index: int) -> torch.Tensor:
    """The hidden states (tokens, width) after the block's input and these of its layers, in plain passes."""
    prefix, blocks = decoder_blocks(model)
    parts = []

    def entering(_module, args, kwargs):
        parts.append((args[0] if args else kwargs["hidden_states"]).clone())

    handles = [blocks[index].register_forward_pre_hook(entering, with_kwargs=True)]
    layers = [model.get_submodule(f"{prefix}.{index}.{name}") for name in names]
    handles += [
        layer.register_forward_hook(lambda _m, _a, out: parts.append(out.reshape(parts[0].shape))) for layer in layers
    ]
    model(ROWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return sum(parts).reshape(-1, parts[0].shape[-1]).double()


def expected_target(weight, x, y, lack, depth: float) -> torch.Tensor:
    """The documented formula in float64, from tokens."""
    c, h, w = CORRECTION, second_moments(y, y), weight.double()
    a = c.strength + (c.strength_last - c.strength) * depth
    damping = c.sigma * h.diagonal().mean() * torch.eye(len(h))
    inverse = torch.linalg.inv(h + damping)
    target = (1 - a) * w + a * w @ (second_moments(x, y) + damping) @ inverse
    return target if lack is None else target + c.residual * second_moments(lack, y) @ inverse


def test_corrected_targets_follow_what_was_compressed_before(family):
    check_targets(*family)


@pytest.mark.parametrize("joined", [tiny_models.shown_again, tiny_models.shown_together])
def test_corrected_targets_where_products_act_past_the_stages_too(tmp_path, joined):
    model = tiny_models.rewired(joined)
    inputs = check_targets("llama", model, calibrated(tmp_path, model))
    assert (inputs.plan.needs is None) == (joined is tiny_models.shown_together)


def check_targets(kind, model, calibration) -> CorrectedPrefix:
    """Stage by stage: a second model gets each compressed weight once its stage is over, and plain passes of the two
    show what the next stage sees: o after q, k, v; down after gate and up; a block after the blocks before it."""
    other, originals = copy.deepcopy(model), plain_inputs(model, ROWS)
    inputs, (prefix, blocks) = CorrectedPrefix(calibration, Whole(model), ROWS, CORRECTION), decoder_blocks(model)
    for index in range(len(blocks)):
        written = []
        for stage in inputs.stages(index):
            behind = plain_inputs(other, ROWS)
            lack = streams(model, written, index) - streams(other, written, index)
            members = {f"{prefix}.{index}.{name}": (name, given) for given in stage for name in given.group.members}
            for full, (name, given) in members.items():
                weight, x, y = weight_of(model, full), originals[full], behind[full]
                if given.group.expert:
                    check_experts(given, weight, x, calibration.moments(index)[given.group.name])
                else:
                    own = lack if name in WRITERS[kind] else None
                    check_corrected(given, name, weight, x, y, expected_target(weight, x, y, own, index))
                approximation = 0.8 * given.target(name, weight) + 0.05 * gaussian(*weight.shape, seed=len(full))
                inputs.install(name, approximation)
                weight_of(other, full).copy_(approximation)
                written += [name] * (name in WRITERS[kind])
        assert written == WRITERS[kind]
    return inputs


def check_experts(given, weight, x, moments) -> None:
    assert given.target("", weight) is weight and given.output_error(weight, weight) is None
    assert given.tokens == len(x) and torch.equal(given.moments, moments)


def check_corrected(given, name, weight, x, y, target) -> None:
    """Against tokens: x in the original, y behind the compressed prefix."""
    assert given.tokens == ROWS.numel() and not given.few
    close(given.moments, second_moments(y, y))
    close(given.target(name, weight), target, 1e-3)
    approximation = 0.9 * weight + 0.1
    wanted = x.double() @ weight.double().T
    lost = wanted - y.double() @ approximation.double().T
    assert given.output_error(weight, approximation) == pytest.approx(float(lost.norm() / wanted.norm()), rel=1e-2)


def every_target(model, calibration, amount: float) -> dict[str, torch.Tensor]:
    """Targets of all matrices, behind weights that are `amount` times the originals."""
    inputs, (prefix, blocks) = CorrectedPrefix(calibration, Whole(model), ROWS, CORRECTION), decoder_blocks(model)
    targets = {}
    for index in range(len(blocks)):
        for given, name in ((g, n) for stage in inputs.stages(index) for g in stage for n in g.group.members):
            weight = weight_of(model, f"{prefix}.{index}.{name}")
            targets[f"{prefix}.{index}.{name}"] = given.target(name, weight)
            inputs.install(name, amount * weight)
    return targets


def test_the_original_is_not_changed_and_targets_are_repeatable(family):
    _, model, calibration = family
    before = {name: p.clone() for name, p in model.state_dict().items()}
    one, two = (every_target(model, calibration, 0.9) for _ in range(2))
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert any((one[name] - weight_of(model, name)).abs().max() > 1e-2 for name in one)


def test_behind_uncompressed_weights_nothing_is_corrected(family):
    _, model, calibration = family
    for name, target in every_target(model, calibration, 1.0).items():
        close(target, weight_of(model, name), 1e-3)


class Sparse(torch.nn.Module):
    """A mixture whose experts are layers of their own: as some models' own code has it."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(tiny_models.WIDTH, tiny_models.WIDTH) for _ in range(2))

    def forward(self, x):
        out, first = torch.zeros_like(x), x[..., 0] > 0
        for expert, tokens in zip(self.experts, (first, ~first)):
            out[tokens] = expert(x[tokens])
        return out


def test_layers_that_see_a_part_of_the_tokens_keep_the_originals_inputs(tmp_path):
    """The two models may send a token to different ones: pairs of inputs would not be of one token."""
    model = tiny_models.llama()
    model.model.layers[0].mlp = Sparse().requires_grad_(False)
    calibration = calibrated(tmp_path, model)
    tokens = calibration.tokens(0)
    assert tokens["mlp.experts.0"] + tokens["mlp.experts.1"] == ROWS.numel() and 0 < tokens["mlp.experts.0"] < 144
    assert calibration.residual_writers(0) == ["self_attn.o_proj"]
    inputs = CorrectedPrefix(calibration, Whole(model), ROWS, CORRECTION)
    for given in (given for stage in inputs.stages(0) for given in stage if "experts" in given.group.name):
        assert torch.equal(given.moments, calibration.moments(0)[given.group.name])
        assert given.output_error(torch.eye(3), torch.eye(3)) is None


# --------------------------------------------------------------------------------------------------------- whole models
def compressed(model, folder, mode: str, include=("*",), exclude=("*_gate",), rows=ROWS, say=None) -> list[dict]:
    """Calibrated, compressed and saved below `folder`; what a record would say of the matrices."""
    model.config.save_pretrained(folder / "source")
    calibration = calibrated(folder, model, rows)
    inputs = Original(calibration)
    if mode == "corrected":
        inputs = CorrectedPrefix(calibration, Whole(copy.deepcopy(model)), rows, Correction())
    names = frozenset(name for name in named_matrices(model) if chosen(name, include, exclude))
    fit = Fit(Method(rank=2, outer_iterations=1, inner_iterations=1, q="uniform_4bit_row"), names, torch.device("cpu"))
    reporter = Reporter("test")
    if say is not None:
        reporter.say = say
    with reporter.stage("compress") as progress:
        return compress(
            folder / "source",
            lambda: Whole(model),
            inputs,
            fit,
            CheckpointFolder(folder / "packed"),
            torch.float32,
            progress,
        ).matrices


def dequantized(folder) -> dict[str, torch.Tensor]:
    files = sorted((folder / "packed").glob("model-block-*"))
    assert [f.name for f in files] == [block_file(i) for i in range(len(files))]
    return {m.spec.name: m.dequantize() for f in files for m in read_matrices(folder / "packed", f.name)}


@pytest.mark.parametrize("mode", ["original", "corrected"])
@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_a_family_from_calibration_to_generation(tmp_path, name, mode):
    model = tiny_models.FAMILIES[name]()
    before = copy.deepcopy(model)
    summaries = compressed(model, tmp_path, mode)
    assert all(torch.equal(p, before.state_dict()[key]) for key, p in model.state_dict().items())
    expected = [full for full in named_matrices(model) if not full.endswith("_gate")]
    assert sorted(s["name"] for s in summaries) == sorted(expected)
    for s in summaries:
        assert s["shape"] == list(weight_of(model, s["name"]).shape) and 0 < s["output_error"] < 1
        assert s["tokens"] == ROWS.numel() or ".experts." in s["name"]
    for full, weight in dequantized(tmp_path).items():
        weight_of(before, full).copy_(weight)
    loaded = load_dense(tmp_path / "packed")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ROWS).logits, before(ROWS).logits, rtol=1e-3, atol=1e-3)
        text = loaded.generate(ROWS[:1, :4], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 7)


@pytest.mark.parametrize("mode", ["original", "corrected"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_an_excluded_matrix_is_kept_as_it_is(tmp_path, name, mode):
    """A whole layer, and one expert of a stack."""
    model = tiny_models.FAMILIES[name]()
    exclude = {
        "llama": ["*.v_proj", "model.layers.1.*"],
        "gpt2": ["*.c_attn", "*.1.mlp.*"],
        "mixtral": ["*.k_proj", "*.0.mlp.experts.down_proj.[23]"],
    }
    summaries = compressed(model, tmp_path, mode, exclude=exclude[name])
    done = {s["name"] for s in summaries}
    left = set(named_matrices(model)) - done
    assert left == {full for full in named_matrices(model) if not chosen(full, ["*"], exclude[name])} and left and done
    loaded, packed = load_dense(tmp_path / "packed"), dequantized(tmp_path)
    for full in named_matrices(model):
        assert torch.equal(weight_of(loaded, full), packed.get(full, weight_of(model, full))), full


# -------------------------------------------------------------------------------------------------------------- experts
def said_and_summaries(tmp_path, mode, rows):
    lines = []
    return compressed(tiny_models.FAMILIES["mixtral"](), tmp_path, mode, rows=rows, say=lines.append), lines


@pytest.mark.parametrize("mode", ["original", "corrected"])
def test_experts_that_saw_few_tokens_are_named(tmp_path, mode):
    """In one line, with their tokens, and in the record."""
    summaries, lines = said_and_summaries(tmp_path, mode, tiny_models.token_rows(2, 24))
    experts = {s["name"]: s for s in summaries if ".experts." in s["name"]}
    few = [name for name, s in experts.items() if s["tokens"] < s["shape"][1]]
    assert few and [s["name"] for s in summaries if s["few_tokens"]] == few
    warnings = [line for line in lines if "warning" in line]
    assert len(warnings) == 1
    assert all(any(f"{name} ({experts[name]['tokens']})" in line for line in warnings) for name in few)
    assert not any(name in line for line in warnings for name in set(experts) - set(few))


def test_experts_that_saw_enough_are_not_named(tmp_path):
    summaries, lines = said_and_summaries(tmp_path, "original", tiny_models.token_rows(24, 24))
    assert not any(s["few_tokens"] for s in summaries) and not any("warning" in line for line in lines)


def test_the_fit_of_an_expert_is_measured_against_the_filled_up_moments(tmp_path):
    model = tiny_models.FAMILIES["mixtral"]()
    summaries = compressed(model, tmp_path, "original", rows=tiny_models.token_rows(2, 24))
    calibration, packed = Calibration(tmp_path / "moments"), dequantized(tmp_path)
    for s in (s for s in summaries if s["few_tokens"]):
        _, _, index, name = s["name"].split(".", 3)
        h = calibration.moments(int(index))[name]
        assert s["relative_error"] == pytest.approx(
            relative_error(weight_of(model, s["name"]), packed[s["name"]], h), rel=1e-3
        )
        assert torch.linalg.matrix_rank(h) == len(h)


def test_a_layer_that_no_token_reaches_is_kept_and_named(tmp_path):
    model, lines = tiny_models.llama(), []
    model.model.layers[0].mlp.extra = torch.nn.Linear(32, 8)
    summaries = compressed(model, tmp_path, "original", say=lines.append)
    assert not any("extra" in s["name"] for s in summaries)
    assert [line for line in lines if "warning" in line] == [
        "  warning: not compressed, as no calibration token reaches them: model.layers.0.mlp.extra"
    ]


def test_the_configuration_is_the_sources_own_but_for_the_mark(tmp_path):
    """Calibration has the experts multiplied one by one, which is no property of the checkpoint."""
    model = tiny_models.FAMILIES["mixtral"]()
    compressed(model, tmp_path, "original")
    packed, source = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("packed", "source"))
    assert packed.pop("quantization_config")["quant_method"] == "caldera"
    assert packed == source
