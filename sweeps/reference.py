"""What the uncompressed model says of a text, in a hundred bytes a token, and how far another model is from it.

Of every scored token's distribution are kept `count` tokens with the logarithms of their probabilities in float16: the
most probable ones, one half, and as many drawn from all others, with the logarithm of the others' mass. The divergence
is exact between the most probable and the rest as a whole; that within the rest is the mean over the drawn of
q/p - 1 - log(q/p), which has the right expectation, is never negative, and varies little where the models agree.
The most probable alone would miss a fifth of the divergence: docs/evaluation.md has measurements.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from sweeps.store import read_tensors_noted, write_tensors_noted

NARROW = 2**16  # up to so many tokens in the vocabulary the index of one takes two bytes


class Kept(NamedTuple):
    """Of n distributions: tokens (n, top + drawn), logarithms of their probabilities, and of the rest's mass (n,)."""

    tokens: Tensor
    logs: Tensor
    rest: Tensor

    def part(self, start: int, stop: int) -> "Kept":
        return Kept(*(t[start:stop] for t in self))

    def to(self, device: torch.device) -> "Kept":
        return Kept(*(t.to(device) for t in self))


def cut(logits: Tensor, count: int, offsets: Tensor) -> Kept:
    """Of logits (n, vocabulary), float32, the likeliest count - count // 2 tokens, and count // 2 drawn from the rest.

    These lie at equal steps in the rest's mass, from a start that `offsets` (n,) in [0, 1) gives. A vocabulary of no
    more tokens than would be the likeliest is kept whole.
    """
    drawn = count // 2
    logs = logits.log_softmax(1)
    top, tokens = logs.topk(min(count - drawn, logs.shape[1]), dim=1)
    masses = logs.scatter(1, tokens, -torch.inf).exp_().cumsum(1)
    steps = (torch.arange(drawn, device=logits.device) + offsets[:, None].to(logits)) / max(drawn, 1)
    within = steps.clamp(max=1 - 1e-6) * masses[:, -1:]  # short of the end, beyond which there is no token
    others = torch.searchsorted(masses, within, right=True).clamp_(max=logs.shape[1] - 1)
    found = torch.cat([top, logs.gather(1, others)], 1)
    return Kept(torch.cat([tokens, others], 1), found.half(), masses[:, -1].log().half())


def divergence(kept: Kept, logits: Tensor) -> Tensor:
    """(3, n): KL(reference || model) in nats, whether the reference's first choice is the model's, and a variance.

    The variance is that of the divergence by the draw. logits: (n, vocabulary), float32.
    """
    total, top = logits.logsumexp(1, keepdim=True), _likeliest(kept, logits.shape[1])
    likeliest, others = kept.tokens[:, :top], kept.tokens[:, top:]
    rest = logits.scatter(1, likeliest, -torch.inf).logsumexp(1, keepdim=True)
    ours = torch.cat([logits.gather(1, likeliest), rest], 1) - total
    theirs = torch.cat([kept.logs[:, :top], kept.rest[:, None]], 1).float().log_softmax(1)  # float16's error is shared
    found = torch.where(theirs == -torch.inf, 0.0, theirs.exp() * (theirs - ours)).sum(1)
    agree = logits.gather(1, likeliest[:, :1])[:, 0] == logits.amax(1)  # one of the likeliest, where several are
    if not others.shape[1]:
        return torch.stack([found, agree.float(), torch.zeros_like(found)])
    ratio = (logits.gather(1, others) - rest) - (kept.logs[:, top:].float() - kept.rest[:, None].float())
    mass = theirs[:, -1].exp()
    within = torch.where(mass[:, None] > 0, ratio.exp() - 1 - ratio, 0.0)
    spread = within.var(1) / within.shape[1] if within.shape[1] > 1 else torch.zeros_like(found)
    return torch.stack([found + mass * within.mean(1), agree.float(), mass**2 * spread])


def _likeliest(kept: Kept, vocabulary: int) -> int:
    """How many of the kept tokens are not drawn."""
    count = kept.tokens.shape[1]
    return min(count - count // 2, vocabulary)


class Reference:
    """What is kept of a text's distributions, token after token: known before, or made of the logits that come by."""

    def __init__(self, count: int, known: Kept | None = None):
        self.count, self.known = count, known
        self._at, self._made, self._offsets = 0, [], torch.Generator().manual_seed(0)

    def next(self, logits: Tensor) -> Kept:
        """Of the tokens that follow those of the last call; logits: (n, vocabulary), float32."""
        start, self._at = self._at, self._at + len(logits)
        if self.known:
            return self.known.part(start, self._at).to(logits.device)
        found = cut(logits, self.count, torch.rand(len(logits), generator=self._offsets))
        self._made.append(found.to(torch.device("cpu")))
        return found

    def made(self) -> Kept:
        return Kept(*(torch.cat(tensors) for tensors in zip(*self._made, strict=True)))


# -------------------------------------------------------------------------------------------------------------- on disk
@contextmanager
def reference(path: Path, count: int) -> Iterator[Reference]:
    """What that file of the cache holds; if it is not there, it is to be made inside, while others wait for it."""
    if (known := read(path)) is not None:
        yield Reference(count, known)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        found = Reference(count, read(path))
        yield found
        if not found.known:
            write(path, found.made())


def read(path: Path) -> Kept | None:
    """What a file holds if it is whole."""
    if (found := read_tensors_noted(path)) is None:
        return None
    tensors, _ = found
    wide = tensors.pop("tokens")
    tokens = wide.long() & (NARROW - 1) if wide.dtype == torch.int16 else wide.long()
    return Kept(tokens, **tensors)


def write(path: Path, kept: Kept) -> None:
    narrow = torch.int16 if int(kept.tokens.max()) < NARROW else torch.int32
    tensors = {"tokens": kept.tokens.to(narrow), "logs": kept.logs, "rest": kept.rest}
    write_tensors_noted(path, tensors, {"tokens": len(kept.rest)})
