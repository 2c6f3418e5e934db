import json

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.image import imread

from analysis import layers, style, tradeoffs
from analysis.figures import Sweep, figures, main
from analysis.records import RecordError, matrices, tidy, traces

PERPLEXITY, ACCURACY = "perplexity/boolq_1024", "arc_easy/acc"


def artists(axes) -> dict:
    return {artist.get_gid(): artist for artist in (*axes.lines, *axes.images, *axes.collections) if artist.get_gid()}


@pytest.fixture
def sweep(records, fitted) -> Sweep:
    """The records, the compressed ones with matrices."""
    for i, record in enumerate(records[:-2]):
        fitted(record, np.array([0.1, 0.2, 0.05, 0.4]) / (1 + i))
    records[0]["memory"] = {"peak_rss_bytes": 2 * 10**9, "workers_peak_rss_bytes": 3 * 10**9}
    return Sweep.of(records)


def test_traces_are_long_and_count_updates(sweep):
    first = sweep.traces[sweep.traces["point"] == "q2_rank0_lrNone"]
    own = first[first["matrix"] == "model.layers.1.mlp.down_proj"]
    assert own[["block", "projection", "update", "step"]].to_numpy().tolist() == [
        [1, "down_proj", 1, "LR"],
        [1, "down_proj", 2, "Q"],
        [1, "down_proj", 3, "LR"],
    ]
    np.testing.assert_allclose(own["error"], [1.6, 0.8, 0.4])
    assert traces([]).empty


@pytest.mark.parametrize("value", ["relative_error", "output_error"])
def test_a_heat_map_has_a_cell_for_each_matrix(sweep, value):
    points = sweep.table[sweep.table["name"].isin(["q2_rank0_lrNone", "q4_rank0_lrNone"])]
    figure = layers.heat_figure(points, sweep.matrices, value)
    for axes, (_, row) in zip(figure.axes, points.iterrows()):
        own = sweep.matrices[sweep.matrices["point"] == row["name"]].set_index(["projection", "block"])[value]
        shown = artists(axes)[f"heat:{row['name']}"].get_array()
        assert [text.get_text() for text in axes.get_yticklabels()] == ["q_proj", "down_proj"]
        for i, projection in enumerate(("q_proj", "down_proj")):
            assert shown[i].tolist() == [own[projection, 0], own[projection, 1]]
    norms = {id(artists(axes)[f"heat:{name}"].norm) for axes, name in zip(figure.axes, points["name"])}
    assert len(norms) == 1


def test_experts_of_one_place_are_averaged_and_gaps_stay_empty(make, fitted):
    record = fitted(make.compressed(0, None, 2, 2.0, 69.0, 0.39), [0.1, 0.2, 0.3, 0.4])
    for entry, name in zip(
        record["matrices"], ("layers.0.experts.0.w1", "layers.0.experts.1.w1", "layers.2.experts.0.w1", "head")
    ):
        entry["name"] = name
    cells = layers.grid(matrices([record]), record["name"], "relative_error")
    assert cells.loc["w1"].tolist() == pytest.approx([0.15, 0.3])
    assert cells.index.tolist() == ["w1"]


def test_convergence_is_the_median_of_the_matrices_and_a_fit_that_ended_stays(sweep):
    points = sweep.table[sweep.table["name"] == "q2_rank32_lr4"]
    ended = (sweep.traces["matrix"] == "model.layers.0.self_attn.q_proj") & (sweep.traces["update"] > 1)
    left = sweep.traces[~ended]
    line = artists(layers.convergence_figure(points, left).axes[0])["median:q2_rank32_lr4"]
    own = left[left["point"] == "q2_rank32_lr4"].groupby("matrix")["error"].apply(list)
    errors = np.array([errors + errors[-1:] * (3 - len(errors)) for errors in own])
    np.testing.assert_allclose(line.get_xydata(), np.transpose([[1, 2, 3], np.median(errors, axis=0)]))


def test_predictions_are_drawn_against_measurements(sweep):
    drawn = artists(layers.prediction_figure(sweep.table, sweep.matrices).axes[0])
    found = np.concatenate([drawn[f"projection:{name}"].get_xydata() for name in ("q_proj", "down_proj")])
    assert len(found) == len(sweep.matrices)
    np.testing.assert_allclose(found[:, 0], 1.1 * found[:, 1])


def test_an_allocation_shows_ranks_and_bits_where_they_differ(sweep):
    chosen = sweep.matrices.copy()
    one = (chosen["point"] == "q2_rank32_lr4") & (chosen["block"] == 1)
    chosen.loc[one, "rank"] = [5, 7]
    chosen.loc[one, "stored_bits"] = [3.5, 4.5]
    figure = layers.allocation_figure(sweep.table, chosen)
    shown = {gid: image.get_array().tolist() for axes in figure.axes for gid, image in artists(axes).items()}
    assert shown["rank:q2_rank32_lr4"] == [[32, 5], [32, 7]]
    assert shown["bits:q2_rank32_lr4"] == [[2.1, 3.5], [2.1, 4.5]]
    assert not [gid for gid in shown if gid.startswith("rank:") and "rank32_lr4" not in gid]


def test_spending_places_points_by_where_their_bits_went(sweep):
    plane = tradeoffs.spending_figure(sweep.table, PERPLEXITY).axes[0]
    places = {
        gid.removeprefix("point:"): line.get_xydata()[0] for gid, line in artists(plane).items() if "point:" in gid
    }
    assert set(places) == set(sweep.table.loc[sweep.table["method"] == "caldera", "name"]) - {"q2_rank8_lr4"}
    np.testing.assert_allclose(places["q2_rank32_lr4"], [0.368, 2.011], atol=1e-4)
    for gid, line in artists(plane).items():
        if gid.startswith("iso:"):
            np.testing.assert_allclose(line.get_xydata().sum(axis=1), float(gid.removeprefix("iso:")))


def test_the_next_bit_buys_rank_or_precision(sweep):
    steps = artists(tradeoffs.spending_figure(sweep.table, PERPLEXITY).axes[1])
    names = {gid.removeprefix("step:") for gid in steps if gid.startswith("step:")}
    assert "rank:q2_rank0_lrNone:q2_rank16_lr4" in names
    assert "rank:q2_rank32_lr4:q2_rank64_lr4" in names
    assert "precision:q2_rank0_lrNone:q3_rank0_lrNone" in names
    assert "precision:q2_rank32_lr4:q3_rank32_lr4" in names
    assert "rank:q2_rank32_lr2:q2_rank64_lr4" not in names  # the factors' bits differ too
    line = steps["step:precision:q2_rank0_lrNone:q3_rank0_lrNone"].get_xydata()
    np.testing.assert_allclose(
        line, [[2.011, 100 * np.log(68.24 / 29.55)], [3.011, 100 * np.log(68.24 / 29.55)]], rtol=1e-4
    )


def test_the_next_bit_of_an_accuracy_is_its_rise(sweep):
    steps = artists(tradeoffs.spending_figure(sweep.table, ACCURACY).axes[1])
    line = steps["step:precision:q2_rank0_lrNone:q3_rank0_lrNone"].get_xydata()
    np.testing.assert_allclose(line[:, 1], 0.471 - 0.392, rtol=1e-4)


def test_models_share_an_axis_of_megabytes(records):
    for record in (other := json.loads(json.dumps(records[:4] + records[-2:-1]))):
        record["point"]["model"] = "larger"
        record["name"] += "_larger"
        record["bits"]["model_bytes"] *= 3
    table = tidy(records + other)
    drawn = artists(tradeoffs.models_figure(table, PERPLEXITY).axes[0])
    for model in ("smollm2_135m", "larger"):
        own = table[(table["model"] == model) & (table["status"] == "done")]
        points, whole = own[own["method"] != "none"], own[own["method"] == "none"]
        assert drawn[f"points:{model}"].get_xydata().tolist() == points[["megabytes", PERPLEXITY]].to_numpy().tolist()
        assert drawn[f"baseline:{model}"].get_xydata().tolist() == whole[["megabytes", PERPLEXITY]].to_numpy().tolist()
        assert (np.diff(drawn[f"frontier:{model}"].get_xydata()[:, 1]) < 0).all()


def test_costs_are_minutes_and_the_largest_process(sweep):
    records = sweep.records
    records[1]["reused"] = {"blocks": 0.5}
    time, memory = (artists(axes) for axes in tradeoffs.costs_figure(tidy(records)).axes[:2])
    assert time["time:q2_rank0_lrNone"].get_xydata()[0].tolist() == pytest.approx([2.011, 812.5 / 60], rel=1e-4)
    assert memory["memory:q2_rank0_lrNone"].get_ydata()[0] == 3.0
    hollow = [gid for gid, line in time.items() if line.get_markerfacecolor() == style.THEMES["print"].paper]
    assert hollow == ["time:q2_rank16_lr4"]


@pytest.mark.parametrize("name", list(figures()))
def test_a_figure_without_its_data_says_what_to_do(make, name):
    lonely = {"method": "rtn", "rank": None, "q": None, "l": None, "r": None}
    bare = make.record("bare", lonely, None, {PERPLEXITY: (30.0, None)}, timings_s={})
    with pytest.raises(RecordError, match=r": [a-z].*\.$"):
        figures()[name](Sweep.of([bare]), "print")


@pytest.mark.parametrize("theme", style.THEMES)
def test_the_command_writes_all_that_can_be_drawn_and_says_what_cannot(sweep, write, capsys, theme):
    folder = write(sweep.records)
    assert main([str(folder), "--theme", theme]) == 0
    output = capsys.readouterr().out.splitlines()
    drawn = set(figures()) - {"methods", "models", "allocation", "spectra"}
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == drawn
    assert {path.stem for path in (folder / "figures").glob("*.png")} == drawn
    assert [line.split(": ")[1] for line in output if line.startswith("not drawn")] == [
        "methods",
        "models",
        "spectra",
        "allocation",
    ]
    corner = imread(folder / "figures" / "spending.png")[0, 0, :3]
    np.testing.assert_allclose(corner, matplotlib.colors.to_rgb(style.THEMES[theme].paper), atol=0.01)


def test_pdfs_repeat_and_hold_letters(sweep, tmp_path):
    written = []
    for name in ("a.pdf", "b.pdf"):
        style.save(tradeoffs.spending_figure(sweep.table, PERPLEXITY), tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert b"/CIDFontType2" in written[0] or b"/TrueType" in written[0]


def test_an_empty_folder_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("caldera-figures: ")
