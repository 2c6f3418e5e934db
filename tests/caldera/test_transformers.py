"""A packed checkpoint is one that transformers loads: packed, or dense to the bit of `load_dense`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM

from caldera import CalderaConfig, CheckpointError, MatrixSpec, PackedMatrix, UserError
from caldera.checkpoint import MANIFEST, REST, block_file, load_dense, write_manifest
from caldera.files import write_json
from caldera.layers import Packed, PackedLinear, PackedStack
from caldera.quantizers import quantizer_names
from caldera.shards import INDEX
from tests.caldera import tiny_models
from tests.caldera.tiny_checkpoints import compress

# transformers says, with every config that is passed, that only its loading attributes count
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
FAMILIES = tiny_models.FAMILIES
SOME = ["llama", "qwen2", "neox", "gpt2", "mixtral", "gpt_oss"]
ROWS = tiny_models.token_rows()
DENSE = {"quantization_config": CalderaConfig(materialize=True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A packed checkpoint of every family; not to be changed."""
    found = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in found.items():
        compress(FAMILIES[name](), folder)
    return found


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A llama's checkpoint that a test may damage."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "llama"))


def load(folder: Path, **settings) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(ROWS).logits


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(t.nbytes for t in {*model.parameters(), *model.buffers()})


# -------------------------------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_agrees_with_dense(folders, family):
    packed, dense = load(folders[family]), load_dense(folders[family])
    assert any(isinstance(m, Packed) for m in packed.modules()) and not packed.training
    expected = logits(dense)
    assert (logits(packed) - expected).norm() <= 1e-5 * expected.norm()
    torch.testing.assert_close(logits(packed), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_materialized_is_load_dense_to_the_bit(folders, family):
    model, dense = load(folders[family], **DENSE), load_dense(folders[family])
    assert not any(isinstance(m, Packed | PackedStack) for m in model.modules())
    state = model.state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in dense.state_dict().items())
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_both_forms_generate_the_same(folders, family):
    packed, dense = load(folders[family]), load(folders[family], **DENSE)
    told = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    new = packed.generate(ROWS[:2, :5], **told)
    assert new.shape == (2, 11) and torch.equal(new, dense.generate(ROWS[:2, :5], **told))


@pytest.mark.parametrize("settings", [{"q": "uniform_asym_4bit_g32", "l": "bf16"}, {"q": "none"}, {"rank": 0}], ids=str)
@pytest.mark.parametrize("transform", [True, False])
def test_every_form_of_a_matrix_runs_packed(tmp_path, settings, transform, monkeypatch):
    monkeypatch.setattr("caldera.packed.BLOCK", 300)  # so that Q comes in several blocks of rows
    compress(tiny_models.llama(), tmp_path, transform=transform, **settings)
    torch.testing.assert_close(logits(load(tmp_path)), logits(load_dense(tmp_path)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [24, 200, 512, 520, 600])
@pytest.mark.parametrize("name", [*quantizer_names(), "e8p_2bit_row", "uniform_asym_3bit_g32", "trellis_2bit_row"])
def test_blocks_of_rows_are_those_of_the_whole(name, rows, monkeypatch):
    """For codes that run down columns too, and for rows that do not divide into blocks."""
    monkeypatch.setattr("caldera.packed.BLOCK", 300)
    spec, generator = MatrixSpec("w", "x", (rows, 21), 0, name, "none", "none"), torch.Generator().manual_seed(0)
    stored = {
        key: torch.randint(256, t.shape, generator=generator).to(t.dtype) if t.dtype == torch.uint8
        else torch.rand(t.shape, generator=generator).to(t.dtype)
        for key, t in spec.layout().items()
    }  # fmt: skip
    matrix = PackedMatrix(spec, stored)
    assert torch.equal(torch.cat(list(matrix._blocks_of_q())), matrix.part("q"))


def test_nothing_is_missing_or_left_over(folders):
    for folder in folders.values():
        _, found = load(folder, output_loading_info=True)
        assert not any(found.values())


def test_a_stack_that_is_compressed_in_part_stays_dense(tmp_path):
    compress(FAMILIES["mixtral"](), tmp_path, exclude=["model.layers.1.mlp.experts.down_proj.2"])
    dense = load_dense(tmp_path)
    for model in (load(tmp_path), load(tmp_path, **DENSE)):
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
        whole = model.model.layers[1].mlp.experts.down_proj
        assert torch.equal(whole, dense.model.layers[1].mlp.experts.down_proj)


def test_the_config_decides_and_the_caller_overrules_it(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "caldera", "version": 1, "materialize": False}
    config["quantization_config"]["materialize"] = True
    write_json(folder / "config.json", config)
    assert isinstance(load(folder).model.layers[0].mlp.up_proj, nn.Linear)
    packed = load(folder, quantization_config=CalderaConfig())
    assert isinstance(packed.model.layers[0].mlp.up_proj, PackedLinear)


def test_a_model_that_is_not_packed_is_refused(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="this model is not packed: run caldera-run on it"):
        load(tmp_path, **DENSE)


def test_a_packed_model_can_become_dense_later(folders):
    model = load(folders["gpt2"])
    model.dequantize()
    assert torch.equal(logits(model), logits(load_dense(folders["gpt2"])))
    assert not hasattr(model.config, "quantization_config")


# -------------------------------------------------------------------------------------------- types, devices and memory
@pytest.mark.parametrize("way", ["load", "to"])
def test_half_precision_leaves_codes_and_scales_as_they_are(folders, way):
    model = load(folders["llama"], dtype=torch.bfloat16) if way == "load" else load(folders["llama"]).to(torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.q_codes.dtype, layer.q_scale.dtype, layer.bias.dtype) == (torch.uint8, torch.float32, torch.bfloat16)
    assert model.lm_head.weight.dtype == logits(model).dtype == torch.bfloat16
    expected = logits(load_dense(folders["llama"]))
    assert (logits(model).float() - expected).norm() < 0.03 * expected.norm()


def test_the_default_type_is_that_of_the_rest(tmp_path):
    compress(tiny_models.llama(), tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {k: v for k, v in config.items() if k != "dtype"})
    write_manifest(tmp_path, {})
    assert load(tmp_path).dtype == torch.bfloat16


def test_tied_embeddings_stay_tied(folders):
    for settings in ({}, DENSE):
        model = load(folders["qwen2"], **settings)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_memory_is_that_of_the_files(folders):
    """Weights in memory are the stored bytes: no dense matrix is kept, after a forward neither."""
    for folder in folders.values():
        model = load(folder)
        held = bytes_of(model) - sum(t.nbytes for name, t in model.named_buffers() if name not in model.state_dict())
        logits(model)
        after = bytes_of(model) - sum(t.nbytes for name, t in model.named_buffers() if name not in model.state_dict())
        assert held == after == json.loads((folder / INDEX).read_text())["metadata"]["total_size"]


def test_a_device_map_is_followed(folders):
    assert torch.equal(logits(load(folders["llama"], device_map="cpu")), logits(load(folders["llama"])))


@pytest.mark.parametrize("settings", [{}, {"q": "trellis_2bit", "l": "bf16"}, {"transform": False}], ids=str)
def test_packed_layers_stay_on_their_device(tmp_path, settings):
    compress(FAMILIES["gpt2"](), tmp_path, **settings)
    layer = load(tmp_path).transformer.h[0].attn.c_attn
    device = "cuda" if torch.backends.cuda.is_built() else "lazy"  # see test_devices
    with FakeTensorMode():
        for key, t in {**layer._buffers, **layer._parameters}.items():
            target = layer._buffers if key in layer._buffers else layer._parameters
            target[key] = torch.empty(t.shape, dtype=t.dtype, device=device)
        y = layer(torch.empty(2, 5, tiny_models.WIDTH, dtype=torch.bfloat16, device=device))
        assert isinstance(y, FakeTensor) and y.device.type == device and y.shape == (2, 5, 3 * tiny_models.WIDTH)


# --------------------------------------------------------------------------------------------------------------- saving
@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("size", ["5KB", "50GB"])
def test_a_packed_model_is_saved_packed(folders, family, size, tmp_path):
    model = load(folders[family])
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / INDEX).exists() == (size == "5KB")
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert torch.equal(logits(load(tmp_path, **DENSE)), logits(load_dense(folders[family])))


def test_a_materialized_model_is_saved_as_an_ordinary_one(folders, tmp_path):
    model = load(folders["mixtral"], **DENSE)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert all(p.requires_grad for p in model.parameters())


def test_load_dense_gives_an_ordinary_model(folders, tmp_path):
    load_dense(folders["llama"]).save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(load_dense(folders["llama"])))


# --------------------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("name", [block_file(0), block_file(1), REST])
def test_a_shard_that_is_missing_is_refused_by_name(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing: compress again, or copy the whole folder"):
        load(folder)


@pytest.mark.parametrize("name", [block_file(0), REST])
def test_a_shard_that_was_cut_short_is_refused_by_name(folder, name):
    os.truncate(folder / name, (folder / name).stat().st_size - 3)
    with pytest.raises(CheckpointError, match=f"{name} has .* bytes instead of .*: it was cut short"):
        load(folder)


@pytest.mark.parametrize("name", [block_file(1), REST])
def test_a_shard_that_was_changed_is_refused_by_name(folder, name):
    flip(folder / name, -1)
    with pytest.raises(CheckpointError, match=f"{name} differs from its checksum in manifest.json: it was changed"):
        load(folder)


def test_a_tensor_that_no_shard_holds_is_refused_by_name(folder):
    rest = load_file(folder / REST)
    rest.pop("model.norm.weight")
    save_file(rest, folder / REST)
    write_manifest(folder, {})
    with pytest.raises(CheckpointError, match=r"holds no value for model\.norm\.weight"):
        load(folder)


def test_a_shard_that_the_index_leaves_out_is_noticed(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != block_file(1)}
    write_json(folder / INDEX, index)
    with pytest.raises(CheckpointError, match=r"holds no value for model\.layers\.1\."):
        load(folder)


def test_a_folder_without_checksums_is_refused(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"{block_file(0)} has no checksums, and its folder no manifest"):
        load(folder)


def test_saving_over_a_checkpoint_is_noticed(folder):
    load(folder).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="save a model into an empty folder"):
        load(folder)


def test_a_later_version_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match="version 2 is not known here"):
        load(folder)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.fixture
def saved(folders, tmp_path) -> Path:
    """What `save_pretrained` wrote, in several shards, without a manifest."""
    load(folders["llama"]).save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path


def test_a_saved_shard_that_was_changed_is_refused_by_name(saved):
    shard = sorted(saved.glob("*.safetensors"))[1]
    flip(shard, -1)
    with pytest.raises(CheckpointError, match=f"{shard.name} differs from the checksums in it"):
        load(saved)


def test_saved_specs_that_were_changed_are_refused(saved):
    shard = sorted(saved.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    assert b'seed\\": 0' in data
    shard.write_bytes(data.replace(b'seed\\": 0', b'seed\\": 1', 1))
    with pytest.raises(CheckpointError, match=f"{shard.name} differs from the checksums in it"):
        load(saved)


@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_saved_shard_that_is_not_whole_is_refused_by_name(saved, how):
    shard = sorted(saved.glob("*.safetensors"))[-1]
    if how == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 3)
    with pytest.raises(CheckpointError, match=f"{shard.name} is unreadable"):
        load(saved)


# -------------------------------------------------------------------------------------------------------- registration
@pytest.mark.parametrize("first", ["caldera", "transformers.quantizers.auto"])
def test_the_order_of_imports_does_not_matter(first):
    script = f"""
import {first}
import caldera, transformers
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
assert "caldera" in AUTO_QUANTIZER_MAPPING and "caldera" in AUTO_QUANTIZATION_CONFIG_MAPPING
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_lm_eval_takes_the_folder(folders):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    scores = {}
    for name, model in (("folder", str(folders["llama"])), ("dense", load_dense(folders["llama"]))):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
        request = Instance("loglikelihood", {}, ("a b", " c"), 0)
        scores[name] = harness.loglikelihood([request], disable_tqdm=True)[0][0]
    assert scores["folder"] == pytest.approx(scores["dense"], rel=1e-4)
