"""Accuracy of a model in memory on lm-eval's tasks, as metrics (see `sweeps.evaluate`)."""

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.resources
import logging
import re
import string
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

from caldera.errors import UserError
from sweeps.texts import embedded_data, load_texts

FEWSHOT_SEED = 1234  # lm-eval's own
TOKENS: WeakKeyDictionary = WeakKeyDictionary()  # of each tokenizer: what was tokenized for the tasks so far
BOOTSTRAP = 1000  # draws for the few metrics that are no mean over documents; zero would switch off every stderr

Progress = Callable[[int, int], None]  # (done, total)


def known_tasks() -> list[str]:
    """The tasks that come with their documents, by name: those in conf/tasks."""
    return sorted(file.stem for file in _task_folder().glob("[!_]*.yaml"))


def check_tasks(names: list[str]) -> None:
    """Raises UserError for a name that is neither ours nor lm-eval's. Instant if all are ours."""
    for name in sorted(set(names) - set(known_tasks())):
        theirs = _harness_tasks().all_tasks
        if name not in theirs:
            near = difflib.get_close_matches(name, {*known_tasks(), *theirs}) or known_tasks()
            raise UserError(f"evaluation.tasks has {name!r}, which is no task: use for example {', '.join(near)}")


def run_tasks(
    model, tokenizer, tasks: list[str], *, limit: int | None, batch_size: int, progress: Progress | None = None
) -> dict[str, dict]:
    """lm-eval's scores, zero-shot unless a task says otherwise, as {"<task>/<metric>": metric}.

    limit: only the first documents of each task; None: all. progress hears of requests, several to a document.
    Raises UserError: unknown task, limit or batch_size below 1, documents that cannot be loaded.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(f"evaluation: limit is {limit} and batch_size {batch_size}: use 1 or more (limit null for all)")
    check_tasks(tasks)
    if not tasks:
        return {}
    with _quiet_harness():
        from lm_eval.evaluator import evaluate

        _compile_templates_once()
        loaded = {name: task for entry in tasks for name, task in _loaded(entry).items()}
        for task in loaded.values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # each time, or the next model is shown other examples
        # evaluate() and not simple_evaluate(): that reseeds every global generator and spends a second on a report
        # about the machine, for each model anew
        scores = evaluate(
            _language_model(model, tokenizer, batch_size, progress),
            {"tasks": loaded},
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
        )
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        key: metric
        for name, task in loaded.items()
        for key, metric in _metrics(name, task, scores, {"dtype": dtype, "batch_size": batch_size}).items()
    }


def embedded_split(folder: str, **_) -> dict:
    """lm-eval's `custom_dataset` of conf/tasks/_embedded.yaml: the validation documents in an embedded folder."""
    from datasets import Dataset

    file = embedded_data() / "hf_datasets" / folder / "validation" / "data-00000-of-00001.arrow"
    return {"validation": Dataset.from_file(str(file), in_memory=True)}  # on disk, map() would write beside the file


def last_words(source: str, **_) -> dict:
    """lm-eval's `custom_dataset` of conf/tasks/last_word.yaml: passages that end in a word which occurs before."""
    from datasets import Dataset

    passages = [text.rstrip(string.punctuation + string.whitespace) for text in load_texts(source)]
    return {"validation": Dataset.from_dict({"text": [text for text in passages if _repeats(text)]})}


def _repeats(text: str) -> bool:
    """Whether the last word, of four letters or more, stands earlier in the text too."""
    before, space, word = text.rpartition(" ")
    return bool(space) and len(word) >= 4 and word.isalpha() and re.search(rf"\b{word}\b", before) is not None


@functools.cache
def _loaded(name: str) -> dict:
    """lm-eval's task objects behind a name (several for a group), documents included; kept for the next model."""
    from lm_eval.tasks import TaskManager

    file = task_file(name)
    try:
        if file.exists():
            tasks = TaskManager(include_defaults=False).load([_task_config(file)])["tasks"]
        else:
            tasks = _harness_tasks().load([name])["tasks"]
    except UserError:
        raise
    except Exception as error:  # of lm-eval, datasets or the hub's client
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"evaluation.tasks: {name} cannot be loaded ({reason}): check its documents and the network"
        ) from error
    for task in tasks.values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
    return tasks


def _task_config(file: Path) -> dict:
    """A task's YAML over those it includes; an include is looked up beside the file, then among lm-eval's tasks."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(file, recursive=False)
    included = config.pop("include", [])
    merged: dict = {}
    for name in [included] if isinstance(included, str) else included:
        beside = file.parent / name
        merged |= load_yaml(beside if beside.exists() else Path(lm_eval.tasks.__file__).parent / name)
    return merged | config


def _language_model(model, tokenizer, batch_size: int, progress: Progress | None):
    """lm-eval's wrapper around the model: log-probabilities in float32, no bar, progress after each request."""
    import torch
    from lm_eval.models.huggingface import HFLM

    wrapper = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
    wrapper.tok_encode = _remembering(wrapper.tok_encode, TOKENS.setdefault(tokenizer, {}))
    score = wrapper.loglikelihood

    def counted(requests):
        if progress:
            wrapper.set_cache_hook(_Counter(progress, len(requests)))
        return score(requests, disable_tqdm=True)

    wrapper.loglikelihood = counted
    return wrapper


def _remembering(encode: Callable, known: dict) -> Callable:
    """A tokenizer's `encode` that answers from `known` what it was asked before, for another model."""

    def remembered(string: str | list[str], **options) -> list:
        key = (string, *sorted(options.items())) if isinstance(string, str) else None
        if key not in known:
            tokens = encode(string, **options)
            if key is None:
                return tokens
            known[key] = array("i", tokens)  # a tenth of a list's memory
        return known[key].tolist()

    return remembered


@functools.cache
def _compile_templates_once() -> None:
    """lm-eval compiles a prompt's template anew for every document, which takes a twelfth of a small model's time."""
    import lm_eval.utils

    lm_eval.utils.env.from_string = functools.lru_cache(maxsize=1024)(lm_eval.utils.env.from_string)


class _Counter:
    """Stands where lm-eval has its cache of answers, which hears of every request as it is answered."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def add_partial(self, *_) -> None:
        self.done += 1
        self.progress(self.done, self.total)


def _metrics(name: str, task, scores: dict, conditions: dict) -> dict[str, dict]:
    """One task's metrics out of lm-eval's results."""
    split = task.config.test_split or task.config.validation_split
    measured_on = {
        "task": name, "documents": scores["n-samples"][name]["effective"], "split": split,
        "num_fewshot": scores["n-shot"][name], "version": scores["versions"][name],
        "harness": f"lm-eval {importlib.metadata.version('lm-eval')}", **conditions,
    }  # fmt: skip
    found = {}
    for key, value in scores["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = scores["results"][name].get(f"{metric}_stderr,{chosen}")
        samples = [s[metric] for s in scores["samples"][name] if s["filter"] == chosen and metric in s]
        found[f"{name}/{metric}" + ("" if chosen == "none" else f".{chosen}")] = {
            "value": float(value),
            "stderr": stderr if isinstance(stderr, float) else None,
            "higher_is_better": task.higher_is_better().get(metric, True),
            "measured_on": measured_on,
            "samples": [float(s) for s in samples] if all(isinstance(s, bool | int | float) for s in samples) else None,
        }
    return found


def task_file(name: str) -> Path:
    """Where the YAML of a task of ours lies, or would lie."""
    return _task_folder() / f"{name}.yaml"


def _task_folder() -> Path:
    return Path(str(importlib.resources.files("conf"))) / "tasks"


@functools.cache
def _harness_tasks():
    """lm-eval's index of its own tasks: some ten seconds, so only for names that are not ours."""
    with _quiet_harness():
        from lm_eval.tasks import TaskManager

        return TaskManager()


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """Errors only from lm-eval and no progress bars, then everything as before."""
    import lm_eval.api.task
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    logger, bars, bar = logging.getLogger("lm_eval"), is_progress_bar_enabled(), lm_eval.api.task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)  # no setting of lm-eval reaches this one
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if bars:
            enable_progress_bar()
