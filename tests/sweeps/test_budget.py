"""Budgets: what they buy is at most what was asked and close to it, goes where it gains most, and can be had again."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from caldera.checkpoint import read_manifest
from sweeps.allocation import chosen, costs_file, curves_file, key_of, report
from sweeps.budget import Budget, Choice, Scale
from sweeps.outline import outline_of
from sweeps.pipeline import run_point
from sweeps.plan import resolve
from sweeps.point import axes
from sweeps.progress import Reporter
from sweeps.sizes import Sizes, bits, stored_bytes
from tests.sweeps.swept import NO_TASKS
from tests.sweeps.test_families import mixtral

ALLOCATED = ("budget=allocated", NO_TASKS, "evaluation.rows=1", "method.inner_iterations=2")


def table_of(point) -> dict[str, Choice]:
    """The choice for every matrix."""
    return {name: point.table.get(name) or Choice.of(point.method, point.method.rank) for name in point.inventory}


def stored_bits(point, table: dict[str, Choice]) -> float:
    specs = [table[n].applied(point.method).spec(tuple(s), n) for n, s in point.inventory.items()]
    return 8 * sum(s.stored_bytes for s in specs) / sum(s.parameters for s in specs)


# -------------------------------------------------------------------------------------------------------------- uniform
@pytest.mark.parametrize("bits", [2.2, 2.3, 2.5, 3.0])
@pytest.mark.parametrize("factors", ["e8p_2bit", "bf16"])
def test_a_budget_buys_the_largest_rank_that_fits(point, bits, factors):
    found = point("budget=uniform", f"budget.bits={bits}", f"quantizer@l={factors}", f"quantizer@r={factors}")
    table = table_of(found)
    ranks = [choice.rank for choice in table.values()]
    assert max(ranks) - min(ranks) <= 1
    assert stored_bits(found, table) <= bits
    short = {name for name, choice in table.items() if choice.rank == min(ranks)}
    for name in short:  # not one of them can have more
        raised = table | {name: Choice.of(replace(found.method, **Q_OF[factors]), min(ranks) + 1)}
        assert stored_bits(found, raised) > bits
    assert (axes(found)["budget"], axes(found)["budget_bits"]) == ("uniform", bits)


Q_OF = {name: {"q": "trellis_2bit", "l": name, "r": name} for name in ("e8p_2bit", "bf16")}


def test_small_quantizers_fill_a_budget_to_a_hundredth(point):
    for asked in (2.15, 2.4, 2.77):
        found = point("budget=uniform", f"budget.bits={asked}")
        assert 0.99 * asked < stored_bits(found, table_of(found)) <= asked


def test_a_budget_is_no_part_of_the_key_beside_the_rank_that_it_buys(point):
    fixed = point("rank.k=8")
    asked = stored_bits(fixed, table_of(fixed))
    found = point("budget=uniform", f"budget.bits={asked}")
    assert (found.key, found.name, found.table) == (fixed.key, fixed.name, {})


def test_a_budget_buys_factors_without_a_backbone(point):
    found = point("method=lr_only", "budget=uniform", "budget.bits=3")
    table = table_of(found)
    assert {choice.q for choice in table.values()} == {"none"} and min(c.rank for c in table.values()) > 1
    assert 2.9 < stored_bits(found, table) <= 3
    assert (axes(found)["q"], axes(found)["q_bits"]) == (None, None)


def test_a_large_budget_stops_at_the_sides_and_says_so(point, capsys):
    found = point("budget=uniform", "budget.bits=100")
    assert {name: c.rank for name, c in found.table.items()} == {n: min(s) for n, s in found.inventory.items()}
    report(found, found.table, Reporter("test"))
    said = capsys.readouterr()
    assert "warning: budget.bits=100: only " in said.err and "offer nothing between" in said.err


def test_mixed_ranks_are_said(point):
    found = point("budget=uniform", "budget.bits=2.5")
    assert found.table and found.name.startswith("tiny-caldera-b2.5-uniform-")
    said = axes(found)
    assert (said["rank"], said["q"], said["q_bits"], said["l"]) == (None, "trellis_2bit", 2, "e8p_2bit")


# --------------------------------------------------------------------------------------------------------------- scopes
@pytest.mark.parametrize("asked", ["budget.bits=15.894", "budget.bits=null budget.megabytes=12.622"])
def test_the_files_of_a_model_weigh_what_was_asked_at_most(asked, point):
    job = point("budget=uniform", "budget.scope=model", *asked.split(), "rank.k=0", *ALLOCATED[1:])
    record = run_point(job, Reporter(job.name))
    said = record["allocation"]
    assert said["asked"]["scope"] == "model" and job.table
    for unit in ("bits", "megabytes"):
        wanted = said["asked"][unit]
        assert wanted is None or 0.999 * wanted < said["achieved"][unit] <= wanted
    assert said["achieved"]["bits"] == record["bits"]["model"]
    expected = job.scale.total(job.table)
    assert record["bits"]["model_bytes"] <= expected < record["bits"]["model_bytes"] + 200 * len(job.table)


# ------------------------------------------------------------------------------------------------------------ allocated
@pytest.fixture(scope="module")
def resolved(composed, settings, tmp_path_factory):
    """resolved(*overrides): a point whose results are this module's."""
    results = tmp_path_factory.mktemp("budget") / "results"
    return lambda *overrides: resolve(composed(*settings, f"results={results}", *overrides))


@pytest.fixture(scope="module")
def allocated(resolved):
    """A point at 2.4 bits and its record."""
    job = resolved(*ALLOCATED, "budget.bits=2.4")
    return job, run_point(job, Reporter(job.name))


def test_an_allocation_comes_close_and_is_in_the_record(allocated):
    job, record = allocated
    said = record["allocation"]
    assert 0.99 * 2.4 < record["bits"]["stored"] <= 2.4
    assert said["achieved"] == {"bits": record["bits"]["stored"], "megabytes": record["bits"]["stored_bytes"] / 1e6}
    assert (said["strategy"], said["asked"]) == ("allocated", {"bits": 2.4, "megabytes": None, "scope": "matrices"})
    assert said["table"] == {m["name"]: {key: m[key] for key in ("rank", "q", "l", "r")} for m in record["matrices"]}
    assert len({choice["q"] for choice in said["table"].values()}) > 1
    assert (record["point"]["rank"], record["point"]["q"], record["point"]["q_bits"]) == (None, "mixed", None)
    assert record["point"]["l"] == "e8p_2bit" and job.name.startswith("tiny-caldera-b2.4-allocated-")
    assert said["predicted_divergence"] > 0 and {"curves", "sensitivity"} <= set(record["timings_s"])


def test_another_budget_finds_the_errors_and_costs_there(allocated, resolved):
    job = resolved(*ALLOCATED, "budget.bits=2.6")
    assert (curves_file(job), costs_file(job)) == (curves_file(allocated[0]), costs_file(allocated[0]))
    before = [file(job).stat().st_mtime_ns for file in (curves_file, costs_file)]
    record = run_point(job, Reporter(job.name))
    assert [file(job).stat().st_mtime_ns for file in (curves_file, costs_file)] == before
    assert record["allocation"]["predicted_divergence"] < allocated[1]["allocation"]["predicted_divergence"]


@pytest.mark.parametrize("form", ["record", "table"])
def test_a_table_that_is_fed_back_gives_the_same_bytes(form, allocated, resolved, tmp_path):
    job, record = allocated
    file = job.folder / "record.json"
    if form == "table":
        file = tmp_path / "table.json"
        file.write_text(json.dumps({"table": record["allocation"]["table"]}))
    again = resolved("budget=table", f"budget.table={file}", *ALLOCATED[1:])
    assert again.key != job.key and again.name.startswith("tiny-caldera-table-")
    found = run_point(again, Reporter(again.name))
    assert found["allocation"]["table"] == record["allocation"]["table"]
    shards = [sorted(p.checkpoint.glob("*.safetensors")) for p in (job, again)]
    assert len(shards[0]) == 3 and read_manifest(again.checkpoint)["method"]["q"] is None
    assert [f.read_bytes() for f in shards[0]] == [f.read_bytes() for f in shards[1]]


def test_a_table_of_one_choice_is_that_point(resolved, allocated, tmp_path):
    names = allocated[0].inventory
    entry = {"rank": 4, "q": "trellis_3bit", "l": "e8p_2bit", "r": "bf16"}
    (tmp_path / "table.json").write_text(json.dumps({"table": dict.fromkeys(names, entry)}))
    found = resolved("budget=table", f"budget.table={tmp_path / 'table.json'}")
    assert found.key == resolved("rank.k=4", "quantizer@q=trellis_3bit", "quantizer@r=bf16").key


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 33}, "rank=33 exceeds the smaller side of model.layers.0.self_attn.k_proj"),
        ({"q": "e8p_9bit"}, "e8p has no 9-bit variant"),
        ({"q": None}, "model.layers.0.self_attn.k_proj has no q: an entry needs rank, q, l, r"),
        (None, "has no entry for model.layers.0.self_attn.k_proj: give a record or table of this very model"),
    ],
)
def test_a_bad_table_is_refused(change, said, resolved, allocated, tmp_path):
    from caldera.errors import UserError

    table, name = dict(allocated[1]["allocation"]["table"]), "model.layers.0.self_attn.k_proj"
    entry = table.pop(name)
    if change is not None:
        table[name] = {key: value for key, value in (entry | change).items() if value is not None}
    (tmp_path / "table.json").write_text(json.dumps({"table": table}))
    with pytest.raises(UserError, match="budget.table=") as caught:
        resolved("budget=table", f"budget.table={tmp_path / 'table.json'}")
    assert said in str(caught.value) and "\n" not in str(caught.value)


KEYS = {
    "budget.bits": "2.5", "budget.scope": "model budget.bits=18", "budget.ranks": "[0,8]", "budget.q": "[e8p_2bit]",
    "budget.l": "[bf16]", "budget.r": "[bf16]", "budget.sensitivity": "none", "budget.sensitivity_rows": "2",
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_the_key_of_an_allocation_follows_all_that_it_depends_on(name, resolved, allocated):
    assert resolved(*ALLOCATED, "budget.bits=2.4", *f"{name}={KEYS[name]}".split()).key != allocated[0].key


def test_the_key_of_an_allocation_follows_nothing_else(resolved, allocated):
    assert resolved(*ALLOCATED, "budget.bits=2.4", "budget.table=unused.json").key == allocated[0].key
    one, other = (resolved(*ALLOCATED, "budget.sensitivity=none", f"budget.sensitivity_rows={n}") for n in (2, 3))
    assert one.key == other.key
    assert resolved("budget.ranks=[0,8]", "budget.sensitivity=none").key == resolved().key  # of no budget


def test_a_plan_knows_about_what_a_budget_will_weigh(allocated, resolved):
    job, _ = allocated
    sizes = Sizes.of(job, outline_of(job.source, job.cache))
    assert 0.97 * 2.4 < bits(sizes)[0] <= 2.4
    uniform = resolved("budget=uniform", "budget.bits=2.4")
    sizes = Sizes.of(uniform, outline_of(job.source, job.cache))
    assert stored_bytes(sizes) == uniform.scale.total(uniform.table)


def test_experts_that_see_more_tokens_count_for_more(saved, resolved):
    job = resolved(f"model.path={saved(mixtral())}", *ALLOCATED, "budget.bits=2.6", "calibration.sequences=2")
    record = run_point(job, Reporter(job.name))
    assert 0.99 * 2.6 < record["bits"]["stored"] <= 2.6
    costs = json.loads(costs_file(job).read_text())
    tokens = {m["name"]: m["tokens"] for m in record["matrices"]}
    stage = [name for name in tokens if ".layers.0.mlp.experts.down_proj" in name]
    assert len(stage) == 4 and all(costs[name] > 0 for name in costs if name in tokens)
    least, most = min(stage, key=tokens.get), max(stage, key=tokens.get)
    assert costs[most] / costs[least] == pytest.approx(tokens[most] / tokens[least], rel=0.5)


# ------------------------------------------------------------------------------------------------------------- choosing
SHAPES = {f"m{i}": [64, 64 + 16 * i] for i in range(4)}


def menu(bits: float, **options) -> Budget:
    names = {"q": ("trellis_2bit", "trellis_3bit", "trellis_4bit"), "l": ("e8p_2bit",), "r": ("e8p_2bit",)}
    rest = {"ranks": (0, 8, 16), "sensitivity": "fisher", "sensitivity_rows": 4, "table": None}
    fields = {"strategy": "allocated", "bits": bits, "megabytes": None, "scope": "matrices"} | rest | names
    return Budget(**fields | options)


@pytest.fixture
def scale(point) -> Scale:
    return Scale(point("rank.k=1").method, SHAPES, sum(m * n for m, n in SHAPES.values()))


def errors(budget: Budget, gain: float = 1.0) -> dict[str, dict[str, float]]:
    """4 for a bit of Q, and for rank as if its bits bought `gain` times as much."""
    found = {}
    for name, (m, n) in SHAPES.items():
        choices = budget.choices([m, n], budget.ranks)
        size = {c: int(c.q[8]) + gain * 2 * c.rank * (m + n) / (m * n) for c in choices}
        found[name] = {key_of(c): 2.0 ** -size[c] for c in choices}
    return found


def test_what_costs_more_gets_more_bits(scale):
    costs = {"m0": 1e3, "m1": 1.0, "m2": 1.0, "m3": 1e-3}
    found = chosen(menu(3.0), scale, errors(menu(3.0), 0.1), costs)["table"]
    assert (found["m0"]["q"], found["m3"]["q"]) == ("trellis_4bit", "trellis_2bit")
    even = chosen(menu(3.1), scale, errors(menu(3.0), 0.1), {name: m * n for name, (m, n) in SHAPES.items()})["table"]
    assert {entry["q"] for entry in even.values()} == {"trellis_3bit"} and min(e["rank"] for e in even.values()) == 0
    assert chosen(menu(3.0), scale, errors(menu(3.0)), None)["predicted_divergence"] is None


def test_matrices_that_no_token_reaches_are_left_out_of_what_is_counted(scale):
    found = chosen(menu(3.0), scale, {k: v for k, v in errors(menu(3.0)).items() if k != "m3"}, None)["table"]
    table = {name: Choice(**entry) for name, entry in found.items()}
    sizes = [SHAPES[name][0] * SHAPES[name][1] for name in table]
    assert set(table) == {"m0", "m1", "m2"} and 2.9 < 8 * scale.total(table) / sum(sizes) <= 3.0
    files = replace(scale, parameters=10**5, rest=1000, headers=True)
    assert files.only(table).total(table) - files.total(table) == 2 * SHAPES["m3"][0] * SHAPES["m3"][1]


@given(st.floats(2.1, 4.4), st.floats(0.3, 2.0))
@hypothesis_settings(max_examples=25, deadline=None)
def test_a_budget_is_never_exceeded_and_always_filled(bits, gain):
    from caldera.method import Method

    scale = Scale(Method(rank=1), SHAPES, sum(m * n for m, n in SHAPES.values()))
    found = chosen(menu(bits), scale, errors(menu(bits), gain), None)
    table = {name: Choice(**entry) for name, entry in found["table"].items()}
    reached = 8 * scale.total(table) / scale.parameters
    assert reached <= bits and max(choice.rank for choice in table.values()) <= 16
    if reached < 0.99 * bits:  # between four matrices' menus there is nothing that fits
        more = {c for name, choice in table.items() for c in menu(bits).next_to(choice, SHAPES[name])}
        assert not more
