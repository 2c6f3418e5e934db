"""LDLQ, LPLR and whole decompositions for several shapes, beside matrix products and the textbook's version."""

import statistics
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from bench import textbook
from bench.problems import (
    INNER,
    METHOD,
    OUTER,
    RANK,
    decomposition_operations,
    ldlq_operations,
    lplr_operations,
    problem,
    start,
    warm_up,
)
from bench.rows import Row
from bench.timing import once, timed
from caldera import Basis, decompose, prepare
from caldera.ldlq import ldlq
from caldera.lowrank import lplr
from caldera.quantizers import get_quantizer
from sweeps.record import peak_rss, reset_peak

# (m, n); the largest comes last, since the peak of memory is reset on the way
SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096))


def shapes(quick: bool) -> list[Row]:
    """Three rows a shape."""
    warm_up()
    chosen, measure = (SHAPES[:3], once) if quick else (SHAPES, timed)
    return [row for m, n in chosen for row in shape_rows(m, n, textbook_iterations(m, n, quick), measure)]


def textbook_iterations(m: int, n: int, quick: bool) -> int:
    """How many of the outer iterations the textbook's version is run for; 0: not at all."""
    if quick:
        return 3 if m == n == 576 else 0
    return OUTER if m * n <= 1536 * 576 else 1


def shape_rows(m: int, n: int, iterations: int, measure: Callable = timed) -> list[Row]:
    """LDLQ and LPLR with prepared moments, the whole decomposition without, and the textbook's outer `iterations`.

    `measure` times the whole decomposition: `timed`, or `once` to be quick.
    """
    weight, moments = problem(m, n)
    basis = prepare(moments, name="input", **METHOD.basis_options)
    w = basis.forward(weight, "matrix")
    rows = [*step_rows(w, basis), whole_row(weight, moments, measure)]
    product = timed(lambda: w @ basis.moments).seconds
    for row, count in zip(rows, (lplr_operations, ldlq_operations, decomposition_operations)):
        row.case, row.operations, row.product_s = f"{m} x {n}", count(m, n), product
        row.equal_s = product * row.operations / (2 * m * n**2)
    if iterations:
        enter_textbook(rows, textbook.decompose(w, basis.moments, basis.sigma, RANK, iterations, INNER))
        compare_errors(rows[2], weight, moments, iterations)
    return rows


def step_rows(w: Tensor, basis: Basis) -> list[Row]:
    """LPLR on W~ (m, n), then LDLQ on what it leaves: the first iteration's steps."""
    right, quantizer = start(w, basis, RANK), get_quantizer(METHOD.q)
    factors = timed(lambda: lplr(w, right, basis, METHOD.factor_quantizers, INNER, "bench"))
    rest = w - factors.result[0].values.T @ factors.result[1].values
    rounding = timed(lambda: ldlq(rest, basis, quantizer))
    whole = textbook.loss(w, basis.moments)
    left_over = (rest, rest - rounding.result.values)
    errors = [(textbook.loss(x, basis.moments) / whole) ** 0.5 for x in left_over]
    return [
        Row("LPLR", "", factors.seconds, runs=factors.runs, error=errors[0]),
        Row("LDLQ", "", rounding.seconds, runs=rounding.runs, error=errors[1]),
    ]


def whole_row(weight: Tensor, moments: Tensor, measure: Callable) -> Row:
    """The whole decomposition, moments included, with its peak memory."""
    reset_peak()
    found = measure(lambda: decompose(weight, moments, METHOD))
    error = found.result.relative_error
    return Row("decomposition", "", found.seconds, runs=found.runs, error=error, peak_bytes=peak_rss())


def compare_errors(whole: Row, weight: Tensor, moments: Tensor, iterations: int) -> None:
    """Enter the error after as many iterations as the textbook's, and the one with fresh factors in each, as it has."""
    method = replace(METHOD, outer_iterations=iterations)
    whole.error = decompose(weight, moments, method).relative_error
    whole.note = f"textbook and errors: {iterations} of {OUTER} iterations" if iterations < OUTER else ""
    if iterations > 1:
        cold = decompose(weight, moments, replace(method, warm_start=False)).relative_error
        whole.note += f"{'; ' * bool(whole.note)}error without warm start {cold:.4f}"


def enter_textbook(rows: list[Row], plain: textbook.Run) -> None:
    """The textbook's times and errors: the median of each step with the first one's error, and the whole."""
    factors, rounding, whole = rows
    factors.textbook_s, factors.textbook_error = statistics.median(plain.lplr_seconds), plain.lplr_errors[0]
    rounding.textbook_s, rounding.textbook_error = statistics.median(plain.ldlq_seconds), plain.ldlq_errors[0]
    iterations = len(plain.lplr_seconds)
    spent = sum(plain.lplr_seconds) + sum(plain.ldlq_seconds)
    whole.textbook_s, whole.textbook_error = spent * OUTER / iterations, plain.error
    whole.textbook_scaled = iterations < OUTER
