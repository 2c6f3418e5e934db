"""`caldera-dashboard ENTITY/PROJECT`: a workspace and a report of W&B, made of what `sweeps.mirror` puts there."""

import argparse
import json
import sys
from pathlib import Path

import wandb_workspaces.expr as expr
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from analysis.frontier import headline
from analysis.records import RecordError, load_records
from caldera.errors import UserError
from sweeps.mirror import CONVERGENCE, LAYERS, PICTURE, STEPS, TABLE

LOGARITHMIC = ("perplexity", "relative_error", "seconds")
AXES = ("rank", "q_bits", "l_bits", "r_bits", "budget_bits")
HALF = wr.Layout(w=12, h=8)  # of 24 columns
Panels = list[wr.ScatterPlot | wr.ParallelCoordinatesPlot | wr.LinePlot | wr.MediaBrowser | wr.WeavePanelSummaryTable]


# --------------------------------------------------------------------------------------------------------------- panels
def frontier() -> Panels:
    """Perplexity against what it costs, and the pictures of the points' frontiers."""
    pictures = wr.MediaBrowser(title="The frontier when the point was done", media_keys=[f"{PICTURE}frontier"])
    return [against("perplexity", "stored_bits"), against("perplexity", "megabytes"), pictures]


def against(metric: str, size: str) -> wr.ScatterPlot:
    """A point a run: a metric of its summary against a size."""
    axes = {"x": wr.SummaryMetric(size), "y": wr.SummaryMetric(metric), "log_y": metric.startswith(LOGARITHMIC)}
    return wr.ScatterPlot(title=f"{metric} against {size.replace('_', ' ')}", **axes)


def axes() -> Panels:
    """What was chosen beside what came out, a line a run."""
    chosen = [wr.ParallelCoordinatesPlotColumn(wr.Config(name), name) for name in ("method", *AXES)]
    came = [
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(name), name, log=name.startswith(LOGARITHMIC))
        for name in ("stored_bits", "relative_error", "perplexity", "accuracy")
    ]
    return [wr.ParallelCoordinatesPlot(title="Choices and outcomes", columns=[*chosen, *came])]


def bits(metrics: list[str]) -> Panels:
    """Every metric against stored bits."""
    return [against(metric, "stored_bits") for metric in ("accuracy", "relative_error", "seconds", *metrics)]


def layers() -> Panels:
    """Errors by block and projection, as a map and as curves, and how the fits converged."""
    titles = {LAYERS: "Relative error by block", CONVERGENCE: "Relative error by half step"}
    heat = wr.MediaBrowser(title="Relative error of every matrix", media_keys=[f"{PICTURE}errors"])
    curves = [wr.LinePlot(title=titles[s], x=step, metric_regex=f"^{s}/", log_y=True) for s, step in STEPS.items()]
    return [heat, *curves]


def tables() -> Panels:
    return [wr.WeavePanelSummaryTable(table_name=f"{TABLE}{name}") for name in ("matrices", "allocation")]


# ---------------------------------------------------------------------------------------------------- workspace, report
def sections(metrics: list[str]) -> dict[str, Panels]:
    """By title, what both show."""
    return {
        "Frontier": frontier(),
        "Choices": axes(),
        "Bits against each metric": bits(metrics),
        "Layers": layers(),
        "Tables": tables(),
    }


def filters(sweep: str | None) -> list[expr.FilterExpr]:
    """Compressed points: the uncompressed model at 16 bits would leave the others no room."""
    compressed = expr.Config("method") != "none"
    return [compressed, expr.Metric("Group") == sweep] if sweep else [compressed]


def workspace(entity: str, project: str, sweep: str | None = None, metrics: tuple[str, ...] = ()) -> ws.Workspace:
    found = [ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections(list(metrics)).items()]
    columns = ["summary:stored_bits", "summary:perplexity", "summary:accuracy", "config:rank.value", "config:q.value"]
    order = [expr.Ordering(expr.Summary("stored_bits"), ascending=True)]
    runs = ws.RunsetSettings(filters=filters(sweep), pinned_columns=columns, order=order)
    place = {"entity": entity, "project": project, "name": title(sweep)}
    return ws.Workspace(**place, sections=found, runset_settings=runs)


def report(entity: str, project: str, sweep: str | None = None, metrics: tuple[str, ...] = ()) -> wr.Report:
    """The same panels below each other, two a row, over one set of runs."""
    blocks: list = [wr.P("Accuracy against stored bits; the records on disk are the truth, W&B has a copy.")]
    for name, panels in sections(list(metrics)).items():
        for index, panel in enumerate(panels):
            panel.layout = wr.Layout(x=HALF.w * (index % 2), y=HALF.h * (index // 2), w=HALF.w, h=HALF.h)
        if len(panels) == 1:
            panels[0].layout.w = 2 * HALF.w
        runs = wr.Runset(name=sweep or "all sweeps", filters=filters(sweep))  # of the report's own project
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(entity=entity, project=project, title=title(sweep), blocks=blocks, width="fluid")


def title(sweep: str | None) -> str:
    return f"CALDERA sweep {sweep}" if sweep else "CALDERA sweeps"


def specification(made: ws.Workspace | wr.Report) -> dict:
    """What W&B is sent, as JSON."""
    return made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]


# --------------------------------------------------------------------------------------------------- the console script
def place_of(text: str) -> tuple[str, str]:
    """Entity and project. Raises UserError."""
    entity, _, project = text.partition("/")
    if not (entity and project) or "/" in project:
        raise UserError(f"{text!r} is no ENTITY/PROJECT: write for example my-team/caldera-sweeps")
    return entity, project


def metrics_of(results: Path, sweep: str | None) -> tuple[str, ...]:
    """Names of the metrics in the records of a sweep, but the one that is called `perplexity` anyway."""
    records = [r for r in load_records(results) if sweep in (None, r.get("sweep"))]
    names = sorted({name for record in records for name in record["metrics"] or {}})
    return tuple(name for name in names if name != headline(names))


def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-dashboard`; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        metrics = metrics_of(options.results, options.sweep) if options.results else ()
        asked = (*place_of(options.project), options.sweep, metrics)
        made = {"workspace": workspace(*asked), "report": report(*asked)}
    except (RecordError, UserError, OSError) as error:
        print(f"caldera-dashboard: {error}", file=sys.stderr)
        return 1
    if options.print:
        print(json.dumps({name: specification(one) for name, one in made.items()}, indent=1))
        return 0
    try:
        for name, one in made.items():
            print(f"{name}: {one.save().url}")
    except Exception as error:  # of W&B: an outage, a missing key, no permission
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(
            f"caldera-dashboard: {options.project} cannot be written ({reason}): see to key and network",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="caldera-dashboard", description="A W&B workspace and report of sweeps.")
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are; each call adds a new pair")
    parser.add_argument("--sweep", help="only its runs")
    parser.add_argument("--results", type=Path, help="a results folder, whose metrics get a panel each")
    parser.add_argument("--print", action="store_true", help="print the specifications; nothing is sent")
    return parser


if __name__ == "__main__":
    sys.exit(main())
