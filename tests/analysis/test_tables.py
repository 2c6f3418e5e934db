"""Tables of articles, on records with samples of their own."""

import math

import numpy as np
import pandas as pd
import pytest

from analysis.cells import measured
from analysis.compare import compare
from analysis.figures import Sweep
from analysis.records import RecordError
from analysis.tables import best_points, inside, intervals, labels, measures, neighbours, noise_floor, points, rivals
from analysis.tables import unpaired as without_pairs

PERPLEXITY, ACCURACY = "perplexity/boolq_1024", "arc_easy/acc"


def sampled(record: dict, windows) -> dict:
    """The record with these cross-entropies of its windows."""
    windows = np.asarray(windows, dtype=float)
    value = float(np.exp(windows.mean()))
    stderr = value * float(windows.std(ddof=1)) / math.sqrt(len(windows))
    record["metrics"][PERPLEXITY] |= {"value": value, "stderr": stderr, "samples": windows.tolist()}
    return record


@pytest.fixture
def hard() -> np.ndarray:
    """How hard 16 windows are, whoever reads them."""
    return np.random.default_rng(0).normal(3, 0.5, 16)


@pytest.fixture
def sweep(make, hard) -> Sweep:
    """CALDERA at three sizes, round to nearest between the larger two: worse than the smaller of them."""
    noise = np.random.default_rng(1).normal(0, 0.01, 16)
    small, middle, large = (make.compressed(0, None, bits, float(bits), 1, 0.4) for bits in (2, 3, 4))
    rtn = make.record("rtn", {"method": "rtn", "rank": 0, "q": "uniform_3bit", "q_bits": 3}, 3.5, {})
    rtn["metrics"] = {PERPLEXITY: dict(small["metrics"][PERPLEXITY])}
    losses = {"small": hard + 0.5, "middle": hard + 0.2, "large": hard + 0.18 + noise, "rtn": hard + 0.3 + noise}
    made = {"small": small, "middle": middle, "large": large, "rtn": rtn}
    return Sweep.of([make.baseline(), *(sampled(record, losses[key]) for key, record in made.items())])


def test_points_are_named_with_their_scores(sweep):
    table = points(sweep).set_index("point")
    assert table.index.tolist() == ["q2_rank0_lrNone", "q3_rank0_lrNone", "rtn", "q4_rank0_lrNone", "uncompressed"]
    row = sweep.table.set_index("name").loc["rtn"]
    assert table.loc["rtn", PERPLEXITY] == f"{row[PERPLEXITY]:.2f} ± {row[f'{PERPLEXITY}:stderr']:.2f}"
    assert table.loc["rtn", ACCURACY] == "-" and table.loc["uncompressed", "settings"] == "uncompressed"
    assert table["optimal"].tolist() == ["yes", "yes", "", "yes", ""]
    assert measures(sweep)[["metric", "better", "measured alike"]].to_numpy().tolist() == [
        [ACCURACY, "higher", "yes"],
        [PERPLEXITY, "lower", "yes"],
    ]


def test_labels_tell_points_apart(sweep):
    rows = pd.DataFrame([{"name": name, "method": method, "rank": 0, "q": "e8p_2bit", "q_bits": 2} for name, method in
                         (("a", "caldera"), ("b", "gptq"), ("c", "gptq"), ("d", "none"))])  # fmt: skip
    assert labels(rows) == {"a": "E8P, 2 bits, caldera", "b": "b", "c": "c", "d": "uncompressed"}
    assert labels(sweep.table[:0]) == {}


def test_neighbours_are_the_closest_pair_of_the_frontier(sweep, make):
    assert [record["name"] for record in neighbours(sweep)] == ["q3_rank0_lrNone", "q4_rank0_lrNone"]
    with pytest.raises(RecordError, match=r"^two neighbours need a frontier of two points or more: sweep more"):
        neighbours(Sweep.of([make.compressed(0, None, 2, 2.0, 60, 0.4)]))


def test_pairs_say_more_than_standard_errors(sweep):
    a, b = neighbours(sweep)
    row = compare(a, b).set_index("metric").loc[PERPLEXITY]
    low, high = without_pairs(row)
    errors = [record["metrics"][PERPLEXITY]["stderr"] / record["metrics"][PERPLEXITY]["value"] for record in (a, b)]
    half = 2.042272 * math.hypot(*errors)  # Student's of twice 16 samples
    middle = math.log(row["b"] / row["a"])
    assert (low, high) == pytest.approx((math.expm1(middle - half), math.expm1(middle + half)), rel=1e-6)
    assert high - low > 20 * (row["high"] - row["low"])
    shown = intervals(a, b).set_index("metric").loc[PERPLEXITY]
    assert shown["better"] == "B" and shown["paired 95%"] == f"{row['low']:+.2%} to {row['high']:+.2%}"
    accuracy = compare(a, b).set_index("metric").loc[ACCURACY]
    assert without_pairs(accuracy) == pytest.approx((-1.959964 * 0.021 * 2**0.5, 1.959964 * 0.021 * 2**0.5))


def test_a_rival_is_no_larger(sweep):
    table = rivals(sweep).set_index("who")
    assert table.loc["round to nearest", ["frontier", "verdict"]].tolist() == [
        "q3_rank0_lrNone",
        "the frontier's is better",
    ]
    assert table.loc["round to nearest", "bits more"] == pytest.approx(0.5)
    assert table.loc["CALDERA", ["point", "verdict"]].tolist() == ["q4_rank0_lrNone", "on the frontier"]
    assert best_points(sweep)[["who", "point"]].to_numpy().tolist() == [
        ["round to nearest", "rtn"],
        ["CALDERA", "q4_rank0_lrNone"],
    ]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda rtn, hard: sampled(rtn, hard + 0.2 + np.tile([0.1, -0.098], 8)), "not told apart"),
        (lambda rtn, hard: rtn["metrics"][PERPLEXITY].update(measured_on={"text": "other"}), "not measured alike"),
    ],
)
def test_verdicts_are_careful(sweep, hard, change, verdict):
    change(next(record for record in sweep.records if record["name"] == "rtn"), hard)
    found = rivals(Sweep.of(sweep.records)).set_index("who")
    assert found.loc["round to nearest", "verdict"] == verdict


def test_budgets_are_methods_of_their_own(sweep, make, hard):
    mixed = make.record("mixed", {"method": "caldera", "budget": "allocated", "rank": None}, 2.5, {PERPLEXITY: (1, 1)})
    found = rivals(Sweep.of([*sweep.records, sampled(mixed, hard + 0.3)])).set_index("who")
    assert found.loc["CALDERA, allocated budget", "verdict"] == "on the frontier" and len(found) == 3


def test_the_noise_floor_is_what_float32_scores(make):
    record = make.baseline()
    with pytest.raises(RecordError, match=r"evaluation\.noise_floor=true"):
        noise_floor(Sweep.of([record]))
    record["metrics"]["kl/boolq_1024"] = {"value": 0.0, "stderr": 0.0, "higher_is_better": False}
    record["noise_floor"] = {PERPLEXITY: 0.01, "kl/boolq_1024": 0.002, ACCURACY: None}
    found = noise_floor(Sweep.of([record])).set_index("metric")["in float32"]
    assert found.to_dict() == pytest.approx({PERPLEXITY: 20.94, "kl/boolq_1024": 0.002})


def test_another_metric_is_chosen_by_how_it_begins(sweep):
    assert measured(sweep, "arc_easy").metric == ACCURACY
    with pytest.raises(RecordError, match=r"^no record has the metric kl: "):
        measured(sweep, "kl")


def test_inside_are_the_matrices_of_optimal_points(sweep, fitted):
    with pytest.raises(RecordError, match=r"^no optimal point tells of its matrices: "):
        inside(sweep)
    for record in sweep.records[1:]:
        fitted(record | {"point": record["point"] | {"l": None, "r": None}}, [0.1, 0.2, 0.3, 0.4])
    found = inside(Sweep.of(sweep.records))
    assert found["point"].unique().tolist() == ["q2_rank0_lrNone", "q3_rank0_lrNone", "q4_rank0_lrNone"]
    assert found["settings"].unique().tolist() == ["E8P, 2 bits", "E8P, 3 bits", "E8P, 4 bits"]
    assert found["relative_error"].dtype == float and len(found) == 12
