"""Tables of a sweep for articles: what was measured, the points, two of them side by side, matrices, methods."""

import math

import numpy as np
import pandas as pd
from scipy.stats import t

from analysis.compare import LEVEL, compare, signed
from analysis.figures import Sweep
from analysis.frontier import DETAILS, score
from analysis.methods import rival, spending
from analysis.records import ERRORS, RecordError
from analysis.style import metric_label, point_label


def labels(rows: pd.DataFrame) -> dict[str, str]:
    """What each point is, by name, in few words; with the method, or the whole name, where those are not one's own."""
    whole = rows["method"] == "none"
    short = rows.apply(point_label, axis=1).mask(whole, "uncompressed") if len(rows) else rows["name"]
    longer = short.mask(short.duplicated(keep=False), short + ", " + rows["method"])
    found = longer.mask(longer.duplicated(keep=False), rows["name"])
    return dict(zip(rows["name"], found, strict=True))


def measures(sweep: Sweep) -> pd.DataFrame:
    """One row a metric: on what it was measured, which way is better, and where points do not agree on it."""
    rows = [
        {
            "metric": metric,
            "what it is": metric_label(metric, info | {"differs": []}),
            "better": "higher" if info["higher_is_better"] else "lower",
            "measured alike": f"no: {', '.join(info['differs'])}" if info["differs"] else "yes",
        }
        for metric, info in sweep.table.attrs["metrics"].items()
    ]
    return pd.DataFrame(rows)


def points(sweep: Sweep) -> pd.DataFrame:
    """The finished points by size, each with its name, its sizes, its scores with standard errors, if it is optimal.

    `optimal in` is the share of redrawn measurements in which it is.
    """
    done = sweep.table[sweep.table["status"] == "done"]
    columns = {
        "point": done["name"],
        "settings": done["name"].map(labels(done)),
        "method": done["method"],
        "stored bits": done["bits_stored"],
        "model bits": done["bits_model"],
        "MB": done["megabytes"],
    }
    for metric in _shown(sweep.table.attrs["metrics"], sweep.metric):
        columns[metric] = [score(*pair) for pair in zip(done[metric], done[f"{metric}:stderr"], strict=True)]
    shares = {"optimal": done["pareto"].map({True: "yes", False: ""}), "optimal in": done["pareto_share"].map(_percent)}
    return pd.DataFrame(columns | shares)


def _shown(metrics, always: str) -> list[str]:
    return [metric for metric in metrics if not metric.startswith(DETAILS) or metric == always]


def _percent(share: float) -> str:
    return "" if pd.isna(share) else f"{share:.0%}"


def noise_floor(sweep: Sweep) -> pd.DataFrame:
    """What uncompressed models score in float32, beside what they score. Raises RecordError if nobody measured it."""
    table = sweep.table
    whole = table[(table["status"] == "done") & (table["method"] == "none")]
    whole = whole.drop_duplicates("model").set_index("model")
    rows = [
        {"model": model, "metric": metric, "as it is": whole[metric].get(model), "in float32": exact}
        for model, floors in table.attrs["float32"].items()
        for metric, exact in floors.items()
        if not metric.startswith(DETAILS)
    ]
    if not rows:
        raise RecordError("no record tells what float32 would change: sweep with evaluation.noise_floor=true.")
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------------------------- two points
def neighbours(sweep: Sweep) -> tuple[dict, dict]:
    """The records of two points next to each other on the frontier, the smaller first: those that are closest in value.

    Raises RecordError for a frontier of fewer than two points.
    """
    front = sweep.table[sweep.table["pareto"]].sort_values(sweep.table.attrs["x"])
    if len(front) < 2:
        raise RecordError("two neighbours need a frontier of two points or more: sweep more sizes.")
    values = front[sweep.metric].to_numpy(float)
    first = int(np.argmin(np.abs(np.diff(values)) / np.maximum(np.abs(values[:-1]), 1e-12)))
    by_name = {record["name"]: record for record in sweep.records}
    return by_name[front["name"].iloc[first]], by_name[front["name"].iloc[first + 1]]


def intervals(a: dict, b: dict) -> pd.DataFrame:
    """`compare` of two records in words, and beside its paired interval the one that the standard errors alone give."""
    found = compare(a, b).set_index("metric", drop=False)
    rows = [row for metric, row in found.iterrows() if not metric.startswith(DETAILS)]
    return pd.DataFrame(
        {
            "metric": row["metric"],
            "A": score(row["a"], row["a_stderr"]),
            "B": score(row["b"], row["b_stderr"]),
            "B - A": signed(row["difference"], row["relative"]),
            "paired 95%": _interval(row["low"], row["high"], row["relative"]),
            "unpaired 95%": _interval(*unpaired(row), row["relative"]),
            "better": row["better"].upper(),
        }
        for row in rows
    )


def unpaired(row: pd.Series) -> tuple[float, float]:
    """The interval of a row of `compare` as if both had been measured on samples of their own; NaN without errors."""
    a, b, *errors = (math.nan if row[key] is None else row[key] for key in ("a", "b", "a_stderr", "b_stderr"))
    freedom = 2 * row["samples"] - 2 if row["samples"] > 1 else math.inf
    width = t.ppf((1 + LEVEL) / 2, freedom)
    if not row["relative"]:
        half = width * math.hypot(*errors)
        return row["difference"] - half, row["difference"] + half
    middle, half = math.log1p(row["difference"]), width * math.hypot(errors[0] / a, errors[1] / b)
    return math.expm1(middle - half), math.expm1(middle + half)


def _interval(low: float, high: float, relative: bool) -> str:
    return "-" if pd.isna(low) else f"{signed(low, relative)} to {signed(high, relative)}"


# ------------------------------------------------------------------------------------------------------- inside a point
def inside(sweep: Sweep) -> pd.DataFrame:
    """The matrices of a few optimal points, errors as numbers, with a column `settings` that says what the point is.

    Raises RecordError where no optimal point has any.
    """
    names = labels(sweep.shown())
    own = sweep.matrices[sweep.matrices["point"].isin(names)]
    if own.empty:
        raise RecordError("no optimal point tells of its matrices: only records of compressed points on disk do.")
    return own.assign(settings=own["point"].map(names)).astype(dict.fromkeys(ERRORS, float))


# -------------------------------------------------------------------------------------------------------------- methods
def best_points(sweep: Sweep) -> pd.DataFrame:
    """The best point of every method, and of every budget that chose for it, in columns of the table of `points`.

    Of the model with most points. Raises RecordError without a compressed point.
    """
    best = _best(_spending(sweep))[["name", "spent"]].rename(columns={"spent": "who"})
    found = points(sweep).merge(best, left_on="point", right_on="name")
    return found[["who", "point", "settings", "stored bits", sweep.metric, "optimal"]]


def rivals(sweep: Sweep) -> pd.DataFrame:
    """The best point of every method beside the best that is no larger, paired as in `compare`; one row a method.

    Raises RecordError without a compressed point.
    """
    rows = _spending(sweep)
    by_name = {record["name"]: record for record in sweep.records}
    found = []
    for _, row in _best(rows).iterrows():
        other = rival(row, rows, sweep.table.attrs["x"])
        pair = _pair(by_name[other["name"]], by_name[row["name"]], sweep.metric)
        size = {"bits more": row["bits_stored"] - other["bits_stored"]}
        found.append({"who": row["spent"], "point": row["name"], "frontier": other["name"], **size, **pair})
    return pd.DataFrame(found)


def _pair(rival: dict, own: dict, metric: str) -> dict:
    """How a point's metric differs from that of the frontier's, and what that says."""
    if rival is own:
        return {"difference": "", "paired 95%": "", "verdict": "on the frontier"}
    try:
        row = compare(rival, own).set_index("metric").loc[metric]
    except RecordError:
        return {"difference": "", "paired 95%": "", "verdict": "not measured alike"}
    verdict = {"a": "the frontier's is better", "b": "this one is better", "": "not told apart"}[row["better"]]
    interval = _interval(row["low"], row["high"], row["relative"])
    return {"difference": signed(row["difference"], row["relative"]), "paired 95%": interval, "verdict": verdict}


def _spending(sweep: Sweep) -> pd.DataFrame:
    return spending(sweep.table, sweep.metric, sweep.table.attrs["x"])


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values("cost", kind="stable").drop_duplicates("spent")
