"""One point from a plan to its record: calibrate, compress, reload, evaluate. What exists already is not done again."""

import functools
import gc
import math
import shutil
from pathlib import Path

from filelock import FileLock

from caldera.errors import CalderaError
from caldera.files import write_json
from sweeps import record as records
from sweeps.point import Point, axes, uncompressed_axes
from sweeps.progress import Reporter, log_file, logger
from sweeps.store import read_json
from sweeps.trackers import track


def finished(point: Point, name: str) -> dict | None:
    """The record of a point that is done, unless it is to be computed again."""
    file = point.folder(name) / "record.json"
    if point.config["force"] or not file.is_file():
        return None
    record = read_json(file)
    return record if record["status"] == "done" else None


def run_point(point: Point, reporter: Reporter) -> dict:
    """The record of a point, computed unless it is there. A failure leaves a failed record and is raised again."""
    if record := finished(point, point.name):
        return record
    folder = point.folder(point.name)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), log_file(folder / "log.txt"):
        if record := finished(point, point.name):
            return record
        records.reset_peak()
        try:
            record = _compute(point, reporter, folder)
        except Exception as error:
            failed = records.skeleton(point.name, point.key, point.config, axes(point), "failed")
            failed |= {"error": records.error_of(error, reporter.stage_name, getattr(error, "matrix", None))}
            logger.exception("point failed")
            _commit(point, failed | {"timings_s": reporter.timings}, folder)
            raise
        _commit(point, record, folder)
        _tidy(point, folder / "checkpoint")
        gc.collect()
        return record


def _commit(point: Point, record: dict, folder: Path) -> None:
    write_json(folder / "record.json", record)
    track(record, point.config["tracker"], Path(point.config["results"]))


def _tidy(point: Point, checkpoint: Path) -> None:
    """Once the record says that the point is done, its notes have served, and so may its checkpoint have."""
    from sweeps.compress import notes_of

    shutil.rmtree(notes_of(checkpoint), ignore_errors=True)
    if not point.config["keep_checkpoint"]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _compute(point: Point, reporter: Reporter, folder: Path) -> dict:
    if point.method is None:
        return _cached_baseline(point, reporter)
    baseline = run_baseline(point, reporter)
    checkpoint = folder / "checkpoint"
    if point.config["force"]:
        _drop(checkpoint)
    compressed = compress_point(point, reporter, checkpoint)
    with reporter.stage("load"):
        from caldera.checkpoint import load_dense

        model = load_dense(checkpoint, _dtype(point)).to(point.device)
    metrics = _evaluate(point, reporter, model)
    parameters = baseline["bits"]["model_parameters"]
    record = records.skeleton(point.name, point.key, point.config, axes(point), "done")
    record |= {"metrics": metrics, "matrices": compressed.matrices, "timings_s": reporter.timings}
    record["bits"] = records.bits_of(compressed.matrices, checkpoint, parameters)
    record["reused"] = reporter.reused | compressed.shares()
    record["memory"]["workers_peak_rss_bytes"] = compressed.peak_rss_bytes
    return record


def run_baseline(point: Point, reporter: Reporter) -> dict:
    """The uncompressed model's record: evaluated once, kept in the cache, copied to every results folder."""
    record, folder = _cached_baseline(point, reporter), point.folder(point.baseline_name)
    copy = folder / "record.json"
    if not copy.is_file() or read_json(copy)["status"] != "done":
        _commit(point, record, folder)
    return record


def _cached_baseline(point: Point, reporter: Reporter) -> dict:
    """The uncompressed model's record under the point's names."""
    cached = point.cache / "baselines" / f"{point.baseline_key}.json"
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):
        reporter.reused["baseline"] = float(cached.is_file())
        if not cached.is_file():
            write_json(cached, _baseline(point, reporter))
    record = read_json(cached)
    record |= {"sweep": point.config["sweep"], "name": point.baseline_name, "config": point.config}
    record["point"] |= {"model": point.config["model"]["name"]}
    return record


def _baseline(point: Point, reporter: Reporter) -> dict:
    own = Reporter(point.baseline_name)
    reporter.say("  uncompressed model, once:")
    with own.stage("load"):
        from sweeps.models import load_model

        trusted = point.config["model"]["trust_remote_code"]
        model = load_model(point.checkpoint, point.dtype, trusted).to(point.device)
    metrics = _evaluate(point, own, model)
    record = records.skeleton(point.baseline_name, point.baseline_key, point.config, uncompressed_axes(point), "done")
    width = 8.0 * _dtype(point).itemsize
    parameters = sum(p.numel() for p in model.parameters())
    compressed = sum(math.prod(shape) for shape in point.inventory.values())
    counts = {"parameters": compressed, "model_parameters": parameters}
    sizes = {"stored_bytes": int(compressed * width / 8), "model_bytes": int(parameters * width / 8)}
    bits = {"nominal": width, "stored": width, "model": width} | sizes | counts
    return record | {"metrics": metrics, "timings_s": own.timings, "bits": bits}


def compress_point(point: Point, reporter: Reporter, target: Path):
    """Calibrate and write the packed checkpoint: a `sweeps.compress.Compressed`."""
    import torch

    from sweeps.compress import Fit, compress
    from sweeps.shared import Shared

    inputs = _inputs(point, reporter)
    fit = Fit(point.method, frozenset(point.inventory), torch.device(point.device), point.key)
    shared = Shared(point.cache / "shared" / point.shared_key[:24] if point.correction is None else None)
    with reporter.stage("compress") as progress:
        options = {"workers": point.workers, "shared": shared}
        return compress(point.checkpoint, _stored(point), inputs, fit, target, _dtype(point), progress, **options)


def _inputs(point: Point, reporter: Reporter):
    """What the matrices are fitted to: see `sweeps.inputs`."""
    from sweeps.calibration import ensure_calibration, is_complete
    from sweeps.inputs import CorrectedPrefix, Original

    folder, spill = point.cache / "moments" / point.moments_key[:24], _spill(point)
    with reporter.stage("calibrate") as progress:
        hidden = point.correction is not None
        reporter.reused["moments"] = float(is_complete(folder, hidden))
        texts = functools.partial(_rows, point, "calibration")
        found = ensure_calibration(folder, lambda: _original(point), texts, progress, hidden, spill)
    if point.correction is None:
        return Original(found)
    return CorrectedPrefix(found, _original(point), _rows(point, "calibration"), point.correction, spill)


def _spill(point: Point):
    from caldera.rows import Spill

    return Spill(point.cache / "spill", point.config["compute"]["spill_mb"] * 2**20)


def _evaluate(point: Point, reporter: Reporter, model) -> dict:
    from sweeps.evaluate import perplexity, run_tasks

    settings = point.config["evaluation"]
    rows, metrics = _rows(point, "evaluation"), {}
    with reporter.stage("perplexity") as progress:
        facts = {"text": settings["text"], "tokenizer_digest": point.tokenizer}
        label = Path(settings["text"]).stem.removeprefix("embedded_")
        metrics[f"perplexity/{label}_{settings['length']}"] = perplexity(model, rows, **facts, progress=progress)
    with reporter.stage("tasks") as progress:
        options = {"limit": settings["limit"], "batch_size": settings["batch_size"], "progress": progress}
        return metrics | run_tasks(model, _tokenizer(point.checkpoint), list(settings["tasks"]), **options)


def check_inputs(point: Point) -> None:
    """Weights are finite, and the texts are in order. Raises an error before any long work."""
    from sweeps.models import check_finite

    check_finite(point.checkpoint, point.cache)
    check_texts(point)


def check_texts(point: Point) -> None:
    """Both texts are long enough and share no document. Raises UserError."""
    from sweeps.texts import check_no_overlap, load_texts

    settings = point.config["calibration"]
    _rows(point, "calibration")
    _rows(point, "evaluation")
    if not settings["allow_overlap"]:
        check_no_overlap(load_texts(settings["text"]), load_texts(point.config["evaluation"]["text"]))


def _rows(point: Point, group: str):
    """Token rows of the calibration or evaluation text. Raises UserError naming the group when there are too few."""
    settings = point.config[group]
    count, seed = ("sequences", settings["shuffle_seed"]) if group == "calibration" else ("rows", None)
    try:
        return _token_rows(point.checkpoint, settings["text"], settings[count], settings["length"], seed)
    except CalderaError as error:
        raise type(error)(f"{group}.{count}: {error}") from error


@functools.lru_cache(maxsize=4)
def _token_rows(checkpoint: Path, text: str, count: int, length: int, seed: int | None):
    from sweeps.texts import load_texts, token_rows

    return token_rows(load_texts(text), _tokenizer(checkpoint), count, length, seed)


@functools.lru_cache(maxsize=1)
def _tokenizer(checkpoint: Path):
    from sweeps.models import load_tokenizer

    return load_tokenizer(checkpoint)


def _original(point: Point):
    """The point's uncompressed model, for forward passes as they are evaluated."""
    return _opened(point.checkpoint, point.dtype, point.device, point.config["model"]["trust_remote_code"])


def _stored(point: Point):
    """What opens the point's uncompressed model, for its weights, in this process or a worker."""
    return functools.partial(_opened, point.checkpoint, None, "cpu", point.config["model"]["trust_remote_code"])


@functools.lru_cache(maxsize=1)
def _opened(checkpoint: Path, dtype: str | None, device: str, trusted: bool):
    """The uncompressed model, block by block; the last one asked for is kept for the next point."""
    from sweeps.models import open_model

    return open_model(checkpoint, dtype, device, trusted)


def _dtype(point: Point):
    import torch

    return getattr(torch, point.dtype)


def _drop(checkpoint: Path) -> None:
    """The checkpoint, and the notes that would let it be finished."""
    from sweeps.compress import notes_of

    for folder in (notes_of(checkpoint), checkpoint):
        shutil.rmtree(folder, ignore_errors=True)
