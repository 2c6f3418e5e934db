"""The host waits for a device a few times an iteration, and never inside a column loop, whatever the sizes.

Shown on fake tensors of a device, and once more on real ones with the code that other devices run.
"""

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import caldera
from caldera import Method, decompose, get_quantizer, predict_error, prepare
from caldera.devices import array, read, read_all
from caldera.ldlq import _walk, ldlq, tune
from caldera.lowrank import lplr
from caldera.quantizers import FAMILIES
from tests.caldera.oracles import gaussian, second_moments
from tests.caldera.watching import Watch, empty, reads

EACH = [f"{family}_{max(books)}bit" for family, books in FAMILIES.items()] + ["bf16"]  # one of each family
LONG = {"rank": 4, "l": "bf16", "r": "e8p_2bit", "inner_iterations": 2, "patience": 100, "tolerance": 0.0}


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def uncompiled(monkeypatch):
    """The code of other devices, for real tensors."""
    for place in ("caldera.ldlq.compiled", "caldera.quantizers.base.compiled"):
        monkeypatch.setattr(place, lambda _codebook, _like: None)


# --------------------------------------------------------------------------------------------------------- the detector
def test_waits_would_be_noticed(fake):
    with Watch() as watch, pytest.raises(DataDependentOutputException):
        bool(empty(3).sum() > 0)
    with Watch() as watch:
        empty(3).cpu()
        torch.linalg.inv(empty(3, 3))
        torch.ones(3).to(empty(1).device)
    assert watch.to_host and watch.from_host and watch.waits["_linalg_check_errors"] == 1


def test_waits_for_real_tensors_would_be_noticed():
    x = torch.tensor([1.0, -1.0])
    with Watch() as watch:
        assert float(x.sum()) == 0 and x[x > 0].shape == (1,) and not torch.equal(x, -x)
    assert watch.waits == {"_local_scalar_dense": 1, "index": 1, "equal": 1}


def test_reads_are_counted_and_give_the_values():
    with reads() as found:
        assert read(torch.tensor(3, dtype=torch.int32)) == 3 and read(torch.tensor(1.5)) == 1.5
        assert read_all(torch.tensor(0.1), torch.tensor(True)) == [float(torch.tensor(0.1)), 1.0] and read_all() == []
        assert array(torch.ones(2, 2)).shape == (2, 2)
    assert found == [(), (), (2,), (2, 2)]


# --------------------------------------------------------------------------------------------------------- column loops
@pytest.mark.parametrize("name", EACH)
def test_no_quantizer_waits(name, fake):
    quantizer, x = get_quantizer(name), empty(24, 16)
    with Watch() as watch, reads() as found:
        scales = quantizer.fit(x)
        codes = quantizer.encode(x, scales)
        quantizer.unpack(quantizer.pack(codes, scales), 24, 16)
    assert not found and not watch.waits and not watch.to_host


@pytest.mark.parametrize("name", EACH)
def test_column_loops_do_not_wait(name, fake, monkeypatch):
    quantizer = get_quantizer(name)
    monkeypatch.setattr("caldera.ldlq.PANEL", 2 * quantizer.group)
    n = 3 * quantizer.group  # two panels
    basis, weight = prepare(empty(n, n), name="x"), empty(24, n)
    inverses = basis.block_inverses(quantizer.group)
    monkeypatch.setattr(type(basis), "block_inverses", lambda _self, _group: inverses)  # checked where it is made
    basis.feedback(quantizer.group)
    with Watch() as watch, reads() as found:
        rounded = _walk(weight, basis, quantizer, quantizer.fit(weight))
        tune(weight, basis, quantizer, rounded, 1)
    assert not found and not watch.waits and not watch.to_host


@pytest.mark.parametrize("name", ["e8p_3bit", "uniform_asym_3bit_g8", "trellis_2bit", "nf_2bit"])
def test_column_loops_do_not_wait_for_real_values_either(name, uncompiled):
    basis, quantizer, weight = prepare(second_moments(16), name="x"), get_quantizer(name), gaussian(32, 16)
    basis.feedback(quantizer.group)
    quantizer.codebook.gaussian_mse  # noqa: B018 (found once, on the host)
    with Watch() as watch, reads() as found:
        rounded = _walk(weight, basis, quantizer, quantizer.fit(weight))
    assert not found and not watch.waits and rounded.values.isfinite().all()
    with Watch() as watch, reads() as found:
        ldlq(weight, basis, quantizer)
    # its loss, with what was expected of it; then each widening's
    assert found[0] == (2,) and set(found[1:]) <= {(1,)} and not watch.waits


# ----------------------------------------------------------------------------------------------------- outside of loops
@pytest.mark.parametrize("iterations", [1, 6])
@pytest.mark.parametrize("names", [("e8p_4bit", "e8p_2bit"), ("uniform_3bit", "nf_4bit_row"), ("bf16", "e8p_3bit")])
def test_an_alternation_waits_once(names, iterations, uncompiled):
    basis, a, right = prepare(second_moments(40), name="x"), gaussian(48, 40), gaussian(24, 40, seed=3)
    basis.damped  # noqa: B018 (made once)
    with Watch() as watch, reads() as found:
        pair = lplr(a, right, basis, tuple(map(get_quantizer, names)), iterations, "x")
    assert found == [(2,)] and not watch.waits and isinstance(pair.loss, float)


def waits_of(m: int, n: int, **settings) -> tuple[int, int]:
    """Reads of a whole decomposition, and the waits of its factorisations, in a dry run."""
    with Watch() as watch, reads() as found:
        decompose(empty(m, n), empty(n, n), Method(**LONG | settings))
    assert not watch.to_host and not set(watch.waits) - {"_linalg_check_errors", "_linalg_svd"}
    return len(found), sum(watch.waits.values())


@pytest.mark.parametrize(("tuned", "waits"), [(0, 9), (1, 8)])
def test_a_decomposition_waits_a_few_times_an_iteration(tuned, waits, fake):
    """Nine in a dry run: two of LPLR and LDLQ, four of what they leave, which is measured anew as losses are NaN, and
    three for the losses before and after two alternations.

    Tuning leaves no loss to begin with; the inverses that it needs are one more wait, inside the solver.
    """
    once, twice = (waits_of(24, 16, tune_passes=tuned, outer_iterations=i) for i in (1, 2))
    assert (twice[0] - once[0], twice[1] - once[1]) == (waits, tuned) and once[0] <= 24


def test_the_sizes_do_not_matter(fake):
    assert waits_of(16, 16, outer_iterations=1) == waits_of(40, 24, outer_iterations=1)


def test_a_real_decomposition_waits_no_oftener(uncompiled):
    weight, moments, counts = gaussian(24, 16), second_moments(16), []
    for iterations in (1, 3):
        with Watch() as watch, reads() as found:
            decompose(weight, moments, Method(**LONG, outer_iterations=iterations))
        counts.append(len(found))
        assert set(watch.waits) <= {"_linalg_check_errors", "_linalg_svd"}
    assert counts[1] - counts[0] <= 2 * (6 + LONG["inner_iterations"])


# ----------------------------------------------------------------------------------------------------------- randomness
DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "normal_", "uniform_",
    "random_", "bernoulli", "bernoulli_", "multinomial", "exponential_", "cauchy_", "geometric_", "log_normal_",
}  # fmt: skip
SOURCES = [p for d in ("caldera", "sweeps", "bench") for p in (Path(caldera.__file__).parents[1] / d).rglob("*.py")]


def test_every_draw_names_its_generator_which_is_the_hosts():
    calls = [(p.name, c) for p in SOURCES for c in ast.walk(ast.parse(p.read_text())) if isinstance(c, ast.Call)]
    named = [(f"{p}:{c.lineno}", c, c.func.attr) for p, c in calls if isinstance(c.func, ast.Attribute)]
    draws = [(place, {k.arg for k in c.keywords}) for place, c, name in named if name in DRAWS]
    assert len(draws) >= 6 and [place for place, keys in draws if "generator" not in keys or "device" in keys] == []
    made = [(place, c) for place, c, name in named if name == "Generator"]
    assert made and [place for place, c in made if c.args or c.keywords] == []
    seeded = [(place, c.func.value) for place, c, name in named if name in ("manual_seed", "manual_seed_all", "seed")]
    everyones = ("torch", "torch.random", "torch.cuda", "np.random")
    # torch.svd_lowrank, which the bench compares with, takes no generator
    ours = [(place, owner) for place, owner in seeded if not place.startswith("problems.py")]
    assert [place for place, owner in ours if ast.unparse(owner) in everyones] == []


def test_the_global_generator_is_left_alone():
    weight, moments, before = gaussian(40, 48), second_moments(48), torch.get_rng_state()
    method = Method(rank=4, q="uniform_3bit", l="bf16", r="bf16", init="whitened", init_rank="auto", outer_iterations=1)
    decompose(weight, moments, method)
    predict_error(weight, moments, method)
    assert torch.equal(torch.get_rng_state(), before)
