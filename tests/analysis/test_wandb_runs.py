"""Without a network: runs hold what the tracker writes, as its own function makes it."""

from types import SimpleNamespace

import pandas as pd
import pytest

from analysis.frontier import frontier_table
from analysis.records import RecordError, tidy
from analysis.wandb_runs import load_runs, records_of
from sweeps.mirror import flat_summary


def as_run(record: dict) -> SimpleNamespace:
    config = record["point"] | {"full": record["config"]}
    summary = flat_summary(record) | {"_runtime": 12, "matrices": {"_type": "table-file", "nrows": 2}}
    return SimpleNamespace(name=record["name"], config=config, summary_metrics=summary)


def test_runs_give_the_table_that_their_records_give(records):
    for record in records:
        record["memory"] = {"peak_rss_bytes": 2 * 10**9, "peak_gpu_bytes": None}
    records[-2]["noise_floor"] = {"perplexity/boolq_1024": 0.012, "arc_easy/acc": None}
    found = tidy(records_of(map(as_run, records)))
    expected = tidy(sorted(records, key=lambda record: record["name"]))
    columns = [column for column in expected if column != "error"]  # why a point failed is not in a summary
    pd.testing.assert_frame_equal(found[columns], expected[columns], check_like=True)
    assert found.attrs["float32"] == {"smollm2_135m": {"perplexity/boolq_1024": 20.95 - 0.012}}
    assert found.attrs["metrics"]["arc_easy/acc"]["higher_is_better"]
    assert not found.attrs["metrics"]["perplexity/boolq_1024"]["higher_is_better"]


def test_runs_give_the_frontier_that_their_records_give(records):
    frontiers = [frontier_table(some) for some in (records, records_of(map(as_run, records)))]
    assert frontiers[0].loc[frontiers[0]["pareto"], "name"].tolist() == (
        frontiers[1].loc[frontiers[1]["pareto"], "name"].tolist()
    )


def test_a_run_that_is_no_finished_point_is_left_out(records):
    running = SimpleNamespace(name="running", config={"rank": 3}, summary_metrics={"_runtime": 3})
    assert [r["name"] for r in records_of([running, as_run(records[0])])] == [records[0]["name"]]


@pytest.mark.parametrize("source", ["wandb:", "wandb:only-a-project", "wandb:/x"])
def test_what_is_no_project_is_refused_with_the_form(source):
    with pytest.raises(RecordError, match="write wandb:ENTITY/PROJECT"):
        load_runs(source)
