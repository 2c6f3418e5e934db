"""The paper's experiments: they compose and are planned with no more of a model than its config.json."""

import pytest

from analysis.published import published
from bench.scaling import MODELS
from sweeps.plan import resolve
from sweeps.preview import preview
from tests.sweeps.test_compose import EXPERIMENTS, expanded  # noqa: F401
from tests.sweeps.test_estimate import MACHINE

MISTRAL = MODELS["LLaMa-3 8B"] | {"vocab_size": 32000}  # Jiang et al. 2023 (arXiv 2310.06825, table 1)
CONFIGS = {
    "paper_llama2_7b": MODELS["LLaMa-2 7B"],
    "paper_llama2_70b": MODELS["LLaMa-2 70B"],
    "paper_llama3_8b": MODELS["LLaMa-3 8B"],
    "paper_mistral_7b": MISTRAL,
}
TEXTS = ["calibration.text=embedded_calibration", "evaluation.text=embedded_heldout"]  # the paper's are not here


@pytest.fixture
def planned(expanded, tmp_path):  # noqa: F811
    """planned(experiment): each point with its estimate, on a folder with the model's config.json alone."""
    from transformers import LlamaConfig, MistralConfig

    def _planned(name: str) -> list[tuple]:
        kind = MistralConfig if "mistral" in name else LlamaConfig
        kind(**CONFIGS[name], tie_word_embeddings=False).save_pretrained(tmp_path / "described")
        here = [f"model.path={tmp_path / 'described'}", f"results={tmp_path}", f"cache={tmp_path / 'cache'}"]
        _, jobs = expanded(f"experiment={name}", "plan=true", *here, *TEXTS)
        return [(point, found) for point, found, _ in preview([resolve(job) for job in jobs], MACHINE)]

    return _planned


def test_every_experiment_of_the_paper_is_planned_here():
    assert set(CONFIGS) == {name for name in EXPERIMENTS if name.startswith("paper_")}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_grid_and_its_bits_are_the_papers(name, planned):
    """Q of 2 bits, ranks 0, 64, 128 and 256, factors of 4 and of 16 bits; the averages, as far as they are printed."""
    points = planned(name)
    found = {(p.method.rank, p.method.q, p.method.l if p.method.rank else None) for p, _ in points}
    factors = [(rank, "e8p_2bit", bits) for rank in (64, 128, 256) for bits in ("e8p_4bit", "bf16")]
    assert len(points) == 7 and found == {(0, "e8p_2bit", None), *factors}
    for point, _ in points:
        assert point.method.l == point.method.r and point.config["calibration"]["sequences"] == 256
        assert point.config["calibration"]["length"] == point.config["evaluation"]["length"]
        assert (point.method.outer_iterations, point.method.inner_iterations) == (15, 10)
    known = published()
    known = known[(known["model"] == name.removeprefix("paper_")) & (known["q_bits"] == 2)]
    counted = {p.method.rank: estimate.nominal_bits for p, estimate in points if p.method.l == "e8p_4bit"}
    assert len(known)
    for _, row in known.iterrows():
        assert counted[row["rank"]] == pytest.approx(row["bits"], abs=0.06)
