"""What was reproduced beside what was published."""

import math

import pytest

from analysis.published import comparison, main, published, sources


def point(make, name: str, rank, factor_bits, value: float, window: int = 4096, **more) -> dict:
    found = make.compressed(rank, factor_bits, 2, 2.0, value, 0.5, **more)
    found["name"], found["point"]["model"] = name, "llama2_7b"
    (_, measured), *_ = found["metrics"].items()
    measured["measured_on"] = {"text": "dataset:Salesforce/wikitext:wikitext-2-raw-v1:test:text", "length": window}
    found["metrics"] = {f"perplexity/wikitext2_{window}": measured}
    return found


@pytest.fixture
def own(make) -> list[dict]:
    return [point(make, "a", 256, 4, 6.5), point(make, "b", 0, None, 8.0, window=2048), point(make, "c", 64, 16, 7.0)]


def test_every_published_number_says_where_it_comes_from():
    table = published()
    assert set(table["source"]) <= set(sources()) and set(table["sure"]) <= {"agreed", "quoted", "doubtful"}
    assert (table["published"].astype(float) > 1).all()
    assert not table.duplicated(["model", "rank", "q_bits", "factor_bits", "text", "source"]).any()


def test_a_setting_stands_beside_what_was_published_of_it(own):
    table = comparison(own)
    assert set(table["model"]) == {"llama2_7b"} and set(table["text"]) == {"wikitext2", "c4"}
    paper = table[(table["rank"] == 256) & (table["source"] == "caldera") & (table["text"] == "wikitext2")]
    (row,) = paper.to_dict("records")
    assert (row["published"], row["here"], row["differs"]) == (6.19, 6.5, False)
    assert math.isclose(row["off"], 6.5 / 6.19 - 1)


def test_other_windows_are_marked_and_other_settings_do_not_match(own):
    table = comparison(own)
    plain = table[(table["rank"] == 0) & (table["text"] == "wikitext2")]
    assert list(plain["here"]) == [8.0] and list(plain["differs"]) == [True]
    assert table[table["rank"] == 64]["here"].isna().all()  # 16-bit factors are not the 4-bit ones


def test_the_table_names_its_sources(own, write, capsys):
    assert main([str(write(own))]) == 0
    shown = capsys.readouterr().out
    assert "6.19" in shown and "+5.0%" in shown and "arXiv 2405.18886v2" in shown and "another length" in shown


def test_models_of_which_nothing_is_published_are_one_sentence(records, write, capsys):
    assert main([str(write(records))]) == 1
    errors = capsys.readouterr().err
    assert "nothing is published of smollm2_135m" in errors and errors.count("\n") == 1
