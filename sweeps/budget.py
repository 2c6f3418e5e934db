"""From a budget of stored bits to ranks."""

from dataclasses import replace

from caldera.errors import UserError
from caldera.method import Method


def fitted(method: Method, config: dict, shapes: dict[str, list[int]]) -> Method:
    """The method with the largest rank whose stored bits over all matrices stay within the budget, if there is one."""
    bits = config["budget"]["bits"]
    if bits is None:
        return method
    low, high = method.rank, min(min(s) for s in shapes.values())
    least = stored_bits(method, low, shapes)
    if least > bits:
        alone = f"rank {low} takes" if low else f"{method.q} takes alone"
        raise UserError(f"budget.bits={bits} is below the {least:.3f} bits that {alone}: raise it")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stored_bits(method, middle, shapes) <= bits else (low, middle - 1)
    return replace(method, rank=low)


def stored_bits(method: Method, rank: int, shapes: dict[str, list[int]]) -> float:
    specs = [replace(method, rank=rank).spec(tuple(shape), name) for name, shape in shapes.items()]
    return 8 * sum(s.stored_bytes for s in specs) / sum(s.parameters for s in specs)
