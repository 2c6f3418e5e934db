import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from analysis import style
from analysis.frontier import SIZES, frontier_table, main, report
from analysis.pareto import pareto
from analysis.plots import frontier_figure
from analysis.records import RecordError, tidy

PERPLEXITY, ACCURACY = "perplexity/boolq_1024", "arc_easy/acc"
# Few distinct values, so that ties are common.
VALUES = st.one_of(st.integers(0, 6).map(float), st.sampled_from([np.nan, np.inf]))
ROWS = st.lists(
    st.tuples(VALUES, VALUES, st.sampled_from(["done", "done", "failed"]), st.sampled_from(["a", "a", "none"]))
)


def brute_force(table: pd.DataFrame, sign: int) -> list[bool]:
    rows = list(table.itertuples(index=False))
    usable = [bool(np.isfinite([row.x, row.y]).all()) and row.status == "done" and row.method != "none" for row in rows]

    def beats(a, b):
        return a.x <= b.x and sign * a.y <= sign * b.y and (a.x < b.x or sign * a.y < sign * b.y)

    others = [row for row, use in zip(rows, usable, strict=True) if use]
    return [use and not any(beats(other, row) for other in others) for row, use in zip(rows, usable, strict=True)]


@given(rows=ROWS, higher_is_better=st.booleans())
def test_pareto_is_its_definition(rows, higher_is_better):
    table = pd.DataFrame(rows, columns=["x", "y", "status", "method"]).astype({"x": float, "y": float})
    found = pareto(table, "x", "y", higher_is_better)
    assert found.tolist() == brute_force(table, -1 if higher_is_better else 1)
    assert found.dtype == bool


def test_pareto_keeps_the_index_even_when_it_repeats():
    table = pd.DataFrame({"x": [1, 2, 3.0], "y": [5, 6, 4.0], "status": "done", "method": "a"}, index=[7, 7, 2])
    assert pareto(table, "x", "y").to_list() == [True, False, True]
    assert pareto(table, "x", "y").index.tolist() == [7, 7, 2]


def test_the_table_marks_the_frontier_and_sorts_by_stored_bits(records):
    table = frontier_table(records)
    optimal = table.loc[table["pareto"], "name"].tolist()
    expected = ["q2_rank0_lrNone", "q2_rank32_lr2", "q2_rank64_lr2", "q2_rank64_lr4"]
    assert optimal == [*expected, "q3_rank0_lrNone", "q3_rank32_lr4", "q4_rank0_lrNone"]
    assert table["name"].tolist()[-2:] == ["uncompressed", "q2_rank8_lr4"]
    assert table["bits_stored"].iloc[:-2].is_monotonic_increasing
    assert table.attrs["metric"] == PERPLEXITY


def test_an_accuracy_is_maximised(records):
    table = frontier_table(records, ACCURACY, "megabytes").set_index("name")
    assert table.loc["q4_rank0_lrNone", "pareto"]
    assert not table.loc["q2_rank32_lr16", "pareto"]
    assert table.attrs["x"] == "megabytes"


def test_a_point_without_the_metric_never_reaches_the_frontier(records):
    del records[-3]["metrics"][PERPLEXITY]  # the best perplexity
    table = frontier_table(records).set_index("name")
    assert np.isnan(table.loc["q4_rank0_lrNone", PERPLEXITY])
    assert not table.loc["q4_rank0_lrNone", "pareto"]
    assert not any(gid.endswith("q4_rank0_lrNone") for gid in drawn(frontier_figure(table.reset_index(), PERPLEXITY)))


@pytest.mark.parametrize(
    ("change", "arguments", "reason"),
    [
        (lambda records: records, {"metric": "wikitext"}, f"choose one of {ACCURACY}, {PERPLEXITY}"),
        (lambda records: records, {"x": "bytes"}, "choose one of stored, nominal, model, megabytes"),
        (lambda records: records[-1:], {}, "no record has a metric .*H has 3 NaN.*: evaluate at least one point"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(records, change, arguments, reason):
    with pytest.raises(RecordError, match=reason):
        frontier_table(change(records), **arguments)


def drawn(figure) -> dict:
    return {line.get_gid(): line for line in figure.axes[0].lines}


@pytest.mark.parametrize(("metric", "x"), [(PERPLEXITY, "bits_stored"), (ACCURACY, "megabytes")])
def test_the_figure_draws_exactly_its_data(records, metric, x):
    table = frontier_table(records, metric, next(size for size, column in SIZES.items() if column == x))
    lines = drawn(frontier_figure(table, metric, x))
    points = table[(table["status"] == "done") & (table["method"] != "none")]
    assert {gid for gid in lines if gid.startswith("point:")} == {f"point:{name}" for name in points["name"]}
    for _, row in points.iterrows():
        assert lines[f"point:{row['name']}"].get_xydata().tolist() == [[row[x], row[metric]]]
        error = row[f"{metric}:stderr"]
        ends = [[row[x], row[metric] - error], [row[x], row[metric] + error]]
        np.testing.assert_allclose(lines[f"stderr:{row['name']}"].get_xydata(), ends)
    front = table[table["pareto"]].sort_values(x)
    np.testing.assert_array_equal(lines["frontier"].get_xydata(), front[[x, metric]])
    assert set(lines["baseline:uncompressed"].get_ydata()) == set(table.loc[table["method"] == "none", metric])


def test_the_band_is_shaded_on_the_axes_that_it_was_drawn_for(records):
    table = frontier_table(records)
    [shade] = [some for some in frontier_figure(table, PERPLEXITY).axes[0].collections if some.get_gid() == "band"]
    corners = shade.get_paths()[0].vertices
    assert set(table.attrs["band"]["low"]) | set(table.attrs["band"]["high"]) <= set(corners[:, 1])
    assert not frontier_figure(table, ACCURACY).axes[0].collections


def test_a_budget_without_one_rank_has_its_place(records):
    records[3]["point"] |= {"budget": "allocated", "budget_bits": 2.25, "rank": None, "q": "mixed", "q_bits": None}
    records[4]["point"] |= {"budget": "allocated", "budget_bits": 2.25, "rank": 0, "q": "mixed", "q_bits": None}
    table = frontier_table(records)
    assert table["rank"].isna().any()
    lines = drawn(frontier_figure(table, PERPLEXITY))
    assert {f"point:{records[i]['name']}" for i in (3, 4)} <= set(lines)


def test_marks_tell_rank_quantizer_bits_and_dominance(records):
    figure = frontier_figure(tidy(records), PERPLEXITY)
    lines = drawn(figure)
    look = {gid.removeprefix("point:"): line for gid, line in lines.items() if gid.startswith("point:")}
    assert look["q2_rank32_lr2"].get_markeredgecolor() == look["q3_rank32_lr4"].get_markeredgecolor()
    assert look["q2_rank32_lr2"].get_markeredgecolor() != look["q2_rank64_lr2"].get_markeredgecolor()
    assert len({look[f"q{bits}_rank0_lrNone"].get_marker() for bits in (2, 3, 4)}) == 3
    widths = [look[f"q2_rank32_lr{bits}"].get_markeredgewidth() for bits in (2, 4)]
    assert widths[0] < widths[1]
    assert look["q2_rank32_lr2"].get_markerfacecolor() == "#FFFFFF"
    pale = style.THEMES["print"].pale(look["q2_rank32_lr2"].get_markeredgecolor())
    assert look["q2_rank32_lr4"].get_markeredgecolor() == pale
    assert {text.get_text() for text in figure.axes[0].texts} >= {"rank 0", "rank 32, 2-bit L, R"}


def test_axes_are_named_with_units_and_perplexity_is_logarithmic(records):
    axes = frontier_figure(tidy(records), PERPLEXITY).axes[0]
    assert axes.get_xlabel() == "Stored bits per parameter (compressed matrices)"
    assert axes.get_ylabel() == "Perplexity (BoolQ passages, 1024-token windows)"
    assert axes.get_yscale() == "log"
    axes = frontier_figure(tidy(records), ACCURACY).axes[0]
    assert (axes.get_ylabel(), axes.get_yscale()) == ("Accuracy (ARC-Easy, 570 documents)", "linear")


@pytest.mark.parametrize("metric", [PERPLEXITY, ACCURACY])
@pytest.mark.parametrize("theme", style.THEMES)
def test_no_text_overlaps_another_or_a_mark(records, metric, theme):
    figure = frontier_figure(tidy(records), metric, theme=theme)
    figure.draw_without_rendering()
    texts = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    marks = [line.get_window_extent() for gid, line in drawn(figure).items() if gid.startswith("point:")]
    assert len(texts) >= 6
    assert not any(a.overlaps(b) for a, b in combinations(texts, 2))
    assert not any(text.overlaps(mark) for text in texts for mark in marks)
    legends = [legend.get_window_extent() for legend in figure.artists]
    assert len(legends) == 4
    assert all(figure.bbox.containsx(legend.x1) and figure.bbox.containsy(legend.y0) for legend in legends)
    assert not any(legend.overlaps(figure.axes[0].bbox) for legend in legends)


def test_the_theme_does_not_leak_into_later_figures(records):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = frontier_figure(tidy(records), PERPLEXITY, theme="dark")
    assert to_hex(figure.get_facecolor()).upper() == style.THEMES["dark"].paper
    assert dict(matplotlib.rcParams) == before


def test_more_ranks_than_the_palette_still_differ(make):
    points = [make.compressed(rank, 4, 2, 2 + rank / 100, 70 - rank, 0.4) for rank in range(1, 13)]
    lines = drawn(frontier_figure(tidy(points), PERPLEXITY))
    colours = {line.get_markeredgecolor() for gid, line in lines.items() if gid.startswith("point:")}
    assert len(colours) == 12


def test_a_diverged_point_or_one_without_stderr_is_drawn(make, records):
    point = {"method": "rtn", "rank": 0, "q": "custom", "l": None, "r": None, "q_bits": None}
    records.append(make.record("rtn", point, 2.28, {PERPLEXITY: (612_000.0, None)}))
    lines = drawn(frontier_figure(tidy(records), PERPLEXITY))
    assert "point:rtn" in lines
    assert "stderr:rtn" not in lines


@pytest.mark.parametrize(
    ("metric", "info", "label"),
    [
        ("perplexity/c4_2048", {}, "Perplexity (C4, 2048-token windows)"),
        ("perplexity/own", {"measured_on": {"text": "Own", "length": 512}}, "Perplexity (Own, 512-token windows)"),
        ("perplexity/c4", {"differs": ["rows"]}, "Perplexity (C4, rows not the same for all)"),
        ("rte/acc", {"measured_on": {"documents": 277}}, "Accuracy (RTE, 277 documents)"),
        ("throughput", {}, "throughput"),
    ],
)
def test_labels_of_metrics(metric, info, label):
    assert style.metric_label(metric, info) == label


@pytest.mark.parametrize(
    ("name", "bits", "label"),
    [("e8p_2bit", 2, "E8P, 2 bits"), ("nf_4bit", 4, "NormalFloat, 4 bits"), ("bf16", 16, "bf16"), (None, None, "none")],
)
def test_labels_of_quantizers(name, bits, label):
    assert style.quantizer_label(name, bits) == label


def run(*arguments) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "analysis.frontier", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_command_writes_a_picture_a_drawing_and_a_table(write, records):
    folder = write(records)
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(folder / "frontier.png")
    assert imread(folder / "frontier.png").shape[:2] == (1170, 1950)  # 6.5 x 3.9 inches at 300 dpi
    assert ElementTree.parse(folder / "frontier.svg").getroot().tag.endswith("svg")
    table = pd.read_csv(folder / "frontier.csv")
    assert table.loc[table["pareto"], "name"].tolist()[0] == "q2_rank0_lrNone"
    assert len(table) == len(records)
    assert sorted(path.name for path in folder.glob("*front*")) == ["frontier.csv", "frontier.png", "frontier.svg"]


def test_the_printed_table_is_whole_when_piped(write, records):
    output = run(write(records)).stdout
    row = next(line for line in output.splitlines() if "50.28" in line)
    cells = ["caldera", "32", "e8p_2bit", "e8p_4bit", "e8p_4bit", "2.379", "0.418 ± 0.021", "50.28 ± 0.91", "812"]
    assert all(cell in row for cell in cells)
    assert not row.lstrip().startswith("*")
    assert next(line for line in output.splitlines() if "48.12" in line).lstrip().startswith("*")
    assert "uncompressed" in output
    assert "failed: q2_rank8_lr4: compress, block 7, self_attn.q_proj: FactorisationError: H has 3 NaN" in output
    assert "…" not in output


def test_axes_that_vary_get_a_column_and_unlike_measurements_a_warning(make, write, records, capsys):
    records.append(make.compressed(0, None, 2, 2.0, 69.1, 0.39) | {"name": "second_seed"})
    records[-1]["point"]["seed"] = 1
    records[-1]["metrics"][PERPLEXITY]["measured_on"] = {"text": "boolq", "rows": 16, "length": 1024}
    report(write(records))
    output = capsys.readouterr().out
    assert " seed " in output
    assert f"warning: {PERPLEXITY} was not measured alike in all points (rows differ)." in output


def test_the_same_records_give_the_same_svg(write, records, tmp_path):
    folder = write(records)
    first, second = (report(folder, tmp_path / name).with_suffix(".svg").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "holds no points"),
        (["--metric", "none/such"], "no record has the metric"),
        (["--x", "depth"], "no size is"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_1(write, records, tmp_path, capsys, arguments, reason):
    folder = write(records) if arguments else tmp_path
    assert main([str(folder), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("caldera-frontier: ")
    assert reason in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_exit_code_reaches_the_shell(tmp_path):
    result = run(tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr


def test_nothing_to_draw_is_said_after_the_reasons(make, write, capsys):
    assert main([str(write([make.baseline(), make.failed()]))]) == 1
    captured = capsys.readouterr()
    assert "failed: q2_rank8_lr4" in captured.out
    assert "no finished compressed point has both bits_stored and" in captured.err


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "frontier.csv"
    path.write_text("old")

    def fill_the_disk():
        with style.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
