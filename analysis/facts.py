"""What a reader of a sweep's numbers has to know: the short answer, where they come from, why to doubt them."""

import re
from pathlib import Path

import pandas as pd

from analysis.frontier import score
from analysis.pareto import is_compressed
from analysis.style import point_label

TOLERANCES = (0.05, 0.1, 0.25, 0.5, 1.0)  # shares of the uncompressed model's value that one may be ready to lose


def answers(table: pd.DataFrame) -> list[dict]:
    """The smallest point that loses no more than each of TOLERANCES; none for several models or no uncompressed one."""
    metric, x = table.attrs["metric"], table.attrs["x"]
    higher = table.attrs["metrics"][metric]["higher_is_better"]
    whole = table[(table["status"] == "done") & (table["method"] == "none")]
    found: dict[str, dict] = {}
    if whole["model"].nunique() != 1 or table["model"].nunique() != 1 or pd.isna(base := whole[metric].iloc[0]):
        return []
    for tolerance in TOLERANCES:
        loss = (1 - table[metric] / base) if higher else (table[metric] / base - 1)
        rows = table[is_compressed(table) & (loss <= tolerance)].sort_values([x])
        if len(rows):
            row = rows.iloc[0]
            found.setdefault(row["name"], {"tolerance": f"{tolerance:.0%}"} | _answer(row, metric, x))
    return list(found.values())


def _answer(row: pd.Series, metric: str, x: str) -> dict:
    value = score(row[metric], row[f"{metric}:stderr"])
    size = f"{row[x]:,.1f} MB" if x == "megabytes" else f"{row[x]:.2f} bits"
    return {"size": size, "label": point_label(row), "value": value}


def environment(records: list[dict]) -> list[tuple[str, str]]:
    """What the points ran on, each fact once; several values where points differ."""
    facts: dict[str, dict] = {}
    for record in records:
        known = record.get("environment") or {}
        memory = known.get("memory_bytes")
        flat = {key: known.get(key) for key in ("processor", "gpu", "threads", "platform", "python")}
        flat |= {"memory": memory and f"{memory / 1e9:.0f} GB"} | (known.get("versions") or {})
        for key, value in flat.items():
            if value is not None:
                facts.setdefault(key, {})[str(value)] = None
    return [(key, ", ".join(values)) for key, values in facts.items()]


def caveats(records: list[dict], table: pd.DataFrame) -> list[str]:
    """What a reader should know before trusting the numbers."""
    metrics = table.attrs["metrics"]
    found = [
        f"{name} was not measured alike in all points: {', '.join(info['differs'])} differ."
        for name, info in metrics.items()
        if info["differs"]
    ]
    if table["model"].nunique() > 1:
        found.append("Several models share these axes: compare them by megabytes, not by bits per parameter.")
    if table["seed"].nunique() == 1:
        found.append("All points have one seed: what another seed would change is in no error bar.")
    files = {(record.get("config") or {}).get("model", {}).get("gguf_file") for record in records} - {None}
    found += [f"The uncompressed reference comes from {file}: {_once(file)}." for file in sorted(files)]
    found += _numerical(records)
    failed = table[table["status"] != "done"]
    return found + [f"{row['name']} failed: {row['error']}" for _, row in failed.iterrows()]


def _once(file: str) -> str:
    """What a GGUF file's name says of its own quantization."""
    bits = re.search(r"\bI?Q(\d)", Path(file).stem, re.IGNORECASE)
    return f"quantized {f'to {bits[1]} bits ' if bits else ''}once, which flatters what is near those bits or above"


def _numerical(records: list[dict]) -> list[str]:
    matrices = [matrix for record in records for matrix in record.get("matrices") or []]
    few, damped = (sum(bool(matrix.get(key)) for matrix in matrices) for key in ("few_tokens", "jitters"))
    notes = [(few, "were fitted to fewer tokens than they have inputs"), (damped, "needed more damping than asked for")]
    return [f"{count} of {len(matrices)} matrices {what}." for count, what in notes if count]
