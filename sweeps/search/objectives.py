"""What a point is judged by: numbers of its record of which less is better."""

import math

from caldera.errors import UserError

BITS = ("bits/stored", "bits/nominal", "bits/model")
OF_TEXT = ("word_perplexity", "byte_perplexity", "kl", "agreement")


def costs(record: dict, names: list[str]) -> tuple[float, ...]:
    """A number an objective; a metric of which more is better is negated.

    Raises UserError for a metric that the record lacks, and for a number that is not finite.
    """
    found = tuple(_cost(record, name) for name in names)
    for name, value in zip(names, found, strict=True):
        if not math.isfinite(value):
            raise UserError(f"{record['name']}: {name} is {value}, by which nothing can be judged")
    return found


def _cost(record: dict, name: str) -> float:
    if name in BITS:
        return float(record["bits"][name.removeprefix("bits/")])
    metrics = record["metrics"]
    found = metrics.get(name) or next((metrics[key] for key in metrics if key.startswith(name)), None)
    if found is None or found["value"] is None:
        raise UserError(f"search.objectives: {record['name']} has no {name}; it has {', '.join(metrics)}")
    return float(-found["value"] if found["higher_is_better"] else found["value"])


def check_objectives(names: list[str], tasks: list[str]) -> None:
    """Raises UserError for objectives that no record would have."""
    known = (*BITS, *OF_TEXT, "perplexity", *tasks)
    for name in names:
        if name not in BITS and not name.startswith(known[len(BITS) :]):
            raise UserError(f"search.objectives={name} is not measured: choose among {', '.join(known)}")
    if len(set(names)) != len(names) or not names:
        raise UserError(f"search.objectives={names} must name one objective or several different ones")
