"""What happened inside a model: errors, ranks and bits of matrices, how fits converged, what theory expected."""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from analysis import style
from analysis.records import RecordError
from analysis.style import point_label

MOST = 5  # points side by side
NAMES = {"relative_error": "Relative error", "output_error": "Output error", "stored_bits": "Bits", "rank": "Rank"}


def heat_figure(
    table: pd.DataFrame, matrices: pd.DataFrame, value: str = "relative_error", theme: str = "print"
) -> Figure:
    """Block by projection, a panel a point, all in one scale of colour; matrices of one place (experts) are averaged.

    `table` has the points to draw, at most MOST, in order. Panels carry gids `heat:<point>`. RecordError when no matrix
    of theirs has that value.
    """
    found = {row["name"]: grid(matrices, row["name"], value) for _, row in table.iterrows()}
    found = {name: cells for name, cells in found.items() if np.isfinite(cells.to_numpy()).any()}
    if not found:
        raise RecordError(f"no point has the {value} of its matrices: only records on disk have them.")
    heights = [len(cells) for cells in found.values()]
    everything = np.concatenate([cells.to_numpy().ravel() for cells in found.values()])
    norm = _norm(everything[np.isfinite(everything)], value)
    look = style.THEMES[theme]
    titles = {row["name"]: point_label(row) for _, row in table.iterrows()}
    with matplotlib.rc_context(look.settings()):
        figure = Figure(figsize=(6.5, 0.45 + sum(0.42 + 0.135 * height for height in heights)), layout="constrained")
        panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, cells) in zip(panels, found.items(), strict=True):
            image = _heat(axes, cells, norm)
            image.set_gid(f"heat:{name}")
            axes.set_title(titles[name], loc="left", fontsize=8)
        panels[-1].set_xlabel("Decoder block")
        bar = figure.colorbar(image, ax=list(panels), aspect=30, pad=0.015, label=NAMES.get(value, value))
        bar.outline.set_visible(False)
        if isinstance(norm, LogNorm):
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def grid(matrices: pd.DataFrame, point: str, value: str) -> pd.DataFrame:
    """Projections by blocks, in the order in which they run; what is not there is NaN."""
    own = matrices[(matrices["point"] == point) & matrices["block"].notna()]
    cells = own.assign(value=own[value].astype(float)).pivot_table("value", "projection", "block", "mean", dropna=False)
    return cells.reindex(list(dict.fromkeys(own["projection"])))


def _norm(values: np.ndarray, value: str) -> Normalize:
    positive = values.min() > 0 and values.max() > 3 * values.min()
    low, high = values.min(), values.max() if values.max() > values.min() else values.min() + 1e-12
    return LogNorm(low, high) if positive and value not in ("rank", "stored_bits") else Normalize(low, high)


def _heat(axes: Axes, cells: pd.DataFrame, norm: Normalize):
    axes.grid(False)
    axes.set_yticks(range(len(cells)), cells.index, fontsize=6.5)
    axes.tick_params(length=0)
    blocks = cells.columns.astype(int)
    edges = (blocks.min() - 0.5, blocks.max() + 0.5, len(cells) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes.imshow(
        cells.to_numpy(), norm=norm, cmap="viridis", aspect="auto", extent=edges, interpolation="nearest"
    )


def allocation_figure(table: pd.DataFrame, matrices: pd.DataFrame, theme: str = "print") -> Figure:
    """Where a budget put its bits: block by projection, left ranks, right stored bits, a row a point.

    Points whose matrices are all alike are left out. Images carry gids `rank:<point>` and `bits:<point>`.
    """
    differing = matrices.groupby("point")[["rank", "q"]].nunique().max(axis=1) > 1
    rows = table[table["name"].isin(differing[differing].index)].head(MOST)
    if rows.empty:
        raise RecordError("no point's matrices differ in rank or quantizer: sweep budget=allocated.")
    look = style.THEMES[theme]
    found = {
        row["name"]: [grid(matrices, row["name"], value) for value in ("rank", "stored_bits")]
        for _, row in rows.iterrows()
    }
    heights = [len(cells[0]) for cells in found.values()]
    with matplotlib.rc_context(look.settings()):
        figure = Figure(figsize=(6.5, 0.6 + sum(0.42 + 0.14 * height for height in heights)), layout="constrained")
        panels = figure.subplots(len(found), 2, squeeze=False, height_ratios=heights)
        for column, (value, kind) in enumerate({"rank": "rank", "stored_bits": "bits"}.items()):
            norm = _norm(np.concatenate([cells[column].to_numpy().ravel() for cells in found.values()]), value)
            for axes, (name, cells) in zip(panels[:, column], found.items(), strict=True):
                image = _heat(axes, cells[column], norm)
                image.set_gid(f"{kind}:{name}")
                axes.set_yticks(axes.get_yticks() if column == 0 else [])
            panels[-1, column].set_xlabel("Decoder block")
            label = "Rank" if column == 0 else "Stored bits per parameter"
            bar = figure.colorbar(image, ax=list(panels[:, column]), location="top", aspect=40, pad=0.02, label=label)
            bar.outline.set_visible(False)
        for axes, (_, row) in zip(panels[:, 0], rows.iterrows(), strict=True):
            axes.set_title(point_label(row), loc="left", fontsize=8)
    return figure


def convergence_figure(table: pd.DataFrame, traces: pd.DataFrame, theme: str = "print") -> Figure:
    """The relative error after every update of Q or of L R: a point's median over its matrices, and the middle 80%.

    Artists carry gids `median:<point>`. RecordError where nothing was iterated.
    """
    known = traces[traces["point"].isin(table["name"])]
    long = known.groupby("point")["update"].max()
    rows = table[table["name"].isin(long[long > 1].index)]
    if rows.empty:
        raise RecordError("no point has a fit of more than one update: sweep ranks above 0.")
    look = style.THEMES[theme]
    with matplotlib.rc_context(look.settings()):
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        axes = figure.add_subplot(
            xlabel="Update (of L R, of Q, and so on)", ylabel="Relative error of a matrix", yscale="log"
        )
        for (_, row), colour in zip(rows.iterrows(), style.palette(len(rows)), strict=True):
            own = known[known["point"] == row["name"]]
            errors = own.pivot_table("error", "update", "matrix").ffill()  # a fit that has ended stays where it is
            low, mid, high = (errors.quantile(q, axis=1) for q in (0.1, 0.5, 0.9))
            axes.fill_between(mid.index.astype(int), low, high, color=colour, alpha=0.13, linewidth=0)
            line = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.3}
            axes.plot(mid.index.astype(int), mid, **line, label=point_label(row), gid=f"median:{row['name']}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(title="Median, and 10% to 90% of matrices", alignment="left")
    return figure


def prediction_figure(table: pd.DataFrame, matrices: pd.DataFrame, theme: str = "print") -> Figure:
    """Measured against predicted relative error, a mark a matrix of the points in `table`, a colour a projection.

    Artists carry gids `projection:<name>` and `equal`. RecordError without predictions.
    """
    rows = matrices[matrices["point"].isin(table["name"])].dropna(subset=["predicted_error", "relative_error"])
    rows = rows[(rows["predicted_error"].astype(float) > 0) & (rows["relative_error"].astype(float) > 0)]
    if rows.empty:
        raise RecordError("no matrix has a predicted error: compress with method.moments=measured.")
    look = style.THEMES[theme]
    projections = list(dict.fromkeys(rows["projection"]))
    with matplotlib.rc_context(look.settings()):
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        axes = figure.add_subplot(
            xlabel="Predicted relative error", ylabel="Measured relative error", xscale="log", yscale="log"
        )
        both = rows[["predicted_error", "relative_error"]].astype(float).to_numpy()
        ends = [both.min() / 1.1, both.max() * 1.1]
        axes.plot(ends, ends, color=look.muted, linewidth=0.8, zorder=1, gid="equal")
        for projection, colour in zip(projections, style.palette(len(projections)), strict=True):
            own = rows[rows["projection"] == projection]
            mark = {"color": colour, "markersize": 2.6, "linestyle": "none", "marker": "o", "alpha": 0.7}
            axes.plot(
                own["predicted_error"], own["relative_error"], **mark, label=projection, gid=f"projection:{projection}"
            )
        ratio = np.log(both[:, 1] / both[:, 0])
        text = f"measured / predicted: {np.exp(np.median(ratio)):.3f}\n(median of {len(both)} matrices)"
        axes.text(0.97, 0.04, text, transform=axes.transAxes, ha="right", fontsize=7.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.legend(markerscale=2)
    return figure


def spectra_figure(table: pd.DataFrame, spectra: pd.DataFrame, theme: str = "print") -> Figure:
    """Singular values of W C, of W^ C, and of what is missing, a panel a projection of one block.

    Of the first point in `table` that has spectra, its first block; a dotted line is the rank of L R. Artists carry
    gids `before:<matrix>`, `after:<matrix>`, `missing:<matrix>`. RecordError without spectra.
    """
    rows = table[table["name"].isin(spectra["point"])]
    if rows.empty:
        raise RecordError("no point has singular values: compute them with caldera-spectra.")
    row = rows.iloc[0]
    own = spectra[spectra["point"] == row["name"]]
    own = own[own["block"] == own["block"].min()]
    look, names = style.THEMES[theme], list(dict.fromkeys(own["matrix"]))
    columns = min(4, len(names))
    height = -(-len(names) // columns)
    lines = {
        "before": (look.ink, "W C"),
        "after": ("#D55E00", "(Q + L R) C"),
        "missing": ("#0072B2", "(W - Q - L R) C"),
    }
    with matplotlib.rc_context(look.settings()):
        figure = Figure(figsize=(6.5, 0.7 + 1.6 * height), layout="constrained")
        panels = figure.subplots(height, columns, squeeze=False).ravel()
        for axes, name in zip(panels, names):
            one = own[own["matrix"] == name]
            for kind, (colour, words) in lines.items():
                values = one[kind].astype(float).where(lambda v: v > 1e-6 * v.max())
                dash = (0, (4, 2)) if kind == "after" else "-"
                axes.plot(
                    one["index"].astype(int),
                    values,
                    color=colour,
                    linewidth=1,
                    linestyle=dash,
                    label=words,
                    gid=f"{kind}:{name}",
                )
            if pd.notna(row["rank"]) and row["rank"] > 0:
                axes.axvline(int(row["rank"]), color=look.muted, linestyle=":", linewidth=0.8)
            axes.set(xscale="log", yscale="log")
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-3 * one["before"].max()))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(one["projection"].iloc[0], loc="left", fontsize=8)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(labelsize=6.5)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        figure.supxlabel("Index", fontsize=8.5)
        figure.supylabel("Singular value", fontsize=8.5)
        figure.suptitle(f"{point_label(row)}, block {own['block'].iloc[0]}", x=0.01, y=0.985, ha="left", fontsize=8.5)
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper right", ncols=3)
    return figure
