"""Perplexity of a model in memory on rows of tokens, as a metric (see `sweeps.evaluate`)."""

import math
import statistics
from collections.abc import Callable

from caldera.errors import CalderaError, UserError

CHUNK = 128  # positions whose logits are float32 at a time: 25 MB for a vocabulary of 49,152

Progress = Callable[[int, int], None]  # (done, total)


def perplexity(
    model, rows, *, text: str, tokenizer_digest: str, progress: Progress | None = None, batch: int = 1
) -> dict:
    """exp of the mean cross-entropy (nats) of positions 1..L-1 of every row; rows: int64 (rows, L).

    No BOS is added and rows do not overlap. The error is the delta method's over rows, None for a single one.
    Raises UserError: no row, or rows of one token; CalderaError: the model's cross-entropy is not finite.
    """
    import torch

    if rows.dim() != 2 or rows.shape[0] < 1 or rows.shape[1] < 2 or batch < 1:
        given = f"rows are {tuple(rows.shape)}, batch is {batch}"
        raise UserError(f"perplexity: {given}: give rows of two tokens or more and a batch of one or more")
    losses: list[float] = []
    with torch.no_grad():
        for part in rows.split(batch):
            part = part.to(model.device)
            losses += _row_losses(model(input_ids=part, use_cache=False).logits, part)
            if progress:
                progress(len(losses), len(rows))
    mean = statistics.fmean(losses)
    if not mean < 700:  # NaN too; exp of more overflows
        raise CalderaError(f"perplexity on {text}: mean cross-entropy is {mean}: the model's logits are broken")
    length, dtype = rows.shape[1], str(model.dtype).removeprefix("torch.")
    return {
        "value": math.exp(mean),
        "stderr": math.exp(mean) * _stderr(losses) if len(losses) > 1 else None,
        "higher_is_better": False,
        "measured_on": {
            "text": text, "rows": len(rows), "length": length, "stride": length, "bos": False,
            "tokens": len(rows) * (length - 1), "dtype": dtype, "tokenizer": tokenizer_digest,
        },
        "samples": losses,
    }  # fmt: skip


def _row_losses(logits, rows) -> list[float]:
    """Mean cross-entropy of each row: logits (batch, L, vocabulary), rows (batch, L); float32, a chunk at a time."""
    import torch.nn.functional as F

    from caldera.devices import read_all

    losses = []
    for row_logits, row in zip(logits, rows, strict=True):
        chunks = zip(row_logits[:-1].split(CHUNK), row[1:].split(CHUNK), strict=True)
        sums = [F.cross_entropy(some.float(), targets, reduction="sum") for some, targets in chunks]
        losses.append(sum(read_all(*sums)) / (len(row) - 1))
    return losses


def _stderr(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
