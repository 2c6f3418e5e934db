"""A search finds what the records say, goes on where it was killed, and tells failures from what is not worth it."""

import math
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from analysis.frontier import frontier_table
from caldera.errors import UserError
from sweeps.pipeline import _inputs
from sweeps.progress import Reporter
from sweeps.search.choose import beats, gains, hypervolume
from sweeps.search.objectives import check_objectives, costs
from sweeps.search.predict import predicted_error, spread
from sweeps.search.space import Space
from sweeps.search.study import Study, opened
from sweeps.store import read_sealed, write_sealed
from tests.sweeps.swept import NO_TASKS, Swept

SEARCH = ["-m", "hydra/sweeper=optuna", NO_TASKS, "evaluation.rows=1", "method=fast", "checkpoint.keep=none"]
MODULE = [sys.executable, "-m", "sweeps.run"]
RANGES = ["rank.k=range(0,25,8)", "quantizer@q=e8p_2bit,e8p_3bit"]


def space(*lines: str) -> Space:
    return Space.of(OverridesParser.create().parse_overrides(list(lines)))


def trials(results: Path, *states: str) -> list[FrozenTrial]:
    """Of the only study of a results folder, those in one of the states."""
    (file,) = results.glob("searches/*.log")
    storage = JournalStorage(JournalFileBackend(str(file)))
    (study,) = (optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage))
    return [trial for trial in study.trials if trial.state.name in states]


# ---------------------------------------------------------------------------------------------------------------- space
@pytest.mark.parametrize(
    ("line", "distribution", "ends"),
    [
        ("rank.k=range(0,129,16)", IntDistribution(0, 128, step=16), ["0", "128"]),
        ("rank.k=range(8,0,-4)", IntDistribution(4, 8, step=4), ["4", "8"]),
        ("seed=range(3,4)", IntDistribution(3, 3), ["3"]),
        ("method.sigma=range(0.1,1,0.2)", FloatDistribution(0.1, 0.9, step=0.2), ["0.1", "0.9"]),
        ("method.sigma=tag(log,interval(1e-4,1))", FloatDistribution(1e-4, 1.0, log=True), ["0.0001", "1.0"]),
        ("rank.k=int(interval(1,9))", IntDistribution(1, 9), ["1", "9"]),
        ("quantizer@q=a,'b,c',2", CategoricalDistribution(["a", "'b,c'", "2"]), ["a", "'b,c'", "2"]),
    ],
)
def test_ranges_and_choices_are_hydras(line, distribution, ends):
    found, key = space(line, "sweep=x"), line.partition("=")[0]
    assert (found.distributions, found.fixed) == ({key: distribution}, ["sweep=x"])
    assert found.probes() == [[f"{key}={end}", "sweep=x"] for end in ends]


def test_the_last_of_two_overrides_counts():
    assert space("rank.k=range(0,9)", "seed=1,2", "seed=3", "rank.k=0,8").choices({"rank.k": "8"}) == ["rank.k=8"]


def test_every_value_is_tried_once_beside_the_first_of_the_others():
    probes = [tuple(probe) for probe in space("rank.k=range(0,9,4)", "quantizer@q=a,b,c").probes()]
    assert set(probes) == {(f"rank.k={k}", f"quantizer@q={q}") for k, q in ((0, "a"), (8, "a"), (0, "b"), (0, "c"))}


def test_a_space_knows_its_size():
    assert space("rank.k=range(0,9,4)", "quantizer@q=a,b", "method.sigma=range(0.1,1,0.2)").size == 30
    assert space("rank.k=0,1", "method.sigma=interval(0.1,1)").size == math.inf


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rank.k=8", "has nothing to choose: give a list or a range"),
        ("rank.k=range(5,5)", "rank.k=range(5,5) cannot be searched: it holds no value"),
        ("rank.k=interval(4,1)", "rank.k=interval(4,1) cannot be searched"),
    ],
)
def test_what_cannot_be_searched_is_refused(line, said):
    with pytest.raises(UserError) as caught:
        space(line)
    assert said in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- choice
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_hypervolume_is_the_area_that_is_beaten(points):
    cells = [(x, y) for x in range(8) for y in range(8)]
    expected = sum(any(px <= x and py <= y for px, py in points) for x, y in cells)
    assert hypervolume(points, (8, 8)) == expected


def test_a_gain_is_what_known_points_do_not_have_yet():
    known = [(2.0, 0.1), (3.0, 0.05)]
    beaten, between, same, less = gains([(3.0, 0.2), (2.5, 0.06), (2.0, 0.1), (1.0, 0.2)], known)
    assert beaten == same == 0 < min(between, less)


def test_a_margin_is_a_share_of_the_error():
    assert beats((2.0, 0.095), (2.0, 0.1), 0.05) and beats((1.0, 0.09), (2.0, 0.1), 0.05)
    assert not beats((2.0, 0.096), (2.0, 0.1), 0.05) and not beats((2.1, 0.01), (2.0, 0.1), 0.05)


# ----------------------------------------------------------------------------------------------------------- objectives
RECORD = {
    "name": "x",
    "bits": {"stored": 2.5, "model": 5.0},
    "metrics": {
        "perplexity/heldout_256": {"value": 30.0, "higher_is_better": False},
        "piqa/acc": {"value": 0.7, "higher_is_better": True},
        "piqa/acc_norm": {"value": 0.6, "higher_is_better": True},
        "boolq/acc": {"value": None, "higher_is_better": True},
    },
}


def test_less_is_better_in_every_objective():
    assert costs(RECORD, ["bits/stored", "perplexity"]) == (2.5, 30.0)
    assert costs(RECORD, ["piqa/acc_norm", "piqa", "bits/model"]) == (-0.6, -0.7, 5.0)


def test_a_point_without_a_number_has_no_costs():
    with pytest.raises(UserError, match="search.objectives: x has no boolq"):
        costs(RECORD, ["bits/stored", "boolq"])
    record = RECORD | {"metrics": {"perplexity/a": {"value": math.inf, "higher_is_better": False}}}
    with pytest.raises(UserError, match="x: perplexity is inf"):
        costs(record, ["perplexity"])


def test_objectives_are_those_that_will_be_measured():
    check_objectives(["bits/stored", "perplexity", "piqa/acc"], ["piqa"])
    with pytest.raises(UserError, match="search.objectives=piqa/acc is not measured: choose among .*perplexity$"):
        check_objectives(["bits/stored", "piqa/acc"], [])
    with pytest.raises(UserError, match="must name one objective or several different ones"):
        check_objectives([], [])


# ---------------------------------------------------------------------------------------------------------------- study
@pytest.fixture
def study(tmp_path):
    """study(): the study of a file, opened again."""
    return lambda name="s": opened(tmp_path / "s.log", name, space("a=range(0,100)"), 2, 0)


def test_a_study_goes_on_where_it_was_left(study, tmp_path):
    with study() as first:
        first.tell(first.begin({"a": 1}, {}), (1.0, 2.0))
        first.tell(first.begin({"a": 2}, {}), None)
        for _ in range(2):
            first.note({"a": 3}, TrialState.PRUNED, {"beaten_by": "x"})
        first.begin({"a": 4}, {})  # and then the process was killed, while it wrote
    with (tmp_path / "s.log").open("ab") as stream:
        stream.write(b'{"op_code": 4, "wor')
    with study() as second:
        assert second.params(TrialState.COMPLETE) == [{"a": 1}]
        assert second.params(TrialState.FAIL) == [{"a": 2}, {"a": 4}]
        assert [t.params for t in second.study.trials if t.state == TrialState.PRUNED] == [{"a": 3}]
        second.tell(second.begin({"a": 4}, {}), (3.0, 4.0))
    with study() as third:
        assert third.params(TrialState.COMPLETE) == [{"a": 1}, {"a": 4}]
    with study("other") as other:
        assert other.params(TrialState.COMPLETE) == []


def test_suggestions_follow_from_the_seed_and_the_trials(study):
    def suggested(of: Study, waiting: list) -> list:
        return list(islice(of.suggestions(waiting), 5))

    with study() as one:
        first = suggested(one, [])
        assert first == suggested(one, [])
        assert one.study.trials == []
        one.tell(one.begin({"a": 1}, {}), (1.0, 2.0))
        assert first != suggested(one, [])


def test_two_searches_of_one_name_do_not_mix(study):
    with study(), pytest.raises(UserError, match="in use by another search: wait for it, or set sweep="), study():
        pass


def test_a_damaged_study_is_named(study, tmp_path):
    (tmp_path / "s.log").write_text("no journal\n{}\n")
    with pytest.raises(UserError, match=r"s\.log cannot be read as a study .* delete it"), study():
        pass


# ----------------------------------------------------------------------------------------------------------- prediction
def test_the_prediction_is_the_records_own(point, application, tmp_path):
    """On all blocks: the root mean square, weighted by size, of what the record says of every matrix."""
    wanted = point("rank.k=8", "method=fast")
    _inputs(wanted, Reporter("x"))
    assert application("rank.k=8", "method=fast", NO_TASKS, "evaluation.rows=1")[0] == 0
    matrices = Swept(tmp_path / "results").of(rank=8)["matrices"]
    sizes = [math.prod(m["shape"]) for m in matrices]
    mean = sum(size * m["predicted_error"] ** 2 for size, m in zip(sizes, matrices)) / sum(sizes)
    assert predicted_error(wanted, 2) == pytest.approx(math.sqrt(mean), rel=1e-6)
    assert predicted_error(wanted, 1) != predicted_error(wanted, 2)


def test_where_theory_says_nothing_there_is_no_prediction(point):
    assert predicted_error(point("method=none"), 2) is None
    assert predicted_error(point("method=rtn"), 2) is None
    assert predicted_error(point("calibration.shuffle_seed=77"), 2) is None  # no moments yet


def test_blocks_are_spread_from_end_to_end():
    assert (spread(30, 4), spread(2, 4), spread(30, 1)) == ([0, 10, 19, 29], [0, 1], [0])


# --------------------------------------------------------------------------------------------------------------- search
def test_a_search_finds_what_the_records_say(application, tmp_path):
    code, output, errors = application(*SEARCH, *RANGES, "search.trials=3")
    swept = Swept(tmp_path / "results")
    assert (code, errors) == (0, "") and "search: 3 trials, 3 of them to compute" in output
    found = trials(swept.results, "COMPLETE")
    records = {r["name"]: r for r in swept.records if r["point"]["method"] != "none"}
    assert {trial.user_attrs["point"] for trial in found} == set(records) and len(found) == 3
    for trial in found:
        record = records[trial.user_attrs["point"]]
        assert trial.values == [record["bits"]["stored"], record["metrics"]["perplexity/heldout_256"]["value"]]
        assert trial.user_attrs["bits"] == pytest.approx(record["bits"]["stored"])
        assert trial.params["rank.k"] == record["point"]["rank"]
    table = frontier_table(swept.records)
    best = [
        t for t in found if not any(o.values != t.values and all(map(float.__le__, o.values, t.values)) for o in found)
    ]
    assert {t.user_attrs["point"] for t in best} == set(table["name"][table["pareto"]])

    before = swept.state()
    code, output, errors = application(*SEARCH, *RANGES, "search.trials=3")
    assert (code, errors, swept.state()) == (0, "", before) and "3 trials, 0 of them to compute" in output
    assert application(*SEARCH, *RANGES, "search.trials=4", "compute.spill_mb=65")[0] == 0
    assert len(trials(swept.results, "COMPLETE")) == len(Swept(swept.results).records) - 1 == 4


def test_what_a_finished_point_beats_is_pruned(application, tmp_path):
    """A rank that buys less than the next width of Q, which costs fewer bits."""
    ranges = ["rank.k=0,24", "quantizer@q=trellis_2bit,trellis_3bit", "quantizer@l=e8p_2bit", "quantizer@r=e8p_2bit"]
    code, output, _ = application(*SEARCH, *ranges, "search.trials=4", "search.prune_margin=0")
    pruned, done = (trials(tmp_path / "results", state) for state in ("PRUNED", "COMPLETE"))
    by_name = {trial.user_attrs["point"]: trial.user_attrs for trial in done}
    assert code == 0 and "search: nothing new is suggested" in output
    assert len(pruned) >= 1 and len(pruned) + len(done) == 4
    for trial in pruned:
        own, rival = trial.user_attrs, by_name[trial.user_attrs["beaten_by"]]
        assert own["bits"] >= rival["bits"] and own["point"] not in by_name
        assert f"pruned: {own['point']}" in output
        assert not (tmp_path / "results" / "points" / own["point"]).exists()


def test_points_that_are_finished_are_told_and_not_run(application, tmp_path):
    grid = ["rank.k=0,8", "quantizer@q=e8p_2bit"]
    assert application("-m", *SEARCH[2:], *grid)[0] == 0
    before = Swept(tmp_path / "results").state()
    code, output, errors = application(*SEARCH, *grid, "search.trials=2")
    assert (code, errors) == (0, "") and "point 1" not in output
    assert Swept(tmp_path / "results").state() == before
    assert len(trials(tmp_path / "results", "COMPLETE")) == 2


def test_a_failed_point_is_a_failure_and_is_tried_again(application, altered, tiny_llama_dir, tmp_path):
    dead = altered("dead", lambda tensors: tensors["model.layers.1.post_attention_layernorm.weight"].zero_())
    lines = [*SEARCH, f"model.path={dead},{tiny_llama_dir}", "rank.k=4", "search.trials=2"]
    code, _, errors = application(*lines)
    (failed,), (done,) = (trials(tmp_path / "results", state) for state in ("FAIL", "COMPLETE"))
    assert code == 1 and f"failed: {failed.user_attrs['point']}" in errors
    assert failed.values is None and failed.params["model.path"] == str(dead)
    assert all(map(math.isfinite, done.values)) and f"failed: {done.user_attrs['point']}" not in errors
    code, output, _ = application(*lines)
    assert code == 1 and "2 trials, 1 of them to compute" in output
    assert [t.params["model.path"] for t in trials(tmp_path / "results", "FAIL")] == [str(dead)] * 2


def test_a_killed_search_goes_on(settings, tmp_path):
    results = tmp_path / "results"
    command = [*MODULE, *SEARCH, *RANGES, *settings, f"results={results}", "search.trials=3"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (results / "searches").is_dir() or not trials(results, "RUNNING"):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (interrupted,) = trials(results, "RUNNING")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = trials(results, "COMPLETE")
    assert len(found) == 3 and not trials(results, "RUNNING")
    assert found[0].params == interrupted.params == trials(results, "FAIL")[0].params


def test_several_points_at_once_go_through_the_launcher(settings, tmp_path):
    lines = ["hydra/launcher=processes", "search.trials=2", "search.batch=2", *RANGES]
    command = [*MODULE, *SEARCH, *lines, *settings, f"results={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), [record["error"] for record in Swept(tmp_path).records]
    one, other = trials(tmp_path, "COMPLETE")
    assert one.datetime_start < other.datetime_start < one.datetime_complete


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["rank.k=range(0,65,8)"], "rank.k=64 exceeds the smaller side of model.layers.0.self_attn.k_proj"),
        (["rank.k=interval(0,8)"], "rank.k=0.0: Value '0.0' of type 'float' could not be converted to Integer"),
        (["quantizer@q=e8p_2bit,e8q_2bit"], "quantizer=e8q_2bit is not known; the nearest names are e8p_2bit"),
        (["rank.k=8"], "hydra/sweeper=optuna has nothing to choose"),
        (["rank.k=0,8", "search.objectives=[speed]"], "search.objectives=speed is not measured: choose among"),
        (["rank.k=0,8", "search.trials=0"], "search.trials=0 must be at least 1"),
        (["rank.k=0,8", "search.prune_margin=-1"], "search.prune_margin=-1.0 must be at least 0"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(lines, said, application, tmp_path):
    code, output, errors = application(*SEARCH, *lines)
    assert (code, output, len(errors.splitlines())) == (1, "", 1) and said in errors
    assert not (tmp_path / "results" / "points").exists()


def test_choices_that_make_no_point_fail_without_stopping_the_search(application, tmp_path):
    """Each is fine by itself: no backbone, and no factors."""
    lines = ["rank.k=4,0", "quantizer@q=e8p_2bit,none", "search.trials=4"]
    code, output, errors = application(*SEARCH, *lines)
    (failed,) = trials(tmp_path / "results", "FAIL")
    assert code == 1 and "nothing new is suggested" in output
    assert "failed: rank.k=0 quantizer@q=none: rank.k=0 with q.family=none leaves nothing" in errors
    assert failed.user_attrs["error"].startswith("rank.k=0 with q.family=none") and failed.values is None
    assert len(trials(tmp_path / "results", "COMPLETE", "PRUNED")) == 3


def test_a_plan_shows_the_values_and_computes_nothing(application, tmp_path):
    code, output, errors = application(*SEARCH, *RANGES, "plan=true")
    assert (code, errors) == (0, "") and "plan: 3 points" in output
    assert not (tmp_path / "results" / "searches").exists()


def test_a_finished_point_without_a_finite_number_is_a_failure(application, point, tmp_path):
    grid = ["rank.k=0", "quantizer@q=e8p_2bit"]
    assert application("-m", *SEARCH[2:], *grid)[0] == 0
    done = point(*SEARCH[2:], *grid)
    record = read_sealed(done.folder / "record.json")
    record["metrics"]["perplexity/heldout_256"]["value"] = None
    write_sealed(done.folder / "record.json", record)
    code, _, errors = application(*SEARCH, grid[1], "rank.k=range(1)", "search.trials=1")
    assert code == 1 and f"failed: search.objectives: {done.name} has no perplexity" in errors
    assert [trial.values for trial in trials(tmp_path / "results", "FAIL")] == [None]
