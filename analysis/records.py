"""Records of a sweep (`RESULTS_DIR/points/<name>/record.json`) as pandas tables."""

import gzip
import json
import zlib
from pathlib import Path

import pandas as pd

SCHEMA_VERSION = 2
REQUIRED = ("name", "status", "point", "bits", "metrics")
RELATIVE = ("kl/", "kl_", "agreement/")  # how metrics begin that compare with the uncompressed model
MATRIX_FIELDS = ("rank", "q", "l", "r", "nominal_bits", "stored_bits", "stored_bytes")
ERRORS = ("relative_error", "predicted_error", "output_error")


class RecordError(ValueError):
    """A results folder cannot be used; the message is one sentence that names the path and the remedy."""


def load_records(source: str | Path) -> list[dict]:
    """All records below a results folder, finished and failed, sorted by name; points still running have none yet.

    Or those in one compressed file, as `analysis.headline.pack` writes it. Raises RecordError.
    """
    if Path(source).is_file():
        found = [checked(record, source) for record in _unpacked(Path(source))]
    else:
        found = [_read(path) for path in sorted(Path(source).glob("points/*/record.json"))]
    if not found:
        raise RecordError(f"{source} holds no points/*/record.json: give the output folder of a sweep.")
    return sorted(found, key=lambda record: record["name"])


def home(source: str | Path) -> Path:
    """Where figures of a source go unless told: into the folder that it is, beside the file, or here for W&B's runs."""
    path = Path(source)
    return path if path.is_dir() else path.parent if path.is_file() else Path()


def _unpacked(path: Path) -> list:
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RecordError(f"{path} is no file of records ({error}): give the output folder of a sweep.") from error
    return found if isinstance(found, list) else [found]


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error}): delete its folder and run the point again.") from error
    return checked(record, path)


def checked(record: object, path: Path) -> dict:
    """What was read from `path`, if it is a record that this version knows. Raises RecordError."""
    version = record.get("schema_version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise RecordError(f"{path} has no schema_version: delete its folder and run the point again.")
    if version > SCHEMA_VERSION:
        raise RecordError(f"{path} has schema {version}, newer than the known {SCHEMA_VERSION}: update this package.")
    if missing := [field for field in REQUIRED if field not in record]:
        raise RecordError(f"{path} lacks {', '.join(missing)}: delete its folder and run the point again.")
    return record


def tidy(records: list[dict]) -> pd.DataFrame:
    """One row a point: name, status, the sweep's axes, bits, megabytes, metrics with `:stderr`, costs, error.

    Bits are per parameter, `megabytes` is the whole stored model / 1e6, `compress_s` seconds, `memory_gb` the most that
    one process held / 1e9, `reused_blocks` the share of blocks that were compressed before. What a record does not give
    is NaN (NA in integer axes). `table.attrs["axes"]` lists the axes, and `table.attrs["metrics"]` maps a metric
    to `higher_is_better`, to `measured_on` as far as all points agree, and to `differs`, the keys where they do not.
    `table.attrs["float32"]` has, by model and metric, what the uncompressed model scores in float32: the noise floor.
    """
    metrics = sorted({metric for record in records for metric in record["metrics"] or {}})
    head = pd.DataFrame([{"name": record["name"], "status": record["status"]} for record in records])
    axes = pd.DataFrame([record["point"] for record in records], dtype=object).apply(_axis)
    numbers = pd.DataFrame([_numbers(record, metrics) for record in records], dtype=float)
    error = pd.Series([failure(record) for record in records], name="error", dtype=object)
    table = pd.concat([head, axes, numbers, error], axis=1)
    table.attrs["axes"] = list(axes.columns)
    table.attrs["metrics"] = {metric: _description(records, metric) for metric in metrics}
    table.attrs["float32"] = _float32(records)
    return table


def _float32(records: list[dict]) -> dict[str, dict[str, float]]:
    """Of what compares with the uncompressed model a record's noise floor has the value itself, else the change."""
    found: dict[str, dict[str, float]] = {}
    for record in records:
        for metric, change in (record.get("noise_floor") or {}).items():
            if change is not None:
                value = change if metric.startswith(RELATIVE) else record["metrics"][metric]["value"] - change
                found.setdefault(record["point"]["model"], {})[metric] = value
    return found


def _axis(column: pd.Series) -> pd.Series:
    """Whole numbers stay whole beside a null (`rank` of the baseline); anything else is left as pandas infers it."""
    integers = all(isinstance(value, int) and not isinstance(value, bool) for value in column.dropna())
    return column.astype("Int64") if integers and column.notna().any() else column.infer_objects()


def _numbers(record: dict, metrics: list[str]) -> dict:
    bits = record["bits"] or {}
    row = {f"bits_{kind}": bits.get(kind) for kind in ("nominal", "stored", "model")}
    size = bits.get("model_bytes")
    row["megabytes"] = None if size is None else size / 1e6
    for metric in metrics:
        measured = (record["metrics"] or {}).get(metric) or {}
        row |= {metric: measured.get("value"), f"{metric}:stderr": measured.get("stderr")}
    return row | _costs(record)


def _costs(record: dict) -> dict:
    memory = record.get("memory") or {}
    peaks = [memory.get(key) for key in ("peak_rss_bytes", "workers_peak_rss_bytes")]
    return {
        "compress_s": (record.get("timings_s") or {}).get("compress"),
        "memory_gb": max((peak / 1e9 for peak in peaks if peak is not None), default=None),
        "reused_blocks": (record.get("reused") or {}).get("blocks"),
    }


def _description(records: list[dict], metric: str) -> dict:
    found = [record["metrics"][metric] for record in records if (record["metrics"] or {}).get(metric)]
    settings = [measured.get("measured_on") or {} for measured in found]
    keys = sorted({key for setting in settings for key in setting})
    differs = [key for key in keys if any(setting.get(key) != settings[0].get(key) for setting in settings)]
    return {
        "higher_is_better": any(measured.get("higher_is_better") for measured in found),
        "measured_on": {key: settings[0][key] for key in keys if key not in differs},
        "differs": differs,
    }


def failure(record: dict) -> str | None:
    """Why a point failed, on one line: stage, block, matrix and the first line of the message; None if it did not."""
    if record["status"] == "done":
        return None
    error = record.get("error") or {}
    block = None if error.get("block") is None else f"block {error['block']}"
    place = ", ".join(str(part) for part in (error.get("stage"), block, error.get("matrix")) if part is not None)
    message = ((error.get("message") or "").strip().splitlines() or ["no message"])[0]
    return f"{place or 'unknown stage'}: {error.get('type') or 'Error'}: {message}"


def matrices(records: list[dict]) -> pd.DataFrame:
    """One row a (point, matrix), long format: where the matrix sits, its shape, its format, bits, bytes and error.

    `block` is the first integer of the dotted name (NA without one), `projection` its last component; bits are per
    parameter, `relative_error` is sqrt(tr(E H E^T) / tr(W H W^T)).
    """
    rows = [_matrix(record["name"], matrix) for record in records for matrix in record.get("matrices") or []]
    columns = ["point", "matrix", "block", "projection", "rows", "columns", *MATRIX_FIELDS, *ERRORS]
    return pd.DataFrame(rows, columns=columns).astype({"block": "Int64", "rank": "Int64"})


def _matrix(point: str, matrix: dict) -> dict:
    row = _place(point, matrix["name"])
    row["rows"], row["columns"] = matrix["shape"]
    return row | {field: matrix.get(field) for field in (*MATRIX_FIELDS, *ERRORS)}


def _place(point: str, name: str) -> dict:
    parts = name.split(".")
    projection = next((part for part in reversed(parts) if not part.isdigit()), parts[-1])  # experts are numbered
    block = next((int(part) for part in parts if part.isdigit()), None)
    return {"point": point, "matrix": name, "projection": projection, "block": block}


def traces(records: list[dict]) -> pd.DataFrame:
    """One row a (point, matrix, update): how the relative error of a fit fell.

    `update` counts from 1 what was fitted, in turn the backbone (`step` Q) and the factors (LR).
    """
    rows = [
        _place(record["name"], matrix["name"]) | {"update": update, "step": step["step"], "error": step["error"]}
        for record in records
        for matrix in record.get("matrices") or []
        for update, step in enumerate(matrix.get("trace") or [], 1)
    ]
    columns = ["point", "matrix", "block", "projection", "update", "step", "error"]
    return pd.DataFrame(rows, columns=columns).astype({"block": "Int64", "update": "Int64", "error": float})


def load_spectra(results_dir: str | Path | None) -> pd.DataFrame:
    """One row a (point, matrix, index) of every `spectra.json` that `caldera-spectra` left: singular values.

    `before` of W C, `after` of W^ C, `missing` of (W - W^) C, each descending. Empty without a folder or
    files; a damaged file is refused.
    """
    rows = []
    for path in sorted(Path(results_dir).glob("points/*/spectra.json")) if results_dir else ():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["matrices"]
        except (ValueError, KeyError) as error:
            raise RecordError(f"{path} is damaged ({error}): run caldera-spectra again.") from error
        for name, values in found.items():
            place = _place(path.parent.name, name)
            columns = zip(values["before"], values["after"], values["missing"], strict=True)
            rows += [
                place | {"index": i, "before": b, "after": a, "missing": m} for i, (b, a, m) in enumerate(columns, 1)
            ]
    columns = ["point", "matrix", "block", "projection", "index", "before", "after", "missing"]
    return pd.DataFrame(rows, columns=columns).astype({"block": "Int64", "index": "Int64"})
