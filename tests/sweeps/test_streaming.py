"""Block by block from the shards or from memory, spilled or not: the files are the same to the byte."""

import pytest
import torch

from caldera import Method
from caldera.blocks import named_matrices
from caldera.correction import Correction
from caldera.matrices import chosen
from caldera.rows import Spill
from caldera.streamed import Streamed, Whole
from sweeps.calibration import ensure_calibration
from sweeps.compress import CheckpointFolder, Fit, compress
from sweeps.inputs import CorrectedPrefix, Original
from sweeps.models import load_model, open_model
from sweeps.progress import Reporter
from tests.caldera import tiny_models

ROWS = tiny_models.token_rows(4, 24)
EXCLUDED = ["*_gate", "*.0.*v_proj", "*.1.mlp.*down_proj*", "*.0.mlp.c_fc"]
FIT = {"rank": 2, "outer_iterations": 1, "inner_iterations": 1, "q": "uniform_4bit_row"}


def fitted(source, stored, folder, out, mode: str, spill: Spill | None) -> dict[str, bytes]:
    """Every file of the calibration and of the packed checkpoint, by its name below `out`."""
    moments = ensure_calibration(out / "moments", lambda: source, lambda: ROWS, lambda *_: None, True, spill)
    inputs = Original(moments)
    if mode == "corrected":
        inputs = CorrectedPrefix(moments, source, ROWS, Correction(), spill)
    names = frozenset(name for name in named_matrices(source.model) if chosen(name, ["*"], EXCLUDED))
    fit = Fit(Method(**FIT), names, torch.device("cpu"))
    with Reporter("test").stage("compress") as progress:
        compress(folder, lambda: stored, inputs, fit, CheckpointFolder(out / "packed"), torch.bfloat16, progress)
    return {
        str(f.relative_to(out)): f.read_bytes()
        for f in sorted([*out.glob("moments/*"), *out.glob("packed/*")])
        if f.is_file()
    }


@pytest.mark.parametrize("mode", ["original", "corrected"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2", "neox", "mixtral"])
def test_files_are_the_same_to_the_byte(tmp_path, name, mode):
    """Qwen's head is tied; Mixtral's experts are stored one by one, so it is loaded whole."""
    folder = tmp_path / "model"
    tiny_models.FAMILIES[name]().save_pretrained(folder, max_shard_size="20KB")
    whole = Whole(load_model(folder, "bfloat16")), Whole(load_model(folder, "float32"))
    expected = fitted(*whole, folder, tmp_path / "whole", mode, None)
    assert {"packed/model-rest.safetensors", "moments/hidden-00001.safetensors"} < set(expected)
    for limit in (0, 10**9):
        opened = open_model(folder, "bfloat16"), open_model(folder)
        assert all(isinstance(source, Whole if name == "mixtral" else Streamed) for source in opened)
        spill = Spill(tmp_path / "spill", limit)
        assert fitted(*opened, folder, tmp_path / str(limit), mode, spill) == expected
    assert not list((tmp_path / "spill").iterdir())


def test_a_block_is_read_when_it_is_its_turn(tmp_path):
    """Not before: a shard that is damaged meanwhile is found out; and none is kept."""
    tiny_models.llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    source = open_model(tmp_path / "model", "float32")
    ensure_calibration(tmp_path / "moments", lambda: source, lambda: ROWS, lambda *_: None, True)
    assert all(p.is_meta for p in source.model.parameters())
    with source.outside() as model:
        held = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    assert held == 4 * (tiny_models.VOCABULARY + 1) * tiny_models.WIDTH  # the embedding and the last norm
    for file in set(source.files.values()):
        file.unlink()
    with pytest.raises(OSError):
        source.block(0)
