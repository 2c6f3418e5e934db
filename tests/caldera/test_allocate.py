"""Allocation under a budget, against every choice there is."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caldera.allocate import Option, allocate
from caldera.errors import UserError

OPTIONS = st.lists(st.builds(Option, st.integers(0, 12), st.integers(0, 40).map(float)), min_size=1, max_size=4)
ITEMS = st.lists(OPTIONS, min_size=1, max_size=4).map(lambda found: {f"item {i}": o for i, o in enumerate(found)})


def total(items: dict, chosen: dict) -> Option:
    return Option(*map(sum, zip(*(items[name][index] for name, index in chosen.items()))))


def least_loss(items: dict, budget: int) -> float:
    """By trying everything."""
    totals = (Option(*map(sum, zip(*choice))) for choice in itertools.product(*items.values()))
    return min(found.loss for found in totals if found.cost <= budget)


def cheapest(items: dict) -> int:
    return sum(min(option.cost for option in options) for options in items.values())


def largest_step(items: dict) -> float:
    """More than any one change of an item gains."""
    return max(max(o.loss for o in options) - min(o.loss for o in options) for options in items.values())


@given(ITEMS, st.integers(0, 48))
@settings(max_examples=300, deadline=None)
def test_the_loss_is_within_one_step_of_the_least(items, more):
    budget = cheapest(items) + more
    found = total(items, allocate(items, budget))
    assert found.cost <= budget
    assert least_loss(items, budget) <= found.loss <= least_loss(items, budget) + largest_step(items)


@given(ITEMS)
@settings(max_examples=100, deadline=None)
def test_more_budget_is_never_more_loss(items):
    losses = [total(items, allocate(items, cheapest(items) + more)).loss for more in range(50)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses))
    assert losses[-1] == sum(min(option.loss for option in options) for options in items.values())


@given(ITEMS, st.integers(0, 48))
@settings(max_examples=100, deadline=None)
def test_neither_the_order_of_items_nor_a_rerun_matters(items, more):
    turned = dict(reversed(items.items()))
    assert allocate(items, cheapest(items) + more) == allocate(turned, cheapest(items) + more)


def test_between_corners_of_the_hulls_the_choice_is_the_best_there_is():
    """Convex curves whose steps cost the same: every step fits until nothing is left."""
    curves = {"a": (16.0, 8.0, 4.0, 3.0), "b": (9.0, 3.0, 1.0, 0.5), "c": (5.0, 4.0, 3.5, 3.4)}
    items = {name: [Option(2 * i, loss) for i, loss in enumerate(losses)] for name, losses in curves.items()}
    for budget in range(19):
        assert total(items, allocate(items, budget)).loss == least_loss(items, budget)


def test_what_is_left_goes_to_options_inside_the_hull():
    items = {"a": [Option(0, 10.0), Option(3, 9.0), Option(8, 0.0)]}
    assert [allocate(items, budget)["a"] for budget in (0, 2, 3, 7, 8)] == [0, 0, 1, 1, 2]


def test_of_equal_gains_the_first_name_is_served_and_dominated_options_are_not_taken():
    same = [Option(0, 2.0), Option(1, 3.0), Option(1, 1.0), Option(1, 1.0)]
    assert allocate({"b": same, "a": same}, 1) == {"a": 2, "b": 0}


def test_a_budget_below_the_cheapest_is_refused():
    with pytest.raises(UserError, match="budget=4 is below the 5 that the cheapest options take: raise it"):
        allocate({"a": [Option(2, 0.0)], "b": [Option(9, 0.0), Option(3, 1.0)]}, 4)
