"""The transforms are orthonormal, flat, cheap and reproducible at every width."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from caldera import hadamard

# Widths of published language models, and powers of two.
WIDTHS = [
    8, 16, 64, 576, 640, 768, 896, 960, 1024, 1152, 1280, 1536, 1600, 2048, 2304, 2560, 2816, 3072, 3584, 3840, 4096,
    4864, 5120, 5376, 5504, 6400, 6912, 8192, 8960, 9216, 9728, 10240, 11008, 12288, 13824, 14336, 15360, 16384, 17920,
    18944, 21504, 25600, 27648, 28672, 29568,
]  # fmt: skip
NO_HADAMARD = [3, 7, 13, 26, 545, 830]
HARTLEY = [10007, 20014]  # odd part above hadamard.LARGEST


def gaussian(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def dense(n, dtype=torch.float64):
    """T_n as a matrix."""
    return hadamard.transform(torch.eye(n, dtype=dtype)).mT


@pytest.mark.parametrize("n", [1, *NO_HADAMARD, *(n for n in WIDTHS if n <= 1152)])
def test_dense_transform_is_orthogonal(n):
    t = dense(n, torch.float32)
    torch.testing.assert_close(t @ t.mT, torch.eye(n), rtol=0, atol=1e-5)
    torch.testing.assert_close(hadamard.inverse(torch.eye(n)), t, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [*NO_HADAMARD, *WIDTHS, *HARTLEY])
def test_round_trip_norms_and_inner_products(n):
    x = gaussian(4, n)
    y = hadamard.transform(x)
    torch.testing.assert_close(hadamard.inverse(y), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(hadamard.transform(hadamard.inverse(x)), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(y @ y.mT / n, x @ x.mT / n, rtol=0, atol=1e-5)


@given(n=st.integers(1, 700), seed=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_any_width_is_orthonormal(n, seed):
    x = hadamard.signs(3 * n, seed, "x", dtype=torch.float64).view(3, n)
    y = hadamard.transform(x)
    torch.testing.assert_close(hadamard.inverse(y), x)
    torch.testing.assert_close(y @ y.mT, x @ x.mT)
    assert np.prod(hadamard.factors(n)) == n


@pytest.mark.parametrize("n", WIDTHS)
def test_model_widths_use_true_hadamard_matrices(n):
    assert all(hadamard.is_hadamard(order) for order in hadamard.factors(n))
    x = torch.zeros(2, n)
    x[0, n // 3] = x[1, n - 1] = 1.0
    for y in (hadamard.transform(x), hadamard.inverse(x)):
        torch.testing.assert_close(y.abs(), torch.full((2, n), n**-0.5))


@pytest.mark.parametrize("n", [545, 830, *HARTLEY])
def test_an_outlier_is_flattened_where_no_hadamard_matrix_exists(n):
    one_hot = torch.nn.functional.one_hot(torch.tensor([0, n // 2]), n).double()
    assert not hadamard.is_hadamard(hadamard.factors(n)[0])
    assert hadamard.transform(one_hot).abs().max() < 5 / n**0.5  # about sqrt(2 log n) for a random factor


def test_hartley_factor_is_the_textbook_matrix(monkeypatch):
    monkeypatch.setattr(hadamard, "LARGEST", 4)
    angle = 2 * np.pi * np.outer(np.arange(7), np.arange(7)) / 7
    hartley = torch.from_numpy((np.cos(angle) + np.sin(angle)) / 7**0.5)
    expected = torch.kron(hartley, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double() / 2**0.5)
    torch.testing.assert_close(dense(14), expected)


@pytest.mark.parametrize("n", [24, 6400, 45 * 4, 7 * 128])
def test_transform_is_the_kronecker_product_of_its_factors(n):
    rows = gaussian(2, n, dtype=torch.float64)
    expected = rows
    for axis, order in enumerate(hadamard.factors(n), start=1):
        factor = dense(order)
        view = expected.reshape(2, *hadamard.factors(n)).movedim(axis, -1) @ factor.mT
        expected = view.movedim(-1, axis).reshape(2, n)
    torch.testing.assert_close(hadamard.transform(rows), expected)


# Sylvester; Paley I over primes, 3^3 and 7^3; Paley II over primes, 3^2, 5^2 and 7^2; doubled; 5^4.
@pytest.mark.parametrize("order", [1, 2, 4, 64, 12, 44, 28, 344, 36, 76, 20, 52, 100, 56, 160, 1252])
def test_hadamard_matrices(order):
    h = hadamard.hadamard(order)
    np.testing.assert_array_equal(abs(h), np.ones((order, order)))
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 10, 92, 116, 172, 2 * 13])
def test_orders_without_a_construction(order):
    assert not hadamard.is_hadamard(order)


def test_plans_and_factors_do_not_change():
    """Checkpoints store no factor: these values are part of their format."""
    plans = {576: (24, 24), 4096: (64, 64), 8192: (16, 16, 32), 11008: (32, 344), 1: (1,), 830: (415, 2)}
    assert {n: hadamard.factors(n) for n in plans} == plans
    expected = [[-0.551268, 0.034697, -0.833606], [0.816793, 0.226212, -0.530734], [-0.170157, 0.973460, 0.153043]]
    torch.testing.assert_close(dense(3), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    paley = ["++++++++++++", "-+-+---+++-+", "-++-+---+++-", "--++-+---+++"]
    assert ["".join("-+"[int(v > 0)] for v in row) for row in dense(12)[:4]] == paley


def test_signs_golden():
    expected = [-1, -1, 1, -1, -1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1]
    assert hadamard.signs(16, 0, "model.layers.0/in").tolist() == expected
    assert hadamard.signs(13, 0, "model.layers.0/in", dtype=torch.float64).tolist() == expected[:13]


def test_signs_differ_by_seed_and_name_and_are_balanced():
    a, b, c = hadamard.signs(4096, 0, "a"), hadamard.signs(4096, 1, "a"), hadamard.signs(4096, 0, "b")
    assert a.dtype == torch.float32 and set(a.tolist()) == {-1.0, 1.0}
    for correlation in (a.mean(), (a * b).mean(), (a * c).mean(), (a[1:] * a[:-1]).mean()):
        assert abs(correlation) < 5 / 4096**0.5


@pytest.mark.parametrize("n", [1, 7, 64, 576])
@pytest.mark.parametrize("apply", [hadamard.transform, hadamard.inverse])
def test_input_is_neither_changed_nor_aliased(apply, n):
    x = gaussian(3, n)
    before = x.clone()
    apply(x).zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", [576, 830, 10007])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_half_precision_rounds_once(dtype, n):
    x = gaussian(2, n).to(dtype)
    y = hadamard.transform(x)
    assert y.dtype == dtype
    error = (y.double() - hadamard.transform(x.double())).norm() / x.double().norm()
    assert error < max(torch.finfo(dtype).eps / 2, 1e-15) * (1 if dtype.itemsize == 2 else 16)


def test_leading_dimensions_and_strides():
    x = gaussian(5, 96, 2, 3).permute(2, 0, 3, 1)  # (2, 5, 3, 96), not contiguous
    y = hadamard.transform(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[1, 3, 2], hadamard.transform(x[1, 3, 2]))
    assert hadamard.transform(torch.zeros(0, 96)).shape == (0, 96)


@pytest.mark.parametrize("n", [96, 830, 10007])
def test_gradient_is_the_inverse_even_after_inference_mode(n):
    hadamard._cached_matrix.cache_clear()
    with torch.inference_mode():
        hadamard.transform(torch.ones(n))
    x, cotangent = gaussian(n).requires_grad_(), gaussian(2, n)[1]
    hadamard.transform(x).backward(cotangent)
    torch.testing.assert_close(x.grad, hadamard.inverse(cotangent))


@pytest.mark.parametrize("n", [576, 830, 20014])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_cuda_tensors_work_and_leave_no_trace(n, dtype):
    hadamard._cached_matrix.cache_clear()
    with FakeTensorMode():
        x = torch.empty(4, n, dtype=dtype, device="cuda") * hadamard.signs(n, 0, "x", device="cuda", dtype=dtype)
        for y in (hadamard.transform(x), hadamard.inverse(x)):
            assert isinstance(y, FakeTensor) and y.device.type == "cuda"
            assert y.shape == (4, n) and y.dtype == dtype
    assert hadamard._cached_matrix.cache_info().currsize == 0
    real = gaussian(2, n)
    torch.testing.assert_close(hadamard.inverse(hadamard.transform(real)), real, rtol=0, atol=1e-5)
    with FakeTensorMode() as mode:  # the cache now holds real tensors of this width
        hadamard.transform(mode.from_tensor(real))


def test_a_factor_built_under_fake_mode_is_real():
    hadamard._cached_matrix.cache_clear()
    with FakeTensorMode():
        assert not isinstance(hadamard._cached_matrix(12, torch.float32, torch.device("cpu")), FakeTensor)


@pytest.mark.parametrize("n", [576, 830, 4096, 8192, 11008])
def test_declared_operations_are_what_runs(n):
    with FlopCounterMode(display=False) as counter:
        hadamard.transform(torch.zeros(3, n))
    assert counter.get_total_flops() == 2 * 3 * hadamard.operations(n)


def test_cost_is_far_below_a_dense_product():
    assert hadamard.operations(8192) / hadamard.operations(4096) < 2.3
    assert all(hadamard.operations(2**j) <= 11 * j * 2**j for j in range(1, 25))  # O(n log n)
    assert all(hadamard.operations(n) < n * n / 10 for n in WIDTHS if n > 512)
    assert hadamard.operations(10007) < 10007**2 / 100


@pytest.mark.parametrize("n", [0, -8])
def test_width_below_one_is_refused(n):
    with pytest.raises(ValueError, match=f"width of at least 1, got {n}"):
        hadamard.factors(n)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        hadamard.transform(torch.arange(8))


def test_import_computes_nothing():
    script = """
from caldera import hadamard
caches = [f for f in vars(hadamard).values() if hasattr(f, "cache_info")]
assert len(caches) >= 4 and all(f.cache_info().misses == 0 for f in caches)
"""
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", script], check=True)
