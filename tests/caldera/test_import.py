"""`import caldera` is light: a plot, a listing or a `--help` must not wait for compilers and model libraries."""

import subprocess
import sys

import pytest

HEAVY = [
    "numba",
    "transformers",
    "hydra",
    "omegaconf",
    "wandb",
    "datasets",
    "accelerate",
    "safetensors",
    "matplotlib",
    "pandas",
]
SCRIPT = """
import sys, time
import torch
with_torch, before = time.process_time(), set(sys.modules)
import caldera
print(time.process_time(), time.process_time() - with_torch, *(set(sys.modules) - before))
"""


@pytest.fixture(scope="module")
def imported() -> tuple[float, float, set[str]]:
    """Processor seconds of the whole process and beyond torch, best of three, and what was loaded beyond torch."""
    runs = [
        subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    total, own, *modules = zip(*(run.stdout.split(maxsplit=2) for run in runs))
    return min(map(float, total)), min(map(float, own)), set(modules[0][0].split())


def test_import_is_fast(imported):
    total, beyond_torch, _ = imported
    assert beyond_torch < 2 and total < 4


@pytest.mark.parametrize("heavy", HEAVY)
def test_import_loads_nothing_heavy(imported, heavy):
    assert not [m for m in imported[2] if m.split(".")[0] == heavy]


def test_names_that_are_promised_exist():
    import caldera

    assert all(hasattr(caldera, name) for name in caldera.__all__)
