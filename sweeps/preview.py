"""`plan=true`: what every point of a grid would take, in the order of its jobs, without doing any of it."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sweeps import costs
from sweeps.allocation import costs_file, curves_file
from sweeps.calibration import is_complete
from sweeps.estimate import Estimate, estimate
from sweeps.evaluate import parts
from sweeps.machine import Machine
from sweeps.outline import outline_of
from sweeps.pipeline import finished
from sweeps.point import Point
from sweeps.progress import clock
from sweeps.sizes import Sizes
from sweeps.tokens import check_texts

PIPE_WIDTH = 200  # columns when the output is no terminal
COLUMNS = (
    "point", "rank", "nominal\nbits", "stored\nbits", "model\nbits", "uncom-\npressed", "cali-\nbrate", "com-\npress",
    "evalu-\nate", "total", "memory\nGB", "disk\nGB", "there already",
)  # fmt: skip
EVALUATION = ("load", "perplexity", "tasks")
UNKNOWN = "no weights here, so what the cache holds is unknown"


def preview(points: list[Point], machine: Machine | None = None) -> list[tuple[Point, Estimate, list[str]]]:
    """Each point's estimate and what it finds there: in the cache, or from the points before it."""
    held = {key for point in points for key in _held(point)}
    rows, models = [], {}
    for point in points:
        folder = point.source
        if folder not in models:
            models[folder] = outline_of(folder, point.cache, point.config["model"]["trust_remote_code"])
        keys = _keys(point)
        there = [name for name, key in keys.items() if key in held]
        sizes = Sizes.of(point, models[folder])
        found = estimate(sizes, machine or machine_of(point), keys, held)
        held |= found.made | {key.removesuffix(" hidden") for key in found.made}
        rows.append((point, found, ["done"] if "done" in there else there))
    return rows


def machine_of(point: Point) -> Machine:
    """The processor as it was measured; for a GPU, the data sheet of an H100."""
    if point.device != "cpu":
        return Machine.h100()
    return Machine.measured(point.dtype, point.cache, point.config["compute"]["threads"])


def has_weights(point: Point) -> bool:
    return any(point.source.glob("*.safetensors"))


def _keys(point: Point) -> dict[str, str]:
    """What a point makes, by kind, under names that equal things share."""
    keys = {"done": f"done {point.config['results']} {point.key}", "baseline": f"baseline {point.uncompressed.key}"}
    if point.method is None:
        return keys
    keys |= {"moments": f"moments {point.moments_key}" + " hidden" * (point.correction is not None)}
    if point.allocated:
        keys["curves"] = f"curves {curves_file(point).stem}"
        if point.budget.sensitivity == "fisher":
            keys["sensitivity"] = f"sensitivity {costs_file(point).stem}"
    if point.correction is None:
        keys |= {"factors": f"factors {point.shared_key}"}
        if rank := _largest_rank(point):
            sides = min(min(shape) for shape in point.inventory.values())
            keys |= {"subspaces": f"subspaces {point.shared_key} {costs.dimensions(rank, sides, sides)}"}
    return keys


def _largest_rank(point: Point) -> int:
    if point.allocated:
        return max(point.budget.ranks)
    return max((choice.rank for choice in point.table.values()), default=point.method.rank)


def _held(point: Point) -> set[str]:
    """Of the point's keys, those whose files are there."""
    keys, cache = _keys(point), point.cache
    if not has_weights(point):
        return set()  # every key follows from the weights
    model = point.uncompressed.fit_key
    scores = [part.file(cache, model) for part in parts(point.config["evaluation"], point.dtype)]
    there = {"done": finished(point), "baseline": all(file.is_file() for file in scores)}
    if point.method is not None:
        folder = point.moments_folder
        there["moments"] = is_complete(folder, point.correction is not None)
        shared = point.shared_folder
        if point.allocated:
            there |= {"curves": curves_file(point).is_file(), "sensitivity": costs_file(point).is_file()}
        there["factors"] = shared.is_dir() and any(shared.glob("*/factors-*"))
        wide = keys.get("subspaces", "").rpartition(" ")[2]
        there["subspaces"] = shared.is_dir() and any(shared.glob(f"*/subspaces-{wide}-*"))
    return {key for kind, key in keys.items() if there[kind]}


# ----------------------------------------------------------------------------------------------------------- what shows
def show_plan(points: list[Point]) -> None:
    """Check the texts, then print the table. Raises UserError as a run would."""
    for point in {p.texts: p for p in points if any(p.source.glob("tokenizer*"))}.values():
        check_texts(point)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    rows = preview(points)
    console.print(table_of(rows))
    for folder in {point.source for point in points if not has_weights(point)}:
        console.print(f"{folder}: {UNKNOWN}", markup=False, soft_wrap=True)


def table_of(rows: list[tuple[Point, Estimate, list[str]]]) -> Table:
    machines = sorted({machine_of(point).name for point, _, _ in rows})
    title = f"plan: {len(rows)} points; predicted for {', '.join(machines)}; nothing was run"
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, show_footer=True)
    footer = _footer([found for _, found, _ in rows])
    for index, name in enumerate(COLUMNS):
        side = "left" if index in (0, len(COLUMNS) - 1) else "right"
        table.add_column(name, footer=footer[index], justify=side, overflow="fold")
    for point, found, there in rows:
        table.add_row(*map(escape, _cells(point, found, there)))
    return table


def _cells(point: Point, found: Estimate, there: list[str]) -> list[str]:
    bits = [f"{value:.3f}" for value in (found.nominal_bits, found.stored_bits, found.model_bits)]
    times = [_time(found, names) for names in (["baseline"], ["calibrate"], ["allocate", "compress"], EVALUATION)]
    sizes = [f"{found.memory / 1e9:.1f}", f"{found.disk / 1e9:.2f}"] if found.stages else ["", ""]
    rank = "" if point.method is None else "mixed" if point.table or point.allocated else str(point.method.rank)
    return [point.name, rank, *bits, *times, clock(found.seconds), *sizes, ", ".join(there)]


def _time(found: Estimate, names: Iterable[str]) -> str:
    """Of those stages; nothing where none is left to do."""
    stages = [found.stages[name] for name in names if name in found.stages]
    return clock(sum(stage.seconds for stage in stages)) if stages else ""


def _footer(found: list[Estimate]) -> list[str]:
    """Totals: what points share is in the first one's row only."""
    time, disk = clock(sum(f.seconds for f in found)), sum(f.disk for f in found)
    memory = max((f.memory for f in found), default=0.0)
    return ["all", *[""] * 8, time, f"{memory / 1e9:.1f}", f"{disk / 1e9:.2f}", ""]
