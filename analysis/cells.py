"""What the cells of notebooks call: a figure, a table, commands to copy; or a sentence on what there is no data for."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd

from analysis.figures import Sweep, figures
from analysis.frontier import frontier_table
from analysis.records import RecordError

DPI = 200
INCH = 110  # pixels on the page


@contextmanager
def or_say_why() -> Iterator[None]:
    """Of what there is no data for, prints why and what would change it; the article goes on."""
    try:
        yield
    except RecordError as error:
        print(f"Nothing to show here: {error}")


def show(sweep: Sweep, name: str, metric: str | None = None, theme: str = "print") -> None:
    """Displays a figure of `analysis.figures` by its name, or says why there is none.

    `metric` is how the name of its metric begins, by default the sweep's.
    """
    from IPython.display import Image, display
    from matplotlib import rc_context

    from analysis.style import SHARED

    with or_say_why():
        known = figures()
        if name not in known:
            raise RecordError(f"no figure is called {name!r}: choose one of {', '.join(known)}.")
        figure = known[name](sweep if metric is None else measured(sweep, metric), theme)
        buffer = io.BytesIO()
        with rc_context(SHARED):
            figure.savefig(buffer, format="png", dpi=DPI)
        display(Image(buffer.getvalue(), width=round(INCH * figure.get_figwidth())))


def measured(sweep: Sweep, beginning: str) -> Sweep:
    """The sweep by its first metric whose name begins so. Raises RecordError."""
    found = [name for name in sweep.table.attrs["metrics"] if name.partition("/")[0] == beginning]
    if not found:
        raise RecordError(f"no record has the metric {beginning}: evaluate with it, as evaluation=standard does.")
    return replace(sweep, table=frontier_table(sweep.records, found[0]))


def tabulate(table: pd.DataFrame | list[dict], index: bool = False) -> None:
    """Displays a table, or rows, whole, numbers with four digits."""
    from IPython.display import HTML, display

    look = {"float_format": _number, "na_rep": "", "border": 0, "justify": "left"}
    with pd.option_context("display.max_colwidth", None):
        display(HTML(pd.DataFrame(table).to_html(index=index, **look)))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"


def commands(sweep: Sweep) -> None:
    """Displays what tells the settings of the optimal points apart, and prints the commands that make them again."""
    from analysis.report import optimal_settings

    found = pd.DataFrame(optimal_settings(sweep))
    with or_say_why():
        if found.empty:
            raise RecordError("no optimal point tells its settings: only records on disk do.")
        tabulate(found[["label", "size", "apart"]])
        for _, row in found.iterrows():
            print(f"# {row['label']}, {row['size']}\n{row['command']}\n")
