"""Texts: the embedded ones to the byte, users' own files, and what is refused."""

import gzip
import hashlib
import itertools
import subprocess
import sys

import pytest

from caldera.errors import UserError
from sweeps.models import load_tokenizer
from sweeps.texts import EMBEDDED, check_no_overlap, load_texts, text_digest, token_rows, token_windows


class Characters:
    """A tokenizer with one token a character and token 0 at the end of a text."""

    eos_token_id = 0

    def __call__(self, texts, add_special_tokens, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


@pytest.mark.parametrize(
    ("source", "seed", "digest", "first"),
    [
        ("embedded_calibration", 0, "db6dbf1d8b73f071", [55, 332, 305, 604, 542, 281, 260, 23346]),
        ("embedded_heldout", None, "b28adfdba62d5f72", [24, 83, 25, 378, 5326, 6581, 98, 506]),
        ("embedded_validation", 0, "5e61a2f69b3c8226", None),
    ],
)
def test_embedded_rows_are_the_published_ones(smollm2_dir, source, seed, digest, first):
    tokenizer, texts = load_tokenizer(smollm2_dir), load_texts(source)
    rows = token_rows(texts, tokenizer, 64, 1024, seed)
    assert hashlib.sha256(rows.numpy().tobytes()).hexdigest().startswith(digest)
    assert first is None or rows[0, :8].tolist() == first
    assert token_rows(texts, tokenizer, 16, 1024, seed).equal(rows[:16])


def test_embedded_sources_share_nothing():
    for one, other in itertools.permutations(EMBEDDED, 2):
        check_no_overlap(load_texts(one), load_texts(other))


def test_rows_are_one_stream_with_an_end_after_each_text():
    rows = token_rows(["ab", "c", "def"], Characters(), 3, 3, shuffle_seed=None)
    assert rows.tolist() == [[97, 98, 0], [99, 0, 100], [101, 102, 0]]


def test_the_seed_alone_decides_the_order():
    texts = [chr(97 + n) * 3 for n in range(26)]
    before = list(texts)
    shuffled = token_rows(texts, Characters(), 26, 4, shuffle_seed=1)
    assert texts == before
    assert shuffled.equal(token_rows(texts, Characters(), 26, 4, shuffle_seed=1))
    assert not shuffled.equal(token_rows(texts, Characters(), 26, 4, shuffle_seed=2))


def test_too_short_a_text_says_how_many_tokens_there_are():
    with pytest.raises(UserError, match=r"need 12 tokens, but the text has 9: lower sequences \(at this length to 2\)"):
        token_rows(["ab", "c", "def"], Characters(), 3, 4, shuffle_seed=None)


def test_windows_of_one_stream_may_overlap_and_begin_with_a_token():
    texts, tokenizer = ["ab", "c", "def"], Characters()
    tokenizer.bos_token_id = 7
    assert token_windows(texts, tokenizer, 2, 3, 3).equal(token_rows(texts, tokenizer, 2, 3, None))
    assert token_windows(texts, tokenizer, None, 4, 2).tolist() == [
        [97, 98, 0, 99], [0, 99, 0, 100], [0, 100, 101, 102],
    ]  # fmt: skip
    assert token_windows(texts, tokenizer, 2, 4, 3, bos=True).tolist() == [[7, 97, 98, 0], [7, 99, 0, 100]]
    with pytest.raises(
        UserError, match=r"4 windows of 4 tokens need 10 tokens, but the text has 9: lower rows .* to 3"
    ):
        token_windows(texts, tokenizer, 4, 4, 2)
    tokenizer.bos_token_id = None
    with pytest.raises(UserError, match="no token for a beginning: set evaluation.bos=false"):
        token_windows(texts, tokenizer, 1, 4, 3, bos=True)


def test_joined_texts_are_tokenized_as_one(monkeypatch):
    """As many as it takes: a prefix of all of them."""
    texts = ["ab", "", "c", "def"]
    assert token_windows(texts, Characters(), None, 5, 5, join="-").tolist() == [[97, 98, 45, 45, 99]]
    monkeypatch.setattr("sweeps.texts.JOINED", 1)
    assert token_windows(texts, Characters(), 1, 5, 5, join="-").tolist() == [[97, 98, 45, 45, 99]]
    with pytest.raises(UserError, match="2 windows of 5 tokens need 10 tokens, but the text has 9"):
        token_windows(texts, Characters(), 2, 5, 5, join="-")


@pytest.mark.parametrize(("sequences", "length"), [(0, 8), (1, 1)])
def test_rows_that_predict_nothing_are_refused(sequences, length):
    with pytest.raises(UserError, match="at least 1 sequence of 2 tokens"):
        token_rows(["abc"], Characters(), sequences, length, None)


def test_own_files(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "one\u2028still one", "id": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert load_texts(str(tmp_path)) == ["first", "second"]
    assert load_texts(str(tmp_path / "b.txt")) == ["second"]
    assert load_texts(str(lines)) == ["one\u2028still one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', "line 2: not a JSON object with a string `text`"),
        ("a.jsonl", b"[1]", "line 1: not a JSON object"),
        ("a.jsonl", b"{", "line 1: not a JSON object"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.txt", b"  \n", "holds no text"),
        ("a.csv", b"text", "is not a .txt or .jsonl file or a folder"),
    ],
)
def test_unusable_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_texts(str(tmp_path / name))


def test_an_unknown_source_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="embedded_calibration, embedded_heldout, embedded_validation"):
        load_texts("embeded_heldout")
    with pytest.raises(UserError, match="folder with .txt files"):
        load_texts(str(tmp_path))


def test_digest_follows_the_content(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = text_digest(str(file))
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere" / "b.txt")
    assert text_digest(str(moved)) == before
    moved.write_text("two")
    assert text_digest(str(moved)) != before
    assert len({text_digest(source) for source in EMBEDDED}) == 3


def test_overlap_is_found_in_whole_texts_and_in_long_runs():
    words = [f"word{n}" for n in range(80)]
    check_no_overlap([" ".join(words)], [" ".join(words[:49]) + " other", "short"])
    with pytest.raises(UserError, match="share 1 documents"):
        check_no_overlap(["before " + "\n".join(words[:50])], ["unrelated", " ".join(words[:50]) + " after"])
    with pytest.raises(UserError, match="share 1 documents"):
        check_no_overlap(["a b c"], ["a  b c"])


def test_importing_the_module_is_cheap():
    program = """
import sys, caldera.errors
before = set(sys.modules)
import sweeps.evaluate, sweeps.tasks, sweeps.perplexity, sweeps.models, sweeps.texts
print(*{"torch", "datasets", "pyarrow", "transformers", "lm_eval"} & (set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ------------------------------------------------------------------------------------------------------------- datasets
@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder that `datasets` loads: two splits of two fields."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one", "title": "a"}\n{"text": "two", "title": "b"}\n')
    (folder / "test.jsonl").write_text('{"text": "three", "title": "c"}\n')
    return folder


def test_a_dataset_is_named_by_its_parts(dataset):
    assert load_texts(f"dataset:{dataset}") == ["one", "two"]
    assert load_texts(f"dataset:{dataset}::test") == ["three"]
    assert load_texts(f"dataset:{dataset}:default:train:title") == ["a", "b"]
    digests = {text_digest(f"dataset:{dataset}{rest}") for rest in ("", "::test", ":::title")}
    assert len(digests) == 3 and text_digest(f"dataset:{dataset}") == text_digest(f"dataset:{dataset}::train")


def test_a_file_of_a_dataset_may_stand_for_its_configuration(dataset):
    """As for C4, of which nobody wants all files for one of them."""
    (dataset / "more").mkdir()
    with gzip.open(dataset / "more" / "part-0.json.gz", "wt") as stream:
        stream.write('{"text": "four"}\n{"text": ""}\n')
    source = f"dataset:{dataset}:more/part-0.json.gz:validation"
    assert load_texts(source) == ["four"] and load_texts(source, blank=True) == ["four", ""]


@pytest.mark.parametrize(
    ("rest", "reason"), [(":::body", "has no field 'body'; it has text, title"), ("::nothing", "cannot be loaded")]
)
def test_a_dataset_that_cannot_serve_is_refused(dataset, rest, reason):
    with pytest.raises(UserError, match=reason):
        load_texts(f"dataset:{dataset}{rest}")
