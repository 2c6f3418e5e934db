"""Bad input costs a person one sentence: it names the field, the value and what to do, before any work starts."""

import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from caldera.errors import CalderaError, NumericalError
from sweeps import tasks
from sweeps.pipeline import check_inputs
from sweeps.wording import sentence
from tests.sweeps.swept import NO_TASKS


@pytest.fixture
def refusal(point):
    """refusal(*overrides): the sentence with which a point is refused."""

    def _refusal(*overrides: str) -> str:
        with pytest.raises((CalderaError, HydraException, OmegaConfBaseException)) as caught:
            check_inputs(point(*overrides))
        assert "\n" not in sentence(caught.value)
        return sentence(caught.value)

    return _refusal


SETTINGS = [
    ("rank.k=33", "rank.k=33 exceeds the smaller side of model.layers.0.self_attn.k_proj (32 x 64): use at most 32"),
    ("rank.k=-1", "rank.k=-1 must be a whole number of at least 0"),
    ("rank.k=1.5", "rank.k=1.5: Value '1.5' of type 'float' could not be converted to Integer"),
    ("rank.k=abc", "rank.k=abc: Value 'abc' of type 'str' could not be converted to Integer"),
    ("rank.k=null", "rank.k is null and no budget is set"),
    ("seed=abc", "seed=abc: Value 'abc' of type 'str' could not be converted to Integer"),
    ("force=maybe", "force=maybe: Value 'maybe' is not a valid bool"),
    ("q.family=e8q", "q: quantizer 'e8q_2bit' is not known; the nearest names are e8p_2bit"),
    ("q.bits=7", "q: quantizer 'trellis_7bit': trellis has no 7-bit variant; it has 1, 2, 3, 4 bits"),
    ("quantizer@r=fp16 r.bits=4 rank.k=4", "r.bits=4: fp16 has 16 bits"),
    ("q.scale=rows", "q: quantizer 'trellis_2bit_rows' is not known"),
    ("l.scale=g7", "l: quantizer 'e8p_2bit_g7': a scale group of 7 columns is no positive multiple of 8"),
    ("method.outer_iterations=0", "method.outer_iterations=0 must be a whole number of at least 1"),
    ("method.order=any", "method.order='any' must be one of lr_first, q_first"),
    ("method.sigma=0", "method.sigma=0.0 must be above 0 and at most 1"),
    ("method.moments=mine", "method.moments='mine' must be one of measured, identity"),
    ("method.init=qr", "method.init='qr' must be one of zero, svd, whitened, odlri"),
    ("method.init_rank=0", "method.init_rank=0 must be a whole number of at least 1, auto, or null for all"),
    ("method.init_rank=some", "method.init_rank='some' must be a whole number of at least 1, auto, or null for all"),
    ("method.init_rank=1.5", "method.init_rank=1.5: Value '1.5' of type 'float' is incompatible with type hint"),
    ("method.init_channels=0", "method.init_channels=0 must be a whole number of at least 1"),
    ("method=odlri method.moments=identity", "method.init='odlri' looks for the inputs of largest moments: set"),
    ("method.downdate=maybe", "method.downdate=maybe: Value 'maybe' is not a valid bool"),
    ("method=lr_only", "rank.k=0 with q.family=none leaves nothing of the matrices: set rank.k or quantizer@q"),
    ("quantizer@l=none", "l.family=none: a factor needs a quantizer; rank.k=0 leaves both factors out"),
    ("quantizer@q=none q.bits=3 rank.k=4", "q.bits=3: none has no bits; leave bits out or choose another family"),
    ("method=lr_only budget=uniform budget.bits=0.1", "budget.bits=0.1 is below the 0.483 bits that rank 1 takes"),
    ("budget=uniform rank.k=8", "rank.k=8 and budget=uniform are both set: set rank.k=0"),
    ("budget=uniform budget.bits=2", "budget.bits=2 is below the 2.007 bits that trellis_2bit takes alone: raise it"),
    ("budget.bits=2", "budget.bits=2 has no use with budget.strategy=none: add budget=uniform or budget=allocated"),
    ("budget=uniform budget.bits=0", "budget.bits=0 must be above 0"),
    ("budget=uniform budget.megabytes=9", "budget.bits and budget.megabytes are both set: set one of them, and the"),
    ("budget=uniform budget.bits=null", "budget.bits and budget.megabytes are both null: set one of them"),
    ("budget=uniform budget.bits=null budget.megabytes=0.01", "budget.megabytes=0.01 is below the 0.015 that trellis"),
    (
        "budget=allocated budget.bits=0.9",
        "budget.bits=0.9 is below the 1.007 bits that the cheapest",
    ),
    ("budget=allocated budget.scope=model budget.bits=2", "budget.bits=2 is below the"),
    ("budget.strategy=best", "budget.strategy='best' must be one of none, uniform, allocated, table"),
    ("budget.scope=all", "budget.scope='all' must be one of matrices, model"),
    ("budget.sensitivity=hessian", "budget.sensitivity='hessian' must be one of fisher, none"),
    ("budget=allocated budget.sensitivity_rows=0", "budget.sensitivity_rows=0 must be at least 1"),
    ("budget=allocated budget.ranks=[]", "budget.ranks=[] must list ranks of at least 0"),
    ("budget=allocated budget.ranks=[0,-8]", "budget.ranks=[0, -8] must list ranks of at least 0"),
    ("budget=allocated budget.q=[e8p_2bits]", "budget.q: quantizer 'e8p_2bits' is not known; the nearest names are"),
    ("budget=allocated budget.l=[none]", "budget.l: quantizer 'none' is not known"),
    ("budget=allocated method=rtn", "method.moments=identity: use budget=uniform"),
    ("budget=table", "budget.table is empty: set it to a record.json or a table of this model"),
    ("budget=table budget.table=none.json", "none.json cannot be read as JSON"),
    ("budget=table budget.table=none.json budget.bits=2", "budget.bits=2 has no use with budget.strategy=table: set"),
    ("calibration.length=0", "calibration.length=0 must be at least 2"),
    ("calibration.sequences=0", "calibration.sequences=0 must be at least 1"),
    ("evaluation.length=1", "evaluation.length=1 must be at least 2"),
    ("evaluation.limit=0", "evaluation.limit=0 must be at least 1"),
    ("evaluation.kl_tokens=-1", "evaluation.kl_tokens=-1 must be at least 0"),
    ("evaluation.stride=257", "evaluation.stride=257 must be at most 256, or tokens between windows are left out"),
    ("evaluation.label=a/b", "evaluation.label='a/b' names files"),
    ("evaluation.batch_size=-1", "evaluation.batch_size=-1 must be at least 1"),
    ("tracker.name=mlflow", "tracker.name='mlflow' must be one of wandb, none"),
    ("tracker.mode=of", "tracker.mode='of' must be one of offline, online, disabled"),
    ("compute.dtype=int8", "compute.dtype='int8' must be auto, float32, bfloat16 or float16"),
    ("compute.device=toaster", "compute.device"),
    ("compute.device=''", "compute.device"),
    ("compute.device=meta", "compute.device"),
    ("compute.threads=-1", "compute.threads=-1 must be"),
    ("compute.spill_mb=-1", "compute.spill_mb=-1 must be"),
]


@pytest.mark.parametrize(("overrides", "expected"), SETTINGS, ids=[overrides for overrides, _ in SETTINGS])
def test_a_setting_that_cannot_be_is_refused(overrides, expected, refusal):
    assert expected in refusal(*overrides.split())


def test_a_grid_without_the_flag_for_it_says_what_is_missing(refusal):
    said = refusal("rank.k=0,8")
    assert said.count("rank.k=0,8") == 1
    assert re.search(r"(^|[\s`])(-m|--multirun)\b", said)


@pytest.mark.parametrize("name", ["budget.bits", "method.sigma", "method.tolerance"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_settings_are_finite(name, value, refusal):
    assert name in refusal(f"{name}={value}")


@pytest.mark.parametrize("name", ["model.name", "method.name"])
@pytest.mark.parametrize("value", ["a/b", "../up"])
def test_a_name_is_no_path(name, value, refusal):
    """A point's folder is named after both, and records are found one level below `points`."""
    assert name in refusal(f"{name}={value}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_a_gpu_that_is_not_there(refusal):
    assert refusal("compute.device=cuda") == "compute.device=cuda: this torch sees no GPU; use compute.device=cpu"


# --------------------------------------------------------------------------------------------------------------- models
def test_a_model_is_a_folder_with_a_model(refusal, tmp_path):
    assert "model.path is empty: set model.path" in refusal("model.path=null")
    assert f"path '{tmp_path}/none' does not exist" in refusal(f"model.path={tmp_path}/none")
    assert "has no config.json" in refusal(f"model.path={tmp_path}")


def test_a_folder_whose_config_is_of_no_language_model(refusal, altered):
    folder = altered("vision", lambda tensors: None)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    assert f"model.path={folder} is no causal language model" in refusal(f"model.path={folder}")
    (folder / "config.json").write_text("{}")
    assert f"model.path={folder} is no causal language model" in refusal(f"model.path={folder}")


def test_pickled_weights_are_not_opened(refusal, altered):
    folder = altered("pickled", lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights only" in refusal(f"model.path={folder}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, point, altered):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = altered("broken", lambda tensors: tensors[name][3].fill_(value))
    with pytest.raises(NumericalError, match=f"{name} has 64 NaN or infinite values: repair the weights"):
        check_inputs(point(f"model.path={folder}"))


# ---------------------------------------------------------------------------------------------------------------- texts
def test_texts_that_are_too_short(refusal, tmp_path):
    (tmp_path / "short.txt").write_text("a few words only")
    expected = "4 sequences of 256 tokens need 1024 tokens, but the text has 5"
    assert f"calibration.sequences: {expected}" in refusal(f"calibration.text={tmp_path}/short.txt")
    expected = "2 windows of 256 tokens need 512 tokens, but the text has 5"
    assert f"evaluation.rows: {expected}" in refusal(f"evaluation.text={tmp_path}/short.txt")


def test_a_text_to_calibrate_on_is_no_text_to_measure_on(refusal, point):
    assert "calibration and evaluation share" in refusal("evaluation.text=embedded_calibration")
    check_inputs(point("evaluation.text=embedded_calibration", "calibration.allow_overlap=true"))


def test_a_text_that_does_not_exist(refusal):
    for group in ("calibration", "evaluation"):
        assert "one of embedded_calibration, embedded_heldout" in refusal(f"{group}.text=embeded_heldout")


def test_a_task_that_does_not_exist(refusal, monkeypatch):
    monkeypatch.setattr(tasks, "_harness_tasks", lambda: SimpleNamespace(all_tasks=["mmlu"]))
    assert "evaluation.tasks has 'arc_eazy', which is no task" in refusal("evaluation.tasks=[arc_eazy]")


# -------------------------------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("field", ["results", "cache"])
def test_folders_that_cannot_be_written_to(field, refusal, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "below", "/proc/x"):
        assert f"{field}={folder} cannot be written to" in refusal(f"{field}={folder}")


# ---------------------------------------------------------------------------------------------------- the whole program
CONSOLE = {
    "a key": (["forse=true"], "forse is no setting; the nearest are force"),
    "a type in a grid": (["-m", "rank.k=0,abc"], "rank.k=abc: Value 'abc' of type 'str' could not be converted"),
    "a rank in a grid": (["-m", "rank.k=0,33"], "rank.k=33 exceeds the smaller side of model.layers.0"),
    "a folder": (["results=/proc/x"], "/proc/x cannot be written to"),
}


@pytest.fixture(scope="module")
def refused(console, settings, tmp_path_factory) -> dict:
    """The finished processes of all cases, two at a time, and the results folder of each."""
    folders = {case: tmp_path_factory.mktemp("refused") / "results" for case in CONSOLE}

    def start(case: str):
        lines = CONSOLE[case][0]
        flags = [line for line in lines if line.startswith("-")]
        return console(*flags, *settings, f"results={folders[case]}", *lines[len(flags) :]), folders[case]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CONSOLE, pool.map(start, CONSOLE)))


@pytest.mark.parametrize("case", CONSOLE)
def test_the_script_says_one_line_and_exits_with_1(case, refused):
    done, results = refused[case]
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("caldera-run: ")
    assert CONSOLE[case][1] in done.stderr.splitlines()[-1]
    assert done.stderr.count("\n") == 1
    assert not (results / "points").exists()


def test_every_problem_of_a_grid_is_listed_before_its_first_job(application, tmp_path):
    (tmp_path / "short.txt").write_text("far too few words")
    texts = f"calibration.text=embedded_calibration,{tmp_path}/short.txt"
    code, output, errors = application("-m", "rank.k=2,900,-1", texts, NO_TASKS)
    assert (code, output) == (1, "") and not (tmp_path / "results" / "points").exists()
    first, second, third = errors.splitlines()
    assert "rank.k=900 exceeds the smaller side" in first and "rank.k=-1 must be" in second
    assert ("calibration.sequences: " in third and "short.txt" in third) or "need 1024 tokens" in third
