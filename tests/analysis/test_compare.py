"""Two points against each other: what pairing gains, how often intervals hold, and what is not compared."""

import json
import math
import statistics

import numpy as np
import pytest

from analysis.compare import chosen, compare, main
from analysis.records import RecordError
from tests.analysis.conftest import record

ON = {"text": "boolq", "rows": 40, "length": 1024, "dtype": "bfloat16"}


def metric(samples, **more) -> dict:
    value, stderr = statistics.fmean(samples), statistics.stdev(samples) / math.sqrt(len(samples))
    found = {"value": value, "stderr": stderr, "higher_is_better": False, "measured_on": ON, "samples": list(samples)}
    if more.get("scale") == "log":
        found |= {"value": math.exp(value), "stderr": math.exp(value) * stderr}
    return found | more


def points(a: dict, b: dict) -> tuple[dict, dict]:
    one, other = (record(name, {"method": "caldera"}, 2.0, {}) for name in ("one-r0", "other-r8"))
    return one | {"metrics": a}, other | {"metrics": b}


@pytest.fixture
def windows():
    """Of 40 windows: cross-entropies that differ much, and those of a model that is 2% worse on all, give or take."""
    generator = np.random.default_rng(0)
    one = generator.normal(3, 0.3, 40)
    return one, one + 0.02 + generator.normal(0, 0.01, 40)


def test_pairing_finds_what_the_values_errors_hide(windows):
    one, other = (metric(x, scale="log") for x in windows)
    assert other["value"] - one["value"] < one["stderr"]
    (row,) = compare(*points({"perplexity/x": one}, {"perplexity/x": other})).to_dict("records")
    apart = windows[1] - windows[0]
    half = 2.0227 * statistics.stdev(apart) / math.sqrt(40)  # Student's t of 39 degrees of freedom
    assert row["difference"] == pytest.approx(other["value"] / one["value"] - 1)
    assert row["low"] == pytest.approx(math.expm1(apart.mean() - half), rel=1e-4)
    assert row["high"] == pytest.approx(math.expm1(apart.mean() + half), rel=1e-4)
    assert (row["better"], row["samples"], row["relative"]) == ("a", 40, True)


def test_nineteen_of_twenty_intervals_hold_the_difference():
    """Windows of unequal weight, drawn anew each time."""
    generator, held = np.random.default_rng(1), 0
    for _ in range(600):
        weights = generator.integers(1, 4, 30).astype(float).tolist()
        one, apart = generator.normal(0, 1, 30), generator.normal(0.5, 0.2, 30)
        a, b = metric(one, weights=weights), metric(one + apart, weights=weights)
        (row,) = compare(*points({"kl/x": a}, {"kl/x": b})).to_dict("records")
        held += row["low"] < 0.5 < row["high"]
    assert 0.92 < held / 600 < 0.98


def test_documents_are_compared_by_their_answers():
    a, b = [1.0, 0.0] * 50, [1.0, 1.0, 1.0, 0.0] * 25
    more = {"higher_is_better": True, "measured_on": {"task": "piqa", "batch_size": 8}}
    one, other = metric(a, **more), metric(b, **more) | {"measured_on": {"task": "piqa", "batch_size": 2}}
    (row,) = compare(*points({"piqa/acc": one}, {"piqa/acc": other})).to_dict("records")
    assert (row["difference"], row["better"], row["relative"]) == (0.25, "b", False)


def test_without_samples_there_is_a_difference_and_no_interval(windows):
    one, other = (metric(x) | {"samples": None} for x in windows)
    (row,) = compare(*points({"kl_p90/x": one}, {"kl_p90/x": other})).to_dict("records")
    assert row["difference"] == pytest.approx(other["value"] - one["value"])
    assert math.isnan(row["low"]) and (row["better"], row["samples"]) == ("", 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"measured_on": ON | {"rows": 8}}, "rows 40 and 8"),
        ({"measured_on": ON | {"bos": True}}, "bos None and True"),
        ({"weights": [2.0] * 40}, "weights"),
        ({"samples": [1.0]}, "samples"),
    ],
)
def test_what_was_not_measured_alike_is_refused(windows, change, reason):
    one = metric(windows[0])
    with pytest.raises(
        RecordError, match=rf"kl/x was not measured alike in one-r0 and other-r8 \({reason}\): evaluate"
    ):
        compare(*points({"kl/x": one}, {"kl/x": one | change}))


def test_points_are_found_by_a_part_of_their_name():
    records = [*points({}, {}), record("failed", {}, 2.0, {}, status="failed")]
    assert chosen(records, "r8")["name"] == "other-r8" and chosen(records, "one-r0")["name"] == "one-r0"
    with pytest.raises(RecordError, match="'r' is the name of 2 finished points: choose one of one-r0, other-r8"):
        chosen(records, "r")
    with pytest.raises(RecordError, match="'failed' is the name of 0 finished points: choose one of one-r0, other-r8"):
        chosen(records, "failed")
    with pytest.raises(RecordError, match="no metric in common"):
        compare(*records[:2])


def test_the_console_script_prints_a_table(tmp_path, capsys, windows):
    one, other = (metric(x, scale="log") for x in windows)
    for found in points({"perplexity/x": one, "kl/x": metric(windows[0])}, {"perplexity/x": other}):
        folder = tmp_path / "points" / found["name"]
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(found))
    assert main([str(tmp_path), "r0", "r8"]) == 0
    printed = capsys.readouterr().out
    assert "A: one-r0\nB: other-r8" in printed and "only one-r0 has kl/x" in printed
    (line,) = (line for line in printed.splitlines() if "perplexity/x" in line)
    assert line.split()[-1] == "A" and "% to +" in line
    assert main([str(tmp_path), "r0", "r9"]) == 1
    assert capsys.readouterr().err.startswith("caldera-compare: 'r9' is the name of 0 finished points")
