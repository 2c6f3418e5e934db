"""The divergence from what is kept of the uncompressed model against the exact one, and how it lies in the cache."""

import math

import pytest
import torch

from sweeps.perplexity import Windows, text_scores
from sweeps.reference import Reference, cut, divergence, read, reference, write

VOCABULARY, TOKENS = 2000, 400


def logits(seed: int, spread: float) -> torch.Tensor:
    """Of TOKENS tokens, with tails as long as a language model's."""
    return spread * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def exact(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.double().log_softmax(1), q.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def kept(p: torch.Tensor, count: int):
    return cut(p, count, torch.rand(len(p), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("distance", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("count", [16, 24, 65])
def test_the_mean_divergence_is_the_exact_one_within_the_error_of_the_draw(distance, count):
    """Half of these tails' mass is not among the most probable tokens; those alone miss as much of the divergence."""
    p = logits(0, 2.0)
    q = p + distance * logits(1, 1.0)
    found, _, variance = divergence(kept(p, count), q)
    draw, true = math.sqrt(variance.sum()) / TOKENS, exact(p, q).mean().item()
    assert abs(found.mean().item() - true) < 4 * draw + 1e-6 and draw < 0.1 * true
    assert (found > -1e-6).all()


def test_the_most_probable_alone_give_a_lower_bound():
    p = logits(0, 2.0)
    q = p + 0.3 * logits(1, 1.0)
    one = kept(p, 1)
    assert one.tokens.shape == (TOKENS, 1)
    found, _, variance = divergence(one, q)
    assert (found.double() <= exact(p, q) + 1e-4).all() and not variance.any()


@pytest.mark.parametrize("count", [2 * VOCABULARY, 2 * VOCABULARY + 1])
def test_a_vocabulary_that_is_kept_whole_gives_the_exact_divergence(count):
    p, q = logits(0, 2.0), logits(1, 2.0)
    found, _, variance = divergence(kept(p, count), q)
    assert found.double().allclose(exact(p, q), rtol=1e-3) and not variance.any()


def test_a_model_does_not_diverge_from_itself():
    p = logits(0, 2.0)
    found, agree, _ = divergence(kept(p, 24), p)
    assert found.abs().max() < 1e-4 and found.mean().abs() < 1e-6 and agree.all()


def test_agreement_is_that_of_first_choices():
    p = logits(0, 2.0)
    q = p.clone()
    q[:100] -= 5 * torch.nn.functional.one_hot(p[:100].argmax(1), VOCABULARY)
    _, agree, _ = divergence(kept(p, 24), q)
    assert agree.equal((p.argmax(1) == q.argmax(1)).float()) and 0 < agree.mean() < 1


def test_certain_and_impossible_tokens_are_no_trouble():
    p = torch.full((2, 50), -torch.inf)
    p[:, 3], p[1, 4] = 0.0, 0.0
    q = torch.zeros(2, 50)
    found, agree, variance = divergence(kept(p, 8), q)
    assert found.tolist() == pytest.approx([math.log(50), math.log(25)], rel=1e-3)
    assert agree.tolist() == [1, 1] and variance.tolist() == [0, 0]


@pytest.mark.parametrize("vocabulary", [2**16, 2**17])
def test_what_is_kept_is_read_as_it_was_written(tmp_path, vocabulary):
    p = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0))
    p[0, vocabulary - 1] = 9.0
    made = kept(p, 24)
    write(tmp_path / "a.safetensors", made)
    found = read(tmp_path / "a.safetensors")
    assert all(one.equal(other) for one, other in zip(made, found, strict=True))
    size = sum(t.numel() * t.element_size() for t in made[1:]) + 3 * 24 * (2 if vocabulary == 2**16 else 4)
    assert size == 3 * (98 if vocabulary == 2**16 else 146)


def test_a_reference_is_made_in_passing_and_serves_the_next_model(tmp_path, smollm2_dir):
    from tests.sweeps.test_evaluate import tiny_llama

    model, other, file = tiny_llama(97), tiny_llama(97), tmp_path / "references" / "a.safetensors"
    with torch.no_grad():
        other.lm_head.weight.mul_(1.05)
    rows = torch.randint(0, 97, (3, 300), generator=torch.Generator().manual_seed(1))
    windows = Windows(rows, 200)
    with reference(file, 24) as found:
        assert found.known is None
        first = text_scores(model, windows, "x", None, found)
    with reference(file, 24) as found:
        assert found.known is not None
        again, off = (text_scores(m, windows, "x", None, Reference(24, found.known)) for m in (model, other))
    assert again == first and first["kl/x"]["value"] < 1e-5 and first["agreement/x"]["value"] == 1.0
    with torch.no_grad():
        pairs = [(m(rows).logits[i, 299 - (200 if i else 299) : -1] for m in (model, other)) for i in range(3)]
        true = torch.cat([exact(p, q) for p, q in pairs])
    kl = off["kl/x"]
    assert kl["value"] == pytest.approx(true.mean().item(), abs=4 * kl["draw_stderr"] + 1e-6)
    assert kl["weights"] == [299, 200, 200] and 0 < kl["draw_stderr"] < kl["stderr"]
    assert off["kl_p90/x"]["value"] == pytest.approx(true.quantile(0.9).item(), rel=0.1)
    assert [off[f"kl_{q}/x"]["stderr"] > 0 for q in ("median", "p90", "p99")] == [True] * 3
