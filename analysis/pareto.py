"""Which points are Pareto-optimal."""

import numpy as np
import pandas as pd


def is_compressed(table: pd.DataFrame) -> pd.Series:
    """Which rows of a `tidy` table are finished points of a compressed model, boolean."""
    return (table["status"] == "done") & (table["method"] != "none")


def of_one_model(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the model that has most; no rows of none."""
    return rows[rows["model"] == rows["model"].mode()[0]] if len(rows) else rows


def pareto(table: pd.DataFrame, x: str, y: str, higher_is_better: bool = False) -> pd.Series:
    """Which rows no other beats by being as small in `x`, as good in `y` and better in one of them; boolean.

    Equal points do not beat each other. Rows that failed, are uncompressed, or lack a finite `x` or `y` are False and
    beat nobody.
    """
    cost = -table[y] if higher_is_better else table[y]
    eligible = is_compressed(table) & np.isfinite(table[x]) & np.isfinite(cost)
    size, cost = table.loc[eligible, x], cost[eligible]
    best = cost.groupby(size).min()  # the best at each size, sizes rising
    best_of_smaller = best.cummin().shift(fill_value=np.inf)
    optimal = eligible.copy()
    optimal[eligible] = (cost == size.map(best)) & (cost < size.map(best_of_smaller))
    return optimal
