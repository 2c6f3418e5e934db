"""The one table of all sections."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPE_WIDTH = 1000  # columns when the output is no terminal: nothing is wrapped
COLUMNS = (
    "part", "case", "measured", "runs", "of equal\nproduct", "of\nW H", "textbook s", "textbook\ntakes", "error",
    "textbook's\nerror", "peak MB", "",
)  # fmt: skip
TEXTUAL = {0, 1, 11}
FOOT = (
    "measured: median of the runs. of equal product: over the time of a float32 product with as many operations, at the"
    " speed of W H. textbook: bench/textbook.py; * measured for fewer outer iterations and scaled. error: relative,"
    " after as many iterations as the textbook's. peak: resident memory, of a section in its title."
)


def number(value: float | None, form: str = ".3g", after: str = "") -> str:
    """The number in a few digits, without an exponent; nothing for None."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{form}}"
    return text + after


def cells(row: dict) -> list[str]:
    """The columns of a row, as JSON keeps it."""
    mark = "*" if row["textbook_scaled"] else ""
    return [
        row["part"],
        row["case"],
        number(row["value"], after=f" {row['unit']}"),
        str(row["runs"]),
        number(row["of_equal_product"]),
        number(row["of_product"]),
        number(row["textbook_s"], after=mark),
        number(row["textbook_slower"], after=" x"),
        number(row["error"], ".4f"),
        number(row["textbook_error"], ".4f"),
        megabytes(row["peak_bytes"]),
        row["note"],
    ]


def megabytes(size: int | None) -> str:
    return number(None if size is None else size / 1e6, ".0f")


def table_of(report: dict) -> Table:
    """All sections of a report below each other."""
    machine = report["environment"]
    kind = "quick" if report["quick"] else "full"
    title = f"{machine['processor']}, {machine['threads']} threads, torch {machine['versions']['torch']} ({kind})"
    table = Table(title=escape(title), caption=FOOT, caption_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index in TEXTUAL else "right", overflow="fold")
    for name, section in report["sections"].items():
        heading = f"{name}: {section['seconds']:.0f} s"
        table.add_row(f"[bold]{escape(heading)}", *[""] * 9, megabytes(section["peak_rss_bytes"]))
        for row in section["rows"]:
            table.add_row(*map(escape, cells(row)))
        table.add_section()
    return table


def show(report: dict) -> None:
    """Print the table: as wide as it needs where the output is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    console.print(table_of(report))
