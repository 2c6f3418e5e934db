"""A real sweep: SmolLM2-135M at 2 bits with and without rank, on four thousand tokens of calibration, and rounded."""

import base64
import math
import os

import pytest
from filelock import FileLock

from sweeps.pipeline import check_inputs, finished, run_baseline, run_point
from sweeps.plan import resolve
from sweeps.progress import Reporter

pytestmark = pytest.mark.slow
TINY = ["calibration=tiny", "calibration.sequences=16", "evaluation=tiny", "evaluation.noise_floor=true"]
TINY += ["tracker=none", "checkpoint.keep=none"]
# E8P is the quicker of the 2-bit codes by far
E8P = ["quantizer@q=e8p_2bit", "method.outer_iterations=1", "method.inner_iterations=1", "method.sigma=1e-2"]
POINTS = {
    "rank 8": [*E8P, "rank.k=8"],
    # what these two cost less than the first: no passes through the compressed prefix, no search for scales of groups
    "rank 0": [*E8P, "rank.k=0", "method.inputs=original"],
    "rounded": ["method=rtn", "quantizer@q=uniform_3bit", "q.scale=matrix"],
}


@pytest.fixture(scope="session")
def real(composed, tmp_path_factory):
    """The sweep's folder and its resolved points by name; made once, by whichever process of the tests comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "real"
    points = {name: resolve(composed(*TINY, f"results={folder}", *own)) for name, own in POINTS.items()}
    with FileLock(f"{folder}.lock"):
        for point in points.values():
            check_inputs(point)
            run_point(point, Reporter(point.name))
        run_baseline(points["rank 8"], Reporter(points["rank 8"].name))
    return folder, points


def test_smollm2_survives_two_bits(real):
    folder, points = real
    point = points["rank 8"]
    record = finished(point)
    before = run_baseline(point, Reporter(point.name))["metrics"]["perplexity/heldout_256"]["value"]
    after = record["metrics"]["perplexity/heldout_256"]["value"]
    assert record["status"] == "done" and run_point(point, Reporter(point.name)) == record
    assert len(record["matrices"]) == 210 and record["bits"]["parameters"] == 106_168_320
    assert 2.04 < record["bits"]["stored"] < 2.05
    assert math.isfinite(after) and before < after < 6 * before

    from analysis.frontier import report

    assert report(folder).read_bytes().startswith(b"\x89PNG")


def test_its_notebooks_run_from_top_to_bottom(real, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    from analysis.article import write_articles

    folder, points = real
    missing = {"frontier": ["two models or more", "differ in rank"], "layers": ["budget=allocated", "caldera-spectra"]}
    for path in write_articles(folder, tmp_path):
        article = nbformat.read(path, 4)
        cells = [cell for cell in article.cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        shown = [output["data"] for output in outputs if output.output_type == "display_data"]
        pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
        said = [line for output in outputs for line in output.get("text", "").splitlines()]
        assert all(cell.execution_count == number for number, cell in enumerate(cells, 1))
        assert {output.output_type for output in outputs} <= {"display_data", "stream"}
        assert [output.text for output in outputs if output.get("name") == "stderr"] == []
        absent = [line for line in said if line.startswith("Nothing to show")]
        assert len(absent) == len(missing.get(path.stem, []))
        assert all(remedy in line for remedy, line in zip(missing.get(path.stem, []), absent)), absent
        assert pictures and all(picture.startswith(b"\x89PNG") for picture in pictures)
        text = "".join(data.get("text/html", "") for data in shown)
        named = {"frontier": points, "layers": ["rank 8"], "methods": ["rank 8", "rounded"]}[path.stem]
        assert all(points[name].name in text for name in named), path.name
