"""How sure a frontier is: values that might have been measured on other texts of the same kind.

Points of a sweep are scored on the same windows or documents, and what is hard for one is hard for all: windows are
drawn anew, the same ones for every point. Where samples are missing or differ, values are drawn by standard errors.
"""

import numpy as np
import pandas as pd

from analysis.pareto import is_compressed

DRAWS = 1000


def draws(records: list[dict], metric: str, count: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """(count, points) values that `metric` might have had, a column a record that has it, by name.

    A value without an error is repeated as it is.
    """
    measured = {record["name"]: (record["metrics"] or {}).get(metric) or {} for record in records}
    measured = {name: one for name, one in measured.items() if one.get("value") is not None}
    generator = np.random.default_rng(seed)
    if measured and _is_paired(list(measured.values())):
        size = len(next(iter(measured.values()))["samples"])
        chosen = generator.integers(size, size=(count, size))
        return pd.DataFrame({name: _resampled(one, chosen) for name, one in measured.items()})
    spread = {name: one.get("stderr") or 0.0 for name, one in measured.items()}
    noise = generator.standard_normal((count, len(measured)))
    values = [one["value"] + spread[name] * noise[:, i] for i, (name, one) in enumerate(measured.items())]
    return pd.DataFrame(dict(zip(measured, values, strict=True)))


def _is_paired(measured: list[dict]) -> bool:
    """Whether all were measured on the same windows or documents, one sample each, from which their values follow."""
    samples = [one.get("samples") or [] for one in measured]
    same = len(set(map(len, samples))) == 1 and all(
        one.get("measured_on") == measured[0].get("measured_on") for one in measured
    )
    return same and len(samples[0]) > 1 and all(_rule(one) is not None for one in measured)


def _rule(one: dict):
    """How a value follows from the mean of its samples: as it is, or as a perplexity; None if neither."""
    with np.errstate(over="ignore"):
        rules = (
            rule for rule in (np.asarray, np.exp) if np.isclose(rule(np.mean(one["samples"])), one["value"], rtol=1e-6)
        )
        return next(rules, None)


def _resampled(one: dict, chosen: np.ndarray) -> np.ndarray:
    return _rule(one)(np.asarray(one["samples"], dtype=float)[chosen].mean(axis=1))


def optimal_share(table: pd.DataFrame, drawn: pd.DataFrame, x: str, higher_is_better: bool) -> pd.Series:
    """In which share of the draws each row of a `tidy` table is Pareto-optimal in `x`; NaN for rows that cannot be."""
    rows = _eligible(table, drawn, x)
    sizes, costs = rows[x].to_numpy(float), _costs(rows, drawn, higher_is_better)
    share = pd.Series(np.nan, index=table.index)
    for i, index in enumerate(rows.index):
        smaller = costs[:, sizes < sizes[i]].min(axis=1, initial=np.inf)
        alike = costs[:, sizes == sizes[i]].min(axis=1)
        share[index] = ((costs[:, i] < smaller) & (costs[:, i] <= alike)).mean()
    return share


def band(table: pd.DataFrame, drawn: pd.DataFrame, x: str, higher_is_better: bool, level: float = 0.9) -> pd.DataFrame:
    """Columns `size`, `low`, `high`: between what the best value that a size buys is, in `level` of the draws."""
    rows = _eligible(table, drawn, x)
    if rows.empty:
        return pd.DataFrame(columns=["size", "low", "high"], dtype=float)
    best = np.minimum.accumulate(_costs(rows, drawn, higher_is_better), axis=1)  # up to each size
    values = -best if higher_is_better else best
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame({"size": rows[x], "low": low, "high": high}).groupby("size", as_index=False).last()


def _eligible(table: pd.DataFrame, drawn: pd.DataFrame, x: str) -> pd.DataFrame:
    """The rows that a frontier is made of, by rising size."""
    eligible = is_compressed(table) & np.isfinite(table[x]) & table["name"].isin(drawn.columns)
    return table[eligible].sort_values(x, kind="stable")


def _costs(rows: pd.DataFrame, drawn: pd.DataFrame, higher_is_better: bool) -> np.ndarray:
    return drawn[list(rows["name"])].to_numpy(float) * (-1 if higher_is_better else 1)
