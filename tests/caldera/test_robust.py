"""Degenerate matrices, extreme scales, failing factorisations: a finite and honest answer, or an error by name."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caldera import Decomposition, Method, NumericalError, decompose, prepare, relative_error
from caldera.linalg import damped_cholesky, named, power_of_4, solve_gram
from tests.caldera.oracles import gaussian, second_moments, weighted_loss

QUICK = {"outer_iterations": 2, "inner_iterations": 2}


def dead_inputs(n: int, seed: int) -> torch.Tensor:
    moments = second_moments(n, seed)
    moments[::2] = moments[:, ::2] = 0
    return moments if n > 1 else second_moments(n, seed)


def zero_columns(m: int, n: int, seed: int) -> torch.Tensor:
    weight = gaussian(m, n, seed=seed)
    weight[:, ::3] = 0
    return weight


def outlier(m: int, n: int, seed: int) -> torch.Tensor:
    weight = gaussian(m, n, seed=seed)
    weight[seed % m, seed % n] = 1e6
    return weight


# What makes a weight (m, n), and moments (n, n), of a size and a seed.
WEIGHTS = {
    "gaussian": lambda m, n, seed: gaussian(m, n, seed=seed),
    "zero": lambda m, n, seed: torch.zeros(m, n),
    "constant": lambda m, n, seed: torch.full((m, n), 0.3),
    "rank 1": lambda m, n, seed: gaussian(m, 1, seed=seed) @ gaussian(1, n, seed=seed + 1),
    "zero columns": zero_columns,
    "one entry": lambda m, n, seed: torch.nn.functional.pad(torch.ones(1, 1), (0, n - 1, 0, m - 1)),
    "outlier": outlier,
}
MOMENTS = {
    "full": second_moments,
    "rank 1": lambda n, seed: torch.ones(n, n),
    "rank 3": lambda n, seed: second_moments(n, seed, tokens=3),
    "dead inputs": dead_inputs,
    "one live input": lambda n, seed: torch.diag(torch.eye(n)[n // 2]),
    "one huge input": lambda n, seed: torch.diag(1 + 1e6 * torch.eye(n)[0]),
}
SCALES = (1.0, 1e30, 1e-30)


def assert_sound(weight: torch.Tensor, moments: torch.Tensor, method: Method) -> Decomposition | None:
    """Finite, and the error is that of the packed tensors; or a NumericalError that names the matrix."""
    try:
        found = decompose(weight, moments, method, name="layer.q")
    except NumericalError as error:
        assert str(error).startswith("layer.q")
        return None
    values = found.dequantize()
    assert values.isfinite().all() and math.isfinite(found.relative_error)
    assert all(math.isfinite(t["error"]) for t in found.trace)
    assert all(note["what"].startswith("layer.q") and note["jitter"] > 0 for note in found.jitters)
    assert found.relative_error == pytest.approx(relative_error(weight, values, moments), rel=1e-3)
    return found


def without_output(weight: torch.Tensor, moments: torch.Tensor) -> bool:
    """Whether what reaches the output drowns in float32's rounding of what the weights could have given."""
    most = float(weight.double().square().sum() * moments.double().trace())
    return weighted_loss(weight, moments) <= 1e-6 * most and most > 0


# --------------------------------------------------------------------------------------------------------- any problem
@given(
    m=st.sampled_from([1, 2, 8, 13, 24]), n=st.sampled_from([1, 7, 8, 21, 40]), seed=st.integers(0, 1000),
    weight=st.sampled_from(sorted(WEIGHTS)), moments=st.sampled_from(sorted(MOMENTS)),
    scales=st.tuples(st.sampled_from(SCALES), st.sampled_from(SCALES)),
    share=st.sampled_from([0, 0.3, 1]), q=st.sampled_from(["e8p_2bit", "uniform_asym_2bit_g16", "nf_4bit_row", "none"]),
    left=st.sampled_from(["e8p_2bit", "uniform_4bit", "bf16", "fp16"]), right=st.sampled_from(["e8p_4bit", "bf16"]),
    init=st.sampled_from(["zero", "svd", "whitened", "odlri"]), init_rank=st.sampled_from([None, 1, 3, "auto"]),
    init_channels=st.sampled_from([1, 16]), identity=st.booleans(), downdate=st.booleans(), transform=st.booleans(),
    order=st.sampled_from(["lr_first", "q_first"]), warm_start=st.booleans(), tune_passes=st.integers(0, 1),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_problem_and_any_method(m, n, seed, weight, moments, scales, share, q, left, right, identity, **options):
    rank = max(round(share * min(m, n)), int(q == "none"))
    options["moments"] = "identity" if identity and options["init"] != "odlri" else "measured"
    problem = WEIGHTS[weight](m, n, seed) * scales[0], MOMENTS[moments](n, seed) * scales[1]
    found = assert_sound(*problem, Method(rank=rank, q=q, l=left, r=right, **QUICK, **options))
    too_far_for_fp16 = left == "fp16" and rank and scales[0] != 1
    assert found is not None or too_far_for_fp16 or without_output(*problem)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize(
    "options",
    [{}, {"init": "whitened", "order": "q_first", "tune_passes": 1}, {"rank": 0, "q": "uniform_asym_3bit_g32"},
     {"l": "bf16", "r": "bf16", "q": "none"}, {"downdate": True, "init": "odlri"}, {"moments": "identity"}],
    ids=str,
)  # fmt: skip
def test_the_scale_of_weights_and_of_moments_is_of_no_account(scale, options):
    weight, moments, method = gaussian(24, 40), second_moments(40), Method(**{"rank": 4} | QUICK | options)
    plain = decompose(weight, moments, method).relative_error
    for problem in ((weight * scale, moments), (weight, moments * scale), (weight * scale, moments * scale)):
        assert decompose(*problem, method).relative_error == pytest.approx(plain, rel=0.02)


def test_powers_of_4():
    for value in (1e-35, 3e-5, 0.3, 1.0, 7.0, 1e5, 1e38):
        unit = power_of_4(torch.tensor([-value, value / 2]))
        assert 0.49 < value / unit < 2.01 and math.frexp(unit)[0] == 0.5 and math.frexp(unit**0.5)[0] == 0.5
    assert power_of_4(torch.zeros(2)) == 1
    assert torch.isfinite(torch.tensor(1e-45) / power_of_4(torch.tensor(1e-45)))


def test_values_that_half_precision_cannot_hold_are_refused_by_name():
    method = Method(rank=4, l="fp16", r="bf16", **QUICK)
    for scale in (1e30, 1e-30):
        with pytest.raises(NumericalError, match=r"layer\.q: l: fp16 cannot hold values of .*; choose bf16"):
            decompose(gaussian(24, 40) * scale, second_moments(40), method, name="layer.q")


def test_weights_without_any_output_have_no_relative_error():
    """Every input that the weights read is dead: to call the error 0 or 1 would be made up."""
    weight, moments = torch.zeros(8, 16), torch.eye(16)
    weight[:, 3], moments[3, 3] = 1.0, 0.0
    with pytest.raises(NumericalError, match="layer.q.*weights that give no output on the calibration inputs"):
        decompose(weight, moments, Method(rank=0, transform=False), name="layer.q")


# ----------------------------------------------------------------------------------------------------- one guard, noted
def test_damping_that_rose_is_noted_and_that_which_did_not_is_not():
    notes, bad = [], torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    damped_cholesky(torch.eye(2), 1e-3, 1.0, "a", notes)
    assert notes == []
    damped_cholesky(bad, 1e-3, 1.0, "b", notes)
    solve_gram(bad, torch.ones(2, 1), "c", notes)
    assert [note["what"] for note in notes] == ["b", "c"]
    assert [note["jitter"] for note in notes] == pytest.approx([0.1, 0.1])


def test_every_note_reaches_the_decomposition(monkeypatch):
    """A guard that fails at first, wherever it is called from."""
    real = torch.linalg.cholesky_ex
    calls = []

    def stubborn(h):
        calls.append(h)
        factor, info = real(h)
        return factor, info if len(calls) % 2 == 0 else torch.ones_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", stubborn)
    options = {"rank": 4, "init": "odlri", "downdate": True, "l": "bf16", "r": "bf16", "outer_iterations": 1}
    found = decompose(gaussian(16, 24), second_moments(24), Method(**options), name="layer.q")
    noted = {note["what"] for note in found.jitters}
    assert noted == {
        "layer.q: second moments", "layer.q: initial factors", "layer.q: LR of iteration 0", "layer.q: Q of iteration 0"
    }  # fmt: skip
    trusting = 2 * 2  # solves of the two LPLRs before they know that these fail
    assert len(found.jitters) == (len(calls) - trusting) / 2 and found.sigma == pytest.approx(0.03)


def test_a_guard_that_gives_up_names_the_matrix_and_the_last_jitter():
    moments = torch.eye(16)
    moments[0, 1] = moments[1, 0] = 10
    message = "layer.q: second moments: the Cholesky factorisation fails even with 1 added to the diagonal"
    with pytest.raises(NumericalError, match=message):
        decompose(gaussian(8, 16), moments, Method(rank=4), name="layer.q")
    with pytest.raises(NumericalError, match="gram: the Cholesky factorisation fails even with 0.1 added"):
        solve_gram(moments, torch.ones(16, 1), "gram")
    with pytest.raises(NumericalError, match="gram: 2 of 2 entries are NaN or infinite"):
        solve_gram(torch.eye(2) * 1e-38, torch.full((2, 1), 1e10), "gram")


@pytest.mark.parametrize("kind", ["svd", "qr"])
def test_a_factorisation_that_does_not_converge_is_an_error_by_name(kind, monkeypatch):
    def fails(*_, **__):
        raise torch.linalg.LinAlgError(f"linalg.{kind}: did not converge\nin detail")

    monkeypatch.setattr(torch.linalg, kind, fails)
    for options in ({}, {"init": "whitened", "init_rank": "auto"}):
        with pytest.raises(NumericalError) as raised:
            decompose(gaussian(64, 96), second_moments(96), Method(rank=4, **options), name="layer.q")
        assert str(raised.value) == f"layer.q: linalg.{kind}: did not converge"


def test_other_errors_pass_the_guard_as_they_are():
    with pytest.raises(ZeroDivisionError), named("x"):
        1 / 0  # noqa: B018


def test_an_iterate_that_is_no_number_is_an_error_by_name(monkeypatch):
    loop = importlib.import_module("caldera.decomposition")._Loop
    monkeypatch.setattr(loop, "_undamped", lambda *_: float("nan"))
    with pytest.raises(NumericalError, match=r"layer\.q: LR of iteration 0: the relative error is nan"):
        decompose(gaussian(8, 16), second_moments(16), Method(rank=4), name="layer.q")


def test_a_basis_that_needed_more_damping_says_so():
    moments = torch.eye(16)
    moments[0, 1] = moments[1, 0] = 1.05
    basis = prepare(moments, name="x", sigma=1e-3)
    assert basis.jitters == [{"what": "x: second moments", "jitter": pytest.approx(0.1)}]
