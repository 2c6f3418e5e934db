"""The page about larger models shows what the counts say now."""

from pathlib import Path

import pytest

from bench.scaling import KINDS, MODELS, TABLES, model, predicted

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
PUBLISHED = {"LLaMa-2 7B": 6_738_415_616, "LLaMa-2 70B": 68_976_648_192, "LLaMa-3 8B": 8_030_261_248,
             "LLaMa-3.1 405B": 405_853_388_800}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_configurations_have_as_many_parameters_as_the_published_models(name):
    assert model(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("title", TABLES)
def test_the_page_shows_the_present_numbers(title):
    assert TABLES[title]() in PAGE.read_text(), "run python -m bench.scaling and put its tables into docs/scaling.md"


def test_on_a_gpu_the_trellis_is_bound_by_its_small_kernels():
    times = {kind: predicted("LLaMa-2 7B", kind).stages["compress"] for kind in KINDS}
    trellis, e8p = times["trellis rank 0"], times["E8P rank 64, 15 x 10"]
    assert trellis.limits["search"] > 0.9 * trellis.seconds and trellis.seconds > 10 * e8p.seconds
