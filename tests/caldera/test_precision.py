"""Float32 means float32 while moments are collected and matrices are fitted, whatever the process has set."""

import contextlib
import warnings

import pytest
import torch

from caldera.devices import full_precision, precision
from caldera.moments import Accumulator, products_of

BACKENDS = torch.backends
OPERATIONS = {
    "cuda": BACKENDS.cuda.matmul, "conv": BACKENDS.cudnn.conv, "rnn": BACKENDS.cudnn.rnn,
    "cpu": BACKENDS.mkldnn.matmul,
}  # fmt: skip
FULL = dict.fromkeys(OPERATIONS, "ieee")


def settings() -> dict[str, str]:
    return {name: operation.fp32_precision for name, operation in OPERATIONS.items()}


def old_switch() -> str | None:
    """What torch's older switch says, None where it refuses to."""
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()


@pytest.fixture(autouse=True)
def restored():
    before = settings()
    yield
    with warnings.catch_warnings(action="ignore"):
        torch.set_float32_matmul_precision("highest")
    for name, value in before.items():
        OPERATIONS[name].fp32_precision = value


@pytest.mark.parametrize("chosen", [{}, {"cuda": "tf32"}, {"cpu": "bf16", "cuda": "tf32"}, {"conv": "ieee"}])
def test_precision_is_full_inside_and_as_before_afterwards(chosen):
    for name, value in chosen.items():
        OPERATIONS[name].fp32_precision = value
    before = settings(), old_switch()
    with full_precision():
        assert settings() == FULL and torch.get_float32_matmul_precision() == "highest"
        with full_precision():
            assert settings() == FULL
        assert settings() == FULL
    assert (settings(), old_switch()) == before


@pytest.mark.parametrize("value", ["high", "medium"])
def test_the_older_switch_is_off_inside_too(value):
    """Torch refuses to compute where the two disagree."""
    with warnings.catch_warnings(action="ignore"):
        torch.set_float32_matmul_precision(value)
    before = settings()
    with full_precision():
        assert settings() == FULL and old_switch() == "highest" and BACKENDS.cuda.matmul.allow_tf32 is False
    assert settings() == before and before["cuda"] == "tf32" and torch.get_float32_matmul_precision() == value


def test_the_oldest_switch_is_off_inside_too():
    with warnings.catch_warnings(action="ignore"):
        BACKENDS.cuda.matmul.allow_tf32 = True
    before = settings()
    with full_precision():
        assert settings() == FULL and BACKENDS.cuda.matmul.allow_tf32 is False
    assert settings() == before and BACKENDS.cuda.matmul.allow_tf32 is True


def test_precision_is_as_before_after_an_exception():
    before = settings()
    with pytest.raises(ValueError), full_precision():
        raise ValueError
    assert settings() == before


def test_exact_products_of_bfloat16_numbers_are_the_one_exception():
    """They are multiplied without rounding, on the CPU by its own instructions; other products stay as they are."""
    half, single = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    with full_precision():
        with products_of(half, half):
            assert settings() == FULL | {"cpu": "bf16"}
        with products_of(half, single):
            assert settings() == FULL
        assert settings() == FULL


def test_moments_of_float32_numbers_do_not_take_a_shortcut():
    x, found = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)), []
    for wrapped in (full_precision(), contextlib.nullcontext()):
        accumulator = Accumulator.zeros(40, x.device)
        with wrapped:
            accumulator.add(x)
        found.append(accumulator.mean())
    assert torch.equal(*found)  # the default is full precision, bit for bit
    with precision(BACKENDS.mkldnn.matmul, "bf16"), full_precision():
        accumulator = Accumulator.zeros(40, x.device)
        accumulator.add(x)
    assert torch.equal(accumulator.mean(), found[0])
