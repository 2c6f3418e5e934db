"""The workspace and the report that W&B is sent, without W&B."""

import json

import pytest

from sweeps import mirror
from sweeps.dashboard import main, report, specification, workspace

RECORD = {
    "name": "some", "status": "done", "point": {}, "memory": {}, "timings_s": {"compress": 3.0}, "error": None,
    "bits": {"nominal": 2.0, "stored": 2.1, "model": 4.0, "model_bytes": 1e6}, "allocation": None,
    "metrics": {name: {"value": 1.0, "stderr": None} for name in ("perplexity/some_8", "arc/acc", "arc/acc_norm")},
    "matrices": [{"name": "h.0.q", "shape": [4, 4], "relative_error": 0.1, "trace": [], "seconds": 1.0}],
}  # fmt: skip
METRICS = ("arc/acc",)


def panels_of(made) -> dict[str, list[dict]]:
    """By section, in the workspace or in the report."""
    spec = specification(made)
    if "section" in spec:
        return {s["name"]: s["panels"] for s in spec["section"]["panelBankConfig"]["sections"]}
    headings = [b["children"][0]["text"] for b in spec["blocks"] if b["type"] == "heading"]
    grids = [b["metadata"]["panelBankSectionConfig"]["panels"] for b in spec["blocks"] if b["type"] == "panel-grid"]
    return dict(zip(headings, grids, strict=True))


@pytest.fixture(params=[workspace, report])
def made(request):
    return request.param("team", "project", "demo", METRICS)


def test_what_panels_show_is_what_runs_have(made):
    """Every name that a panel draws is one that the mirror of a record writes."""
    summary = {f"summary:{name}" for name in mirror.flat_summary(RECORD) | mirror.headlines(RECORD)}
    for panels in panels_of(made).values():
        for config in (panel["config"] for panel in panels):
            named = {config.get("xAxis"), config.get("yAxis")} | {c["accessor"] for c in config.get("columns", [])}
            assert {name for name in named if str(name).startswith("summary:")} <= summary


def test_the_sections_have_their_kinds_of_panels(made):
    kinds = {name: [panel["viewType"] for panel in panels] for name, panels in panels_of(made).items()}
    assert kinds["Frontier"] == ["Scatter Plot", "Scatter Plot", "Media Browser"]
    assert kinds["Choices"] == ["Parallel Coordinates Plot"]
    assert set(kinds["Bits against each metric"]) == {"Scatter Plot"}
    assert kinds["Layers"] == ["Media Browser", "Run History Line Plot", "Run History Line Plot"]
    assert kinds["Tables"] == ["Weave", "Weave"]


def test_every_metric_has_a_panel_against_bits(made):
    found = {p["config"]["yAxis"]: p["config"]["xAxis"] for p in panels_of(made)["Bits against each metric"]}
    assert set(found) == {f"summary:{n}" for n in ("accuracy", "relative_error", "seconds", "arc/acc")}
    assert set(found.values()) == {"summary:stored_bits"}


def test_curves_are_drawn_over_their_steps(made):
    lines = [p["config"] for p in panels_of(made)["Layers"] if p["viewType"] == "Run History Line Plot"]
    assert {line["metricRegex"]: line["xAxis"] for line in lines} == {
        f"^{section}/": step for section, step in mirror.STEPS.items()
    }


def test_only_compressed_points_of_the_sweep_are_shown(made):
    spec = specification(made)
    runs = spec["section"]["runSets"] if "section" in spec else spec["blocks"][3]["metadata"]["runSets"]
    asked = [(f["key"]["name"], f["op"], f["value"]) for f in runs[0]["filters"]["filters"]]
    assert asked == [("method", "!=", "none"), ("group", "=", "demo")]


def test_panels_of_a_report_do_not_lie_on_each_other():
    for panels in panels_of(report("team", "project")).values():
        places = [(p["layout"]["x"], p["layout"]["y"]) for p in panels]
        assert len(set(places)) == len(places) and all(p["layout"]["x"] + p["layout"]["w"] <= 24 for p in panels)


def test_the_specification_is_printed_without_a_network(capsys):
    assert main(["team/project", "--print"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"workspace", "report"}


@pytest.mark.parametrize("wrong", [["project"], ["a/b/c"], ["team/project", "--results", "nowhere"]])
def test_a_mistake_is_one_sentence(wrong, capsys):
    assert main(wrong) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("caldera-dashboard: ") and errors.count("\n") == 1


def test_without_a_key_it_is_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["team/project"]) == 1
    assert "No API key" in capsys.readouterr().err
