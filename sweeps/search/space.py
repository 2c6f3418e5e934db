"""What a search may choose from: Hydra's sweep overrides as optuna's distributions, and choices as overrides."""

import math
from dataclasses import dataclass

from hydra.core.override_parser.types import Override
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from caldera.errors import UserError

Params = dict[str, str | int | float]


@dataclass(frozen=True)
class Space:
    """Distributions by the key of their override, and the overrides that all points have."""

    distributions: dict[str, BaseDistribution]
    fixed: list[str]

    @classmethod
    def of(cls, overrides: list[Override]) -> "Space":
        """Of two overrides of one key the later counts. Raises UserError for a sweep that holds nothing."""
        last = {o.get_key_element(): o for o in overrides}
        distributions = {key: _distribution(o) for key, o in last.items() if o.is_sweep_override()}
        if not distributions:
            raise UserError(
                "hydra/sweeper=optuna has nothing to choose: give a list or a range, rank.k='range(0,65,8)'"
            )
        fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in last.items() if key not in distributions]
        return cls(distributions, fixed)

    def overrides(self, params: Params) -> list[str]:
        """The overrides of one point."""
        return self.choices(params) + self.fixed

    def choices(self, params: Params) -> list[str]:
        """Those that differ between points."""
        return [f"{key}={_text(params[key])}" for key in self.distributions]

    @property
    def size(self) -> float:
        """How many points there are; infinity for an interval."""
        return math.prod(map(_count, self.distributions.values()))

    def probes(self) -> list[list[str]]:
        """Points in which every choice and both ends of every range occur, the others at their first."""
        ends = {key: _ends(distribution) for key, distribution in self.distributions.items()}
        first = {key: values[0] for key, values in ends.items()}
        others = [first | {key: value} for key, values in ends.items() for value in values[1:]]
        return [self.overrides(params) for params in (first, *others)]


def _distribution(override: Override) -> BaseDistribution:
    value = override.value()
    try:
        if override.is_interval_sweep():
            kind = IntDistribution if isinstance(value.start, int) else FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        choices = list(override.sweep_string_iterator())
        if not choices:
            raise ValueError("it holds no value")
        return _stepped(choices) if override.is_range_sweep() else CategoricalDistribution(choices)
    except ValueError as error:
        raise UserError(f"{override.input_line} cannot be searched: {error}") from error


def _stepped(texts: list[str]) -> BaseDistribution:
    """Equally spaced numbers."""
    whole = all(text.lstrip("-").isdigit() for text in texts)
    numbers = sorted(int(text) if whole else float(_text(float(text))) for text in texts)
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    kind = IntDistribution if whole else FloatDistribution
    return kind(numbers[0], numbers[-1], step=step if whole else float(_text(float(step))))


def _ends(distribution: BaseDistribution) -> list[str | int | float]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return sorted({distribution.low, distribution.high})


def _count(distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if distribution.step is None:
        return math.inf
    return round((distribution.high - distribution.low) / distribution.step) + 1


def _text(value: str | int | float) -> str:
    """As an override: a float keeps its point, so that a setting that takes whole numbers refuses it at once."""
    return str(float(f"{value:.12g}")) if isinstance(value, float) else str(value)
