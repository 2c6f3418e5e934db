import numpy as np
import pandas as pd
import pytest

from analysis.pareto import pareto
from analysis.records import tidy
from analysis.uncertainty import band, draws, optimal_share

PERPLEXITY, ACCURACY = "perplexity/boolq_1024", "arc_easy/acc"


@pytest.fixture
def paired(records):
    """The records with a sample a window: hard windows are hard for every point."""
    hardness = np.random.default_rng(0).normal(0, 0.3, 64)
    for record in records[:-1]:
        measured = record["metrics"][PERPLEXITY]
        measured["samples"] = list(np.log(measured["value"]) + hardness - hardness.mean())
    return records


def test_values_are_drawn_around_what_was_measured_with_its_error(records):
    drawn = draws(records, ACCURACY, count=4000)
    table = tidy(records[:-1]).set_index("name")
    assert set(drawn.columns) == set(table.index)
    np.testing.assert_allclose(drawn.mean(), table[ACCURACY].loc[drawn.columns], atol=0.002)
    np.testing.assert_allclose(drawn.std(), table[f"{ACCURACY}:stderr"].loc[drawn.columns], rtol=0.1)


def test_points_on_the_same_windows_rise_and_fall_together(paired):
    drawn = draws(paired, PERPLEXITY)
    assert np.corrcoef(drawn.to_numpy().T).min() > 0.999
    better, worse = drawn["q3_rank32_lr4"], drawn["q3_rank0_lrNone"]
    assert (better < worse).all()
    assert worse.min() < better.max()  # apart they would overlap


def test_samples_that_differ_in_number_or_do_not_give_the_value_are_not_paired(paired):
    paired[0]["metrics"][PERPLEXITY]["samples"].pop()
    assert np.corrcoef(draws(paired, PERPLEXITY).to_numpy().T)[0, 1] < 0.2
    paired[0]["metrics"][PERPLEXITY]["samples"].append(9.0)
    assert np.corrcoef(draws(paired, PERPLEXITY).to_numpy().T)[0, 1] < 0.2


@pytest.mark.parametrize(("metric", "higher"), [(PERPLEXITY, False), (ACCURACY, True)])
def test_the_share_is_how_often_a_draw_finds_the_point_optimal(records, metric, higher):
    table, drawn = tidy(records), draws(records, metric, count=40)
    found = optimal_share(table, drawn, "bits_stored", higher)
    often = pd.Series(0.0, index=table.index)
    for _, draw in drawn.iterrows():
        often += pareto(table.assign(drawn=table["name"].map(draw)), "bits_stored", "drawn", higher) / len(drawn)
    eligible = (table["status"] == "done") & (table["method"] != "none")
    np.testing.assert_allclose(found[eligible], often[eligible])
    assert found[~eligible].isna().all()
    assert found.between(0.01, 0.99).any()
    assert found.max() == 1


@pytest.mark.parametrize(("metric", "higher"), [(PERPLEXITY, False), (ACCURACY, True)])
def test_the_band_holds_the_best_value_that_a_size_buys(records, metric, higher):
    table, drawn = tidy(records), draws(records, metric)
    found = band(table, drawn, "bits_stored", higher, level=0.9)
    assert found["size"].is_monotonic_increasing and found["size"].is_unique
    assert (found["low"] <= found["high"]).all()
    affordable = table[(table["bits_stored"] < 2.4) & (table["method"] != "none")]["name"]
    best = drawn[affordable].max(axis=1) if higher else drawn[affordable].min(axis=1)
    expected = best.quantile([0.05, 0.95])
    np.testing.assert_allclose(found[found["size"] < 2.4].iloc[-1][["low", "high"]].to_numpy(float), expected)


def test_nothing_finished_has_an_empty_band(make):
    records = [make.baseline(), make.failed()]
    drawn = draws(records, PERPLEXITY, count=3)
    assert band(tidy(records), drawn, "bits_stored", False).empty
    assert optimal_share(tidy(records), drawn, "bits_stored", False).isna().all()
