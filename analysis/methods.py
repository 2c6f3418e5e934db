"""What else the same bytes could do: methods and budgets on one frontier."""

import re
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis import plots, style
from analysis.pareto import is_compressed, of_one_model, pareto
from analysis.records import RecordError

WORDS = {
    "caldera": "CALDERA",
    "caldera_published": "CALDERA, published settings",
    "fast": "CALDERA, fast",
    "gptq": "GPTQ",
    "loftq": "LoftQ",
    "lr_only": "low rank alone",
    "odlri": "ODLRI",
    "q_only": "LDLQ, no rank",
    "qera": "QERA",
    "rtn": "round to nearest",
    "srr": "SRR",
}
RANGE = 5  # times the best value: what is worse has no place on the picture, and is named in the legend


def spent_by(row: pd.Series) -> str:
    """Who chose how a point's bits are spent: its method, and its budget if it has one."""
    name = WORDS.get(row["method"], row["method"])
    budget, rank = row.get("budget"), row.get("rank")
    if pd.isna(budget):
        return name
    return f"{name}, mixed bits" if pd.notna(rank) and rank == 0 else f"{name}, {budget} budget"


def methods_figure(table: pd.DataFrame, metric: str, x: str = "bits_stored", theme: str = "print") -> Figure:
    """Every method's points against the size column `x`, joined, a colour and a shape a method; optimal ones are solid.

    Of the model with most points. Band, uncompressed model and noise floor are as in `frontier_figure`. A perplexity of
    more than RANGE times the best has no place, and is named in the legend. Artists carry gids `method:<name>` (its
    line), `point:<name>`, `baseline:<name>`, `floor:<name>`, `band`. RecordError for fewer than two methods.
    """
    rows = spending(table, metric, x)
    if rows["spent"].nunique() < 2:
        raise RecordError("a comparison of methods needs points of two or more: sweep method=..., or budget=...")
    look = style.THEMES[theme]
    with matplotlib.rc_context(look.settings()):
        figure = Figure(figsize=plots.SIZE)
        label = style.metric_label(metric, table.attrs["metrics"][metric])
        axes = figure.add_subplot(xlabel=style.AXES[x], ylabel=label)
        marks = dict(zip(_order(rows), zip(cycle(style.OKABE_ITO[:6]), cycle(style.MARKERS))))
        legend = [_draw(axes, rows[rows["spent"] == name], x, metric, mark, look) for name, mark in marks.items()]
        whole = plots.uncompressed(table, metric)
        own = whole[whole["model"] == rows["model"].iloc[0]]
        lines = [plots.baseline(axes, row, metric, look) for _, row in own.iterrows()]
        plots.scale(axes, metric)
        axes.autoscale(False)  # the band may go on where no point has a place
        banded = plots.shade(axes, table, x, metric, look)
        groups = {"Method": legend, "Frontier": _key(look, banded), "Not compressed": list(map(_named, lines))}
        plots.arrange(figure, axes, {title: entries for title, entries in groups.items() if entries})
    return figure


def spending(table: pd.DataFrame, metric: str, x: str) -> pd.DataFrame:
    """Finished compressed points of the model with most, by size. RecordError without one.

    `spent` is who chose how their bits are spent, `cost` their value, the less the better, `optimal` whether they are
    on the frontier, `far` whether they are off the picture.
    """
    rows = table[is_compressed(table) & np.isfinite(table[x]) & np.isfinite(table[metric])]
    if rows.empty:
        raise RecordError("no finished compressed point has size and metric: look at the failed records.")
    rows = of_one_model(rows)
    higher, values = table.attrs["metrics"][metric]["higher_is_better"], rows[metric].astype(float)
    far = metric.startswith("perplexity/") & (values > RANGE * values.min())
    spent = [spent_by(row) for _, row in rows.iterrows()]
    found = rows.assign(
        spent=spent, cost=-values if higher else values, optimal=pareto(rows, x, metric, higher), far=far
    )
    return found.sort_values([x, "name"])


def rival(row: pd.Series, rows: pd.DataFrame, x: str) -> pd.Series:
    """Of `spending`'s points the best that is no larger than `row`: on the frontier it is the point itself."""
    front = rows[rows["optimal"] & (rows[x] <= row[x])]
    return front.loc[front["cost"].idxmin()]


def _order(rows: pd.DataFrame) -> list[str]:
    """Methods by how many of their points are optimal, then by the best that they reach."""
    found = rows.assign(optimal=rows["optimal"] & ~rows["far"])
    found = found.groupby("spent").agg(optimal=("optimal", "sum"), best=("cost", "min"))
    return list(found.sort_values(["optimal", "best"], ascending=[False, True]).index)


def _draw(axes: Axes, own: pd.DataFrame, x: str, metric: str, mark: tuple[str, str], theme: style.Theme) -> Line2D:
    """Draws a method's points; returns its entry of the legend, which also says what is off the picture."""
    (colour, shape), name, near = mark, own["spent"].iloc[0], own[~own["far"]]
    hollow = {"marker": shape, "markersize": 5.5, "markeredgecolor": colour, "markerfacecolor": theme.paper}
    axes.plot(near[x], near[metric], color=colour, linewidth=0.9, gid=f"method:{name}", zorder=3)
    for _, row in near.iterrows():
        face = {"markerfacecolor": colour} if row["optimal"] else {}
        axes.plot([row[x]], [row[metric]], linestyle="none", **hollow | face, gid=f"point:{row['name']}", zorder=4)
    off = [f"   at {row[x]:.2f} off the picture: {row[metric]:,.0f}" for _, row in own[own["far"]].iterrows()]
    return Line2D([], [], label="\n".join([name, *off]), color=colour, linewidth=0.9, **hollow)


def _named(line: Line2D) -> Line2D:
    """The legend's entry of a line of `plots.baseline`, on as many lines as it has parts."""
    words = "\n   ".join(re.split(r"[:,] ", line.get_label()))
    return Line2D([], [], label=words, color=line.get_color(), linewidth=0.9, linestyle=(0, (3, 2)))


def _key(theme: style.Theme, banded: bool) -> list[Artist]:
    solid = {"marker": "o", "markersize": 5.5, "linestyle": "none", "color": theme.muted}
    band = [Patch(facecolor=theme.grid, linewidth=0, label="90% of redrawn ones")] if banded else []
    return [Line2D([], [], label="on it", **solid), *band]
