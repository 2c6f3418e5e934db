"""What a benchmark hands over: rows of one table, as JSON keeps them."""

from dataclasses import asdict, dataclass


@dataclass
class Row:
    """One measured number, in `unit`: the median of `runs`. What does not apply is None, never a number.

    `product_s` is the time of the float32 product W H (m, n) x (n, n) on the same threads, `equal_s` that of a product
    with as many operations as were counted, at that product's speed. `textbook_s` is the time of `bench.textbook`,
    `textbook_scaled` whether it was measured for fewer outer iterations and scaled up to all. `error` and
    `textbook_error` are relative errors after equally many iterations.
    """

    part: str
    case: str
    value: float
    unit: str = "s"
    runs: int = 1
    operations: float | None = None
    product_s: float | None = None
    equal_s: float | None = None
    textbook_s: float | None = None
    textbook_scaled: bool = False
    error: float | None = None
    textbook_error: float | None = None
    peak_bytes: int | None = None
    note: str = ""

    def as_dict(self) -> dict:
        """The fields, and the ratios that follow from them."""
        ratios = {
            "of_equal_product": ratio(self.value, self.equal_s),
            "of_product": ratio(self.value, self.product_s),
            "textbook_slower": ratio(self.textbook_s, self.value),
        }
        return asdict(self) | ratios


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, None if either is missing."""
    return None if a is None or b is None else a / b
