"""`caldera-frontier RESULTS_DIR`: which points of a sweep are Pareto-optimal, as a table, a figure and a CSV file."""

import argparse
import math
import sys
from pathlib import Path
from textwrap import shorten

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.pareto import is_compressed, pareto
from analysis.records import RecordError, home, load_records, tidy
from analysis.uncertainty import band, draws, optimal_share

SIZES = {"stored": "bits_stored", "nominal": "bits_nominal", "model": "bits_model", "megabytes": "megabytes"}
# Axes that always have a column on the terminal, and those that these already say; others have one if they vary.
IDENTITY, IMPLIED = {"method", "rank", "q", "l", "r"}, {"q_bits", "l_bits", "r_bits"}
DETAILS = ("byte_perplexity/", "word_perplexity/", "kl_")  # metrics without a column, unless it is the frontier's
PIPE_WIDTH = 1000  # columns when the output is no terminal: nothing is wrapped, the table is as wide as it needs


def frontier_table(records: list[dict], metric: str | None = None, x: str = "stored") -> pd.DataFrame:
    """The `tidy` table with a boolean column `pareto`: points by stored bits, then the uncompressed model, failures.

    `pareto_share` says in which share of redrawn measurements a point is optimal, `table.attrs["band"]` where 90% of
    their frontiers lie, as lists `size`, `low` and `high` (see `analysis.uncertainty`). `metric` is by default the
    first perplexity, or else the first metric; `x` is a key of SIZES. The names of the columns used are in
    `table.attrs["metric"]` and `["x"]`. Raises RecordError for a metric or an `x` that does not exist.
    """
    table = tidy(records)
    if x not in SIZES:
        raise RecordError(f"no size is called {x!r}: choose one of {', '.join(SIZES)}.")
    metric = _choose_metric(table, metric)
    higher_is_better = table.attrs["metrics"][metric]["higher_is_better"]
    drawn = draws(records, metric)
    table["pareto"] = pareto(table, SIZES[x], metric, higher_is_better)
    table["pareto_share"] = optimal_share(table, drawn, SIZES[x], higher_is_better)
    limits = band(table, drawn, SIZES[x], higher_is_better).to_dict("list")
    table.attrs |= {"metric": metric, "x": SIZES[x], "band": limits}
    group = (table["status"] != "done") * 2 + (table["method"] == "none")
    order = table.assign(group=group).sort_values(["group", "bits_stored", "name"]).index
    return table.loc[order].reset_index(drop=True)


def _choose_metric(table: pd.DataFrame, metric: str | None) -> str:
    metrics = list(table.attrs["metrics"])
    if not metrics:
        reasons = [f" (the first failure: {reason})" for reason in table["error"].dropna()[:1]]
        raise RecordError(f"no record has a metric{''.join(reasons)}: evaluate at least one point first.")
    if metric is None:
        return headline(metrics)
    if metric not in metrics:
        raise RecordError(f"no record has the metric {metric!r}: choose one of {', '.join(metrics)}.")
    return metric


def headline(metrics: list[str]) -> str:
    """Of the names of metrics the first perplexity, or else the first."""
    return next((name for name in metrics if name.startswith("perplexity/")), metrics[0])


def report(
    results_dir: str | Path, output: str | Path | None = None, metric: str | None = None, x: str = "stored"
) -> Path:
    """Prints the table of a sweep and writes frontier.png, .svg and .csv; returns the path of the PNG.

    The files go to `output`, by default `results_dir`. Raises RecordError when there is nothing to draw, after the
    table and the reasons why points failed.
    """
    table = frontier_table(load_records(results_dir), metric, x)
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    _print(console, table)
    path = _write(table, Path(output or home(results_dir)))
    console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return path


def _write(table: pd.DataFrame, folder: Path) -> Path:
    from analysis import plots, style  # matplotlib takes a second to import and is needed only here

    folder.mkdir(parents=True, exist_ok=True)
    figure = plots.frontier_figure(table, table.attrs["metric"], table.attrs["x"])
    style.save(figure, folder / "frontier.svg")
    style.save(figure, folder / "frontier.png")
    with style.replacing(folder / "frontier.csv") as temporary:
        table.to_csv(temporary, index=False)
    return folder / "frontier.png"


def _print(console: Console, table: pd.DataFrame) -> None:
    rows = table[table["status"] == "done"]
    points = rows[is_compressed(rows)]
    varying = {axis for axis in table.attrs["axes"] if points[axis].map(str).nunique() > 1}
    axes = [axis for axis in table.attrs["axes"] if axis in IDENTITY | (varying - IMPLIED)]
    metrics = [name for name in table.attrs["metrics"] if not name.startswith(DETAILS) or name == table.attrs["metric"]]
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("", *axes):
        view.add_column(escape(header), overflow="fold")
    for header in ("stored bits", *metrics, "compress s"):
        view.add_column(escape(header), overflow="fold", justify="right")
    for _, row in rows.iterrows():
        view.add_row(*_cells(row, axes, metrics), style="bold" if row["pareto"] else None)
    console.print(view)
    for note in _notes(table):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _cells(row: pd.Series, axes: list[str], metrics: list[str]) -> list[str]:
    mark = "*" if row["pareto"] else ""
    values = ["uncompressed" if axis == "method" and row[axis] == "none" else _text(row[axis]) for axis in axes]
    scores = [score(row[metric], row[f"{metric}:stderr"]) for metric in metrics]
    return [mark, *map(escape, values), _text(row["bits_stored"], ".3f"), *scores, _text(row["compress_s"], ",.0f")]


def _text(value, form: str = "") -> str:
    missing = pd.api.types.is_scalar(value) and pd.isna(value)
    return "-" if missing else format(value, form) if form else str(value)


def score(value: float, stderr: float) -> str:
    """`50.28 ± 0.91`, `0.514 ± 0.021`; without an error just the value."""
    form = ",.2f" if abs(value) > 1 else ".3f"
    return _text(value, form) + ("" if pd.isna(stderr) else f" ± {stderr:{form}}")


def _notes(table: pd.DataFrame) -> list[str]:
    metric, x = table.attrs["metric"], table.attrs["x"]
    notes = [f"* Pareto-optimal: no other point has as few {x} and as good a {metric}."]
    notes += [
        f"noise floor of {model}: {metric} is {score(exact[metric], math.nan)} in float32."
        for model, exact in table.attrs["float32"].items()
        if metric in exact
    ]
    for name, info in table.attrs["metrics"].items():
        if info["differs"]:
            notes.append(f"warning: {name} was not measured alike in all points ({', '.join(info['differs'])} differ).")
    if table["model"].nunique() > 1 and x != "megabytes":
        notes.append("warning: several models share this frontier; --x megabytes compares them by what they store.")
    failed = table[table["status"] != "done"]
    return notes + [f"failed: {row['name']}: {shorten(row['error'], 160)}" for _, row in failed.iterrows()]


def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-frontier`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="caldera-frontier", description="Which points of a sweep are Pareto-optimal.")
    parser.add_argument("results_dir", type=Path, help="a sweep's output folder, with points/*/record.json")
    parser.add_argument("--metric", help="the metric of the frontier (default: the first perplexity)")
    parser.add_argument("--x", default="stored", help=f"the x axis: {', '.join(SIZES)} (default: stored)")
    parser.add_argument("--output", type=Path, help="where the files go (default: the sweep's folder)")
    options = parser.parse_args(arguments)
    try:
        report(options.results_dir, options.output, options.metric, options.x)
    except (RecordError, OSError) as error:
        print(f"caldera-frontier: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
