"""Whole points of SmolLM2: their stages, what corrected targets cost, and a sweep over rank and bits."""

import itertools
import statistics

import torch

from bench.pipeline import E8P, Finished, caldera_run, checkpoint, fresh_cache, seconds_of
from bench.rows import Row
from bench.timing import Timing, timed
from sweeps.models import load_model, load_tokenizer
from sweeps.settings import placement
from sweeps.texts import load_texts, token_rows

KINDS = ("original", "corrected")
RANKS, QUANTIZERS = (0, 16, 32, 64), ("e8p_2bit", "e8p_3bit", "e8p_4bit")


def settings(quick: bool, sequences: int, length: int) -> tuple[list[str], str]:
    """Overrides of calibration, evaluation and matrices, and their description.

    A quick run compresses the matrices of one block; its forward passes go through all of them.
    """
    rows = [f"calibration.sequences={sequences}", f"calibration.length={length}"]
    what = f"{sequences} x {length} tokens"
    if not quick:
        return ["calibration=tiny", *rows, "evaluation=tiny", "evaluation.rows=8", "evaluation.length=1024"], what
    few = ["calibration=tiny", *rows, "evaluation=tiny", "evaluation.tasks=[]", 'model.include=["*.layers.0.*"]']
    return few, f"{what}, matrices of 1 of 30 blocks"


# --------------------------------------------------------------------------------------------------------------- points
def point(quick: bool) -> list[Row]:
    """The stages of a point fitted to original inputs, then to corrected ones, and the difference in forward passes."""
    sequences, length = (4, 256) if quick else (16, 1024)
    overrides, what = settings(quick, sequences, length)
    # one process for both, so that they differ in what they compute alone
    common = [*E8P, "rank.k=32", "compute.workers=1", *overrides]
    found = {inputs: _alone([*common, f"method.inputs={inputs}"]) for inputs in KINDS}
    forward = forward_pass(sequences, length)
    rows = [row for inputs, run in found.items() for row in _stages(run, f"{inputs}, rank 32", what)]
    rows.append(
        Row("forward pass, calibration rows", f"{sequences} x {length} tokens", forward.seconds, runs=forward.runs)
    )
    original, corrected = (seconds_of(found[inputs].points[0], "calibrate", "compress") for inputs in KINDS)
    extra = (corrected - original) / forward.seconds
    return [
        *rows,
        Row(
            "corrected beyond original",
            f"{sequences} x {length} tokens",
            extra,
            "forward passes",
            note="calibrate and compress",
        ),
    ]


def _alone(overrides: list[str]) -> Finished:
    with fresh_cache() as folder:
        return caldera_run(folder, *overrides)


def _stages(run: Finished, case: str, what: str) -> list[Row]:
    """A row for each stage of the first point, one for all of them, and one for the whole process."""
    record = run.points[0]
    rows = [Row(f"point: {stage}", case, seconds) for stage, seconds in record["timings_s"].items()]
    peak = record["memory"]["peak_rss_bytes"]
    rows.append(Row("point: all stages", case, seconds_of(record), peak_bytes=peak, note=what))
    baseline = seconds_of(run.baseline)
    note = f"start, checks, {baseline:.1f} s for the uncompressed model"
    return [*rows, Row("point: process", case, run.seconds, note=note)]


def forward_pass(sequences: int, length: int) -> Timing:
    """All calibration rows, one after the other, through the blocks of the original model."""
    directory = checkpoint()
    device, dtype = placement({"device": "auto", "dtype": "auto"})
    model = load_model(directory, dtype).to(device).base_model
    rows = token_rows(load_texts("embedded_calibration"), load_tokenizer(directory), sequences, length, 0).to(device)

    @torch.inference_mode()
    def run() -> None:
        for row in rows:
            model(row[None], use_cache=False)

    return timed(run)


# ---------------------------------------------------------------------------------------------------------------- sweep
def sweep(quick: bool) -> list[Row]:
    """Rank x bits on few calibration rows: the whole sweep, its first point, and further ranks beside it."""
    ranks, quantizers = ((0, 32), QUANTIZERS[:2]) if quick else (RANKS, QUANTIZERS)
    overrides, what = settings(quick, 4, 256)
    grid = [f"quantizer@q={','.join(quantizers)}", f"rank.k={','.join(map(str, ranks))}"]
    with fresh_cache() as folder:
        run = caldera_run(folder, "-m", *E8P[1:], *grid, "method.inputs=original", *overrides)
    return sweep_rows(run, f"{len(run.points)} points, {what}")


def sweep_rows(run: Finished, case: str) -> list[Row]:
    """Totals, and for each rank the mean time of its points relative to the first point's; further points only."""
    first, *further = run.points
    peak = max(r["memory"]["peak_rss_bytes"] for r in run.points)
    rows = [
        Row("sweep", case, run.seconds, peak_bytes=peak, note=f"{seconds_of(run.baseline):.1f} s uncompressed model"),
        Row("sweep: first point", f"rank {first['point']['rank']}", seconds_of(first)),
    ]
    by_rank = sorted(further, key=lambda r: r["point"]["rank"])
    for rank, group in itertools.groupby(by_rank, key=lambda r: r["point"]["rank"]):
        relative = [seconds_of(r) / seconds_of(first) for r in group]
        rows.append(Row("sweep: further points", f"rank {rank}", statistics.mean(relative), "of first", len(relative)))
    return rows
