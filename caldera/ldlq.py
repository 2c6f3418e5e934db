"""Rounding with error feedback: LDLQ (Chee et al. 2023; block form of QuIP#), and coordinate descent after it.

Both walk the columns from last to first in groups of the quantizer's size. Inside a panel of columns the errors are
carried group by group; one matrix product then carries the panel's errors to all columns before it.
"""

from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from caldera.basis import Basis, padded
from caldera.devices import over_rows, read_all
from caldera.linalg import total
from caldera.quantizers import Half, Quantizer, Scales
from caldera.quantizers.base import compiled

PANEL = 128
# Fed back errors widen what is rounded. Where single rows of W lie along a dominant direction of H they widen it beyond
# the codebook, and the error beyond its edge is fed back in turn: the loss is then up to 17 times the one of a codebook
# without an edge (2 to 10% above it elsewhere), and a wider scale mends it.
OVERLOAD = 1.25
WIDER = 1.2


class Rounded(NamedTuple):
    """Codes (m, n / g), the scales they were fitted with, and the values (m, n) they stand for.

    `loss` is tr(E (H + sigma I) E^T) of E = W~ - Q where the rounding gave it away; a tensor inside this module, where
    it need not be waited for. The scales are `widened` times as wide as those fitted to W~.
    """

    codes: Tensor
    scales: Scales
    values: Tensor
    loss: float | Tensor | None = None
    widened: float = 1.0


def ldlq(weight: Tensor, basis: Basis, quantizer: Quantizer, scales: Scales | None = None) -> Rounded:
    """Round W~ (m, n) so that tr((W~ - Q) H (W~ - Q)^T) is small.

    Scales are fitted to W~ unless given; where the rounding overloads them, they are widened as long as that helps.
    """
    found = _walk(weight, basis, quantizer, quantizer.fit(weight) if scales is None else scales)
    if scales is not None or isinstance(quantizer, Half) or not basis.feedback(quantizer.group).largest > 1e-3:
        return _read(found)  # given scales, no edge to speak of, or nothing that is fed back
    loss, expected = read_all(found.loss, _unit_loss(weight, basis, quantizer, found.scales))
    found, limit = found._replace(loss=loss), OVERLOAD * (expected * quantizer.codebook.gaussian_mse)
    while found.loss > limit:
        wider = _read(_walk(weight, basis, quantizer, found.scales.times(WIDER)))
        if not wider.loss < found.loss:
            break
        found = wider._replace(widened=found.widened * WIDER)
    return found


def _read(rounded: Rounded) -> Rounded:
    return rounded._replace(loss=read_all(rounded.loss)[0])


def _unit_loss(weight: Tensor, basis: Basis, quantizer: Quantizer, scales: Scales) -> Tensor:
    """tr(D) for each row, in units of its variance: times a codebook's error on a Gaussian, the loss to expect."""
    feedback = basis.feedback(quantizer.group)
    d = feedback.blocks.square().sum(-1).reshape(1, -1)  # diagonal of D
    variance = (quantizer.columns(scales, d.shape[1]).scale * quantizer.codebook.gaussian_scale).square()
    return total(variance * d) * (weight.shape[0] / variance.shape[0])


def _walk(weight: Tensor, basis: Basis, quantizer: Quantizer, scales: Scales) -> Rounded:
    """LDLQ with given scales. Inside, everything is transposed, (columns, rows): rows are what is done side by side."""
    (m, n), group, feedback = weight.shape, quantizer.group, basis.feedback(quantizer.group)
    work = _transposed(weight, group)
    target, values = work.clone(), torch.empty_like(work)
    codes = torch.empty(len(work) // group, m, dtype=torch.int64, device=work.device)
    lost = torch.zeros(m, dtype=torch.float64, device=work.device)  # of each row
    columns = quantizer.columns(scales, len(work))
    walk = _ldlq_panel_compiled if compiled(quantizer.codebook, work) else _ldlq_panel
    for first, last in _panels(len(work)):
        walk(quantizer, columns, work, target, feedback, first, last, values, codes, lost)
        if first:
            target[:first].addmm_(feedback.matrix[first:last, :first].T, work[first:last] - values[first:last])
    loss = lost.sum() - total(values[n:].square())  # columns that were added have moments of 1
    return Rounded(codes.T.contiguous(), scales, values[:n].T.contiguous(), loss)


def _transposed(x: Tensor, group: int) -> Tensor:
    """x (m, n) as (p, m), zeros added up to p, a multiple of the group."""
    return pad(x.T, (0, 0, 0, -x.shape[1] % group)).contiguous()


def tune(weight: Tensor, basis: Basis, quantizer: Quantizer, start: Rounded, passes: int) -> Rounded:
    """`passes` passes of coordinate descent from `start`; the damped loss never rises."""
    n, group = weight.shape[1], quantizer.group
    work, values = _transposed(weight, group), _transposed(start.values, group).clone()
    codes = start.codes.T.clone(memory_format=torch.contiguous_format)
    moments, inverses = padded(basis.damped, group), basis.block_inverses(group)
    columns = quantizer.columns(start.scales, len(work))
    walk = _tune_panel_compiled if compiled(quantizer.codebook, work) else _tune_panel
    for _ in range(passes):
        gradient = moments @ (work - values)
        for first, last in _panels(len(work)):
            before = values[first:last].clone()
            walk(quantizer, columns, gradient, moments, inverses, first, last, values, codes)
            if first:
                gradient[:first].addmm_(moments[first:last, :first].T, before - values[first:last])
    return Rounded(codes.T.contiguous(), start.scales, values[:n].T.contiguous())


def _panels(n: int) -> list[tuple[int, int]]:
    """Column ranges from last to first."""
    return [(first, min(first + PANEL, n)) for first in range(0, n, PANEL)][::-1]


def _loops(quantizer: Quantizer) -> ModuleType:
    """The compiled loops of the quantizer's kind."""
    from caldera.quantizers import _kernels, _trellis

    return _trellis if quantizer.codebook.sequential else _kernels


def _edges(quantizer: Quantizer, rows: int) -> list[int] | None:
    """Where the rows may be cut: between sequences, or anywhere."""
    return quantizer.codebook.edges(rows) if quantizer.codebook.sequential else None


def _ldlq_panel_compiled(quantizer, columns, work, target, feedback, first, last, values, codes, lost) -> None:
    arrays = [t.numpy() for t in (work, target, feedback.matrix, feedback.blocks, *columns)]
    rest = (quantizer.codebook.kernel(), first, last, values.numpy(), codes.numpy(), lost.numpy())
    rows = work.shape[1]
    over_rows(_loops(quantizer).ldlq_panel, rows, *arrays, *rest, edges=_edges(quantizer, rows))


def _tune_panel_compiled(quantizer, columns, gradient, moments, inverses, first, last, values, codes) -> None:
    arrays = [t.numpy() for t in (gradient, moments, inverses, *columns)]
    rest = (quantizer.codebook.kernel(), first, last, values.numpy(), codes.numpy())
    rows = gradient.shape[1]
    over_rows(_loops(quantizer).tune_panel, rows, *arrays, *rest, edges=_edges(quantizer, rows))


def _nearest(quantizer, columns: Scales, x: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """Codes (m,) and values (g, m) of the codewords nearest to x (g, m), the columns `at` of the matrix, transposed."""
    scale, zero = (t[:, at] if t.shape[1] > 1 else t for t in columns)
    codes = quantizer.codebook.encode(torch.where(scale > 0, (x.T - zero) / scale, 0.0))
    return codes, (quantizer.codebook.decode(codes) * scale + zero).T


def _ldlq_panel(quantizer, columns, work, target, feedback, first, last, values, codes, lost) -> None:
    """What `_kernels.ldlq_panel` does, on any device: no branch or read depends on the data."""
    group, m = quantizer.group, work.shape[1]
    for column in range(last - group, first - 1, -group):
        at = slice(column, column + group)
        codes[column // group], values[at] = _nearest(quantizer, columns, target[at], at)
        target[first:column] += feedback.matrix[at, first:column].T @ (work[at] - values[at])
    # E M = target - Q is what was lost when each column was rounded, and E H E^T = (E M) D (E M)^T
    gap = (target[first:last] - values[first:last]).reshape(-1, group, m)
    lost += (feedback.blocks[first // group : last // group].mT @ gap).square().sum((0, 1))


def _tune_panel(quantizer, columns, gradient, moments, inverses, first, last, values, codes) -> None:
    """What `_kernels.tune_panel` does, on any device."""
    group = quantizer.group
    for column in range(last - group, first - 1, -group):
        at, block = slice(column, column + group), column // group
        found, new = _nearest(quantizer, columns, values[at] + inverses[block].T @ gradient[at], at)
        move = values[at] - new
        change = (move * (2 * gradient[at] + moments[at, at] @ move)).sum(0)
        better = _jointly(quantizer, change) < 0
        codes[block] = torch.where(better, found, codes[block])
        values[at] = torch.where(better, new, values[at])
        gradient[first:last] += moments[at, first:last].T @ torch.where(better, move, 0.0)


def _jointly(quantizer: Quantizer, change: Tensor) -> Tensor:
    """Each row's change (m,), or the sum over its sequence where rows are rounded together."""
    edges = _edges(quantizer, len(change))
    if edges is None:
        return change
    return torch.cat([change[a:b].sum().expand(b - a) for a, b in pairwise(edges)])
