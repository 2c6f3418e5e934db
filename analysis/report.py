"""`caldera-report RESULTS_DIR`: a sweep as one HTML file that needs no network."""

import argparse
import base64
import io
import math
import sys
from itertools import cycle
from pathlib import Path

import pandas as pd

from analysis import configs, style
from analysis.facts import answers, caveats, environment
from analysis.figures import Sweep, figures
from analysis.frontier import SIZES, frontier_table, score
from analysis.layers import NAMES, grid
from analysis.pareto import is_compressed
from analysis.plots import LOGARITHMIC, baseline_label, uncompressed
from analysis.records import RecordError, home

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "x", "star", "pentagon")
STILL = {
    "methods": "What each method and each budget makes of the bits",
    "spending": "What a split of bits between Q and L R buys, and what the next bit buys",
    "convergence": "How the fits converged: relative errors after each update",
    "prediction": "Measured against predicted relative errors of all matrices",
    "spectra": "Singular values of what the matrices do to their inputs, before and after",
    "allocation": "Where budgets put ranks and bits",
    "costs": "Time and memory of compression",
}
HEATS = ("relative_error", "output_error", "stored_bits", "rank")


def write_report(sweep: Sweep, path: Path) -> None:
    """Writes the page. Raises OSError."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=PackageLoader("analysis", "templates"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html").render(page_of(sweep), plotly=get_plotlyjs())
    path.parent.mkdir(parents=True, exist_ok=True)
    with style.replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def page_of(sweep: Sweep) -> dict:
    """What the template shows: texts, rows of the table, the data of the interactive figures, pictures."""
    table = sweep.table
    models = [style.model_label(model) for model in table["model"].dropna().unique()]
    return {
        "title": ", ".join(dict.fromkeys(record.get("sweep") or "sweep" for record in sweep.records)),
        "models": " and ".join(models),
        "metric": style.metric_label(sweep.metric, table.attrs["metrics"][sweep.metric]),
        "counts": _counts(table),
        "answers": answers(table),
        "columns": _columns(table),
        "rows": [_row(table, row) for _, row in table[table["status"] == "done"].iterrows()],
        "configs": optimal_settings(sweep),
        "pictures": pictures(sweep),
        "environment": environment(sweep.records),
        "caveats": caveats(sweep.records, table),
        "data": _finite({"frontier": frontier_data(sweep), "heat": heat_data(sweep)}),
    }


def _counts(table: pd.DataFrame) -> str:
    done, failed = is_compressed(table).sum(), (table["status"] != "done").sum()
    lost = f", {failed} failed" if failed else ""
    return f"{done} compressed points{lost}, {table['pareto'].sum()} of them Pareto-optimal"


# ------------------------------------------------------------------------------------------------------------ the table
def _columns(table: pd.DataFrame) -> list[str]:
    metrics = [style.metric_label(metric, info) for metric, info in table.attrs["metrics"].items()]
    sizes = ["Stored bits", "Nominal bits", "Model bits", "MB"]
    return ["Point", "Method", "Rank", *sizes, *metrics, "Optimal", "Minutes", "GB"]


def _row(table: pd.DataFrame, row: pd.Series) -> dict:
    """`cells` are (shown, value to sort by)."""
    whole = row["method"] == "none"
    label = f"uncompressed {style.model_label(row['model'])}" if whole else style.point_label(row)
    sizes = [(row[SIZES[key]], ".3f") for key in ("stored", "nominal", "model")] + [(row["megabytes"], ",.1f")]
    cells = [(label, label), (row["method"], row["method"]), _cell(row.get("rank"), "g")]
    cells += [_cell(value, form) for value, form in sizes]
    for metric in table.attrs["metrics"]:
        cells.append((score(row[metric], row[f"{metric}:stderr"]), _number(row[metric])))
    cells += [_cell(row["pareto_share"], ".0%"), _cell(row["compress_s"] / 60, ".1f"), _cell(row["memory_gb"], ".1f")]
    return {"name": row["name"], "optimal": bool(row["pareto"]), "cells": cells}


def _cell(value, form: str) -> tuple[str, float | str]:
    return ("–", "") if value is None or pd.isna(value) else (format(value, form), float(value))


def _number(value) -> float | str:
    return "" if pd.isna(value) else float(value)


# ------------------------------------------------------------------------------------------------- interactive figures
def frontier_data(sweep: Sweep) -> dict:
    """Points with sizes and metrics, baselines, and for every pair of axes which points are optimal, and the band."""
    table = sweep.table
    metrics = table.attrs["metrics"]
    ordered = [sweep.metric, *(metric for metric in metrics if metric != sweep.metric)]
    return {
        "sizes": [{"key": column, "label": style.AXES[column]} for column in SIZES.values()],
        "metrics": [
            {"key": m, "label": style.metric_label(m, metrics[m]), "log": m.startswith(LOGARITHMIC)} for m in ordered
        ],
        "points": _points(table),
        "baselines": {metric: _baselines(table, metric) for metric in ordered},
        "fronts": {metric: {SIZES[x]: _front(sweep, metric, x) for x in SIZES} for metric in ordered},
    }


def _baselines(table: pd.DataFrame, metric: str) -> list[dict]:
    """Where the uncompressed models and their noise floors are drawn, and in which words."""
    found = []
    for _, row in uncompressed(table, metric).iterrows():
        label = baseline_label(row, metric)
        found.append({"level": row["level"], "float32": row["float32"], "label": label})
    return found


def _points(table: pd.DataFrame) -> list[dict]:
    rows = table[is_compressed(table)]
    groups = [_group(row) for _, row in rows.iterrows()]
    colours = dict(zip(sorted(set(groups)), style.palette(len(set(groups))), strict=True))
    symbols = dict(zip(sorted(set(rows["q"].map(str))), cycle(SYMBOLS)))
    return [
        {
            "name": row["name"],
            "label": style.point_label(row),
            "method": row["method"],
            "group": group[-1],
            "colour": colours[group],
            "symbol": symbols[str(row["q"])],
            "sizes": {column: row[column] for column in SIZES.values()},
            "values": _values(row, list(table.attrs["metrics"])),
        }
        for group, (_, row) in sorted(zip(groups, rows.iterrows(), strict=True), key=lambda pair: pair[0])
    ]


def _group(row: pd.Series) -> tuple[float, str]:
    """The rank, in order and in words; where it differs, what chose it."""
    if pd.notna(row.get("rank")):
        return float(row["rank"]), f"rank {row['rank']:g}"
    return math.inf, str(row["budget"]) if pd.notna(row.get("budget")) else row["method"]


def _values(row: pd.Series, metrics: list[str]) -> dict:
    return {metric: [row[metric], row[f"{metric}:stderr"]] for metric in metrics}


def _front(sweep: Sweep, metric: str, x: str) -> dict:
    table = frontier_table(sweep.records, metric, x)
    optimal = table[table["pareto"]].sort_values(SIZES[x])
    share = table.set_index("name")["pareto_share"].dropna().to_dict()
    return {"optimal": optimal["name"].tolist(), "share": share, "band": table.attrs["band"]}


def heat_data(sweep: Sweep) -> dict:
    """For points with matrices, optimal ones first: block by projection, of every value that they have."""
    rows = sweep.table[sweep.table["name"].isin(sweep.matrices["point"])].sort_values(
        "pareto", ascending=False, kind="stable"
    )
    points = [
        {"name": row["name"], "label": style.point_label(row), **_cells(sweep, row["name"])}
        for _, row in rows.iterrows()
    ]
    values = [value for value in HEATS if any(point["values"].get(value) for point in points)]
    return {"values": [{"key": value, "label": NAMES[value]} for value in values], "points": points}


def _cells(sweep: Sweep, point: str) -> dict:
    cells = {value: grid(sweep.matrices, point, value) for value in HEATS}
    first = cells["rank"]
    known = {
        value: found.round(6).to_numpy().tolist() for value, found in cells.items() if found.notna().any(axis=None)
    }
    return {"blocks": [int(block) for block in first.columns], "projections": list(first.index), "values": known}


# -------------------------------------------------------------------------------------------------- what stays as it is
def pictures(sweep: Sweep) -> list[dict]:
    """Figures of the paper as PNG, as far as there is data for them."""
    found = []
    for name, words in STILL.items():
        try:
            figure = figures()[name](sweep, "print")
        except RecordError:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=180)
        found.append({"name": name, "words": words, "base64": base64.b64encode(buffer.getvalue()).decode()})
    return found


def optimal_settings(sweep: Sweep) -> list[dict]:
    """The optimal points' settings: what tells them apart, and the whole command."""
    by_name = {record["name"]: record.get("config") or {} for record in sweep.records}
    optimal = sweep.table[sweep.table["pareto"] & sweep.table["name"].map(lambda name: bool(by_name[name]))]
    apart = configs.differing([by_name[name] for name in optimal["name"]])
    return [
        {
            "label": style.point_label(row),
            "size": f"{row['bits_stored']:.3f} bits",
            "apart": " ".join(f"{key}={word}" for key, word in own.items()),
            "command": configs.command(by_name[row["name"]]),
        }
        for (_, row), own in zip(optimal.iterrows(), apart, strict=True)
    ]


def _finite(value):
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-report`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="caldera-report", description="A sweep as one HTML file.")
    parser.add_argument(
        "results_dir", help="a sweep's output folder, or wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/SWEEP"
    )
    parser.add_argument("--metric", help="the metric in front (default: the first perplexity)")
    parser.add_argument("--output", type=Path, help="the file (default: report.html in the sweep's folder)")
    options = parser.parse_args(arguments)
    path = options.output or home(options.results_dir) / "report.html"
    try:
        write_report(Sweep.read(options.results_dir, options.metric), path)
    except (RecordError, OSError) as error:
        print(f"caldera-report: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
