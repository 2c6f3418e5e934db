"""Which of many points to compute: functions of what is expected of them, pairs of which less is better."""

from collections.abc import Sequence

Expected = tuple[float, float]  # stored bits, predicted error
BEYOND = 0.2  # of the range of what is compared: how far behind the worst the reference lies


def beats(one: Expected, other: Expected, margin: float) -> bool:
    """Whether `one` takes no more bits and its error is below the other's by that share of it."""
    return one[0] <= other[0] and one[1] <= other[1] * (1 - margin)


def gains(candidates: Sequence[Expected], known: Sequence[Expected]) -> list[float]:
    """What each candidate would add to the known ones' area of bits and squared error, which log perplexity follows."""
    losses = [(bits, error**2) for bits, error in (*candidates, *known)]
    reference = tuple(max(axis) + BEYOND * (max(axis) - min(axis) or 1.0) for axis in zip(*losses))
    before = losses[len(candidates) :]
    area = hypervolume(before, reference)
    return [hypervolume([*before, one], reference) - area for one in losses[: len(candidates)]]


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area between the points and the reference that some point beats."""
    area, lowest = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return area
