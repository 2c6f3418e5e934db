"""Every YAML composes, holds only keys of the schema, and every key of the schema is read by the application."""

import dataclasses
import importlib.resources
import math
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import sweeps
from caldera import Method, decompose
from caldera.errors import UserError
from caldera.quantizers import quantizer_names
from sweeps.grid import expand, is_search
from sweeps.models import ModelSource
from sweeps.plan import resolve
from sweeps.schema import Config, QuantizerConfig
from sweeps.settings import quantizer_name
from sweeps.wording import sentence
from tests.caldera.oracles import error_by_definition, gaussian, second_moments

CONF = Path(str(importlib.resources.files("conf")))
NOT_HYDRA = ("tasks",)  # lm-eval reads these
FILES = sorted(f.relative_to(CONF) for f in CONF.rglob("*.yaml") if f.relative_to(CONF).parts[0] not in NOT_HYDRA)
OPTIONS = [file for file in FILES if len(file.parts) > 1]
GROUPS = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}


def parts(option: Path) -> str:
    """The parts of a matrix that a quantizer serves: Q alone may be left out by name."""
    return "q" if option.stem == "none" else "qlr"


def overrides(option: Path) -> list[str]:
    if option.parts[0] == "quantizer":
        return [f"quantizer@{part}={option.stem}" for part in parts(option)]
    return [f"{option.parent.as_posix()}={option.stem}"]


@pytest.fixture
def expanded():
    """expanded(*overrides): the configuration of a multirun, and that of each of its jobs."""

    def _expanded(*lines: str):
        with initialize_config_module("conf", version_base="1.3"):
            fixed = [line for line in lines if "," not in line and "(" not in line]
            config = compose("config", fixed, return_hydra_config=True)
            with open_dict(config):
                config.hydra.overrides.task = list(lines)
            return config, expand(config)

    return _expanded


def leaves(schema: type) -> list[tuple[str, str]]:
    """(group, key) of every setting of the schema; the group of a scalar of the root is empty."""
    nested = {f.name: f.type for f in dataclasses.fields(schema)}
    flat = [("", name) for name, kind in nested.items() if not dataclasses.is_dataclass(kind)]
    return flat + [(group, f.name) for group, kind in GROUPS.items() for f in dataclasses.fields(kind)]


# ---------------------------------------------------------------------------------------------------------- composition
def test_there_are_options_to_test():
    assert {option.parts[0] for option in OPTIONS} >= {"model", "quantizer", "method", "experiment", "tracker"}


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes(option, composed):
    config = composed(*overrides(option), return_hydra_config=True)
    missing = {key for key in OmegaConf.missing_keys(config) if not key.startswith("hydra.")}
    assert missing <= ({"model.path"} if option == Path("model/hf.yaml") else set())
    own = option.parts[1] if option.parts[0] == "hydra" else None
    assert config.hydra.launcher._target_.startswith("hydra_plugins." if own == "launcher" else "hydra.")
    if option.parts[0] == "quantizer":
        named = {quantizer_name(part, OmegaConf.to_container(config[part])) for part in parts(option)}
        assert named == {option.stem}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_yaml_holds_a_key_that_the_schema_lacks(file):
    data = OmegaConf.to_container(OmegaConf.load(CONF / file)) or {}
    data = {key: value for key, value in data.items() if key not in ("defaults", "hydra")}
    whole = len(file.parts) == 1 or (CONF / file).read_text().startswith("# @package _global_")
    group = "experiment" if whole else file.parts[0]
    schemas = GROUPS | {"experiment": Config, "quantizer": QuantizerConfig}
    if group != "hydra":
        OmegaConf.merge(OmegaConf.structured(schemas[group]), data)


def test_every_group_of_the_schema_has_its_options():
    quantized, plain = {"q", "l", "r"}, {"compute", "checkpoint", "search"}
    assert set(GROUPS) - quantized - plain <= {option.parts[0] for option in OPTIONS}


# ----------------------------------------------------------------------------------------------------------- quantizers
def test_every_quantizer_has_a_yaml_of_its_name():
    assert sorted(o.stem for o in OPTIONS if o.parts[0] == "quantizer") == sorted([*quantizer_names(), "none"])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"family": "e8p", "bits": 2, "scale": "row"}, "e8p_2bit_row"),
        ({"family": "uniform_asym", "bits": 3, "scale": "g64"}, "uniform_asym_3bit_g64"),
        ({"family": "fp16", "bits": 16, "scale": "matrix"}, "fp16"),
    ],
)
def test_scale_is_part_of_a_quantizers_name(settings, name):
    assert quantizer_name("q", settings) == name


# -------------------------------------------------------------------------------------------------------------- methods
METHODS = {
    "caldera": ("trellis_2bit", 0), "caldera_published": ("e8p_2bit", 0), "q_only": ("e8p_2bit", 0),
    "qera": ("trellis_2bit", 32), "loftq": ("nf_4bit_g64", 32), "srr": ("trellis_2bit", 64),
    "odlri": ("trellis_2bit", 64),
    "gptq": ("uniform_asym_3bit_g64", 0), "rtn": ("uniform_asym_3bit_g64", 0), "lr_only": ("none", 0),
    "none": ("none", 0), "fast": ("e8p_2bit", 0),
}  # fmt: skip


def test_every_method_is_known_here():
    assert sorted(METHODS) == sorted(o.stem for o in OPTIONS if o.parts[0] == "method")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_alone_brings_its_quantizer_and_its_rank(name, composed):
    config = composed(f"method={name}")
    found = quantizer_name("q", OmegaConf.to_container(config.q))
    assert (config.method.name, found, config.rank.k) == (name, *METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_the_command_line_and_experiments_win_over_a_method(name, composed):
    config = composed(f"method={name}", "quantizer@q=uniform_5bit", "quantizer@l=nf_2bit", "rank.k=7")
    assert (config.q.family, config.q.bits, config.l.family, config.rank.k) == ("uniform", 5, "nf", 7)
    assert composed("experiment=original", f"method={name}").method.inputs == "original"


def test_an_experiment_may_choose_method_and_quantizer(composed, tmp_path):
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /method: gptq\n  - override /quantizer@q: nf_3bit\n"
    (own / "mine.yaml").write_text(text)
    config = composed("experiment=mine", f"hydra.searchpath=[file://{own.parent}]")
    assert (config.method.name, config.q.family, config.q.scale) == ("gptq", "nf", "g64")


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"none"}))
def test_every_method_decomposes(name, point):
    """On the smallest matrix of the tiny model, and what it reports is what it deploys."""
    method = point(f"method={name}", "rank.k=4", "method.outer_iterations=1", "method.inner_iterations=1").method
    weight, moments = gaussian(32, 64), second_moments(64)
    found = decompose(weight, moments, method)
    expected = error_by_definition(weight, found.dequantize(), moments)
    assert found.relative_error == pytest.approx(expected, rel=1e-3) and 0 < expected < 1


# ---------------------------------------------------------------------------------------------------------- experiments
EXPERIMENTS = [option.stem for option in OPTIONS if option.parts[0] == "experiment"]
HERE = [name for name in EXPERIMENTS if not name.startswith("paper_")]  # of those the models are not: test_published


@pytest.mark.parametrize("name", HERE)
def test_every_experiment_has_distinct_points(name, expanded, tmp_path):
    config, jobs = expanded(f"experiment={name}")
    grids = config.hydra.sweeper.get("grids") or {"": config.hydra.sweeper.params}
    size = sum(math.prod(len(str(values).split(",")) for values in grid.values()) for grid in grids.values())
    assert config.hydra.mode.name == "MULTIRUN"
    assert is_search(config) or len(jobs) == size > 1
    assert len({OmegaConf.to_yaml(job) for job in jobs}) == len(jobs)
    for job in jobs:
        job.results = str(tmp_path)
        resolve(job)


def test_the_grid_is_every_combination_in_order(expanded):
    _, jobs = expanded("hydra.mode=MULTIRUN", "rank.k=0,8", "quantizer@q=e8p_2bit,uniform_3bit", "seed=range(2)")
    found = [(job.rank.k, job.q.family, job.q.bits, job.seed) for job in jobs]
    assert found == [(k, *q, s) for k in (0, 8) for q in (("e8p", 2), ("uniform", 3)) for s in (0, 1)]
    assert all("hydra" not in job for job in jobs)


# ------------------------------------------------------------------------------------------------------- misspelt keys
MISSPELT = ["rank.kk=3", "rnk.k=3", "forse=true", "+rank.kk=3", "+forse=true", "++q.bit=2", "+model.pth=x"]


@pytest.mark.parametrize("line", MISSPELT)
def test_a_misspelt_key_is_refused_by_name(line, point):
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as caught:
        point(line)
    key = line.lstrip("+").split("=")[0]
    assert re.search(rf"^{re.escape(key)} is no setting", sentence(caught.value))


@pytest.mark.parametrize(("line", "near"), [("rank.kk=3", "rank.k"), ("forse=true", "force"), ("sed=1", "seed")])
def test_the_nearest_settings_are_offered(line, near, point):
    with pytest.raises(HydraException) as caught:
        point(line)
    assert re.search(rf"the nearest are .*\b{re.escape(near)}\b", sentence(caught.value))


@pytest.mark.parametrize(
    ("line", "near"),
    [("tracker=wandbb", "wandb"), ("quantizer@q=e8p_5bit", "e8p_4bit"), ("model=smolm", "smollm2_135m")],
)
def test_an_unknown_option_is_refused_with_the_nearest(line, near, point):
    with pytest.raises(HydraException) as caught:
        point(line)
    value, group = line.split("=")[1], line.split("=")[0].split("@")[0]
    assert re.search(rf"{group}={value} is not known; the nearest names are .*\b{near}\b", sentence(caught.value))


def test_a_users_own_option_may_not_misspell_a_key_either(point, tmp_path):
    own = tmp_path / "own" / "rank"
    own.mkdir(parents=True)
    (own / "right.yaml").write_text("k: 4\n")
    (own / "wrong.yaml").write_text("kk: 4\n")
    path = f"hydra.searchpath=[file://{own.parent}]"
    assert point(path, "rank=right").method.rank == 4
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as caught:
        point(path, "rank=wrong")
    assert re.search(r"\bkk\b is no setting", sentence(caught.value))


# ------------------------------------------------------------------------------------------------- no setting is unread
def sources() -> str:
    files = sorted(Path(sweeps.__file__).parent.glob("*.py"))
    return "\n".join(f.read_text() for f in files if f.name != "schema.py")


@pytest.mark.parametrize(("group", "key"), leaves(Config), ids=lambda part: part or "root")
def test_every_setting_is_read_somewhere(group, key):
    """A coarse check, by name: in the sources, or as a field that the whole group is unpacked into."""
    unpacked = {"method": Method, "model": ModelSource}
    if group in unpacked and key in {f.name for f in dataclasses.fields(unpacked[group])}:
        return
    assert re.search(rf"""["']{key}["']|\.{key}\b""", sources())
