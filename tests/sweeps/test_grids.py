"""Several grids in one experiment, and the baselines, which are such a one."""

import pytest
from hydra import compose, initialize_config_module
from omegaconf import open_dict

from analysis.frontier import frontier_table, is_compressed
from analysis.records import load_records
from sweeps.grid import expand
from sweeps.pipeline import run_point
from sweeps.plan import resolve
from sweeps.progress import Reporter
from tests.sweeps.swept import NO_TASKS, Swept
from tests.sweeps.test_compose import METHODS

GRIDS = "+hydra.sweeper.grids={a:{rank.k:'0,4'},b:{method:'rtn,gptq',q.bits:3}}"
NO_BASELINES = {"none", "fast"}  # the uncompressed model is always there; fast is caldera in a hurry
QUICK = ["method.outer_iterations=1", "method.inner_iterations=1", "method.tune_passes=0"]


@pytest.fixture
def jobs():
    """jobs(*overrides): the configuration of each job of a multirun."""

    def _jobs(*lines: str):
        with initialize_config_module("conf", version_base="1.3"):
            config = compose("config", list(lines), return_hydra_config=True)
            with open_dict(config):
                config.hydra.overrides.task = [line for line in lines if not line.lstrip("+").startswith("hydra")]
            return expand(config)

    return _jobs


def test_grids_follow_each_other(jobs):
    found = jobs("hydra/sweeper=grids", GRIDS)
    assert [(job.method.name, job.rank.k, job.q.family, job.q.bits) for job in found] == [
        ("caldera", 0, "trellis", 2), ("caldera", 4, "trellis", 2),
        ("rtn", 0, "uniform_asym", 3), ("gptq", 0, "uniform_asym", 3),
    ]  # fmt: skip


def test_the_command_line_wins_over_every_grid(jobs):
    found = jobs("hydra/sweeper=grids", GRIDS, "q.bits=4", "method=rtn")
    assert [(job.method.name, job.rank.k, job.q.bits) for job in found] == [("rtn", 0, 4), ("rtn", 4, 4), ("rtn", 0, 4)]


def test_a_run_does_what_was_expanded(application, tmp_path):
    two = "+hydra.sweeper.grids={a:{method:q_only},b:{method:rtn,q.bits:3}}"
    code, output, errors = application("-m", "hydra/sweeper=grids", two, *QUICK, NO_TASKS)
    assert code == 0, errors
    assert "2 points, 2 of them to compute" in output
    assert {r["point"]["method"] for r in Swept(tmp_path / "results").records} == {"q_only", "none", "rtn"}


# ------------------------------------------------------------------------------------------------------------ baselines
def test_no_method_is_left_out(jobs):
    found = jobs("experiment=baselines")
    assert {job.method.name for job in found} == set(METHODS) - NO_BASELINES
    strategies = {(job.budget.strategy, tuple(job.budget.ranks)) for job in found}
    assert {name for name, _ in strategies} == {"none", "uniform", "allocated"}
    assert ("allocated", (0,)) in strategies  # mixed bits without rank
    assert {job.q.bits for job in found if job.rank.k == 0 and job.method.name == "caldera"} >= {2, 3, 4}


@pytest.fixture(scope="module")
def wide_dir(saved):
    """A block of width 128, so that every rank of the experiment fits."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": 49152, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1}
    return saved(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2))


def test_the_baselines_share_one_frontier(wide_dir, settings, jobs, tmp_path):
    """A point of every method and budget of the experiment, in a hurry, sized by what it stores and measured alike."""
    here = [*settings, f"model.path={wide_dir}", f"results={tmp_path}", NO_TASKS, *QUICK]
    hurry = ["method.inputs=original", "budget.sensitivity=none", "evaluation.rows=1"]
    found = jobs("experiment=baselines", *here, *hurry)
    chosen = {(job.method.name, job.budget.strategy, tuple(job.budget.ranks)): job for job in found}
    for point in map(resolve, chosen.values()):
        run_point(point, Reporter(point.name))
    table = frontier_table(load_records(tmp_path))
    done = table[is_compressed(table)]
    assert len(done) == len(chosen) and set(done["method"]) == set(METHODS) - NO_BASELINES
    assert done["bits_stored"].between(2, 16).all() and not table.attrs["metrics"][table.attrs["metric"]]["differs"]
    assert done["pareto"].any()
