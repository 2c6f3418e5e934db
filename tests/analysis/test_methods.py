import numpy as np
import pytest

from analysis.frontier import frontier_table
from analysis.methods import methods_figure, spent_by
from analysis.records import RecordError, tidy

PERPLEXITY = "perplexity/boolq_1024"


@pytest.fixture
def methods(records, make):
    """Three methods and a budget; the last one's perplexity is far off."""
    for record, method in zip(records, ["gptq", "gptq", "qera"]):
        record["point"]["method"] = method
    records[3]["point"] |= {"budget": "allocated", "budget_bits": 2.25}
    records[4]["point"] |= {"budget": "allocated", "budget_bits": 2.25, "rank": 0}
    records[2]["metrics"][PERPLEXITY]["value"] = 9000.0
    return records


def test_every_point_is_drawn_where_it_is_and_solid_if_it_is_optimal(methods):
    table = frontier_table(methods)
    axes = methods_figure(table, PERPLEXITY).axes[0]
    lines = {line.get_gid(): line for line in axes.lines}
    rows = table[(table["method"] != "none") & (table["status"] == "done")]
    for _, row in rows[rows[PERPLEXITY] < 9000].iterrows():
        mark = lines[f"point:{row['name']}"]
        assert mark.get_xydata().tolist() == [[row["bits_stored"], row[PERPLEXITY]]]
        assert (mark.get_markerfacecolor() == mark.get_markeredgecolor()) == row["pareto"]
    own = rows[(rows["method"] == "gptq")].sort_values("bits_stored")
    np.testing.assert_array_equal(lines["method:GPTQ"].get_xydata(), own[["bits_stored", PERPLEXITY]])
    assert {gid for gid in lines if gid.startswith("method:")} >= {"method:CALDERA, mixed bits", "method:GPTQ"}
    assert [some.get_gid() for some in axes.collections] == ["band"]


def test_what_is_off_the_picture_is_named(methods):
    figure = methods_figure(tidy(methods), PERPLEXITY)
    assert "point:q2_rank32_lr2" not in {line.get_gid() for line in figure.axes[0].lines}
    assert figure.axes[0].get_ylim()[1] < 9000
    words = [text.get_text() for legend in figure.legends + figure.artists for text in legend.get_texts()]
    assert "QERA\n   at 2.20 off the picture: 9,000" in words


def test_methods_look_different(methods):
    figure = methods_figure(tidy(methods), PERPLEXITY)
    looks = {
        (line.get_color(), handle.get_marker())
        for legend in figure.artists
        for line, handle in zip(legend.get_lines(), legend.legend_handles)
    }
    assert len(looks) >= 5


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "rtn"}, "round to nearest"),
        ({"method": "mine"}, "mine"),
        ({"method": "caldera", "budget": "uniform", "rank": None}, "CALDERA, uniform budget"),
        ({"method": "caldera", "budget": "allocated", "rank": 0}, "CALDERA, mixed bits"),
    ],
)
def test_who_spends_the_bits(make, more, words):
    table = tidy([make.record("one", {"rank": 4} | more, 2.0, {PERPLEXITY: (30.0, 1.0)})])
    assert spent_by(table.iloc[0]) == words


def test_one_method_is_no_comparison(records):
    with pytest.raises(RecordError, match=r"sweep method=\.\.\., or budget="):
        methods_figure(tidy(records), PERPLEXITY)
