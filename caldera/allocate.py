"""Which option each item takes so that the total loss is small and the total cost stays within a budget.

From the cheapest options on, the change of one item that gains most for what it costs more is made, again and again,
of those that still fit. As long as all fit, these are the steps along the lower convex hulls of the items' options in
the order of their slopes: the choices of Lagrange's method for a falling price, each of the least possible loss at its
cost. From the first step on that does not fit, other options fill up what is left. So the loss is above the least
possible one by less than that step would have gained, and never rises with the budget.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from caldera.errors import UserError


class Option(NamedTuple):
    """`cost` in whole units (bytes), and the `loss` that comes with it."""

    cost: int
    loss: float


def allocate(items: Mapping[str, Sequence[Option]], budget: int) -> dict[str, int]:
    """Index of the option that each item takes; their costs together are at most `budget`.

    Of equal gains the item whose name comes first is served first, of an item's equal options the first one. Raises
    UserError when even the cheapest options exceed the budget.
    """
    left = budget - sum(min(option.cost for option in options) for options in items.values())
    if left < 0:
        raise UserError(f"budget={budget} is below the {budget - left} that the cheapest options take: raise it")
    curves = {name: _Curve.of(options) for name, options in items.items()}
    queue = [(-curve.best(left)[0], name) for name, curve in curves.items()]
    heapq.heapify(queue)
    while queue:
        expected, name = heapq.heappop(queue)
        slope, index = curves[name].best(left)
        if slope == 0:
            continue
        if slope == -expected:  # otherwise what it was has ceased to fit
            left -= curves[name].move(index)
            slope, _ = curves[name].best(left)
        heapq.heappush(queue, (-slope, name))
    return {name: int(curves[name].order[curves[name].at]) for name in items}


class _Curve:
    """An item's options by cost, then loss; `at` is the one taken."""

    def __init__(self, order: np.ndarray, cost: np.ndarray, loss: np.ndarray) -> None:
        self.order, self.cost, self.loss, self.at = order, cost, loss, 0

    @classmethod
    def of(cls, options: Sequence[Option]) -> "_Curve":
        cost, loss = np.array([o.cost for o in options], np.int64), np.array([o.loss for o in options], np.float64)
        order = np.lexsort((loss, cost))
        return cls(order, cost[order], loss[order])

    def best(self, left: int) -> tuple[float, int]:
        """The largest gain for a unit of cost of changes that cost at most `left` more, 0 if none gains; where to."""
        more = self.cost - self.cost[self.at]
        fits = (more > 0) & (more <= left)
        slopes = np.where(fits, (self.loss[self.at] - self.loss) / np.where(fits, more, 1), 0.0)
        index = int(slopes.argmax())
        return max(float(slopes[index]), 0.0), index

    def move(self, index: int) -> int:
        """Take that option; what it costs more."""
        more = int(self.cost[index] - self.cost[self.at])
        self.at = index
        return more
