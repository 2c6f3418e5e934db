"""The record of a point: one JSON file that says what was asked, what came out, and on what machine."""

import importlib.metadata
import platform
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from sweeps.point import Point

SCHEMA_VERSION = 2
PACKAGES = ("torch", "transformers", "lm-eval", "hydra-core", "datasets", "safetensors", "numpy", "numba")


def skeleton(point: Point, axes: dict, status: str) -> dict:
    """A record with every top-level key; what is not known is null or empty, never a number."""
    config = point.config
    return {
        "schema_version": SCHEMA_VERSION,
        "status": status,
        "name": point.name,
        "key": point.key,
        "keys": point.keys,  # of what it was made from, as the cache and the checkpoints are named
        "sweep": config["sweep"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config,
        "point": axes,
        "bits": None,
        "metrics": {},
        "noise_floor": None,  # of the uncompressed model, if asked for: what the metrics change by in float32
        "matrices": [],
        "allocation": None,  # of a budget: what was asked, reached and chosen
        "timings_s": {},
        "reused": {},  # of what points share, by kind: the part that was there already, from 0 to 1
        "checkpoint": None if point.method is None else str(point.checkpoint.relative_to(point.results)),
        "memory": {"peak_rss_bytes": peak_rss(), "peak_gpu_bytes": peak_gpu()},
        "environment": environment(),
        "seeds": {"seed": config["seed"], "calibration_shuffle": config["calibration"]["shuffle_seed"]},
        "error": None,
    }


def bits_of(matrices: list[dict], checkpoint: Path, parameters: int) -> dict:
    """Bits per parameter: the paper's convention, counted over the compressed tensors, and over the model's files.

    `parameters` counts the whole model. Only tensor files count for `model`: not configuration, tokenizer, manifest.
    """
    sizes = [m["shape"][0] * m["shape"][1] for m in matrices]
    stored = sum(m["stored_bytes"] for m in matrices)
    model = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    nominal = sum(m["nominal_bits"] * size for m, size in zip(matrices, sizes)) / sum(sizes)
    counts = {"stored_bytes": stored, "model_bytes": model, "parameters": sum(sizes), "model_parameters": parameters}
    return {"nominal": nominal, "stored": 8 * stored / sum(sizes), "model": 8 * model / parameters} | counts


def error_of(error: BaseException, stage: str, matrix: str | None) -> dict:
    """What failed, and where."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "stage": stage,
        "matrix": matrix,
        "block": next((int(part) for part in (matrix or "").split(".") if part.isdigit()), None),
    }


def environment() -> dict:
    """Versions and hardware."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    machine = {
        "processor": torch.cpu.get_capabilities().get("cpu_name"),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
    memory = {"memory_bytes": psutil.virtual_memory().total, "platform": platform.platform()}
    return {"python": platform.python_version(), "versions": versions} | machine | memory


def peak_gpu() -> int | None:
    """Most bytes of tensors on the GPUs at once since `reset_peak`; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def reset_peak() -> None:
    """Start new peaks: of resident memory, where the system can (Linux), and of the GPUs'."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int | None:
    """Highest resident memory in bytes since `reset_peak`, or since the start of the process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
