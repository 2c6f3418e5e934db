"""What bits are spent on: several models on one axis of size, rank against precision, time and memory."""

import re
from collections.abc import Iterator
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from analysis import style
from analysis.pareto import is_compressed, of_one_model, pareto
from analysis.plots import scale, uncompressed
from analysis.records import RecordError

STEPS = {"rank": "#0072B2", "precision": "#D55E00"}


def models_figure(table: pd.DataFrame, metric: str, theme: str = "print") -> Figure:
    """The frontier of every model against megabytes, a colour a model; a star is a model before compression.

    A bar at the star reaches to the same model in float32. Artists carry gids `points:<model>`, `frontier:<model>`,
    `baseline:<model>`, `floor:<model>`. RecordError for fewer than two models.
    """
    info = table.attrs["metrics"][metric]
    rows = table[(table["status"] == "done") & np.isfinite(table["megabytes"]) & np.isfinite(table[metric])]
    models = sorted(rows.loc[is_compressed(rows), "model"].unique())
    if len(models) < 2:
        raise RecordError("one axis for several models needs points of two models or more: sweep another model.")
    look = style.THEMES[theme]
    with matplotlib.rc_context(look.settings()):
        figure = Figure(figsize=(6.5, 3.9), layout="constrained")
        axes = figure.add_subplot(xlabel=style.AXES["megabytes"], ylabel=style.metric_label(metric, info))
        for model, colour in zip(models, style.palette(len(models)), strict=True):
            _model(axes, rows[rows["model"] == model], metric, info["higher_is_better"], colour, look)
        scale(axes, metric)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(StrMethodFormatter("{x:,.0f}") if _narrow(axes) else NullFormatter())
        axes.legend(title="Model (star: uncompressed)", alignment="left")
    return figure


def _narrow(axes: Axes) -> bool:
    low, high = axes.get_xlim()
    return high / low < 12


def _model(axes: Axes, rows: pd.DataFrame, metric: str, higher: bool, colour: str, theme: style.Theme) -> None:
    model, points = rows["model"].iloc[0], rows[is_compressed(rows)]
    front = points[pareto(points, "megabytes", metric, higher)].sort_values("megabytes")
    whole = uncompressed(rows, metric)
    axes.plot(points["megabytes"], points[metric], "o", color=theme.pale(colour), markersize=4, gid=f"points:{model}")
    label = style.model_label(model)
    solid = {"color": colour, "marker": "o", "markersize": 5, "linewidth": 1.2, "label": label}
    axes.plot(front["megabytes"], front[metric], **solid, gid=f"frontier:{model}")
    star = {"color": colour, "marker": "*", "markersize": 9, "linestyle": "none"}
    axes.plot(whole["megabytes"], whole["level"], **star, gid=f"baseline:{model}")
    bar = {"color": colour, "linewidth": 1, "gid": f"floor:{model}"}
    axes.vlines(whole["megabytes"], whole["level"], whole["float32"].fillna(whole["level"]), **bar)


def spending_figure(table: pd.DataFrame, metric: str, theme: str = "print") -> Figure:
    """Rank against precision: left what every split of bits buys, right what the next bit buys.

    Left, a point is where its bits went, to Q and to L R, with its value; along a dashed line the total is the same.
    Right, a line from one size to the next is as high as the improvement per bit, of perplexity in percent: more rank
    at the same Q, or a finer Q at the same rank; shaded is what float32 changes. Artists carry gids: `point:<name>`,
    `iso:<bits>`, `step:<kind>:<name>:<name>`, `floor`. RecordError where ranks or bits do not vary.
    """
    rows = _split(table, metric)
    higher = table.attrs["metrics"][metric]["higher_is_better"]
    steps = list(_steps(rows, metric, higher))
    if not steps:
        raise RecordError("rank against precision needs points that differ in rank, or in the bits of Q: sweep both.")
    look = style.THEMES[theme]
    with matplotlib.rc_context(look.settings()):
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        plane, gains = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _plane(figure, plane, rows, metric, look)
        whole = uncompressed(table, metric)
        floors = whole.loc[whole["model"] == rows["model"].iloc[0], ["float32", metric]].dropna()
        noise = max((abs(_improvement(*pair, metric, higher)) for pair in floors.to_numpy(float)), default=0.0)
        _gains(gains, steps, noise, metric, look)
    return figure


def _split(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Points with one rank and one Q for all matrices, of the model with most, and what L R and Q take of their bits.

    Scales are Q's: those of groups are half a bit, those of factors next to nothing.
    """
    rows = table[is_compressed(table) & np.isfinite(table[metric]) & np.isfinite(table["bits_stored"])]
    rows = rows[rows["rank"].notna() & rows["q_bits"].notna()] if {"rank", "q_bits"} <= set(rows) else rows[:0]
    if rows.empty:
        raise RecordError("no finished point has one rank and one Q for all matrices: sweep rank.k and quantizer@q.")
    rows = of_one_model(rows)
    factors = (rows["bits_nominal"] - rows["q_bits"].astype(float)).clip(lower=0)
    return rows.assign(factor_bits=factors, backbone_bits=rows["bits_stored"] - factors)


def _plane(figure: Figure, axes: Axes, rows: pd.DataFrame, metric: str, theme: style.Theme) -> None:
    values = rows[metric].astype(float)
    ratio = values.max() / values.min() if values.min() > 0 else 1
    norm = (LogNorm if ratio > 3 else Normalize)(values.min(), values.max())
    colours = matplotlib.colormaps["viridis"]
    shapes = dict(zip(sorted(set(map(_family, rows["q"]))), cycle(style.MARKERS)))
    _iso_bits(axes, rows, theme)
    for _, row in rows.iterrows():
        look = {"color": colours(norm(row[metric])), "markeredgecolor": theme.ink, "markeredgewidth": 0.4}
        at = row["factor_bits"], row["backbone_bits"]
        axes.plot(*at, shapes[_family(row["q"])], markersize=9, **look, gid=f"point:{row['name']}", zorder=3)
        text = f"{row[metric]:.1f}" if abs(row[metric]) > 1 else f"{row[metric]:.3f}".lstrip("0")
        patch = {"facecolor": theme.paper, "edgecolor": "none", "pad": 0.3}
        axes.annotate(text, at, (0, 7), textcoords="offset points", ha="center", fontsize=6.5, bbox=patch, zorder=2)
    if len(shapes) > 1:
        for family, shape in shapes.items():
            axes.plot([], [], shape, color=theme.muted, label=style.FAMILIES.get(family, family))
        figure.legend(loc="outside lower left", ncols=4, title=None)
    axes.set(xlabel="Bits per parameter for L R", ylabel="Bits per parameter for Q")
    axes.set_title("What a split of bits buys", loc="left", fontsize=8.5)
    axes.grid(False)


def _family(quantizer: str) -> str:
    """`e8p` of `e8p_2bit`, `nf` of `nf_2bit_g64`."""
    return re.sub(r"_\d+bit(_row|_g\d+)?$", "", quantizer)


def _iso_bits(axes: Axes, rows: pd.DataFrame, theme: style.Theme) -> None:
    """Dashed lines of equal size, each with its bits at the right end."""
    right = max(1.15 * rows["factor_bits"].max(), 0.1)
    low, high = rows["backbone_bits"].min() - 0.4, rows["backbone_bits"].max() + 0.5
    axes.set(xlim=(-0.08 * right, right), ylim=(low, high))
    for total in np.arange(np.ceil(2 * low) / 2, high + right, 0.5):
        axes.plot(
            [0, right], [total, total - right], "--", color=theme.muted, linewidth=0.6, gid=f"iso:{total:g}", zorder=1
        )
        if low < total - right < high:
            beside = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
            axes.annotate(f"{total:g}", (right, total - right), (3, 0), fontsize=6.5, color=theme.muted, **beside)
    axes.annotate(
        "total",
        (1, 1),
        (3, 0),
        xycoords="axes fraction",
        fontsize=6.5,
        color=theme.muted,
        va="top",
        textcoords="offset points",
        annotation_clip=False,
    )


def _steps(rows: pd.DataFrame, metric: str, higher: bool) -> Iterator[tuple[str, pd.Series, pd.Series, float]]:
    """(kind, before, after, improvement a bit) of neighbours that differ in the rank alone, or in Q's bits alone."""
    same = [c for c in rows.attrs.get("axes", []) if c not in ("rank", "q", "l", "r", "q_bits", "l_bits", "r_bits")]
    key = [str(tuple(row)) for row in rows[same].itertuples(index=False)]
    factors = rows["l"].astype(str) + rows["r"].astype(str)
    grid = rows.assign(key=key, family=rows["q"].map(_family), factors=factors.mask(rows["rank"] == 0, "none"))
    for (_, _, _), line in grid.groupby(["key", "q", "model"]):
        for kind in sorted(set(line["factors"]) - {"none"}):
            ordered = line[line["factors"].isin([kind, "none"])].sort_values("rank")
            yield from _pairs("rank", ordered, metric, higher)
    for _, line in grid.groupby(["key", "family", "factors", "rank"]):
        yield from _pairs("precision", line.sort_values("q_bits"), metric, higher)


def _pairs(kind: str, line: pd.DataFrame, metric: str, higher: bool):
    for (_, before), (_, after) in zip(line[:-1].iterrows(), line[1:].iterrows(), strict=True):
        bits = after["bits_stored"] - before["bits_stored"]
        if bits > 0:
            yield kind, before, after, _improvement(before[metric], after[metric], metric, higher) / bits


def _improvement(before: float, after: float, metric: str, higher: bool) -> float:
    """Of perplexities in percent of the logarithm, which adds up; else as it is."""
    if metric.startswith("perplexity/"):
        return 100 * float(np.log(before / after))
    return after - before if higher else before - after


def _gains(axes: Axes, steps: list[tuple], noise: float, metric: str, theme: style.Theme) -> None:
    for kind, before, after, gain in steps:
        look = {"color": STEPS[kind], "linewidth": 1.8, "solid_capstyle": "butt", "marker": "|", "markersize": 5}
        sizes = [before["bits_stored"], after["bits_stored"]]
        axes.plot(sizes, [gain, gain], **look, gid=f"step:{kind}:{before['name']}:{after['name']}")
    for kind, words in {"rank": "more rank, same Q", "precision": "finer Q, same rank"}.items():
        if any(step[0] == kind for step in steps):
            axes.plot([], [], color=STEPS[kind], linewidth=1.8, label=words)
    axes.axhline(0, color=theme.muted, linewidth=0.7)
    if noise:
        words = f"noise floor of one bit: {noise:.2g}"
        axes.axhspan(-noise, noise, color=theme.muted, label=words, gid="floor", zorder=0.8)
    what = "Reduction of log perplexity (% per bit)" if metric.startswith("perplexity/") else f"Better {metric} per bit"
    axes.set(xlabel="Stored bits per parameter, from and to", ylabel=what)
    axes.set_title("What the next bit buys", loc="left", fontsize=8.5)
    axes.legend(handlelength=1.2)


def costs_figure(table: pd.DataFrame, x: str = "bits_stored", theme: str = "print") -> Figure:
    """Minutes of compression and memory of the largest process against size, a colour a method.

    Hollow marks are points some of whose blocks were there already: they took less than from scratch. Artists carry
    gids `time:<name>` and `memory:<name>`. RecordError without times and memory.
    """
    rows = table[
        is_compressed(table) & np.isfinite(table[x]) & (table["compress_s"].notna() | table["memory_gb"].notna())
    ]
    if rows.empty:
        raise RecordError("no finished point says how long it took or what memory it had: run the sweep again.")
    methods = sorted(rows["method"].unique())
    colours = dict(zip(methods, style.palette(len(methods)), strict=True))
    look = style.THEMES[theme]
    with matplotlib.rc_context(look.settings()):
        figure = Figure(figsize=(6.5, 2.8), layout="constrained")
        time, memory = figure.subplots(1, 2)
        time.set(ylabel="Compression (minutes)")
        memory.set(ylabel="Peak memory of a process (GB)")
        figure.supxlabel(style.AXES[x], fontsize=8.5)
        for _, row in rows.iterrows():
            fresh = not row["reused_blocks"] > 0
            mark = {"marker": "o", "linestyle": "none", "markersize": 5, "color": colours[row["method"]]}
            mark |= {"markerfacecolor": colours[row["method"]] if fresh else look.paper}
            time.plot(row[x], row["compress_s"] / 60, **mark, gid=f"time:{row['name']}")
            memory.plot(row[x], row["memory_gb"], **mark, gid=f"memory:{row['name']}")
        for method, colour in colours.items():
            memory.plot([], [], "o", color=colour, label=method)
        for axes in (time, memory):
            axes.margins(y=0.12)
            axes.set_ylim(bottom=0)
        figure.legend(title="Method\n(hollow: blocks reused)", alignment="left", loc="outside right upper")
    return figure
