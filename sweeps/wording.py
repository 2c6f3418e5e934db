"""Errors as one sentence for the person who typed the command."""

import difflib
import re
import sys
from dataclasses import fields, is_dataclass

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from sweeps.schema import Config


def known_keys() -> list[str]:
    """Every setting of the schema, as an override names it."""
    groups = {f.name: f.default_factory for f in fields(Config) if is_dataclass(f.default_factory)}
    return [*(f.name for f in fields(Config)), *(f"{g}.{f.name}" for g, kind in groups.items() for f in fields(kind))]


def refuse(problems: list[str]) -> None:
    """Print each problem once and exit with 1, if there are any."""
    for problem in dict.fromkeys(problems):
        print(f"caldera-run: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(1)


def sentence(error: Exception) -> str:
    """An error in one line; Hydra's and OmegaConf's are worded to name the field, the value and the remedy."""
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return str(error) or type(error).__name__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, value = (error.missing_cfg_file or "").rpartition("/")
        near = difflib.get_close_matches(value, error.options, 3, 0.3) or sorted(error.options)
        return f"{group}={value} is not known; the nearest names are {', '.join(near)}"
    text = " ".join(line.strip() for line in str(error.__cause__ or error).splitlines()[:1])
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]} lists several values: add -m to run all of them"
    if match := re.search(r"Could not override '([\w.]+)'|Key '(\w+)'", f"{error} {text}"):
        near = difflib.get_close_matches(match[1] or match[2], known_keys(), 3, 0.4)
        return f"{match[1] or match[2]} is no setting; the nearest are {', '.join(near) or 'in conf/'}"
    return text if str(error) in text else f"{str(error).splitlines()[0]}: {text}"
