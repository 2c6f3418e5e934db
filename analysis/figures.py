"""`caldera-figures RESULTS_DIR`: every figure that a results folder, or a W&B project, has the data for."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import records as reading
from analysis.frontier import SIZES, frontier_table
from analysis.pareto import of_one_model
from analysis.records import RecordError
from analysis.wandb_runs import PREFIX, load_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("pdf", "png")
FEW = 5  # points that one figure looks into


@dataclass(frozen=True)
class Sweep:
    """What figures are drawn from: `table` is a `frontier_table`, `matrices`, `traces` and `spectra` are long."""

    records: list[dict]
    table: pd.DataFrame
    matrices: pd.DataFrame
    traces: pd.DataFrame
    spectra: pd.DataFrame

    @classmethod
    def of(cls, records: list[dict], metric: str | None = None, folder: str | Path | None = None) -> "Sweep":
        """With the singular values in a results folder, if one is given. RecordError: no such metric."""
        spectra = reading.load_spectra(folder)
        table, matrices = frontier_table(records, metric), reading.matrices(records)
        return cls(records, table, matrices, reading.traces(records), spectra)

    @classmethod
    def read(cls, source: str, metric: str | None = None) -> "Sweep":
        """Of a results folder or a W&B project. Raises RecordError."""
        return cls.of(load(source), metric, None if source.startswith(PREFIX) else source)

    @property
    def metric(self) -> str:
        return self.table.attrs["metric"]

    def shown(self) -> pd.DataFrame:
        """A few Pareto-optimal points from the smallest to the largest, for figures that look inside points."""
        return _few(self.table[self.table["pareto"] & self.table["name"].isin(self.matrices["point"])])

    def iterated(self) -> pd.DataFrame:
        """A few points from the smallest to the largest whose fits took more than one update."""
        updates = self.traces.groupby("point")["update"].max()
        return _few(self.table[self.table["name"].isin(updates[updates > 1].index)])


def _few(rows: pd.DataFrame) -> pd.DataFrame:
    """At most FEW rows, evenly, of the model that has most."""
    rows = of_one_model(rows)
    return rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(FEW, len(rows))).astype(int))]


def load(source: str | Path) -> list[dict]:
    """The records of a results folder or of `wandb:ENTITY/PROJECT[/SWEEP]`. Raises RecordError."""
    return load_runs(str(source)) if str(source).startswith(PREFIX) else reading.load_records(source)


def figures() -> dict[str, Callable[[Sweep, str], "Figure"]]:
    """Every figure by its file's name: a function of a sweep and a theme, which raises RecordError without data."""
    from analysis import layers, methods, tradeoffs
    from analysis.plots import frontier_figure

    def frontier(size: str):
        return lambda s, theme: frontier_figure(frontier_table(s.records, s.metric, size), s.metric, SIZES[size], theme)

    return {f"frontier-{size}": frontier(size) for size in SIZES} | {
        "methods": lambda s, theme: methods.methods_figure(s.table, s.metric, theme=theme),
        "models": lambda s, theme: tradeoffs.models_figure(s.table, s.metric, theme),
        "spending": lambda s, theme: tradeoffs.spending_figure(s.table, s.metric, theme),
        "costs": lambda s, theme: tradeoffs.costs_figure(s.table, s.table.attrs["x"], theme),
        "errors": lambda s, theme: layers.heat_figure(s.shown(), s.matrices, "relative_error", theme),
        "output-errors": lambda s, theme: layers.heat_figure(s.shown(), s.matrices, "output_error", theme),
        "convergence": lambda s, theme: layers.convergence_figure(s.iterated(), s.traces, theme),
        "prediction": lambda s, theme: layers.prediction_figure(s.table, s.matrices, theme),
        "spectra": lambda s, theme: layers.spectra_figure(s.table, s.spectra, theme),
        "allocation": lambda s, theme: layers.allocation_figure(s.table, s.matrices, theme),
    }


def draw(sweep: Sweep, folder: Path, theme: str = "print") -> tuple[list[Path], dict[str, str]]:
    """Writes every figure as PDF and PNG; the files, and why others could not be drawn, by name."""
    from analysis import style

    folder.mkdir(parents=True, exist_ok=True)
    written, missing = [], {}
    for name, make in figures().items():
        try:
            figure = make(sweep, theme)
        except RecordError as error:
            missing[name] = str(error)
            continue
        for kind in KINDS:
            path = folder / f"{name}.{kind}"
            style.save(figure, path)
            written.append(path)
    return written, missing


def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-figures`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="caldera-figures", description="Every figure of a sweep, as PDF and PNG.")
    parser.add_argument(
        "results_dir", help="a sweep's output folder, or wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/SWEEP"
    )
    parser.add_argument("--metric", help="the metric of the figures (default: the first perplexity)")
    parser.add_argument("--theme", default="print", choices=("print", "dark"), help="colours (default: print)")
    parser.add_argument("--output", type=Path, help="where the files go (default: figures in the sweep's folder)")
    options = parser.parse_args(arguments)
    output = options.output or reading.home(options.results_dir) / "figures"
    try:
        written, missing = draw(Sweep.read(options.results_dir, options.metric), output, options.theme)
    except (RecordError, OSError) as error:
        print(f"caldera-figures: {error}", file=sys.stderr)
        return 1
    print("\n".join([*map(str, written), *(f"not drawn: {name}: {reason}" for name, reason in missing.items())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
