"""One point from a plan to its record: calibrate, compress, reload, evaluate. What exists already is not done again.

Moments and what points share of the fit lie in the cache, and so do the scores of each text and task; checkpoints,
block by block, and records in the results. Each is named by the hash of what it depends on and made under a lock.
"""

import functools
import gc
import math
from pathlib import Path

from filelock import FileLock

from caldera.errors import UserError
from sweeps import record as records
from sweeps.ending import honour
from sweeps.evaluate import Evaluation
from sweeps.heartbeat import working_on
from sweeps.keep import tidy
from sweeps.point import Point, axes, uncompressed_axes
from sweeps.progress import Reporter, log_file, logger, warn
from sweeps.store import read_sealed, write_sealed
from sweeps.tokens import calibration_rows, check_texts, tokenizer_of, windows
from sweeps.trackers import track


def finished(point: Point) -> dict | None:
    """The record of a point that is done, unless it is to be computed again.

    Raises UserError for a record of a newer version.
    """
    file = point.folder / "record.json"
    record = None if point.config["force"] else read_sealed(file)
    if record is None:
        return None
    if record["schema_version"] > records.SCHEMA_VERSION:
        raise UserError(
            f"{file} has schema {record['schema_version']}, newer than the known {records.SCHEMA_VERSION}: update this"
            " package or choose another folder by results=..."
        )
    return record if record["status"] == "done" and record["key"] == point.key else None


def run_point(point: Point, reporter: Reporter) -> dict:
    """The record of a point, computed unless it is there. A failure leaves a failed record and is raised again."""
    if record := finished(point):
        return record
    point.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(point.folder / ".lock"), log_file(point.folder / "log.txt"), working_on(point) as reporter.pulse:
        if record := finished(point):
            return record
        records.reset_peak()
        try:
            record = _compute(point, reporter)
            _commit(point, record)
        except Exception as error:
            honour()
            logger.exception("point failed")
            commit_failure(point, error, reporter.stage_name, reporter.timings)
            raise
        finally:
            _let_go()
        tidy(point)
        return record


def _let_go() -> None:
    """Memory of one point is not the next one's."""
    from caldera.devices import release, release_devices

    gc.collect()
    release()
    release_devices()


def _commit(point: Point, record: dict) -> None:
    write_sealed(point.folder / "record.json", record)
    track(record, point.config["tracker"], point.results)


def commit_failure(point: Point, error: Exception, stage: str, timings: dict[str, float] | None = None) -> None:
    """Record that a point failed, and in which stage; whoever calls has the point's lock."""
    failed = records.skeleton(point, axes(point), "failed")
    failed |= {"error": records.error_of(error, stage, getattr(error, "matrix", None))}
    try:
        _commit(point, failed | {"timings_s": timings or {}})
    except OSError as lost:  # a full disk: what failed is said, and what is finished stays
        warn(f"the failure of {point.name} could not be recorded ({lost.strerror}): {error}")


def _compute(point: Point, reporter: Reporter) -> dict:
    if point.method is None:
        return _uncompressed(point, reporter)
    from sweeps.allocation import summary

    baseline = run_baseline(point, reporter)
    point.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{point.checkpoint}.lock"):  # another evaluation of the same weights may want them too
        compressed = compress_point(point, reporter, point.checkpoint)
        metrics = _evaluation(point, lambda: _packed(point)).run(reporter, point.config["force"])
        bits = records.bits_of(compressed.matrices, point.checkpoint, baseline["bits"]["model_parameters"])
    record = records.skeleton(point, axes(point), "done")
    record |= {"metrics": metrics, "matrices": compressed.matrices, "timings_s": reporter.timings, "bits": bits}
    record["allocation"] = summary(point, compressed.matrices, bits)
    record["reused"] = reporter.reused | compressed.shares()
    record["memory"]["workers_peak_rss_bytes"] = compressed.peak_rss_bytes
    return record


def run_baseline(point: Point, reporter: Reporter) -> dict:
    """The record of the uncompressed model under the same evaluation, which it shares with every results folder."""
    own = Reporter(point.uncompressed.name)
    if not finished(point.uncompressed):
        reporter.say("  uncompressed model, once:")
    record = run_point(point.uncompressed, own)
    reporter.reused["baseline"] = own.reused.get("evaluation", 1.0)
    return record


def _uncompressed(point: Point, reporter: Reporter) -> dict:
    from sweeps.outline import outline_of

    evaluation = _evaluation(point, lambda: _uncompressed_model(point, point.dtype))
    metrics = evaluation.run(reporter, point.config["force"])
    record = records.skeleton(point, uncompressed_axes(point), "done")
    if point.config["evaluation"]["noise_floor"] and point.dtype != "float32":
        exact = lambda: _uncompressed_model(point, "float32")  # noqa: E731
        record["noise_floor"] = evaluation.noise_floor(exact, metrics, reporter)
    trusted = point.config["model"]["trust_remote_code"]
    width, parameters = 8.0 * _dtype(point).itemsize, outline_of(point.source, point.cache, trusted).parameters
    compressed = sum(math.prod(shape) for shape in point.inventory.values())
    counts = {"parameters": compressed, "model_parameters": parameters}
    sizes = {"stored_bytes": int(compressed * width / 8), "model_bytes": int(parameters * width / 8)}
    bits = {"nominal": width, "stored": width, "model": width} | sizes | counts
    return record | {"metrics": metrics, "timings_s": reporter.timings, "bits": bits, "reused": reporter.reused}


def compress_point(point: Point, reporter: Reporter, target: Path):
    """Calibrate and write the packed checkpoint, as far as that is not done: a `sweeps.compress.Compressed`."""
    import torch

    from sweeps.compress import CheckpointFolder, Fit, compress, drop
    from sweeps.shared import Shared

    place = CheckpointFolder(target, point.fit_key)
    if point.config["force"]:
        drop(target)
    if found := place.finished():
        return found
    inputs = _inputs(point, reporter)
    shared = Shared(point.shared_folder if point.correction is None else None)
    table = _budgeted(point, reporter, inputs.calibration, shared)
    fit = Fit(point.method, frozenset(point.inventory), torch.device(point.device), table)
    with reporter.stage("compress") as progress:
        options = {"workers": point.workers, "shared": shared}
        return compress(point.source, _stored(point), inputs, fit, place, _dtype(point), progress, **options)


def _budgeted(point: Point, reporter: Reporter, calibration, shared) -> dict:
    """The choices for matrices that differ from the point's method: see `sweeps.allocation`."""
    from sweeps.allocation import Probe, decided, report

    def probe() -> Probe:
        rows, original = functools.partial(calibration_rows, point), functools.partial(_original, point)
        return Probe(point, calibration, _stored(point), original, rows, _spill(point), shared)

    table = decided(probe, point, reporter)
    report(point, table, reporter)
    return table


def _inputs(point: Point, reporter: Reporter):
    """What the matrices are fitted to: see `sweeps.inputs`."""
    from sweeps.calibration import ensure_calibration, is_complete
    from sweeps.inputs import CorrectedPrefix, Original

    folder, spill = point.moments_folder, _spill(point)
    with reporter.stage("calibrate") as progress:
        hidden = point.correction is not None
        reporter.reused["moments"] = float(is_complete(folder, hidden))
        texts = functools.partial(calibration_rows, point)
        found = ensure_calibration(folder, lambda: _original(point), texts, progress, hidden, spill)
    if point.correction is None:
        return Original(found)
    return CorrectedPrefix(found, _original(point), calibration_rows(point), point.correction, spill)


def _spill(point: Point):
    from caldera.rows import Spill

    return Spill(point.cache / "spill", point.config["compute"]["spill_mb"] * 2**20)


def _evaluation(point: Point, load) -> Evaluation:
    tokenizer, original = lambda: tokenizer_of(point.source), lambda: _uncompressed_model(point, point.dtype)
    given = {"windows": lambda: windows(point), "tokenizer": tokenizer}
    given |= {"original": (point.uncompressed.fit_key, original)}
    return Evaluation(point.config["evaluation"], point.dtype, point.cache, point.fit_key, load, **given)


def _uncompressed_model(point: Point, dtype: str):
    """All of it in memory, as it is evaluated."""
    from sweeps.models import load_model

    return load_model(point.source, dtype, point.config["model"]["trust_remote_code"]).to(point.device)


def _packed(point: Point):
    """The compressed model as it is evaluated, from its checkpoint's bytes."""
    from caldera.checkpoint import load_dense

    return load_dense(point.checkpoint, _dtype(point)).to(point.device)


def check_inputs(point: Point) -> None:
    """Weights are finite, and the texts are in order. Raises an error before any long work."""
    from sweeps.models import check_finite

    check_finite(point.source, point.cache)
    check_texts(point)


def _original(point: Point):
    """The point's uncompressed model, for forward passes as they are evaluated."""
    return _opened(point.source, point.dtype, point.device, point.config["model"]["trust_remote_code"])


def _stored(point: Point):
    """What opens the point's uncompressed model, for its weights, in this process or a worker."""
    return functools.partial(_opened, point.source, None, "cpu", point.config["model"]["trust_remote_code"])


@functools.lru_cache(maxsize=1)
def _opened(checkpoint: Path, dtype: str | None, device: str, trusted: bool):
    """The uncompressed model, block by block; the last one asked for is kept for the next point."""
    from sweeps.models import open_model

    return open_model(checkpoint, dtype, device, trusted)


def _dtype(point: Point):
    import torch

    return getattr(torch, point.dtype)
