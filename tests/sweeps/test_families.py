"""The application on models that are no Llama, a mixture of experts and GPT-2: from the weights to the record."""

import pytest
import torch
from safetensors.torch import load_file

from caldera.blocks import named_matrices
from caldera.checkpoint import load_dense
from sweeps.models import load_model
from tests.sweeps.swept import NO_TASKS, Swept

TOKENS = 4 * 256


def mixtral():
    from transformers import MixtralConfig

    sizes = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2)


def gpt2():
    from transformers import GPT2Config

    return GPT2Config(vocab_size=49152, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2)


@pytest.fixture(scope="module", params=[mixtral, gpt2], ids=lambda config: config.__name__)
def folder(request, saved):
    return saved(request.param())


@pytest.mark.parametrize(("inputs", "dtype"), [("original", "float32"), ("corrected", "bfloat16")])
def test_a_point_ends_well(folder, inputs, dtype, application, tmp_path):
    settings = [f"method.inputs={inputs}", f"compute.dtype={dtype}", "rank.k=4", NO_TASKS]
    code, output, errors = application(f"model.path={folder}", *settings)
    assert (code, errors) == (0, "") and "warning" not in output
    swept = Swept(tmp_path / "results")
    record, model = swept.of(method="caldera"), load_model(folder)
    assert record["status"] == "done" and record["point"]["rank"] == 4
    matrices, found = {m["name"]: m for m in record["matrices"]}, named_matrices(model)
    assert set(matrices) == set(found)
    for name, matrix in matrices.items():
        assert matrix["shape"] == list(found[name].shape)
        assert 0 < matrix["relative_error"] < 1 and 0 < matrix["output_error"] < 1.5
        assert matrix["few_tokens"] is False
        if found[name].expert is None:
            assert matrix["tokens"] == TOKENS
    for stage in {m.stage for m in found.values() if m.expert is not None}:
        for block in range(2):  # each token goes to two experts
            names = [n for n, m in found.items() if m.stage == stage and f".layers.{block}." in n]
            assert sum(matrices[n]["tokens"] for n in names) == 2 * TOKENS
    loaded = load_dense(swept.checkpoint(record))
    for name, matrix in named_matrices(loaded).items():
        assert matrix.read().shape == found[name].shape and not torch.equal(matrix.read(), found[name].read())
    rest = load_file(swept.checkpoint(record) / "model-rest.safetensors")
    held = {m.parameter for m in found.values()}
    assert not any(name.endswith(parameter) for name in rest for parameter in held)


def test_experts_with_few_tokens_are_named_on_the_screen_in_the_log_and_in_the_record(
    saved, application, tmp_path, capsys
):
    folder = saved(mixtral())
    capsys.readouterr()  # the bar of saving
    short = ["calibration.sequences=1", "calibration.length=40", "evaluation.rows=1", "rank.k=4", NO_TASKS]
    code, output, errors = application(f"model.path={folder}", *short)
    assert (code, errors) == (0, "")
    swept = Swept(tmp_path / "results")
    record = swept.of(method="caldera")
    few = {m["name"]: m["tokens"] for m in record["matrices"] if m["few_tokens"]}
    assert few and all(".experts." in name and tokens < 48 for name, tokens in few.items())
    for text in (output, (swept.folder(record) / "log.txt").read_text()):
        assert "warning: experts with fewer tokens than inputs" in text
        assert all(f"{name} ({tokens})" in text for name, tokens in few.items())
