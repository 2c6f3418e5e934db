"""The tokens that a point is calibrated and measured on; the last ones are kept for the next point."""

import contextlib
import functools
from pathlib import Path

from caldera.errors import CalderaError
from sweeps.models import load_tokenizer
from sweeps.perplexity import Windows
from sweeps.point import Point
from sweeps.texts import check_no_overlap, load_texts, text_digest, token_rows, token_windows


def check_texts(point: Point) -> None:
    """Both texts are long enough and share no document. Raises UserError."""
    settings = point.config["calibration"]
    calibration_rows(point)
    windows(point)
    if not settings["allow_overlap"]:
        check_no_overlap(load_texts(settings["text"]), load_texts(point.config["evaluation"]["text"]))


def calibration_rows(point: Point):
    """Token rows of the calibration text. Raises UserError naming the field when there are too few."""
    settings = point.config["calibration"]
    with _naming("calibration.sequences"):
        chosen = [settings[key] for key in ("text", "sequences", "length", "shuffle_seed")]
        return _token_rows_of(point.source, *chosen)


def windows(point: Point) -> Windows:
    """Windows of the evaluation text. Raises UserError naming the field when there are too few."""
    settings = point.config["evaluation"]
    stride = settings["stride"] or settings["length"] - settings["bos"]
    source = (settings["text"], settings["rows"], settings["length"], stride, settings["bos"], settings["join"])
    with _naming("evaluation.rows"):
        rows = token_windows_of(point.source, *source)
    facts = {"text": settings["label"] or settings["text"], "text_digest": text_digest(settings["text"])}
    facts |= {"join": settings["join"], "tokenizer": point.tokenizer}
    return Windows(rows, stride, settings["bos"], facts)


@contextlib.contextmanager
def _naming(field: str):
    """Errors inside name the field."""
    try:
        yield
    except CalderaError as error:
        raise type(error)(f"{field}: {error}") from error


@functools.lru_cache(maxsize=4)
def _token_rows_of(checkpoint: Path, text: str, count: int, length: int, seed: int):
    return token_rows(load_texts(text), tokenizer_of(checkpoint), count, length, seed)


@functools.lru_cache(maxsize=4)
def token_windows_of(checkpoint: Path, text: str, *options):
    return token_windows(load_texts(text, blank=options[-1] is not None), tokenizer_of(checkpoint), *options)


@functools.lru_cache(maxsize=1)
def tokenizer_of(checkpoint: Path):
    return load_tokenizer(checkpoint)
