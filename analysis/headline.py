"""`make figures`: the README's figure and table, from the records that they are made of.

Those records, without matrices, are kept in one file beside the figure: whoever has no hours to spare draws it from
them, and a test finds a README that says something else.
"""

import argparse
import gzip
import json
import math
import sys
from pathlib import Path

import pandas as pd

from analysis import style
from analysis.compare import compare
from analysis.facts import answers, caveats, environment
from analysis.figures import Sweep, figures
from analysis.frontier import score
from analysis.methods import rival, spending
from analysis.records import RecordError

BEGIN, END = "<!-- made by `make figures`: do not edit -->", "<!-- end of what `make figures` makes -->"
PICTURE, RECORDS = "frontier.png", "headline.json.gz"
SIZE = "bits_stored"
MACHINE = "processor", "gpu", "threads", "memory", "torch", "transformers"


def section(sweep: Sweep) -> str:
    """Markdown: where the numbers come from, the short answer, the table, the caveats."""
    parts = [_origin(sweep), _answers(sweep), _table(sweep), _doubts(sweep)]
    return "\n\n".join(part for part in parts if part)


def _origin(sweep: Sweep) -> str:
    """Model, calibration, protocol, precision, machine."""
    record = next(
        record for record in sweep.records if record["status"] == "done" and record["point"]["rank"] is not None
    )
    config, table = record["config"], sweep.table
    model = style.model_label(record["point"]["model"])
    calibration, on = config["calibration"], table.attrs["metrics"][sweep.metric]["measured_on"]
    text = Path(calibration["text"]).stem
    machine = ", ".join(f"{key} {value}" for key, value in environment(sweep.records) if key in MACHINE)
    done = table[table["status"] == "done"]
    label = style.metric_label(sweep.metric, table.attrs["metrics"][sweep.metric])
    rows = f"{calibration['sequences']} x {calibration['length']} tokens ({style.TEXTS.get(text, text)})"
    count = (done["method"] != "none").sum()
    return (
        f"{count} points of `caldera-run experiment={record['sweep']}` on {model}, calibrated"
        f" on {rows}, seed {config['seed']}. {label}: {on['rows']} windows, {on['dtype']}, ± the standard error over"
        f" windows. Machine: {machine}."
    )


def _answers(sweep: Sweep) -> str:
    return "\n".join(
        f"* at most {one['tolerance']} worse than uncompressed: **{one['size']}** a parameter, {one['label']},"
        f" {one['value']}"
        for one in answers(sweep.table)
    )


def _table(sweep: Sweep) -> str:
    """Every Pareto-optimal point, and of each other method the point that comes nearest to the frontier."""
    rows = spending(sweep.table, sweep.metric, SIZE)
    records = {record["name"]: record for record in sweep.records}
    rows["behind"] = [_behind(row, rows, records, sweep.metric) for _, row in rows.iterrows()]
    nearest = rows.assign(by=rows["behind"].map(lambda found: found[0])).sort_values("by").groupby("spent").head(1)
    shown = rows[rows["optimal"] | rows.index.isin(nearest.index)]
    whole = sweep.table[(sweep.table["method"] == "none") & (sweep.table["model"] == rows["model"].iloc[0])]
    kl = next((name for name in sweep.table.attrs["metrics"] if name.startswith("kl/")), None)
    heads = ["", "rank", "Q", "stored bits", "model bits", "MB", "perplexity", "KL", "worse than the frontier (95%)"]
    cells = [_cells(row, sweep.metric, kl) for _, row in pd.concat([whole, shown]).iterrows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *cells])


def _behind(row: pd.Series, rows: pd.DataFrame, records: dict, metric: str) -> tuple[float, float, float]:
    """How much worse than the frontier at that size, and the ends of the paired interval; zeros on it."""
    if row["optimal"]:
        return 0.0, math.nan, math.nan
    best = rival(row, rows, SIZE)
    found = compare(records[best["name"]], records[row["name"]]).set_index("metric").loc[metric]
    return found["difference"], found["low"], found["high"]


def _cells(row: pd.Series, metric: str, kl: str | None) -> list[str]:
    whole = row["method"] == "none"
    name = "uncompressed" if whole else row["spent"]
    rank = "" if pd.isna(row["rank"]) else f"{row['rank']:g}"
    sizes = [f"{row['bits_stored']:.3f}", f"{row['bits_model']:.2f}", f"{row['megabytes']:.1f}"]
    divergence = "" if whole or kl is None or pd.isna(row[kl]) else f"{row[kl]:.3f}"
    values = [score(row[metric], row[f"{metric}:stderr"]), divergence]
    if not whole and row["optimal"] and not row["far"]:
        return [f"**{name}**", rank, _q(row), *sizes, f"**{values[0]}**", values[1], ""]
    behind = "" if whole else "nothing else is as small" if row["optimal"] else _percent(row["behind"])
    return [name, rank, _q(row), *sizes, *values, behind]


def _q(row: pd.Series) -> str:
    return "" if pd.isna(row.get("q")) else f"`{row['q']}`"


def _percent(behind: tuple[float, float, float]) -> str:
    difference, low, high = (f"{share:.1%}" if abs(share) < 1 else f"{share:,.0%}" for share in behind)
    return f"{difference} ({low} to {high})"


def _doubts(sweep: Sweep) -> str:
    return "\n".join(f"* {caveat}" for caveat in caveats(sweep.records, sweep.table))


def pack(records: list[dict], path: Path) -> None:
    """Write records as one compressed file, without matrices and without the folders and the kernel of their machine.

    The same records give the same bytes.
    """
    text = json.dumps(list(map(_portable, records)), sort_keys=True, separators=(",", ":"))
    with style.replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def _portable(record: dict) -> dict:
    config = record["config"] | {"results": f"results/{record.get('sweep')}", "cache": None}
    machine = {key: value for key, value in (record.get("environment") or {}).items() if key != "platform"}
    return record | {"config": config, "environment": machine, "matrices": []}


def put(text: str, readme: str) -> str:
    """The README with the text between its two marks. Raises RecordError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise RecordError(f"the README has no place for the table: it goes between {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Writes docs/frontier.png, docs/headline.json.gz and the README's section; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make figures", description="The README's figure and table, from records.")
    parser.add_argument("results_dir", nargs="?", type=Path, help="a sweep's output folder (default: the kept records)")
    parser.add_argument("--root", type=Path, default=Path(), help="where README.md and docs are")
    options = parser.parse_args(arguments)
    docs, readme = options.root / "docs", options.root / "README.md"
    try:
        sweep = Sweep.read(str(options.results_dir or docs / RECORDS))
        text = put(section(sweep), readme.read_text(encoding="utf-8"))
        style.save(figures()["methods"](sweep, "print"), docs / PICTURE)
        pack(sweep.records, docs / RECORDS)
        with style.replacing(readme) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except (RecordError, OSError) as error:
        print(f"make figures: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, (docs / PICTURE, docs / RECORDS, readme))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
