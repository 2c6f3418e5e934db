"""One real point: SmolLM2-135M at 2 bits and rank 8, on four thousand tokens of calibration."""

import math

import pytest

from sweeps.pipeline import check_inputs, finished, run_baseline, run_point
from sweeps.plan import resolve
from sweeps.progress import Reporter


@pytest.mark.slow
def test_smollm2_survives_two_bits(composed, tmp_path):
    # E8P is the quicker of the 2-bit codes by far
    rounds = ["quantizer@q=e8p_2bit", "method.outer_iterations=1", "method.inner_iterations=1"]
    tiny = ["calibration=tiny", "evaluation=tiny", "tracker=none", f"results={tmp_path}", "checkpoint.keep=none"]
    point = resolve(composed(*tiny, *rounds, "method.sigma=1e-2", "rank.k=8", "calibration.sequences=16"))
    check_inputs(point)
    record = run_point(point, Reporter(point.name))
    before = run_baseline(point, Reporter(point.name))["metrics"]["perplexity/heldout_256"]["value"]
    after = record["metrics"]["perplexity/heldout_256"]["value"]
    assert (record["status"], finished(point)) == ("done", record)
    assert len(record["matrices"]) == 210 and record["bits"]["parameters"] == 106_168_320
    assert 2.04 < record["bits"]["stored"] < 2.05
    assert math.isfinite(after) and before < after < 6 * before

    from analysis.frontier import report

    assert report(tmp_path).read_bytes().startswith(b"\x89PNG")
