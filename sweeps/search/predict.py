"""What error a point may expect, from a few of its blocks in a second: enough to rank points."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from caldera import predict_error
from caldera.devices import full_precision
from caldera.errors import NumericalError
from caldera.matrices import matrices
from caldera.streamed import Source
from sweeps.budget import as_json
from sweeps.calibration import Calibration, is_complete
from sweeps.inputs import Original
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
    moments = point.cache / "moments" / point.moments_key[:24]
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
    given, weights, losses = Original(Calibration(moments)), 0, 0.0
    try:
        for index in spread(model.count, blocks):
            for size, error in _block_errors(point, model, given, index):
                weights, losses = weights + size, losses + size * error**2
    except NumericalError:
        return {"error": None}  # the point itself will fail, and say so
    return {"error": math.sqrt(losses / weights) if weights else None}


def _block_errors(point: Point, model: Source, inputs: Original, index: int) -> Iterator[tuple[int, float]]:
    """(parameters, predicted relative error) of each of a block's matrices that are compressed."""
    name, layers = f"{model.name}.{index}", matrices(model.block(index))
    shared = Shared(point.cache / "shared" / point.shared_key[:24])
    known = shared.block(index)
    for given in (given for stage in inputs.stages(index) for given in stage):
        moments = given.moments.to(point.device)
        for own in given.group.members:
            if (full := f"{name}.{own}") not in point.inventory:
                continue
            weight, method = layers[own].read().to(moments), point.method_of(full)
            basis = known.basis(moments, f"{name}.{given.group.name}", point.method.basis_options)
            problem = known.problem(weight, basis, full, method.rank)
            yield weight.numel(), predict_error(weight, moments, method, name=full, basis=basis, problem=problem)


def spread(count: int, wanted: int) -> list[int]:
    """So many of `count` indices, evenly spread from the first to the last."""
    wanted = min(wanted, count)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]
