"""What error a point may expect, from a few of its blocks in a second: enough to rank points."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from caldera import predict_error
from caldera.devices import full_precision
from caldera.errors import NumericalError
from caldera.streamed import Source
from sweeps.allocation import members
from sweeps.budget import as_json
from sweeps.calibration import Calibration, is_complete
from sweeps.models import open_model
from sweeps.point import Point
from sweeps.shared import Shared
from sweeps.store import digest, once

VERSION = 1  # counts up when the same settings give another prediction


def predicted_error(point: Point, blocks: int) -> float | None:
    """Root mean square of the relative errors that theory expects of the matrices of so many blocks, weighted by size.

    Of the original model's weights and moments, whatever `method.inputs` says: it ranks points that differ in ranks
    and quantizers. None where nothing is known: no moments yet, or none that can be factorised, or a fit that
    does not follow them.
    """
    moments = point.moments_folder
    method = point.method
    if method is None or method.moments != "measured" or not is_complete(moments, hidden=False):
        return None
    table = as_json(point.table)
    key = digest([VERSION, point.moments_key, asdict(method), table, sorted(point.inventory), blocks])
    found, _ = once(point.cache / "predictions" / f"{key[:24]}.json", lambda: _predicted(point, moments, blocks))
    return found["error"]


@full_precision()
def _predicted(point: Point, moments: Path, blocks: int) -> dict:
    model = open_model(point.source, None, "cpu", point.config["model"]["trust_remote_code"])
    calibration, weights, losses = Calibration(moments), 0, 0.0
    try:
        for index in spread(model.count, blocks):
            for size, error in _block_errors(point, model, calibration, index):
                weights, losses = weights + size, losses + size * error**2
    except NumericalError:
        return {"error": None}  # the point itself will fail, and say so
    return {"error": math.sqrt(losses / weights) if weights else None}


def _block_errors(point: Point, model: Source, calibration: Calibration, index: int) -> Iterator[tuple[int, float]]:
    """(parameters, predicted relative error) of each of a block's matrices that are compressed."""
    known = Shared(point.shared_folder).block(index)
    for member in members(calibration, model, point, index, known, torch.device(point.device)):
        method = point.method_of(member.name)
        problem = known.problem(member.weight, member.basis, member.name, method.rank)
        options = {"name": member.name, "basis": member.basis, "problem": problem}
        yield member.weight.numel(), predict_error(member.weight, member.moments, method, **options)


def spread(count: int, wanted: int) -> list[int]:
    """So many of `count` indices, evenly spread from the first to the last."""
    wanted = min(wanted, count)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]
