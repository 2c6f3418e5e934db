"""A model's scores on a text, of one forward pass a window, as metrics (see `sweeps.evaluate`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from caldera.errors import CalderaError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sweeps.reference import Reference

CHUNK = 128  # positions whose logits are float32 at a time: 25 MB for a vocabulary of 49,152
DRAWS = 200  # of windows, for the errors of quantiles
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Windows:
    """A text's tokens as a model sees them: int64 rows (n, length), each `stride` tokens further on than the last.

    With `bos` every row begins with that token, and `stride` is at most length - 1. A token is scored in the first row
    that has it and another one before it. `facts` say where the tokens come from.
    """

    rows: Tensor
    stride: int
    bos: bool = False
    facts: dict | None = None

    def __post_init__(self):
        if self.rows.dim() != 2 or self.rows.shape[0] < 1 or self.rows.shape[1] < 2:
            raise UserError(f"perplexity: rows are {tuple(self.rows.shape)}: give rows of two tokens or more")

    @property
    def length(self) -> int:
        return self.rows.shape[1]

    def first(self, index: int) -> int:
        """Position of the first token of a row that is scored there."""
        return 1 if index == 0 else max(1, self.length - self.stride)

    def counts(self) -> np.ndarray:
        """Scored tokens of every row."""
        return np.array([self.length - self.first(i) for i in range(len(self.rows))], dtype=float)

    def measured_on(self) -> dict:
        conditions = {"rows": len(self.rows), "length": self.length, "stride": self.stride, "bos": self.bos}
        return (self.facts or {}) | conditions | {"tokens": int(self.counts().sum())}


def text_scores(
    model, windows: Windows, name: str, tokenizer=None, reference: Reference | None = None,
    progress: Progress | None = None,
) -> dict[str, dict]:  # fmt: skip
    """Perplexity by token and, with a tokenizer, by word and byte; with a reference the divergence from it too.

    They are called `perplexity/<name>`, `word_perplexity/<name>` and so on. Errors are over windows.
    Raises CalderaError: the model's cross-entropy or divergence is not finite.
    """
    found = _token_scores(model, windows, reference, progress)
    measured_on = windows.measured_on() | {"dtype": str(model.dtype).removeprefix("torch.")}
    losses = [scores[0] for scores in found]
    metrics = {"perplexity": _perplexity([x.sum() for x in losses], windows.counts(), measured_on)}
    if tokenizer is not None:
        ends, words, size = _units(windows, tokenizer)
        sums = [x[~end].sum() for x, end in zip(losses, ends, strict=True)]
        metrics["word_perplexity"] = _perplexity(sums, words, measured_on)
        metrics["byte_perplexity"] = _perplexity(sums, size, measured_on)
    if reference is not None:
        metrics |= _divergences([scores[1:] for scores in found], measured_on | {"kept": reference.count})
    return {f"{kind}/{name}": metric for kind, metric in metrics.items()}


# ------------------------------------------------------------------------------------------------------ token by token
def _token_scores(model, windows: Windows, reference: Reference | None, progress: Progress | None) -> list[np.ndarray]:
    """Of each window (1 or 4, scored tokens): cross-entropy in nats, and what `reference.divergence` gives."""
    import torch

    found = []
    with torch.no_grad():
        for i, row in enumerate(windows.rows):
            row = row.to(model.device)
            logits = model(input_ids=row[None], use_cache=False).logits[0]
            found.append(_window_scores(logits, row, windows.first(i), reference))
            if progress:
                progress(i + 1, len(windows.rows))
    losses = np.concatenate([scores[0] for scores in found])
    if not losses.mean() < 700:  # NaN too; exp of more overflows
        raise CalderaError(f"perplexity: mean cross-entropy is {losses.mean()}: the model's logits are broken")
    return found


def _window_scores(logits, row, first: int, reference: Reference | None) -> np.ndarray:
    """logits (length, vocabulary), row (length,); float32, a chunk at a time, and one wait for the device."""
    import torch
    import torch.nn.functional as F

    from caldera.devices import array
    from sweeps.reference import divergence

    found = []
    for some, targets in zip(logits[first - 1 : -1].split(CHUNK), row[first:].split(CHUNK), strict=True):
        some = some.float()
        scores = F.cross_entropy(some, targets, reduction="none")[None]
        if reference is not None:
            scores = torch.cat([scores, divergence(reference.next(some), some)])
        found.append(scores)
    return array(torch.cat(found, 1))


def _units(windows: Windows, tokenizer) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Which scored tokens end a document, and how many words and bytes the others make, window by window.

    Counted as lm-eval does: by white space, and in UTF-8; it scores no end of a document. At least one of each.
    """
    ends, words, size = [], [], []
    for i, row in enumerate(windows.rows):
        tokens = row[windows.first(i) :].numpy()
        end = tokens == (-1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
        pieces = [piece[piece != tokenizer.eos_token_id] for piece in np.split(tokens, np.flatnonzero(end))]
        texts = [tokenizer.decode(p.tolist(), clean_up_tokenization_spaces=False) for p in pieces if len(p)]
        ends.append(end)
        words.append(max(1, sum(len(text.split()) for text in texts)))
        size.append(max(1, sum(len(text.encode()) for text in texts)))
    return ends, np.array(words, dtype=float), np.array(size, dtype=float)


# ------------------------------------------------------------------------------------------------------------- metrics
def _mean(sums: list[float], weights: np.ndarray) -> tuple[float, float | None]:
    """sum / weight over all windows, and the error of that ratio, None for a single one."""
    sums = np.array(sums)
    mean, count = sums.sum() / weights.sum(), len(sums)
    if count == 1:
        return float(mean), None
    squares = ((sums - mean * weights) ** 2).sum()
    return float(mean), float(math.sqrt(count / (count - 1) * squares) / weights.sum())


def _metric(
    value: float | None, stderr: float | None, measured_on: dict, sums: list[float], weights: np.ndarray
) -> dict:
    return {
        "value": value, "stderr": stderr, "higher_is_better": False, "measured_on": measured_on,
        "samples": [float(x) for x in np.array(sums) / weights], "weights": weights.tolist(),
    }  # fmt: skip


def _perplexity(sums: list[float], weights: np.ndarray, measured_on: dict) -> dict:
    """exp of the mean, None where that overflows; samples are the logarithms, and the error the delta method's."""
    mean, stderr = _mean(sums, weights)
    value = math.exp(mean) if mean < 700 else None  # a script without spaces has a word a paragraph
    stderr = None if value is None or stderr is None else value * stderr
    return _metric(value, stderr, measured_on, sums, weights) | {"scale": "log"}


def _divergences(scores: list[np.ndarray], measured_on: dict) -> dict[str, dict]:
    """scores: of each window (3, tokens), the divergence, whether first choices agree, and the draw's variance."""
    weights = np.array([x.shape[1] for x in scores], dtype=float)
    kl, agree = ([float(x[row].sum()) for x in scores] for row in (0, 1))
    mean, stderr = _mean(kl, weights)
    if not math.isfinite(mean):
        raise CalderaError(f"perplexity: the divergence from the uncompressed model is {mean}: its logits are broken")
    draw = math.sqrt(sum(float(x[2].sum()) for x in scores)) / weights.sum()
    found = {"kl": _metric(mean, stderr, measured_on, kl, weights) | {"draw_stderr": float(draw)}}
    found["agreement"] = _metric(*_mean(agree, weights), measured_on, agree, weights) | {"higher_is_better": True}
    quantiles, errors = _quantiles([x[0] for x in scores])
    for name, value, error in zip(QUANTILES, quantiles, errors, strict=True):
        whole = {"value": value, "stderr": error, "higher_is_better": False, "measured_on": measured_on}
        found[f"kl_{name}"] = whole | {"samples": None}
    return found


def _quantiles(windows: list[np.ndarray]) -> tuple[list[float], list[float | None]]:
    """QUANTILES over all tokens, and their errors: a bootstrap over windows, which the tokens of one are not."""
    values = np.concatenate(windows)
    order, owner = np.argsort(values), np.repeat(np.arange(len(windows)), [len(x) for x in windows])
    values, owner, wanted = values[order], owner[order], np.array(list(QUANTILES.values()))

    def at(times: np.ndarray) -> np.ndarray:
        """The quantiles where each window is there so many times."""
        mass = np.cumsum(times[owner])
        return values[np.searchsorted(mass, wanted * mass[-1])]

    found = at(np.ones(len(windows))).tolist()
    if len(windows) == 1:
        return found, [None] * len(found)
    draws = np.random.default_rng(0).integers(len(windows), size=(DRAWS, len(windows)))
    drawn = [at(np.bincount(draw, minlength=len(windows))) for draw in draws]
    return found, np.std(drawn, axis=0, ddof=1).tolist()
