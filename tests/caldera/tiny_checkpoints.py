"""Packed checkpoints of tiny models, made by hand."""

import torch

from caldera import Method, decompose
from caldera.blocks import covered, decoder_blocks
from caldera.checkpoint import block_file, write_manifest, write_matrices, write_rest
from caldera.matrices import chosen, matrices
from tests.caldera.oracles import second_moments


def method(**settings) -> Method:
    return Method(**{"rank": 3, "outer_iterations": 1, "inner_iterations": 1} | settings)


def compress(model, directory, dtype=torch.float32, exclude=("*_gate",), **settings) -> dict[str, torch.Tensor]:
    """All matrices of all blocks but the excluded ones (patterns); the dequantized matrices by name."""
    prefix, blocks = decoder_blocks(model)
    dense = {}
    for index, block in enumerate(blocks):
        packed = []
        for name, matrix in matrices(block).items():
            full = f"{prefix}.{index}.{name}"
            if not chosen(full, ["*"], exclude):
                continue
            moments = second_moments(matrix.shape[1])
            packed.append(decompose(matrix.read(), moments, method(**settings), name=full).packed)
            dense[full] = packed[-1].dequantize()
        write_matrices(directory, block_file(index), packed)
    write_rest(directory, model.state_dict(), covered(model, dense), dtype)
    model.config.save_pretrained(directory)
    write_manifest(directory, {"note": "by hand"})
    return dense
