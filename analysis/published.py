"""`caldera-published RESULTS_DIR`: what was reproduced beside what others have printed (`published.yaml`)."""

import argparse
import importlib.resources
import sys
from pathlib import Path

import pandas as pd
import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.frontier import PIPE_WIDTH, score
from analysis.records import RecordError, load_records

TEXTS = {"wikitext2": ("wikitext2", "wikitext-2"), "c4": ("c4",)}  # how a metric's text is called
SETTING = ["model", "rank", "q_bits", "factor_bits"]
SHOWN = {
    "model": "model", "rank": "rank", "q_bits": "Q", "factor_bits": "factors", "method": "method", "text": "text",
    "here": "here", "published": "published", "off": "off by", "source": "source", "sure": "sure",
}  # fmt: skip


def published() -> pd.DataFrame:
    """One row a printed number: setting, nominal bits, text, window length, value, source and how sure it is."""
    rows = [
        {key: result[key] for key in (*SETTING, "bits", "length", "source", "sure")}
        | {"text": text, "published": value}
        for result in _data()["results"]
        for text, value in result.items()
        if text in TEXTS
    ]
    return pd.DataFrame(rows, dtype=object)


def sources() -> dict[str, str]:
    return _data()["sources"]


def _data() -> dict:
    return yaml.safe_load(importlib.resources.files("analysis").joinpath("published.yaml").read_text())


def reproduced(records: list[dict]) -> pd.DataFrame:
    """One row a perplexity of a finished record on one of TEXTS: setting, method, text, window length, value, error."""
    return pd.DataFrame(
        [
            _setting(record["point"])
            | {"text": text, "window": measured["measured_on"].get("length"), "here": measured["value"]}
            | {"stderr": measured["stderr"]}
            for record in records
            if record["status"] == "done"
            for name, measured in record["metrics"].items()
            if name.startswith("perplexity/") and (text := _text(name, measured)) is not None
        ],
        columns=[*SETTING, "method", "text", "window", "here", "stderr"],
        dtype=object,
    )


def _setting(point: dict) -> dict:
    """The axes that published numbers are told by; the uncompressed model is one of 16 bits."""
    if point["method"] == "none":
        return {"model": point["model"], "rank": None, "q_bits": 16, "factor_bits": None, "method": "none"}
    factors = point["l_bits"] if point["l_bits"] == point["r_bits"] else f"{point['l_bits']}/{point['r_bits']}"
    names = {key: point[key] for key in ("model", "rank", "q_bits", "method")}
    return names | {"factor_bits": factors if point["rank"] else None}


def _text(name: str, measured: dict) -> str | None:
    called = f"{name} {measured['measured_on'].get('text')}".lower()
    return next((text for text, names in TEXTS.items() if any(n in called for n in names)), None)


def comparison(records: list[dict]) -> pd.DataFrame:
    """Every published number of the records' models beside what was reproduced of it, null where nothing was.

    `off` is what is here over what is published, less 1. Raises RecordError when nothing is published of any of the
    models.
    """
    known, models = published(), {record["point"]["model"] for record in records}
    chosen = known[known["model"].isin(models)]
    if chosen.empty:
        known_models = ", ".join(dict.fromkeys(known["model"]))
        raise RecordError(
            f"nothing is published of {', '.join(sorted(models))}: model.name must be one of {known_models}."
        )
    keys = [*SETTING, "text"]
    sides = [frame.assign(key=frame[keys].map(str).agg(" ".join, axis=1)) for frame in (chosen, reproduced(records))]
    found = sides[0].merge(sides[1].drop(columns=keys), on="key", how="left").drop(columns="key")
    ratio = found["here"].astype(float) / found["published"].astype(float) - 1
    return found.assign(off=ratio, differs=found["window"].notna() & (found["window"] != found["length"]))


def show(table: pd.DataFrame) -> None:
    """The comparison, and what its sources and marks mean."""
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in SHOWN.values():
        view.add_column(header, justify="right" if header in ("here", "published", "off by") else "left")
    for _, row in table.iterrows():
        view.add_row(*map(escape, _cells(row)))
    console.print(view)
    notes = [f"{name}: {text}" for name, text in sources().items() if name in set(table["source"])]
    if table["differs"].any():
        notes.append("* measured on windows of another length than the published number (or of one that is not known)")
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _cells(row: pd.Series) -> list[str]:
    here = "-" if pd.isna(row["here"]) else score(row["here"], row["stderr"]) + " *" * row["differs"]
    special = {
        "here": here,
        "published": f"{row['published']:g}",
        "off": "-" if pd.isna(row["off"]) else f"{row['off']:+.1%}",
    }
    return [special.get(key, "-" if pd.isna(row[key]) else str(row[key])) for key in SHOWN]


def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-published`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="caldera-published", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument(
        "results_dir", type=Path, help="the output folder of a sweep, for example experiment=paper_llama2_7b"
    )
    options = parser.parse_args(arguments)
    try:
        show(comparison(load_records(options.results_dir)))
    except (RecordError, OSError) as error:
        print(f"caldera-published: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
