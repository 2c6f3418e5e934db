"""The figures of a paper, on matplotlib's object interface: no pyplot, no display, no global state."""

from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from analysis import style
from analysis.frontier import score
from analysis.pareto import is_compressed, pareto
from analysis.records import RELATIVE, RecordError

SIZE = (6.5, 3.9)  # inches: the text width of a one-column article; a long legend makes it higher
OUTER, HOLE = 7.2, 4.8  # points: the width of a mark, and of the hole of a hollow one
LOGARITHMIC = ("perplexity/", "kl/", "kl_")  # how metrics begin whose axis is
WHISKER = {"linewidth": 1, "marker": "_", "markersize": 4, "markeredgewidth": 1}
LEGEND = {"loc": "upper left", "alignment": "left", "title_fontproperties": {"weight": "bold"}}
LEGEND |= {"borderpad": 0, "borderaxespad": 0, "labelspacing": 0.35, "handlelength": 1.4}


def frontier_figure(table: pd.DataFrame, metric: str, x: str = "bits_stored", theme: str = "print") -> Figure:
    """The frontier of a `tidy` table: `metric` against the size column `x`, in the colours of `style.THEMES[theme]`.

    Colour is the rank, shape Q's quantizer, fill the bits of L and R, from hollow to solid. Pareto-optimal points are
    joined and labelled, dominated ones pale; the uncompressed model is a dashed line. The band of a `frontier_table` is
    shaded, and so is the noise floor, between the uncompressed model and the same in float32. Rows that lack one of the
    two values are left out; RecordError if none is left. Artists carry gids: `point:<name>` a mark, `stderr:<name>` its
    error, `baseline:<name>` a dashed line, `floor:<name>`, `frontier` the steps, `band` their band.
    """
    info = table.attrs.get("metrics", {}).get(metric, {})
    rows = table[is_compressed(table) & np.isfinite(table[x]) & np.isfinite(table[metric])].reset_index(drop=True)
    if rows.empty:
        raise RecordError(f"no finished compressed point has both {x} and {metric}: look at the failed records.")
    front = rows[pareto(rows, x, metric, info.get("higher_is_better", False))].sort_values(x)
    theme = style.THEMES[theme]
    with matplotlib.rc_context(theme.settings()):
        figure = Figure(figsize=SIZE)
        axes = figure.add_subplot(xlabel=style.AXES[x], ylabel=style.metric_label(metric, info))
        steps = {"drawstyle": "steps-post", "color": theme.muted, "linewidth": 1, "zorder": 2}
        axes.plot(front[x], front[metric], **steps, gid="frontier")
        shaded = shade(axes, table, x, metric, theme)
        marks = Marks(rows, theme, shaded)
        for index, row in rows.iterrows():
            marks.draw(axes, row, x, metric, optimal=index in front.index)
        lines = [baseline(axes, row, metric, theme) for _, row in uncompressed(table, metric).iterrows()]
        scale(axes, metric)
        arrange(figure, axes, marks.legend())
        labels = style.Labels(axes, theme)
        for line in lines:
            labels.along(line)
        for _, row in front.iterrows():
            labels.beside((row[x], row[metric]), marks.label(row))
    return figure


def shade(axes: Axes, table: pd.DataFrame, x: str, metric: str, theme: style.Theme) -> bool:
    """Shades the band if the table has one for these axes; whether it has."""
    band = table.attrs.get("band")
    if not band or (table.attrs["x"], table.attrs["metric"]) != (x, metric) or len(band["size"]) < 2:
        return False
    look = {"color": theme.grid, "linewidth": 0, "zorder": 0.5}
    axes.fill_between(band["size"], band["low"], band["high"], step="post", gid="band", **look)
    return True


def uncompressed(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Models as they are, with `level`, where to draw them, and `float32`, what the same model scores in float32.

    What compares with the uncompressed model is drawn at its float32 value, the noise floor: its own is zero, or one,
    by definition. Without a noise floor such a row is left out.
    """
    rows = table[(table["status"] == "done") & (table["method"] == "none") & np.isfinite(table[metric])]
    exact = table.attrs["float32"]
    float32 = rows["model"].map(lambda model: exact.get(model, {}).get(metric, np.nan)).astype(float)
    relative = metric.startswith(RELATIVE)
    return rows.assign(float32=float32, level=float32 if relative else rows[metric]).dropna(subset="level")


def baseline(axes: Axes, row: pd.Series, metric: str, theme: style.Theme) -> Line2D:
    """A dashed line for a row of `uncompressed`; its label is the text that `Labels.along` writes beside it.

    Shaded, with gid `floor:<name>`, is what lies between the model and the same in float32.
    """
    if row["level"] == row[metric] and pd.notna(row["float32"]):
        ends = sorted([row["float32"], row["level"]])
        axes.axhspan(*ends, color=theme.muted, gid=f"floor:{row['name']}", zorder=0.8)
    look = {"color": theme.ink, "linewidth": 0.9, "linestyle": (0, (5, 3)), "zorder": 1}
    return axes.axhline(row["level"], label=baseline_label(row, metric), gid=f"baseline:{row['name']}", **look)


def baseline_label(row: pd.Series, metric: str) -> str:
    """`uncompressed SmolLM2: 20.95 ± 0.84, in float32 20.94`, or what the noise floor of a divergence is."""
    name, exact = style.model_label(row["model"]), row["float32"]
    if metric.startswith(RELATIVE):
        return f"noise floor, {name} in float32: {exact:.2g}"
    text = f"uncompressed {name}: {score(row[metric], row[f'{metric}:stderr'])}"
    return text if pd.isna(exact) else f"{text}, in float32 {_close(exact, row[metric])}"


def _close(exact: float, value: float) -> str:
    """With as many digits as tell the two apart, two at least."""
    digits = next((d for d in range(2, 6) if f"{exact:.{d}f}" != f"{value:.{d}f}"), 2)
    return f"{exact:,.{digits}f}"


def scale(axes: Axes, metric: str) -> None:
    """Perplexities and divergences on a logarithmic axis with plain numbers at its ticks, and room at every side."""
    axes.margins(x=0.08, y=0.1)
    if not metric.startswith(LOGARITHMIC):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow = high / low < 2.5
    decade = (1, 2, 3, 4, 5, 6, 8) if high / low < 12 else (1, 2, 5) if high / low < 200 else (1,)
    axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=decade, numticks=99))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def arrange(figure: Figure, axes: Axes, groups: dict[str, list[Artist]]) -> None:
    """Sets the legend of each group below the other, right of the axes, and freezes the layout."""
    legends = [
        Legend(figure, handles, [handle.get_label() for handle in handles], title=title, **LEGEND)
        for title, handles in groups.items()
    ]
    for legend in legends:
        figure.add_artist(legend).set_in_layout(False)
    sizes = [legend.get_window_extent() for legend in legends]
    gap = 10 / 72 * figure.dpi  # ten points
    height = sum(size.height + gap for size in sizes) + gap
    figure.set_figheight(max(SIZE[1], height / figure.dpi))
    width, height = figure.bbox.size
    left, top = 1 - (max(size.width for size in sizes) + gap) / width, 1 - gap / height
    for legend, size in zip(legends, sizes, strict=True):
        legend.set_bbox_to_anchor((left, top), figure.transFigure)
        top -= (size.height + gap) / height
    figure.set_layout_engine("constrained", rect=(0, 0, left - gap / width, 1))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


class Marks:
    """How points look: `colours` by rank, `shapes` by Q's quantizer, `fills` by the bits of L and R.

    The keys of the three are sortable and end in the words of the legend.
    """

    def __init__(self, rows: pd.DataFrame, theme: style.Theme, shaded: bool = False):
        self.theme, self.shaded = theme, shaded
        reads = (_rank, _quantizer, _factors)
        ranks, shapes, fills = (sorted({read(row) for _, row in rows.iterrows()}) for read in reads)
        coloured = [rank for rank in ranks if rank != _key(0)]
        palette = zip(coloured, style.palette(len(coloured)), strict=True)
        self.colours = dict.fromkeys(ranks, theme.ink) | dict(palette)
        self.shapes = dict(zip(shapes, cycle(style.MARKERS)))
        fills = [key for key in fills if key]
        self.fills = dict(zip(fills, np.linspace(0 if len(fills) > 1 else 1, 1, len(fills)), strict=True))

    def draw(self, axes: Axes, row: pd.Series, x: str, y: str, optimal: bool) -> None:
        """One mark and its standard error; a dominated one pale and behind."""
        colour = self.colours[_rank(row)]
        colour, layer = (colour, 4) if optimal else (self.theme.pale(colour), 3)
        if np.isfinite(stderr := row[f"{y}:stderr"]):
            ends = [row[y] - stderr, row[y] + stderr]
            axes.plot([row[x]] * 2, ends, **WHISKER, color=colour, gid=f"stderr:{row['name']}", zorder=layer)
        look = self._look(colour, self.shapes[_quantizer(row)], self.fills.get(_factors(row), 1))
        axes.plot(row[x], row[y], **look, gid=f"point:{row['name']}", zorder=layer + 0.5)

    def label(self, row: pd.Series) -> str:
        """What stands beside a Pareto-optimal mark: its rank, or what chose ranks, and the bits of factors, if any."""
        (kind, _, rank), factors = _rank(row), _factors(row)
        return (rank if kind == 1 else f"rank {rank}") + (f", {factors[-1]}-bit L, R" if factors else "")

    def legend(self) -> dict[str, list[Artist]]:
        """The handles below each heading; headings without entries are left out."""
        muted, whisker = self.theme.muted, WHISKER | {"marker": "|", "markersize": 7, "linestyle": "none"}
        groups = {
            "Rank of L R": [self._entry(rank[-1], colour) for rank, colour in self.colours.items()],
            "Quantizer of Q": [self._entry(key[-1], muted, shape) for key, shape in self.shapes.items()],
            "Bits of L and R": [self._entry(key[-1], muted, fill=fill) for key, fill in self.fills.items()],
            "Frontier": [
                Line2D([], [], color=muted, linewidth=1, label="Pareto-optimal"),
                self._entry("dominated (pale)", self.theme.pale(self.theme.ink)),
                Line2D([], [], **whisker, color=muted, label="± standard error"),
            ],
        }
        if self.shaded:
            groups["Frontier"].append(Patch(color=self.theme.grid, label="90% of redrawn frontiers"))
        return {heading: entries for heading, entries in groups.items() if entries}

    def _entry(self, label: str, colour: str, shape: str = "o", fill: float = 1) -> Line2D:
        return Line2D([], [], label=label, **self._look(colour, shape, fill))

    def _look(self, colour: str, shape: str, fill: float) -> dict:
        """A ring that is thicker the higher `fill`, solid at 1, of the same outer size."""
        hole = (1 - fill) * HOLE if fill < 1 else HOLE
        size = {"markersize": (OUTER + hole) / 2, "markeredgewidth": (OUTER - hole) / 2}
        face = colour if fill == 1 else self.theme.paper
        return size | {"linestyle": "none", "marker": shape, "markeredgecolor": colour, "markerfacecolor": face}


def _key(value) -> tuple:
    """(kind, number, words) of an axis value: numbers sort first, then names, then what a record does not give."""
    if pd.isna(value):
        return 2, 0, "not given"
    return (1, 0, value) if isinstance(value, str) else (0, value, f"{value:g}")


def _rank(row: pd.Series) -> tuple:
    """The rank; where matrices differ in it, the strategy of the budget that chose them."""
    rank = row.get("rank")
    return _key(row.get("budget") if pd.isna(rank) else rank)


def _quantizer(row: pd.Series) -> tuple:
    bits = row.get("q_bits")
    q = row.get("q")
    return *_key(bits), style.quantizer_label(None if pd.isna(q) else q, None if pd.isna(bits) else bits)


def _factors(row: pd.Series) -> tuple:
    left, right = _key(row.get("l_bits")), _key(row.get("r_bits"))
    if _key(row.get("rank")) == _key(0) or left[0] == right[0] == 2:
        return ()
    return left, right, left[-1] if left == right else f"{left[-1]}/{right[-1]}"
