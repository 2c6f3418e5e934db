"""A model read block by block is the one that transformers loads, whatever its family and its shards."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from caldera.blocks import Stream, covered, decoder_blocks, named_matrices
from caldera.checkpoint import REST, write_rest
from caldera.streamed import Streamed, Whole
from sweeps.models import load_model, open_model
from tests.caldera import tiny_models
from tests.caldera.tiny_models import token_rows

CONVERTED = {"mixtral", "qwen2_moe", "qwen3_moe"}  # saved as one tensor an expert
SHARD = "20KB"  # a few of them a model


def saved(model, folder):
    """The model's folder, in shards."""
    model.save_pretrained(folder, max_shard_size=SHARD)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def folder(request, tmp_path_factory):
    """Name and folder of a family's model."""
    return request.param, saved(tiny_models.FAMILIES[request.param](), tmp_path_factory.mktemp(request.param))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(t, other[name]) and t.dtype == other[name].dtype for name, t in one.items()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_and_hidden_states_are_those_of_the_loaded_model(folder, dtype):
    kind, path = folder
    source, model = open_model(path, dtype), load_model(path, dtype)
    assert isinstance(source, Whole if kind in CONVERTED else Streamed)
    name, blocks = decoder_blocks(model)
    assert (source.name, source.count) == (name, len(blocks))
    assert same(dict(source.model.named_buffers()), dict(model.named_buffers()))
    with source.outside() as whole:
        one, two = Stream.open(whole, token_rows()), Stream.open(model, token_rows())
    for index, block in enumerate(blocks):
        assert same(source.block(index).state_dict(), block.state_dict())
        one.advance(source.block(index), index)
        two.advance(block, index)
        assert all(torch.equal(x, y) for x, y in zip(one.hidden, two.hidden))
    assert list(named_matrices(source.model)) == list(named_matrices(model))


def test_a_block_is_the_callers_own(folder):
    source = open_model(folder[1], "float32")
    before = {name: t.clone() for name, t in source.block(1).state_dict().items()}
    for p in source.block(1).parameters():
        p.data.zero_()
    assert same(source.block(1).state_dict(), before)
    cast = source.block(1, torch.bfloat16)
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    if isinstance(source, Streamed):
        assert all(p.is_meta for p in decoder_blocks(source.model)[1].parameters())


def test_the_rest_is_written_as_from_memory(folder, tmp_path):
    """With nothing compressed, and with some of it."""
    source, model = open_model(folder[1]), load_model(folder[1], "float32")
    for done in ([], list(named_matrices(model))[::2], list(named_matrices(model))):
        write_rest(tmp_path / "memory", model.state_dict(), covered(model, done), torch.bfloat16)
        write_rest(tmp_path / "stream", source.state(), covered(source.model, done), torch.bfloat16, source.read)
        assert (tmp_path / "memory" / REST).read_bytes() == (tmp_path / "stream" / REST).read_bytes()


def test_without_a_dtype_weights_come_as_they_are_stored(tmp_path):
    source = open_model(saved(tiny_models.llama().bfloat16(), tmp_path))
    assert {p.dtype for p in source.block(0).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in source.block(0, torch.float32).parameters()} == {torch.float32}


def test_what_no_hidden_state_depends_on_is_not_read(tmp_path):
    """A head of its own; one that is tied is the embedding."""
    with open_model(saved(tiny_models.llama(), tmp_path / "own"), "float32").outside() as model:
        assert model.lm_head.weight.is_meta and not model.get_input_embeddings().weight.is_meta
    source = open_model(saved(tiny_models.qwen2(), tmp_path / "tied"), "float32")
    for _ in range(2):
        with source.outside() as model:
            assert not model.lm_head.weight.is_meta
            assert model.lm_head.weight is model.get_input_embeddings().weight
        assert source.model.lm_head.weight.is_meta
        assert source.model.lm_head.weight is source.model.get_input_embeddings().weight


# ------------------------------------------------------------------------------------------- checkpoints of other kinds
def edited(model, folder, change):
    """The model's folder with one shard, whose tensors `change` has replaced."""
    model.save_pretrained(folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_loaded(folder) -> bool:
    source, model = open_model(folder, "float32"), load_model(folder)
    first = {name for name, _ in model.named_parameters()}
    state = {name: source.read(name) for name in source.state()}
    return same({n: t for n, t in state.items() if n in first}, {n: model.state_dict()[n] for n in first})


def test_the_base_models_names_are_the_models(tmp_path):
    """As of GPT-2 on the hub."""
    path = edited(tiny_models.llama(), tmp_path, lambda t: {n.removeprefix("model."): x for n, x in t.items()})
    assert isinstance(open_model(path), Streamed) and as_loaded(path)


def test_a_tensor_that_the_model_does_not_know_is_left_alone(tmp_path):
    path = edited(tiny_models.llama(), tmp_path, lambda t: t | {"model.layers.0.rotary_emb.inv_freq": torch.ones(4)})
    assert isinstance(open_model(path), Streamed) and as_loaded(path)


@pytest.mark.parametrize(("amount", "kind"), [(1.0, Streamed), (2.0, Whole)])
def test_a_tied_head_that_is_stored_too(tmp_path, amount, kind):
    """With other values it is not tied, whatever the configuration says."""
    head = "lm_head.weight"
    path = edited(tiny_models.qwen2(), tmp_path, lambda t: t | {head: amount * t["model.embed_tokens.weight"]})
    assert isinstance(open_model(path), kind) and as_loaded(path)


def test_parameters_that_stay_in_float32_are_left_to_transformers(tmp_path):
    path = saved(tiny_models.FAMILIES["gpt_oss"](), tmp_path)
    assert isinstance(open_model(path, "float16"), Whole) and isinstance(open_model(path, "bfloat16"), Streamed)


def test_a_missing_shard_is_transformers_to_report(tmp_path):
    from caldera.errors import UserError

    path = saved(tiny_models.llama(), tmp_path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    (path / index["weight_map"]["model.norm.weight"]).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        open_model(path)
