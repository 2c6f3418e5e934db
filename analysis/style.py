"""What all figures share: themes, colour-blind-safe colours, words on axes, places of labels, how files are written."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cbook import pts_to_poststep
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

# Okabe and Ito's palette without black, which is the theme's ink; yellow last, since it is weak on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "p", "h", "*")

AXES = {
    "bits_stored": "Stored bits per parameter (compressed matrices)",
    "bits_nominal": "Nominal bits per parameter (without scales and signs)",
    "bits_model": "Stored bits per parameter (whole model)",
    "megabytes": "Stored size of the whole model (MB)",
}
MEASURES = {
    "acc": "Accuracy",
    "acc_norm": "Length-normalised accuracy",
    "agreement": "Agreement with the uncompressed model's first choices",
    "byte_perplexity": "Perplexity by byte",
    "kl": "KL divergence",
    "kl_median": "Median KL divergence",
    "kl_p90": "90th percentile of the KL divergence",
    "kl_p99": "99th percentile of the KL divergence",
    "perplexity": "Perplexity",
    "word_perplexity": "Perplexity by word",
}
TEXTS = {
    "boolq": "BoolQ passages",
    "embedded_calibration": "CoQA, SQuAD and SciQ passages",
    "embedded_heldout": "BoolQ passages",
    "embedded_validation": "DROP passages",
    "wikitext2": "WikiText-2",
    "c4": "C4",
}
MODELS = {"smollm2_135m": "SmolLM2-135M-Instruct"}
TASKS = {
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
    "piqa": "PIQA",
    "rte": "RTE",
    "winogrande": "WinoGrande",
}
FAMILIES = {"e8p": "E8P", "nf": "NormalFloat", "trellis": "Trellis", "uniform": "Uniform"}
FAMILIES |= {"uniform_asym": "Asymmetric uniform"}

# Where a label may stand, best first: points from its mark (a falling frontier is free at its top right), the same
# further off, and for a line its share of the width and points above it.
AROUND = [(6, 5), (-6, -5), (9, 0), (-9, 0), (6, -5), (-6, 5), (0, 10), (0, -10)]
ANGLES = [(1, 0.8), (-1, -0.8), (-1, 0.8), (1, -0.8), (0.4, 1), (-0.4, 1), (0.4, -1), (-0.4, -1)]
APART = [(dx * reach, dy * reach) for reach in (14, 24, 36, 48) for dx, dy in ANGLES]
ALONG = [(0.99, -3), (0.99, 3), (0.01, -3), (0.01, 3), (0.5, -3), (0.5, 3)]


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: `ink` for text and rank 0, `muted` for what stands back, on `paper`."""

    ink: str
    muted: str
    grid: str
    paper: str

    def pale(self, colour: str, share: float = 0.38) -> str:
        """`share` of `colour` on paper: opaque, so that nothing shines through and overlaps do not darken."""
        return to_hex(share * np.array(to_rgb(colour)) + (1 - share) * np.array(to_rgb(self.paper)))

    def settings(self) -> dict:
        """matplotlib's settings, for `matplotlib.rc_context`."""
        inked = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "legend.labelcolor")
        muted = ("axes.edgecolor", "xtick.color", "ytick.color")
        paper = ("figure.facecolor", "axes.facecolor")
        colours = {
            **dict.fromkeys(inked, self.ink),
            **dict.fromkeys(muted, self.muted),
            **dict.fromkeys(paper, self.paper),
        }
        return SHARED | colours | {"grid.color": self.grid}


THEMES = {
    "print": Theme(ink="#000000", muted="#666666", grid="#E6E6E6", paper="#FFFFFF"),
    "dark": Theme(ink="#F2F2F2", muted="#A6A6A6", grid="#3A3A3E", paper="#1C1C1F"),
}
SHARED = {
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.hinting": "none",  # a text is as wide at any resolution, so that labels placed once fit in every file
    "pdf.fonttype": 42,  # letters stay letters: journals refuse the default
    "svg.fonttype": "path",
    "svg.hashsalt": "caldera",
}


def palette(count: int) -> Iterator[str]:
    """`count` colours that stay apart for the colour-blind: Okabe-Ito, or cividis where that has too few."""
    if count <= len(OKABE_ITO):
        return iter(OKABE_ITO[:count])
    return (to_hex(colour) for colour in matplotlib.colormaps["cividis"](np.linspace(0, 0.95, count)))


def metric_label(metric: str, info: dict) -> str:
    """The axis label of a metric described by `table.attrs["metrics"][metric]`, with what it was measured on.

    `Perplexity (BoolQ passages, 1024-token windows)`; a metric of no known pattern is its own label.
    """
    measured_on, (first, _, last) = info.get("measured_on", {}), metric.partition("/")
    if first in MEASURES:  # perplexity/boolq_1024
        text, length = re.fullmatch(r"(.*?)(?:_(\d+))?", last).groups()
        text, length = measured_on.get("text", text), measured_on.get("length", length)
        measure, details = MEASURES[first], [TEXTS.get(text, text), length and f"{length}-token windows"]
    elif last in MEASURES:  # arc_easy/acc
        documents = measured_on.get("documents")
        measure, details = MEASURES[last], [TASKS.get(first, first), documents and f"{documents} documents"]
    else:
        return metric
    details += [f"{key} not the same for all" for key in info.get("differs", [])]
    return f"{measure} ({', '.join(detail for detail in details if detail)})"


def model_label(name: str) -> str:
    """`smollm2_135m` as people call it; an unknown name stays as it is."""
    return MODELS.get(name, name)


def quantizer_label(name: str | None, bits: float | None) -> str:
    """`e8p_2bit` at 2 bits as `E8P, 2 bits`, `nf_3bit_g64` as `NormalFloat, 3 bits, g64`; other names as they are."""
    if name is None:
        return "none"
    parts = re.fullmatch(r"(.+)_(\d+)bit(?:_(row|g\d+))?", name)
    if parts is None or bits != int(parts[2]):
        return name
    return ", ".join([FAMILIES.get(parts[1], parts[1]), f"{bits:g} bits", *filter(None, [parts[3]])])


def point_label(row: pd.Series) -> str:
    """What a point is in a legend or a title: `E8P, 2 bits + rank 32 of 4 bits`, or what its budget asked for."""
    if pd.notna(row.get("budget")) and (pd.isna(row.get("rank")) or row.get("q") == "mixed"):
        bits = [f"{row['budget_bits']:g} bits"] if pd.notna(row.get("budget_bits")) else []
        return ", ".join(
            [row["budget"], *bits, *(["no rank"] if pd.notna(row.get("rank")) and row["rank"] == 0 else [])]
        )
    bits = None if pd.isna(row.get("q_bits")) else row["q_bits"]
    backbone = quantizer_label(None if pd.isna(row.get("q")) else row["q"], bits)
    if pd.isna(row.get("rank")) or row["rank"] == 0:
        return backbone
    sides = dict.fromkeys(f"{row[side]:g}" for side in ("l_bits", "r_bits") if pd.notna(row.get(side)))
    return f"{backbone} + rank {row['rank']:g}" + (f" of {'/'.join(sides)} bits" if sides else "")


class Labels:
    """Writes texts into axes whose layout is final, where they cover nothing; a text without a place is left out."""

    def __init__(self, axes: Axes, theme: Theme):
        self.axes, self.theme = axes, theme
        marks = [line.get_xydata() for line in axes.lines if line.get_gid().startswith("point:")]
        self.marks = axes.transData.transform(np.concatenate(marks))  # (points, 2), pixels
        self.texts: list[Bbox] = []
        self.taken = [box for line in axes.lines for box in _boxes(line)]  # by lines, later by texts and leaders too

    def along(self, line: Line2D) -> None:
        """Writes the label of a horizontal line above or below it, on two lines where it is too long for one."""
        across = self.axes.get_yaxis_transform()
        for text in (line.get_label(), line.get_label().replace(", ", "\n")):
            for share, dy in ALONG:
                note = self._write(text, (share, line.get_ydata()[0]), (0, dy), 1 - 2 * share, xycoords=across)
                if self._fits(note):
                    return

    def beside(self, point: tuple[float, float], text: str) -> None:
        """Writes next to the mark at `point` of the data if no other mark is nearer, else further off with a leader."""
        own = self.axes.transData.transform(point)
        for dx, dy in AROUND:
            if self._fits(self._write(text, point, (dx, dy), dx), own):
                return
        for dx, dy in APART:
            leader = {"arrowstyle": "-", "linewidth": 0.5, "color": self.theme.muted, "shrinkA": 0, "shrinkB": 4}
            leader["relpos"] = (float(dx < 0), 0.5)  # it starts at the near end of the text
            if self._fits(self._write(text, point, (dx, dy), dx, arrowprops=leader), own):
                return

    def _write(self, text: str, point: tuple, offset: tuple, side: float, **more) -> Annotation:
        across = "left" if side > 0.5 else "right" if side < -0.5 else "center"
        up = "bottom" if offset[1] > 0 else "top" if offset[1] < 0 else "center"
        patch = {"facecolor": self.theme.paper, "edgecolor": "none", "pad": 0.5}  # hides the grid behind the text
        look = {"ha": across, "va": up, "fontsize": 7.5, "bbox": patch, "zorder": 1.5}
        return self.axes.annotate(text, point, offset, textcoords="offset points", **look, **more)

    def _fits(self, note: Annotation, own: np.ndarray | None = None) -> bool:
        """Keeps a text that covers nothing and belongs to the mark at the pixel `own`, or else removes it."""
        note.get_window_extent()  # with the leader; called because it is what moves the text to its place
        box, frame = Text.get_window_extent(note).padded(2), self.axes.bbox
        leader = _leader(box, own) if note.arrow_patch else []
        inside = (box.min >= frame.min).all() and (box.max <= frame.max).all()
        if inside and not box.count_overlaps(self.taken) and (own is None or self._belongs(box, leader, own)):
            self.texts.append(box)
            self.taken += [box, *leader]
            return True
        note.remove()
        return False

    def _belongs(self, box: Bbox, leader: list[Bbox], own: np.ndarray) -> bool:
        """Whether `own` is the nearest mark, or the leader reaches it past all other marks and texts."""
        apart = np.hypot(*(self.marks - own).T)
        if not leader:
            return _distance(box, own) <= _distance(box, self.marks[apart > 1]).min(initial=np.inf)
        others = self.marks[apart > 8]  # of marks that overlap, a line to one is a line to all
        near_mark = any(_distance(bit, others).min(initial=np.inf) < 6 for bit in leader)
        return not near_mark and not any(bit.count_overlaps(self.texts) for bit in leader)


def _leader(box: Bbox, own: np.ndarray) -> list[Bbox]:
    """The line from the mark at the pixel `own` to the near end of `box`, as small boxes."""
    end = np.array([box.x0 if box.x0 > own[0] else box.x1, (box.y0 + box.y1) / 2])
    path = own + np.linspace(0, 0.95, 24)[:, None] * (end - own)
    return [Bbox([start, stop]) for start, stop in pairwise(path)]


def _distance(box: Bbox, points: np.ndarray) -> np.ndarray:
    """How far each of `points` (..., 2) is from the box, in pixels; 0 inside."""
    outside = np.maximum(np.maximum(box.min - points, points - box.max), 0)
    return np.hypot(outside[..., 0], outside[..., 1])


def _boxes(line: Line2D) -> list[Bbox]:
    """The pixels that an artist of the axes takes: a mark's square, or one thin box for each stroke of a line."""
    if line.get_linestyle() == "None":
        return [line.get_window_extent()]
    steps = pts_to_poststep(*line.get_data()) if line.get_drawstyle() == "steps-post" else line.get_data()
    corners = line.get_transform().transform(np.transpose(steps))
    return [Bbox([start, end]) for start, end in pairwise(corners)]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place if the block succeeds, so readers see whole files."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(figure: Figure, path: Path) -> None:
    """Writes `figure` as PNG (300 dpi), SVG or PDF, by the ending of `path`; the same figure gives the same bytes."""
    kind = path.suffix.removeprefix(".")
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context(SHARED), replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=300, metadata=metadata)
