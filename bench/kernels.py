"""The encoder's speed, and how the times of square matrices grow."""

from dataclasses import replace

import torch

from bench.problems import METHOD, RANK, problem, warm_up
from bench.rows import Row
from bench.timing import exponent, timed
from caldera import Method, decompose, prepare
from caldera.ldlq import ldlq
from caldera.quantizers import get_quantizer

VECTORS = 1 << 17
FEW = {"outer_iterations": 2, "inner_iterations": 3}  # of the decompositions whose growth is fitted


# -------------------------------------------------------------------------------------------------------------- encoder
def encoder(quick: bool) -> list[Row]:
    """E8P 2-bit vectors a second, on one thread and on all."""
    quantizer, generator = get_quantizer("e8p_2bit"), torch.Generator().manual_seed(0)
    x = torch.randn(VECTORS // 64, 64 * 8, generator=generator)
    scales, everything = quantizer.fit(x), torch.get_num_threads()
    rows = []
    warm_up()
    for threads in dict.fromkeys((1, everything)):
        torch.set_num_threads(threads)
        found = timed(lambda: quantizer.encode(x, scales))
        case = f"{threads} thread{'s' * (threads > 1)}"
        rows.append(Row("E8P 2-bit encoder", case, VECTORS / found.seconds, "vectors/s", found.runs))
    torch.set_num_threads(everything)
    return rows


# --------------------------------------------------------------------------------------------------------------- growth
def growth(quick: bool) -> list[Row]:
    """Exponents of n in the times of square matrices, and of the product's."""
    warm_up()
    sizes = [512, 1024, 1536] if quick else [512, 1024, 2048, 4096]
    return growth_rows(sizes, RANK)


def growth_rows(sizes: list[int], rank: int) -> list[Row]:
    """A row each for product, LDLQ and decomposition: exponent, its difference to the product's, the times."""
    seconds = [_seconds(n, replace(METHOD, rank=rank, **FEW)) for n in sizes]
    fitted = {part: exponent(sizes, [found[part] for found in seconds]) for part in seconds[0]}
    case = f"n = {sizes[0]} to {sizes[-1]}"
    rows = []
    for part, p in fitted.items():
        times = ", ".join(f"{found[part]:.3g}" for found in seconds)
        beyond = "" if part == "product" else f"{p - fitted['product']:+.2f} to the product; "
        rows.append(Row(f"growth: {part}", case, p, "exponent", note=f"{beyond}{times} s"))
    return rows


def _seconds(n: int, method: Method) -> dict[str, float]:
    """Seconds of the product W H, LDLQ, and a decomposition of few iterations of a square matrix."""
    weight, moments = problem(n, n)
    basis, quantizer = prepare(moments, name="input", **method.basis_options), get_quantizer(method.q)
    w = basis.forward(weight, "matrix")
    return {
        "product": timed(lambda: w @ basis.moments).seconds,
        "LDLQ": timed(lambda: ldlq(w, basis, quantizer)).seconds,
        "decomposition": timed(lambda: decompose(weight, moments, method)).seconds,
    }
