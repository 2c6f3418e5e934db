"""What is saved is what is loaded, to the bit; what is unfinished, cut short or changed is refused by name."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from caldera import CheckpointError, PackedMatrix, decompose
from caldera.checkpoint import (
    MANIFEST,
    REST,
    block_file,
    load_dense,
    read_manifest,
    read_matrices,
    write_manifest,
    write_matrices,
    write_rest,
)  # fmt: skip
from caldera.files import committed, sha256, write_json
from caldera.quantizers import quantizer_names
from tests.caldera import tiny_models
from tests.caldera.oracles import gaussian, second_moments
from tests.caldera.tiny_checkpoints import compress, method

FIRST = block_file(0)


def matrix(name: str = "a.b", **settings) -> PackedMatrix:
    return decompose(gaussian(12, 20), second_moments(20), method(**settings), name=name).packed


@pytest.fixture
def small(tmp_path):
    """A finished folder with two shards of two matrices each, without a model."""
    for index in range(2):
        write_matrices(tmp_path, block_file(index), [matrix(f"{index}.a"), matrix(f"{index}.b", rank=0)])
    write_rest(tmp_path, {"norm.weight": gaussian(20)}, set(), torch.float32)
    write_manifest(tmp_path, {})
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- matrices
@pytest.mark.parametrize("name", [*quantizer_names(), "e8p_2bit_row", "uniform_3bit_g32", "uniform_asym_4bit_g64"])
def test_matrices_come_back_to_the_bit(tmp_path, name):
    """Q in one quantizer with factors in two others, and factors in it, odd sizes, with and without the transform."""
    saved = [
        decompose(gaussian(13, 21), second_moments(21), method(q=name, l="bf16", r="e8p_2bit"), name="q").packed,
        decompose(gaussian(13, 21), second_moments(21), method(l=name, r=name, transform=False), name="lr").packed,
        decompose(gaussian(13, 21), second_moments(21), method(q=name, rank=0, seed=3), name="x.0").packed,
        decompose(gaussian(13, 21), second_moments(21), method(q="none", l=name, r=name), name="x.1").packed,
    ]
    write_matrices(tmp_path, FIRST, saved)
    loaded = read_matrices(tmp_path, FIRST)
    assert [m.spec for m in loaded] == [m.spec for m in saved]
    for before, after in zip(saved, loaded):
        assert torch.equal(after.dequantize(), before.dequantize())


def test_stored_bytes_are_those_on_disk(tmp_path):
    """A shard is its tensors and a header: nothing else is stored."""
    saved = [matrix("a"), matrix("b", rank=0), matrix("c", l="bf16", r="nf_3bit_row")]
    write_matrices(tmp_path, FIRST, saved)
    with (tmp_path / FIRST).open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    assert (tmp_path / FIRST).stat().st_size - header == sum(m.spec.stored_bytes for m in saved)


def test_a_shard_is_readable_alone(tmp_path):
    write_matrices(tmp_path, FIRST, [matrix()])
    assert read_matrices(tmp_path, FIRST)[0].spec.name == "a.b"
    with safe_open(tmp_path / FIRST, "pt") as opened:
        assert set(opened.keys()) == {f"a.b.{p}_{k}" for p in "qlr" for k in ("codes", "scale")}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("q_scale"),
        lambda t: t.update(q_codes=t["q_codes"][:-1]),
        lambda t: t.update(q_codes=t["q_codes"].int()),
        lambda t: t.update(extra=torch.zeros(1)),
    ],
    ids=["missing", "short", "other type", "surplus"],
)
def test_tensors_that_differ_from_the_spec_are_refused_by_name(change):
    good = matrix("layer.q")
    tensors = dict(good.tensors)
    change(tensors)
    with pytest.raises(CheckpointError, match=r"layer\.q: stored tensors"):
        PackedMatrix(good.spec, tensors)


# ------------------------------------------------------------------------------------------------------------- manifest
def test_manifest_lists_every_file_and_matrix(small):
    manifest = read_manifest(small)
    assert set(manifest["files"]) == {f.name for f in small.iterdir()} - {MANIFEST}
    for name, listed in manifest["files"].items():
        assert listed == {"bytes": (small / name).stat().st_size, "sha256": sha256(small / name)}
    assert set(manifest["matrices"]) == {"0.a", "0.b", "1.a", "1.b"}
    assert manifest["matrices"]["1.b"] == json.loads(json.dumps(read_matrices(small, block_file(1))[1].spec.to_json()))
    assert manifest["format"] == "caldera" and manifest["version"] == 1


def test_manifest_keeps_the_details_and_can_be_written_again(small):
    write_manifest(small, {"model": "tiny", "error": None})
    manifest = read_manifest(small)
    assert manifest["model"] == "tiny" and manifest["error"] is None and MANIFEST not in manifest["files"]


def test_a_folder_without_manifest_is_unfinished(small):
    (small / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json: it is no finished CALDERA checkpoint"):
        read_manifest(small)
    with pytest.raises(CheckpointError, match="no finished"):
        load_dense(small)


@pytest.mark.parametrize("name", [block_file(1), REST])
def test_a_missing_file_is_refused_by_name(small, name):
    (small / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing: compress again, or copy the whole folder"):
        read_manifest(small)


@pytest.mark.parametrize("name", [block_file(1), REST])
def test_a_file_that_was_cut_short_is_refused_by_name(small, name):
    size = (small / name).stat().st_size
    os.truncate(small / name, size - 3)
    with pytest.raises(CheckpointError, match=rf"{name} has {size - 3} bytes instead of {size}: it was cut short"):
        read_manifest(small)


@pytest.mark.parametrize("name", [block_file(1), REST])
def test_a_changed_byte_is_refused_by_name(small, name):
    data = bytearray((small / name).read_bytes())
    data[-1] ^= 1
    (small / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} differs from its checksum in manifest.json: it was changed"):
        read_manifest(small)
    assert read_manifest(small, verify=False)["matrices"]


@pytest.mark.parametrize("change", [{"format": "gguf"}, {"version": 2}])
def test_another_format_is_refused(small, change):
    manifest = json.loads((small / MANIFEST).read_text())
    write_json(small / MANIFEST, manifest | change)
    with pytest.raises(CheckpointError, match="is not known here"):
        read_manifest(small)


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": "caldera", "ver', "[]", '{"format": "caldera", "version": 1}'], ids=range(5)
)
def test_a_manifest_that_was_cut_short_is_refused_by_name(small, text):
    (small / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(small)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "no metadata", "a tensor too few"])
def test_an_unreadable_shard_is_refused_by_name(small, damage):
    """Without the manifest's checksums, as `read_matrices` alone meets it."""
    shard = small / FIRST
    if damage == "missing":
        shard.unlink()
    elif damage in ("empty", "cut short"):
        os.truncate(shard, 0 if damage == "empty" else shard.stat().st_size - 3)
    else:
        tensors = load_file(shard)
        with safe_open(shard, "pt") as opened:
            metadata = opened.metadata()
        tensors.pop("0.a.q_scale")
        save_file(tensors, shard, metadata=metadata if damage == "a tensor too few" else None)
    with pytest.raises(CheckpointError, match=FIRST):
        read_matrices(small, FIRST)


# ---------------------------------------------------------------------------------------------------------- whole files
def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    write_matrices(tmp_path, FIRST, [matrix("old")])

    def broken():
        yield matrix("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_matrices(tmp_path, FIRST, broken())
    with pytest.raises(KeyboardInterrupt), committed(tmp_path / FIRST) as part:
        part.write_bytes(b"half a fi")
        raise KeyboardInterrupt
    assert [f.name for f in tmp_path.iterdir()] == [FIRST]
    assert read_matrices(tmp_path, FIRST)[0].spec.name == "old"


def test_leftovers_of_a_killed_writer_are_no_part_of_the_checkpoint(small):
    """`kill -9` between writing and renaming: someone will clean such files up, and the checkpoint must survive it."""
    leftover = small / f".{FIRST}.12345.part"
    leftover.write_bytes(b"half a fi")
    write_manifest(small, {})
    leftover.unlink()
    assert read_manifest(small)["matrices"]


def test_json_refuses_numbers_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"error": float("nan")})
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- whole models
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_model_comes_back_with_the_dequantized_weights(tmp_path, family):
    model = tiny_models.FAMILIES[family]()
    dense = compress(model, tmp_path)
    loaded = load_dense(tmp_path)
    expected, found = model.state_dict(), loaded.state_dict()
    assert set(found) == set(expected) and not loaded.training
    for name, weight in dense.items():
        assert torch.equal(tiny_models.weight_of(loaded, name), weight), name
        tiny_models.weight_of(model, name).copy_(weight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_loaded_model_computes_what_the_compressed_one_does(tmp_path, family):
    """Buffers that no file holds (rotary frequencies) are there as well."""
    model, rows = tiny_models.FAMILIES[family](), tiny_models.token_rows()
    for name, weight in compress(model, tmp_path).items():
        tiny_models.weight_of(model, name).copy_(weight)
    with torch.inference_mode():
        expected, logits = model(rows).logits, load_dense(tmp_path)(rows).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_biases_are_kept_and_compressed_weights_are_not(tmp_path):
    model = tiny_models.llama(mlp_bias=True)
    dense = compress(model, tmp_path)
    rest = load_file(tmp_path / REST)
    assert {f"{name}.bias" for name in dense} <= set(rest)
    assert not {f"{name}.weight" for name in dense} & set(rest)
    loaded = load_dense(tmp_path).state_dict()
    assert all(torch.equal(loaded[f"{name}.bias"], model.state_dict()[f"{name}.bias"]) for name in dense)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_tied_embeddings_are_stored_once_and_tied_again(tmp_path, family):
    model = tiny_models.qwen2() if family == "qwen2" else tiny_models.llama(tie_word_embeddings=True)
    compress(model, tmp_path)
    rest = load_file(tmp_path / REST)
    assert ("lm_head.weight" in rest) + ("model.embed_tokens.weight" in rest) == 1
    loaded = load_dense(tmp_path)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_untied_embeddings_stay_apart(tmp_path):
    model = tiny_models.llama(tie_word_embeddings=False)
    compress(model, tmp_path)
    loaded = load_dense(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_the_rest_is_stored_and_loaded_in_the_type_asked_for(tmp_path):
    model = tiny_models.llama()
    dense = compress(model, tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / REST).values()} == {torch.bfloat16}
    loaded = load_dense(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    name, weight = next(iter(dense.items()))
    assert torch.equal(loaded.get_submodule(name).weight, weight.bfloat16())


def test_integer_tensors_and_views_of_one_storage_are_kept(tmp_path):
    """Only the same tensor is stored once: a slice that begins where its parent begins is another one."""
    whole = gaussian(6, 4)
    others = {"first_rows": whole[:2], "steps": torch.arange(3), "mask": torch.tensor([True])}
    write_rest(tmp_path, {"whole": whole, "same": whole} | others, set(), torch.bfloat16)
    rest = load_file(tmp_path / REST)
    assert set(rest) == {"whole", *others}
    assert torch.equal(rest["steps"], others["steps"]) and torch.equal(rest["mask"], others["mask"])
    assert torch.equal(rest["first_rows"], whole[:2].bfloat16())


def test_a_parameter_that_no_file_holds_is_refused_by_name(tmp_path):
    model = tiny_models.llama()
    compress(model, tmp_path)
    rest = load_file(tmp_path / REST)
    rest.pop("model.norm.weight")
    save_file(rest, tmp_path / REST)
    write_manifest(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"holds no value for model\.norm\.weight"):
        load_dense(tmp_path)


def test_a_damaged_model_is_not_loaded(tmp_path):
    compress(tiny_models.llama(), tmp_path)
    os.truncate(tmp_path / block_file(1), 100)
    with pytest.raises(CheckpointError, match=block_file(1)):
        load_dense(tmp_path)
    with pytest.raises(CheckpointError, match=block_file(1)):
        load_dense(tmp_path, verify=False)
