"""Perplexity against a plain slow twin; lm-eval's tasks on a tiny model and for real."""

import itertools
import math
import re
import statistics

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from caldera.errors import CalderaError, UserError
from sweeps import tasks as harness
from sweeps.evaluate import Evaluation, halving
from sweeps.models import load_model, load_tokenizer
from sweeps.perplexity import Windows, _mean, _quantiles, text_scores
from sweeps.progress import Reporter
from sweeps.tasks import check_tasks, known_tasks, run_tasks
from sweeps.texts import load_texts, token_rows

DOCUMENTS = {
    "arc_challenge": 299, "arc_easy": 570, "boolq": 3270, "openbookqa": 500,
    "piqa": 1838, "rte": 277, "sciq": 1000, "winogrande": 1267,
}  # fmt: skip


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    """A random two-layer Llama whose logits spread enough to matter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny():
    return tiny_llama(97)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 97, (5, 300), generator=torch.Generator().manual_seed(1))  # longer than two chunks


def score(model, rows, stride=None, bos=False, **more) -> dict:
    facts = {"text": "random", "tokenizer": "abc"}
    windows = Windows(rows, stride or rows.shape[-1] - bos, bos, facts)
    return text_scores(model, windows, "x", **more)["perplexity/x"]


# ----------------------------------------------------------------------------------------------------------- perplexity
def slow_losses(model, row, first=1) -> list[float]:
    """The twin: one position at a time, in float64."""
    logits = model(row[None]).logits[0].double()
    return [-logits[p - 1].log_softmax(0)[row[p]].item() for p in range(first, len(row))]


def slow_row_losses(model, rows) -> list[float]:
    return [statistics.fmean(slow_losses(model, row)) for row in rows]


@torch.no_grad()
def test_perplexity_is_the_slow_twins(tiny, rows):
    losses, metric = slow_row_losses(tiny, rows), score(tiny, rows)
    mean, spread = statistics.fmean(losses), statistics.stdev(losses) / math.sqrt(5)
    assert metric["samples"] == pytest.approx(losses, rel=1e-6)
    assert metric["value"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert metric["stderr"] == pytest.approx(math.exp(mean) * spread, rel=1e-4)


def test_perplexity_says_what_it_was_measured_on(tiny, rows):
    metric = score(tiny, rows)
    assert metric["higher_is_better"] is False
    assert metric["measured_on"] == {
        "text": "random", "rows": 5, "length": 300, "stride": 300, "bos": False,
        "tokens": 5 * 299, "dtype": "float32", "tokenizer": "abc",
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("stride", "bos", "first"), [(100, False, 200), (100, True, 200), (299, True, 1)])
def test_overlapping_windows_score_every_token_once(tiny, stride, bos, first):
    """The first window scores all but what nothing stands before, the others what is new in them."""
    stream = torch.randint(0, 97, (300 - bos + 2 * stride,), generator=torch.Generator().manual_seed(2))
    rows = stream.unfold(0, 300 - bos, stride)
    rows = torch.cat([torch.full((3, int(bos)), 5), rows], 1)
    losses = [slow_losses(tiny, row, first if i else 1) for i, row in enumerate(rows)]
    metric, every = score(tiny, rows, stride, bos), list(itertools.chain(*losses))
    assert len(every) == len(stream) - (not bos) == metric["measured_on"]["tokens"]
    assert (metric["measured_on"]["stride"], metric["measured_on"]["bos"]) == (stride, bos)
    assert metric["value"] == pytest.approx(math.exp(statistics.fmean(every)), rel=1e-6)
    assert metric["samples"] == pytest.approx([statistics.fmean(x) for x in losses], rel=1e-6)
    assert metric["weights"] == [len(x) for x in losses]


def test_word_and_byte_perplexity_are_lm_evals(smollm2_dir):
    """A document in a window, behind the token that lm-eval puts before it, with an end that is not scored."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import weighted_perplexity
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_llama(49152), load_tokenizer(smollm2_dir)
    texts = [
        "A naïve  question, asked twice:\nhow long is a document?",
        "Another one, which is a little longer than that.",
    ]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype=torch.float32)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    theirs = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    found = []
    for text in texts:
        ids = [lm.prefix_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        windows = Windows(torch.tensor([ids]), len(ids) - 1, bos=True)
        found.append(text_scores(model, windows, "x", tokenizer))
    for text, log, metrics in zip(texts, theirs, found, strict=True):
        words, size = len(re.split(r"\s+", text)), len(text.encode())
        expected = [weighted_perplexity([(log, count)]) for count in (words, size)]
        assert [metrics[f"{unit}_perplexity/x"]["value"] for unit in ("word", "byte")] == pytest.approx(
            expected, rel=1e-5
        )
        assert [metrics[f"{unit}_perplexity/x"]["weights"] for unit in ("word", "byte")] == [[words], [size]]


def test_errors_of_ratios_are_those_of_many_draws():
    """Windows of unequal weight: the delta method against sums of windows that are drawn again and again."""
    generator = np.random.default_rng(0)
    weights = generator.integers(50, 150, 40).astype(float)
    sums = (weights * generator.normal(3, 0.5, 40)).tolist()
    mean, stderr = _mean(sums, weights)
    draws = generator.integers(40, size=(4000, 40))
    drawn = np.array(sums)[draws].sum(1) / weights[draws].sum(1)
    assert mean == pytest.approx(sum(sums) / weights.sum()) and stderr == pytest.approx(drawn.std(), rel=0.05)
    values = [generator.exponential(size=100) for _ in range(900)]  # independent tokens, of known density
    found, errors = _quantiles(values)
    wanted = np.array([0.5, 0.9, 0.99])
    assert found == pytest.approx(-np.log(1 - wanted), rel=0.02)
    assert errors == pytest.approx(np.sqrt(wanted / (1 - wanted) / 90_000), rel=0.25)


def test_perplexity_reports_progress(tiny, rows):
    seen = []
    score(tiny, rows, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]


def test_one_row_has_no_error_bar(tiny, rows):
    assert score(tiny, rows[:1])["stderr"] is None


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_rows_without_predictions_are_refused(tiny, shape):
    with pytest.raises(UserError, match="two tokens or more"):
        score(tiny, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("broken", [math.nan, 1e30])
def test_a_broken_model_gets_no_number(rows, broken):
    model = tiny_llama(97)
    model.lm_head.weight.data[3:].fill_(broken)
    with pytest.raises(CalderaError, match="mean cross-entropy is"):
        score(model, rows[:2])


# ---------------------------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("name", DOCUMENTS)
def test_local_tasks_hold_all_their_documents(name):
    (task,) = harness._loaded(name).values()
    assert (task.config.task, len(task.eval_docs), task.VERSION is None) == (name, DOCUMENTS[name], False)
    for doc in (task.eval_docs[0], task.eval_docs[len(task.eval_docs) - 1]):
        # Winogrande's answer is which of two prompts it is, everywhere else which of the choices
        answer = (task.doc_to_text if name == "winogrande" else task.doc_to_target)(doc)
        assert answer in range(len(task.doc_to_choice(doc)))


def test_every_task_file_is_named_after_its_task():
    assert known_tasks() == sorted([*DOCUMENTS, "hellaswag", "last_word"])
    for name in known_tasks():
        assert harness._task_config(harness._task_folder() / f"{name}.yaml")["task"] == name


def test_the_last_word_is_asked_for_where_it_occurs_before():
    (task,) = harness._loaded("last_word").values()
    assert len(task.eval_docs) == 635
    for doc in task.eval_docs:
        before, word = task.doc_to_text(doc), task.doc_to_target(doc)
        assert f"{before}{word}" == doc["text"] and len(word) > 4
        assert word[0] == " " and word.strip() in re.split(r"\W+", before)
    ends = {
        "The cat saw a cat": False,
        "A house is a house": True,
        "Forty of 4000 of 4000": False,
        "catapult cata": False,
    }
    assert {text: harness._repeats(text) for text in ends} == ends


def test_hellaswag_loads_without_writing_beside_its_documents():
    folder = harness.embedded_data() / "hf_datasets" / "hellaswag"
    before = sorted(folder.rglob("*"))
    (task,) = harness._loaded("hellaswag").values()
    assert len(task.dataset["validation"]) == 10042
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_batch_changes_no_score(smollm2_dir, dtype):
    """Sums are rounded otherwise in another batch, which moves logits in their last bits and no answer here."""
    model, tokenizer = tiny_llama(49152).to(dtype), load_tokenizer(smollm2_dir)
    tasks, found = ["piqa", "last_word"], {}
    for batch in (1, 3, 8):
        scores = run_tasks(model, tokenizer, tasks, limit=9, batch_size=batch)
        found[batch] = {name: (metric["value"], metric["stderr"], metric["samples"]) for name, metric in scores.items()}
    assert set(found[1]) == {"piqa/acc", "piqa/acc_norm", "last_word/acc"}
    assert found[1] == found[3] == found[8]


def test_log_likelihoods_of_another_batch_differ_in_their_last_bits(smollm2_dir):
    """Relatively: 1.3e-7 in float32, 7e-4 in bfloat16 where this was written."""
    tokenizer = load_tokenizer(smollm2_dir)
    (task,) = harness._loaded("piqa").values()
    task.build_all_requests(limit=9, rank=0, world_size=1)
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        model, logs = tiny_llama(49152).to(dtype), {}
        for batch in (1, 3, 8):
            wrapper = harness._language_model(model, tokenizer, batch, None)
            logs[batch] = [log for log, _ in wrapper.loglikelihood(task.instances)]
        for batch in (3, 8):
            assert logs[batch] == pytest.approx(logs[1], rel=most)


def test_task_metrics_hold_their_samples_and_ignore_the_batch(smollm2_dir):
    model, tokenizer, seen = tiny_llama(49152), load_tokenizer(smollm2_dir), []
    four = run_tasks(model, tokenizer, ["rte", "piqa"], limit=4, batch_size=4, progress=lambda *step: seen.append(step))
    one = run_tasks(model, tokenizer, ["rte", "piqa"], limit=4, batch_size=1)
    assert list(four) == ["rte/acc", "piqa/acc", "piqa/acc_norm"]
    assert seen == [(n, 16) for n in range(1, 17)]
    for key, metric in four.items():
        assert metric["samples"] == one[key]["samples"]
        assert set(metric["samples"]) <= {0.0, 1.0}
        assert metric["value"] == pytest.approx(statistics.fmean(metric["samples"]))
        assert metric["stderr"] == pytest.approx(statistics.stdev(metric["samples"]) / 2)
        assert metric["higher_is_better"] is True
    measured_on = dict(four["piqa/acc"]["measured_on"])
    assert measured_on.pop("harness").startswith("lm-eval 0.")
    assert measured_on == {
        "task": "piqa", "documents": 4, "split": "validation", "num_fewshot": 0,
        "version": 1.0, "dtype": "float32", "batch_size": 4,
    }  # fmt: skip


def test_every_model_is_shown_the_same_examples(smollm2_dir, monkeypatch):
    model, tokenizer = tiny_llama(49152), load_tokenizer(smollm2_dir)
    (task,) = harness._loaded("rte").values()
    monkeypatch.setattr(task.config, "num_fewshot", 2)
    prompts = []
    for _ in range(2):
        metric = run_tasks(model, tokenizer, ["rte"], limit=2, batch_size=1)["rte/acc"]
        prompts.append([request.args for request in task.instances])
    assert metric["measured_on"]["num_fewshot"] == 2
    assert prompts[0] == prompts[1]
    assert prompts[0][0][0].count("Question:") == 3


def test_the_real_model_scores_as_it_should(smollm2_dir):
    """Two held-out rows cut to 128 tokens (64 whole rows in bfloat16: 20.95), and the first questions of PIQA."""
    model, tokenizer = load_model(smollm2_dir, "float32"), load_tokenizer(smollm2_dir)
    rows = token_rows(load_texts("embedded_heldout"), tokenizer, 2, 1024, None)[:, :128]
    assert score(model, rows)["value"] == pytest.approx(18.0422, rel=1e-4)
    assert run_tasks(model, tokenizer, ["piqa"], limit=8, batch_size=8)["piqa/acc"]["value"] >= 0.625


@pytest.mark.parametrize("settings", [{"limit": 0, "batch_size": 1}, {"limit": None, "batch_size": 0}])
def test_empty_runs_are_refused(tiny, settings):
    with pytest.raises(UserError, match="use 1 or more"):
        run_tasks(tiny, None, ["rte"], **settings)


def test_no_tasks_no_metrics(tiny):
    check_tasks([])
    assert run_tasks(tiny, None, [], limit=None, batch_size=1) == {}


def test_unknown_tasks_are_refused_with_the_nearest(monkeypatch):
    class Index:
        all_tasks = ["mmlu", "arc_easy"]

    monkeypatch.setattr(harness, "_harness_tasks", Index)
    check_tasks(["mmlu", "piqa"])
    with pytest.raises(UserError, match="has 'arc_eazy', which is no task: use for example arc_easy"):
        check_tasks(["rte", "arc_eazy"])


def test_a_task_whose_documents_cannot_be_had_is_one_sentence(monkeypatch):
    class Index:
        def load(self, names):
            raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(harness, "_harness_tasks", Index)
    with pytest.raises(UserError, match=r"evaluation.tasks: mmlu cannot be loaded \(no network\)"):
        harness._loaded("mmlu")


def test_a_second_model_is_scored_on_the_tokens_of_the_first(smollm2_dir, monkeypatch):
    """And alike: documents, prompts and tokens are kept for the next point of a sweep."""
    model, tokenizer, options = tiny_llama(49152), load_tokenizer(smollm2_dir), {"limit": 2, "batch_size": 2}
    first = run_tasks(model, tokenizer, ["arc_easy"], **options)

    def refuse(*_, **__):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    monkeypatch.setattr(type(tokenizer), "encode", refuse)
    assert run_tasks(model, tokenizer, ["arc_easy"], **options) == first


# --------------------------------------------------------------------------------------------------------------- memory
class Small(torch.nn.Module):
    """A model on a machine whose memory holds a batch of two."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype
        self.batches = []

    def tie_weights(self):
        self.model.tie_weights()

    def forward(self, input_ids, **more):
        self.batches.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.model(input_ids, **more)


def test_a_batch_that_does_not_fit_is_halved_and_said(smollm2_dir, tmp_path, capsys):
    settings = {"text": "embedded_heldout", "rows": 1, "length": 16, "stride": None, "bos": False, "join": None}
    settings |= {"label": None, "kl_tokens": 0, "tasks": ["rte"], "limit": 8, "batch_size": 8}
    small, reporter = Small(tiny_llama(49152)), Reporter("x")
    tokenizer = load_tokenizer(smollm2_dir)
    rows = token_rows(load_texts("embedded_heldout"), tokenizer, 1, 16, None)
    given = {"windows": lambda: Windows(rows, 16), "tokenizer": lambda: tokenizer, "original": ("small", None)}
    metrics = Evaluation(settings, "float32", tmp_path, "small", lambda: small, **given).run(reporter)
    said = capsys.readouterr().err
    assert "rte: out of memory with batches of 8, going on with 4" in said and "of 4, going on with 2" in said
    assert metrics["rte/acc"]["measured_on"]["batch_size"] == 2 and max(small.batches) == 8
    again = Evaluation(settings, "float32", tmp_path, "small", lambda: pytest.fail("measured"), **given)
    assert again.run(Reporter("y")) == metrics


def test_a_batch_of_one_that_does_not_fit_is_an_error_and_others_are_not_retried():
    def full(batch):
        raise MemoryError

    def broken(batch):
        assert batch == 8, "this is no matter of memory"
        raise RuntimeError("shapes do not match")

    with pytest.raises(CalderaError, match="evaluation of x: out of memory at evaluation.batch_size=1"):
        halving(full, 8, "evaluation of x")
    with pytest.raises(RuntimeError, match="shapes"):
        halving(broken, 8, "evaluation of x")
