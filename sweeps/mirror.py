"""What W&B shows of a record: flat numbers, tables, curves over half steps and over depth, the frontier so far."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.frontier import frontier_table, headline
from analysis.records import RecordError, failure, load_records, matrices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS, CONVERGENCE = "layers", "convergence"  # sections of curves, a curve a projection
STEPS = {LAYERS: "steps/block", CONVERGENCE: "steps/half_step"}  # what they are drawn over
TABLE, PICTURE = "table_", "picture_"  # what begins so is no metric: those have a slash in them
PLACE = ["matrix", "block", "projection"]


def show(run, record: dict, results: Path, artifact: bool = False) -> None:
    """Log all of a record to a run of W&B; `artifact`: the packed checkpoint too, if it is still there."""
    import wandb

    for section, step in STEPS.items():
        run.define_metric(step, hidden=True, summary="none")
        run.define_metric(f"{section}/*", step_metric=step, summary="none")
    rows = curves(record)
    for index, row in enumerate(rows):
        run.log(row, step=index)
    media = {f"{TABLE}{name}": wandb.Table(dataframe=frame) for name, frame in tables(record).items()}
    with tempfile.TemporaryDirectory() as folder:
        drawn = pictures(record, results, Path(folder))
        media |= {f"{PICTURE}{path.stem}": wandb.Image(str(path)) for path in drawn}
        if media:
            run.log(media, step=len(rows))
    run.summary.update(flat_summary(record) | headlines(record))
    checkpoint = results / record["checkpoint"] if artifact and record.get("checkpoint") else None
    if checkpoint and checkpoint.is_dir():
        packed = wandb.Artifact(checkpoint.name, "model", metadata=record["point"])
        for file in filter(Path.is_file, sorted(checkpoint.rglob("*"))):  # add_dir would say so on the terminal
            packed.add_file(str(file), str(file.relative_to(checkpoint)))
        run.log_artifact(packed)


# -------------------------------------------------------------------------------------------------------------- numbers
def flat_summary(record: dict) -> dict:
    """The numbers of a record by name: metrics, their standard errors and noise floors, bits, seconds, memory."""
    metrics = {name: m["value"] for name, m in record["metrics"].items()}
    errors = {f"{name}_stderr": m["stderr"] for name, m in record["metrics"].items() if m["stderr"] is not None}
    bits = {f"bits/{k}": v for k, v in (record["bits"] or {}).items()}
    seconds = {f"seconds/{stage}": s for stage, s in record["timings_s"].items()}
    ended = {"status": record["status"], "error": failure(record)}
    floor = {f"noise_floor/{name}": v for name, v in (record.get("noise_floor") or {}).items() if v is not None}
    return metrics | errors | floor | bits | seconds | _budget(record) | ended | record["memory"]


def _budget(record: dict) -> dict:
    found = record.get("allocation")
    if not found:
        return {}
    reached = {f"budget_achieved_{unit}": value for unit, value in found["achieved"].items()}
    return reached | {"predicted_divergence": found["predicted_divergence"]}


def headlines(record: dict) -> dict:
    """The few numbers that dashboards are made of, under names that no text or task is in; what is not known is not."""
    metrics, bits = record["metrics"], record["bits"] or {}
    first = headline(list(metrics)) if metrics else ""
    accuracies = {name.partition("/")[0]: m["value"] for name, m in metrics.items() if name.endswith("/acc")}
    errors = [m["relative_error"] for m in record["matrices"]]
    found = {
        "perplexity": metrics[first]["value"] if first.startswith("perplexity/") else None,
        "accuracy": _mean(list(accuracies.values())),
        "stored_bits": bits.get("stored"),
        "nominal_bits": bits.get("nominal"),
        "model_bits": bits.get("model"),
        "megabytes": bits["model_bytes"] / 1e6 if "model_bytes" in bits else None,
        "relative_error": _mean(errors),
        "seconds": sum(record["timings_s"].values()),
    }
    return {name: value for name, value in found.items() if value is not None}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --------------------------------------------------------------------------------------------------------------- tables
def tables(record: dict) -> dict[str, pd.DataFrame]:
    """By name: every matrix, every half step of every matrix, and what a budget chose; none that would be empty."""
    frame = matrices([record]).drop(columns="point")
    chosen = (record.get("allocation") or {}).get("table") or {}
    allocation = [{"matrix": name} | choice for name, choice in chosen.items()]
    seconds = pd.DataFrame([{"matrix": m["name"], "seconds": m["seconds"]} for m in record["matrices"]])
    found = {}
    if len(frame):
        found = {"matrices": frame.merge(seconds), CONVERGENCE: frame[PLACE].merge(steps(record))}
    if len(frame) and allocation:
        found["allocation"] = frame[PLACE].merge(pd.DataFrame(allocation))
    return {name: table.astype(object).where(table.notna(), None) for name, table in found.items()}


def steps(record: dict) -> pd.DataFrame:
    """One row a half step of a matrix: iteration, step (Q or LR) and relative error in the loop's coordinates."""
    traces = [(m["name"], step) for m in record["matrices"] for step in enumerate(m["trace"])]
    return pd.DataFrame([{"matrix": name, "half_step": index} | step for name, (index, step) in traces])


# --------------------------------------------------------------------------------------------------------------- curves
def curves(record: dict) -> list[dict]:
    """Rows of a run's history: mean relative error of each projection after every half step, and in every block."""
    frame = matrices([record])
    if frame.empty:
        return []
    held = pd.DataFrame({m["name"]: pd.Series([s["error"] for s in m["trace"]]) for m in record["matrices"]})
    held = held.fillna(held.min())  # a matrix that ended early keeps its best iterate
    projection = frame.set_index("matrix")["projection"]
    over_steps = held.T.groupby(projection).mean().T
    over_depth = frame.pivot_table("relative_error", "block", "projection")
    found = _rows(LAYERS, over_depth)
    if len(held) > 1:  # rounding once is no curve
        found = _side_by_side(found, _rows(CONVERGENCE, over_steps))
    return found


def _rows(section: str, frame: pd.DataFrame) -> list[dict]:
    named = frame.add_prefix(f"{section}/")
    return [
        {STEPS[section]: int(index)} | {k: float(v) for k, v in row.dropna().items()} for index, row in named.iterrows()
    ]


def _side_by_side(some: list[dict], others: list[dict]) -> list[dict]:
    """The rows of two sections in as many steps as the longer one has."""
    count = max(len(some), len(others))
    return [
        {k: v for rows in (some, others) for k, v in (rows[i] if i < len(rows) else {}).items()} for i in range(count)
    ]


# ------------------------------------------------------------------------------------------------------------- pictures
def pictures(record: dict, results: Path, folder: Path) -> list[Path]:
    """PNGs of the sweep's frontier as far as it is and of the errors of the matrices; those that have something."""
    from analysis import style

    drawn = []
    for name, figure in (("frontier", _frontier(record, results)), ("errors", _errors(record))):
        if figure is not None:
            style.save(figure, folder / f"{name}.png")
            drawn.append(folder / f"{name}.png")
    return drawn


def _frontier(record: dict, results: Path) -> "Figure | None":
    from analysis.plots import frontier_figure

    try:
        table = frontier_table([r for r in load_records(results) if r.get("sweep") == record["sweep"]])
        return frontier_figure(table, table.attrs["metric"])
    except RecordError:
        return None


def _errors(record: dict) -> "Figure | None":
    """Relative error by projection and block."""
    from matplotlib.figure import Figure

    frame = matrices([record])
    if frame.empty:
        return None
    cells = frame.pivot_table("relative_error", "projection", "block").loc[list(dict.fromkeys(frame["projection"]))]
    figure = Figure(figsize=(6.5, 0.9 + 0.25 * len(cells)), layout="constrained")
    axes = figure.add_subplot(xlabel="Decoder block", title=record["name"])
    image = axes.imshow(cells, aspect="auto", cmap="cividis")
    axes.set_yticks(range(len(cells)), cells.index)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="Relative error")
    return figure
