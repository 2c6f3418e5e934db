"""What float32 changes of the uncompressed model is on every figure that shows how good points are."""

import json

import numpy as np
import pytest

from analysis import methods, plots, tradeoffs
from analysis.figures import Sweep
from analysis.frontier import frontier_table, main
from analysis.records import tidy
from analysis.report import frontier_data

PERPLEXITY, ACCURACY, KL = "perplexity/boolq_1024", "arc_easy/acc", "kl/boolq_1024"
EXACT = {PERPLEXITY: 20.95 - 0.012, ACCURACY: 0.514 + 0.002, KL: 0.0008}


@pytest.fixture
def measured(records, make):
    """The records with a divergence, a second method, and an uncompressed model that knows its noise floor."""
    for i, record in enumerate(records[:-2]):
        record["metrics"][KL] = make.measured(KL, 0.8 / (1 + i), 0.01) | {"higher_is_better": False}
    records[3]["point"]["method"] = "gptq"
    records[-2]["metrics"][KL] = make.measured(KL, 1e-7, 1e-8) | {"higher_is_better": False}
    records[-2]["noise_floor"] = {PERPLEXITY: 0.012, ACCURACY: -0.002, KL: 0.0008}
    return records


def patches(axes) -> dict:
    return {patch.get_gid(): patch for patch in axes.patches if patch.get_gid()}


@pytest.mark.parametrize("draw", [plots.frontier_figure, methods.methods_figure])
@pytest.mark.parametrize("metric", [PERPLEXITY, ACCURACY])
def test_it_is_between_the_model_and_the_same_in_float32(measured, draw, metric):
    axes = draw(tidy(measured), metric).axes[0]
    corners = patches(axes)["floor:uncompressed"].get_extents().transformed(axes.transData.inverted())
    value = measured[-2]["metrics"][metric]["value"]
    np.testing.assert_allclose([corners.y0, corners.y1], sorted([EXACT[metric], value]), rtol=1e-9)
    (line,) = [line for line in axes.lines if line.get_gid() == "baseline:uncompressed"]
    assert set(line.get_ydata()) == {value}
    assert line.get_label().endswith(
        {PERPLEXITY: "20.95 ± 0.38, in float32 20.94", ACCURACY: "in float32 0.52"}[metric]
    )


@pytest.mark.parametrize("draw", [plots.frontier_figure, methods.methods_figure])
def test_what_compares_with_the_uncompressed_model_is_drawn_beside_float32(measured, draw):
    axes = draw(tidy(measured), KL).axes[0]
    assert axes.get_yscale() == "log" and not patches(axes)
    (line,) = [line for line in axes.lines if line.get_gid() == "baseline:uncompressed"]
    assert set(line.get_ydata()) == {0.0008}
    assert line.get_label() == "noise floor, SmolLM2-135M-Instruct in float32: 0.0008"
    measured[-2]["noise_floor"] = None
    lines = draw(tidy(measured), KL).axes[0].lines
    assert not any(line.get_gid() == "baseline:uncompressed" for line in lines)


def test_it_is_beside_the_stars_and_the_gains(measured):
    larger = json.loads(json.dumps(measured))
    for record in larger:
        record["name"] += "_larger"
        record["point"]["model"] = "larger"
    larger[-2]["noise_floor"] = None
    axes = tradeoffs.models_figure(tidy([*measured, *larger]), PERPLEXITY).axes[0]
    bars = {bar.get_gid(): bar.get_segments()[0][:, 1].tolist() for bar in axes.collections if bar.get_gid()}
    assert bars == {"floor:smollm2_135m": [20.95, EXACT[PERPLEXITY]], "floor:larger": [20.95, 20.95]}
    gains = tradeoffs.spending_figure(tidy(measured), PERPLEXITY).axes[1]
    band = patches(gains)["floor"].get_extents().transformed(gains.transData.inverted())
    assert band.y1 == pytest.approx(100 * np.log(20.95 / EXACT[PERPLEXITY])) and band.y0 == -band.y1


def test_the_page_and_the_terminal_say_it(measured, write, capsys):
    found = frontier_data(Sweep.of(measured))["baselines"]
    assert [(one["level"], one["float32"]) for one in found[PERPLEXITY]] == [(20.95, EXACT[PERPLEXITY])]
    assert [(one["level"], one["float32"]) for one in found[KL]] == [(0.0008, 0.0008)]
    assert main([str(write(measured)), "--metric", PERPLEXITY]) == 0
    assert f"noise floor of smollm2_135m: {PERPLEXITY} is 20.94 in float32." in capsys.readouterr().out


def test_without_it_nothing_is_drawn(records):
    assert not patches(plots.frontier_figure(frontier_table(records), PERPLEXITY).axes[0])
    assert not patches(tradeoffs.spending_figure(tidy(records), PERPLEXITY).axes[1])
