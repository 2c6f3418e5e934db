"""The settings of a recorded point as overrides of `caldera-run`."""

import json
import shlex
from collections.abc import Iterator

LEFT_OUT = {"results", "cache", "plan", "force", "retry"}  # where and how often, not what


def overrides(config: dict) -> dict[str, str]:
    """Every setting by its dotted name, in the words of the command line."""
    return {name: _word(value) for name, value in _leaves(config) if name.partition(".")[0] not in LEFT_OUT}


def command(config: dict) -> str:
    """What to type in a shell to run the point again."""
    return shlex.join(["caldera-run", *(f"{name}={word}" for name, word in overrides(config).items())])


def differing(configs: list[dict]) -> list[dict[str, str]]:
    """Of each configuration the overrides in which not all agree."""
    found = [overrides(config) for config in configs]
    return [{key: word for key, word in one.items() if any(other.get(key) != word for other in found)} for one in found]


def _leaves(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _word(value: object) -> str:
    """A value in Hydra's grammar; a text that would read as something else is quoted."""
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, str) and (not value or set(value) & set(" ,:=[]{}()'\"\\\t\n$%") or _reads_as_other(value)):
        return "'" + value.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
    return value if isinstance(value, str) else json.dumps(value)


def _reads_as_other(text: str) -> bool:
    """Whether a bare text is a number, a truth value or null."""
    if text.lower() in ("null", "true", "false", "nan", "inf", "-inf"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
