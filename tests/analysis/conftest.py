"""Records of a small sweep, with numbers as a real one has them."""

import json
from types import SimpleNamespace

import pytest

WINDOWS = {"text": "boolq", "rows": 64, "length": 1024}
# rank, bits of L and R, bits of Q, nominal bits, perplexity, ARC-Easy accuracy
GRID = [
    (0, None, 2, 2.000, 68.24, 0.392),
    (16, 4, 2, 2.184, 61.82, 0.401),
    (32, 2, 2, 2.184, 57.90, 0.405),
    (32, 4, 2, 2.368, 50.28, 0.418),
    (64, 2, 2, 2.368, 48.12, 0.421),
    (64, 4, 2, 2.736, 41.84, 0.436),
    (128, 2, 2, 2.736, 43.10, 0.431),
    (0, None, 3, 3.000, 29.55, 0.471),
    (32, 16, 2, 3.472, 47.04, 0.423),
    (32, 4, 3, 3.368, 27.60, 0.478),
    (0, None, 4, 4.000, 23.11, 0.497),
]
PROJECTIONS = ("self_attn.q_proj", "mlp.down_proj")
PARAMETERS, MODEL_PARAMETERS = 106_168_320, 134_515_008


def record(name: str, point: dict, nominal: float | None, metrics: dict, **more) -> dict:
    """One finished record; `metrics` maps a metric to (value, stderr)."""
    stored = None if nominal is None else nominal if nominal == 16 else nominal + 0.011
    stored_bytes = None if nominal is None else round(stored * PARAMETERS / 8)
    untouched = 2 * (MODEL_PARAMETERS - PARAMETERS)
    return {
        "schema_version": 1, "status": "done", "name": name, "key": "ab12", "sweep": "test",
        "created": "2025-01-01T00:00:00Z", "config": {}, "point": {"model": "smollm2_135m", "seed": 0} | point,
        "bits": {
            "nominal": nominal, "stored": stored, "stored_bytes": stored_bytes, "parameters": PARAMETERS,
            "model": None if nominal is None else 8 * (stored_bytes + untouched) / MODEL_PARAMETERS,
            "model_bytes": None if nominal is None else stored_bytes + untouched, "model_parameters": MODEL_PARAMETERS,
        },
        "metrics": {metric: measured(metric, *values) for metric, values in metrics.items()},
        "matrices": [], "timings_s": {"compress": 812.5}, "memory": {}, "environment": {}, "seeds": {}, "error": None,
    } | more  # fmt: skip


def measured(metric: str, value: float, stderr: float) -> dict:
    perplexity = metric.startswith("perplexity/")
    on = WINDOWS if perplexity else {"documents": 570}
    scored = {"value": value, "stderr": stderr, "samples": None}
    return scored | {"higher_is_better": not perplexity, "measured_on": on}


def compressed(rank, factor_bits, q_bits, nominal, perplexity, accuracy, **more) -> dict:
    factor = None if factor_bits is None else "bf16" if factor_bits == 16 else f"e8p_{factor_bits}bit"
    point = {"method": "caldera", "rank": rank, "q": f"e8p_{q_bits}bit", "l": factor, "r": factor}
    point |= {"q_bits": q_bits, "l_bits": factor_bits, "r_bits": factor_bits}
    metrics = {"perplexity/boolq_1024": (perplexity, 0.018 * perplexity), "arc_easy/acc": (accuracy, 0.021)}
    return record(f"q{q_bits}_rank{rank}_lr{factor_bits}", point, nominal, metrics, **more)


def baseline() -> dict:
    point = {"method": "none"} | dict.fromkeys(("rank", "q", "l", "r", "q_bits", "l_bits", "r_bits"))
    return record("uncompressed", point, 16, {"perplexity/boolq_1024": (20.95, 0.38), "arc_easy/acc": (0.514, 0.021)})


def failed() -> dict:
    point = {"method": "caldera", "rank": 8, "q": "e8p_2bit", "l": "e8p_4bit", "r": "e8p_4bit"}
    point |= {"q_bits": 2, "l_bits": 4, "r_bits": 4}
    error = {
        "type": "FactorisationError",
        "message": "H has 3 NaN\nmore",
        "traceback": "",
        "stage": "compress",
        "block": 7,
    }
    error["matrix"] = "self_attn.q_proj"
    return record("q2_rank8_lr4", point, None, {}, status="failed", error=error, timings_s={})


def with_matrices(record: dict, errors) -> dict:
    """The record with two blocks of two matrices of these relative errors, after three updates."""
    names = [f"model.layers.{block}.{projection}" for block in (0, 1) for projection in PROJECTIONS]
    rank, q = record["point"]["rank"], record["point"]["q"]
    fields = {
        "shape": [576, 576],
        "rank": rank,
        "q": q,
        "l": "none",
        "r": "none",
        "nominal_bits": 2.0,
        "stored_bits": 2.1,
    }
    for name, error in zip(names, errors, strict=True):
        trace = [
            {"iteration": i, "step": step, "error": error * k}
            for i, step, k in ((0, "LR", 4), (0, "Q", 2), (1, "LR", 1))
        ]
        made = {"relative_error": error, "predicted_error": 1.1 * error, "output_error": 1.5 * error, "trace": trace}
        record["matrices"].append({"name": name} | fields | made)
    return record


@pytest.fixture
def fitted():
    """fitted(record, errors): see `with_matrices`."""
    return with_matrices


@pytest.fixture
def make() -> SimpleNamespace:
    """The factory of records, for tests that need others than `records`."""
    return SimpleNamespace(record=record, measured=measured, compressed=compressed, baseline=baseline, failed=failed)


@pytest.fixture
def records() -> list[dict]:
    """Eleven compressed points, the uncompressed model and a failed point."""
    return [*(compressed(*row) for row in GRID), baseline(), failed()]


@pytest.fixture
def write(tmp_path):
    """Writes records as a results folder and returns its path."""

    def _write(records: list[dict]):
        for one in records:
            folder = tmp_path / "sweep" / "points" / one["name"]
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(json.dumps(one))
        return tmp_path / "sweep"

    return _write
