"""How far an error of each matrix moves a model's predictions: the Fisher information along the errors that LDLQ makes.

For small errors E of a matrix the Kullback-Leibler divergence of the predictions over a row of tokens is, to second
order, half the mean of <g, E>^2, where g (m, n) is the gradient by W of log p(y) and y is drawn, at every position,
from the model's own prediction: no text is asked what y should be. LDLQ's error is E = eta M^-1 with eta white and
H = M D M^T (see `caldera.theory`), so that of its loss tr(E H E^T) = m v tr(D) the expected divergence is
v |g M^-T|^2 / 2. The sum of g^T g (n, n) over a few rows is thus all that turns a relative error, whatever the bits,
into nats a token. What errors of different matrices do together is left out.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from caldera.basis import Basis, into_both
from caldera.blocks import Stream, decoder_blocks, instead
from caldera.devices import read_all
from caldera.matrices import Matrix, matrices
from caldera.problem import Problem
from caldera.rows import Rows, Spill
from caldera.streamed import Source


def gradient_moments(
    model: Source,
    rows: Tensor,
    chosen: Collection[str],
    generator: torch.Generator,
    spill: Spill | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Blocks from the last to the first: index, and of its `chosen` matrices the sum of g^T g (n, n) over token rows.

    Keys are full names; the experts of a stage are summed under the stage's. Memory: a block with its gradients, a
    row's logits; hidden states of all blocks, which spill. `progress` hears of every row that went through a block,
    and of every row that came back.
    """
    spill = spill and replace(spill, limit=spill.limit // (model.count + 2))  # all blocks' together stay within it
    with model.outside(head=True) as whole:
        stream = Stream.open(whole, rows, spill)
        entering, form = _entering(model, stream, spill, progress)
        above = Rows(spill=spill)
        for row, hidden in zip(rows, entering.pop()):
            above.append(_at_the_end(whole, row, hidden, form, generator))
    for index in reversed(range(model.count)):
        block, name = model.block(index), f"{model.name}.{index}"
        sums = _Sums.of(block, name, chosen)
        run = partial(_run, block, *tree_map_only(Tensor, torch.clone, stream.arguments[index]))
        for row, hidden in enumerate(entering[index]):
            above[row] = _backwards(run, hidden, above[row])
            sums.add()
            if progress:
                progress(1)
        yield index, sums.found


@dataclass(frozen=True)
class _Sums:
    """Of matrices by full name, what their gradients add up to, by full name or stage."""

    chosen: dict[str, Matrix]
    keys: dict[str, str]
    found: dict[str, Tensor]

    @classmethod
    def of(cls, block: nn.Module, name: str, chosen: Collection[str]) -> "_Sums":
        """Of the block of that name; from now on its chosen matrices, and nothing else, get gradients."""
        own = {f"{name}.{m.name}": m for m in matrices(block).values() if f"{name}.{m.name}" in chosen}
        keys = {full: full if m.expert is None else f"{name}.{m.stage}" for full, m in own.items()}
        block.requires_grad_(False)
        for matrix in own.values():
            matrix.whole.requires_grad_()
        device = next(block.parameters()).device
        sizes = {keys[full]: m.shape[1] for full, m in own.items()}
        return cls(own, keys, {key: torch.zeros(n, n, device=device) for key, n in sizes.items()})

    @torch.no_grad()
    def add(self) -> None:
        """Take in the gradients of one row."""
        for full, matrix in self.chosen.items():
            if matrix.whole.grad is not None:  # a stage of experts that no token reached has none
                gradient = matrix.part(matrix.whole.grad).float()
                self.found[self.keys[full]].addmm_(gradient.T, gradient)
        for matrix in self.chosen.values():
            matrix.whole.grad = None


@torch.no_grad()
def _entering(
    model: Source, stream: Stream, spill: Spill | None, progress: Callable[[int], None] | None
) -> tuple[list[Rows], Callable]:
    """The hidden states before every block and after the last, and the form in which the last one returned its own."""
    entering = [Rows(stream.hidden, spill)]
    form = _as_tensor
    for index in range(model.count):
        block = model.block(index)
        run = partial(_run, block, *stream.arguments[index])
        entering.append(Rows(spill=spill))
        for hidden in entering[index]:
            out = run(hidden)
            entering[-1].append(_first(out))
            if progress:
                progress(1)
        form = partial(_as_tuple, len(out)) if isinstance(out, tuple) else _as_tensor
    return entering, form


def _run(block: nn.Module, args: tuple, kwargs: dict, hidden: Tensor) -> Tensor | tuple:
    return block(hidden, *args, **kwargs)


def _first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _as_tensor(hidden: Tensor) -> Tensor:
    return hidden


def _as_tuple(count: int, hidden: Tensor) -> tuple:
    return hidden, *[None] * (count - 1)


def _at_the_end(whole: nn.Module, row: Tensor, hidden: Tensor, form: Callable, generator: torch.Generator) -> Tensor:
    """Gradient (1, length, width) of the row's log p(y) by what leaves the last block, y drawn here."""
    _, blocks = decoder_blocks(whole)
    leaf = hidden.detach().clone().requires_grad_()
    passed = [(block, lambda *args, **kwargs: form(leaf)) for block in blocks]
    with torch.enable_grad(), instead(passed):
        logs = whole(row[None].to(leaf.device), use_cache=False).logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
        return torch.autograd.grad(logs.gather(-1, drawn).sum(), leaf)[0]


def _backwards(run: Callable, hidden: Tensor, above: Tensor) -> Tensor:
    """The gradient by what enters a block from that by what leaves it; its weights' gradients are added up."""
    leaf = hidden.detach().clone().requires_grad_()
    with torch.enable_grad():
        _first(run(leaf)).backward(above.clone())
    return leaf.grad


def divergence(gradients: Tensor, basis: Basis, problem: Problem, tokens: int) -> float:
    """Nats a token that a squared relative error of 1 would cost, were the divergence quadratic up to there.

    `gradients` (n, n) is the sum of g^T g over rows of so many tokens in all, for the matrix of `problem`.
    """
    moments = into_both(gradients, basis.seed, basis.name) if basis.transformed else gradients
    half = torch.linalg.solve_triangular(basis.chol, moments, upper=False)
    white = torch.linalg.solve_triangular(basis.chol, half.T, upper=False).diagonal()
    scales = basis.chol.diagonal().square()
    along, spread = read_all((white.double() * scales).sum(), scales.double().sum())
    energy = problem.energy * problem.unit**2
    return max(0.0, along) / tokens / 2 * energy / (problem.weight.shape[0] * spread)
