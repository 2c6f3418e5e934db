"""`caldera-compare RESULTS_DIR A B`: how far apart two points are, window by window and document by document."""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import t

from analysis.frontier import PIPE_WIDTH, score
from analysis.records import RecordError, load_records

LEVEL = 0.95
NO_MATTER = {"batch_size"}  # of what a metric was measured on, what changes no score
COLUMNS = ("metric", "a", "a_stderr", "b", "b_stderr", "difference", "low", "high", "relative", "samples", "better")


def compare(a: dict, b: dict) -> pd.DataFrame:
    """One row a metric that two records share: values, and the mean difference b - a over samples with its interval.

    The interval is Student's, of 95%, over the paired differences (of windows by their weights); of a perplexity
    difference and interval are those of the ratio b / a less 1 (`relative`), since its samples are logarithms. They are
    NaN where there are fewer than two samples, as of quantiles. `better` is "a" or "b" where the interval lacks zero.
    Raises RecordError: nothing in common, or a metric that was measured on different things.
    """
    shared = [name for name in a["metrics"] or {} if name in (b["metrics"] or {})]
    if not shared:
        raise RecordError(
            f"{a['name']} and {b['name']} have no metric in common: compare finished points of one sweep."
        )
    return pd.DataFrame([_row(name, a, b) for name in shared], columns=list(COLUMNS))


def _row(name: str, a: dict, b: dict) -> dict:
    one, other = (record["metrics"][name] for record in (a, b))
    _check_alike(name, a, b)
    relative = one.get("scale", "log" if name.startswith("perplexity/") else None) == "log"  # older records do not say
    row = {"metric": name, "relative": relative}
    row |= {"a": one["value"], "a_stderr": one.get("stderr"), "b": other["value"], "b_stderr": other.get("stderr")}
    difference, low, high = _interval(one, other)
    if relative:
        difference, low, high = (math.expm1(x) for x in (difference, low, high))
    if math.isnan(difference) and None not in (row["a"], row["b"]):
        difference = row["b"] / row["a"] - 1 if relative else row["b"] - row["a"]
    apart = low > 0 or high < 0
    better = ("b" if (difference > 0) == one["higher_is_better"] else "a") if apart else ""
    found = {"difference": difference, "low": low, "high": high, "better": better}
    return row | found | {"samples": len(one.get("samples") or [])}


def _interval(one: dict, other: dict) -> tuple[float, float, float]:
    """Mean of the paired differences and the ends of its interval; NaN without samples or, of the ends, with one."""
    if not (one.get("samples") and other.get("samples")):
        return math.nan, math.nan, math.nan
    weights = np.array(one.get("weights") or [1.0] * len(one["samples"]))
    apart = np.array(other["samples"]) - np.array(one["samples"])
    mean, count = float((weights * apart).sum() / weights.sum()), len(apart)
    if count == 1:
        return mean, math.nan, math.nan
    squares = float(((weights * (apart - mean)) ** 2).sum())
    half = t.ppf((1 + LEVEL) / 2, count - 1) * math.sqrt(count / (count - 1) * squares) / weights.sum()
    return mean, mean - half, mean + half


def _check_alike(name: str, a: dict, b: dict) -> None:
    one, other = (record["metrics"][name] for record in (a, b))
    on = [metric.get("measured_on") or {} for metric in (one, other)]
    keys = sorted({*on[0], *on[1]} - NO_MATTER)
    different = [f"{key} {on[0].get(key)} and {on[1].get(key)}" for key in keys if on[0].get(key) != on[1].get(key)]
    same = ("weights", "scale", "higher_is_better")
    different += [key for key in same if one.get(key) != other.get(key)]
    if len(one.get("samples") or []) != len(other.get("samples") or []):
        different.append("samples")
    if different:
        raise RecordError(
            f"{name} was not measured alike in {a['name']} and {b['name']} ({', '.join(different)}): evaluate both with"
            " the same settings."
        )


def chosen(records: list[dict], name: str) -> dict:
    """The finished record of that name, or the only one whose name has this in it. Raises RecordError."""
    done = {record["name"]: record for record in records if record["status"] == "done"}
    near = [name] if name in done else [known for known in done if name in known]
    if len(near) != 1:
        known = ", ".join(near or done) or "none"
        raise RecordError(f"{name!r} is the name of {len(near)} finished points: choose one of {known}.")
    return done[near[0]]


def report(results_dir: str | Path, a: str, b: str) -> pd.DataFrame:
    """Prints what `compare` finds of two points of a results folder, and returns it. Raises RecordError."""
    records = load_records(results_dir)
    one, other = chosen(records, a), chosen(records, b)
    found = compare(one, other)
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    for letter, record in (("A", one), ("B", other)):
        console.print(f"{letter}: {record['name']}", markup=False, highlight=False, soft_wrap=True)
    console.print(_view(found))
    console.print(
        "B - A over pairs of samples, with its 95% interval; of perplexities in percent of A's.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    for record, rest in ((one, other), (other, one)):
        if alone := [name for name in record["metrics"] if name not in rest["metrics"]]:
            console.print(f"only {record['name']} has {', '.join(alone)}", markup=False, highlight=False)
    return found


def _view(found: pd.DataFrame) -> Table:
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("metric", "A", "B", "B - A", "95% interval", "pairs", "better"):
        view.add_column(header, justify="left" if header in ("metric", "better") else "right", overflow="fold")
    for _, row in found.iterrows():
        values = [score(row[side], row[f"{side}_stderr"]) for side in "ab"]
        difference, low, high = (signed(row[key], row["relative"]) for key in ("difference", "low", "high"))
        interval = "-" if low == "-" else f"{low} to {high}"
        cells = [row["metric"], *values, difference, interval, str(row["samples"] or "-"), row["better"].upper()]
        view.add_row(*map(escape, cells), style="bold" if row["better"] else None)
    return view


def signed(value: float, relative: bool) -> str:
    """`+0.0123`, or `+1.23%` of what is relative."""
    return "-" if pd.isna(value) else f"{value:+.2%}" if relative else f"{value:+.4f}"


def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-compare`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="caldera-compare", description="How far apart two points of a sweep are.")
    parser.add_argument("results_dir", type=Path, help="a sweep's output folder, with points/*/record.json")
    parser.add_argument("a", help="the name of a finished point, or a part of it that no other has")
    parser.add_argument("b", help="the point to compare it with")
    options = parser.parse_args(arguments)
    try:
        report(options.results_dir, options.a, options.b)
    except RecordError as error:
        print(f"caldera-compare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
