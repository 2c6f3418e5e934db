import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from analysis.records import RecordError, failure, load_records, matrices, tidy

PERPLEXITY = "perplexity/boolq_1024"


def one_sentence(text: str) -> bool:
    return "\n" not in text and text.endswith(".") and text.count(". ") == 0


def test_records_come_back_sorted_by_name(write, records):
    assert load_records(write(records)) == sorted(records, key=lambda record: record["name"])


def test_a_point_without_a_record_yet_is_skipped(write, records):
    folder = write(records)
    (folder / "points" / "running").mkdir()
    assert len(load_records(folder)) == len(records)


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(RecordError, match="give the output folder of a sweep") as error:
        load_records(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"schema_version": 1, "name": ', "is not JSON .* run the point again"),
        ("[1, 2]", "has no schema_version: .* run the point again"),
        ('{"name": "a"}', "has no schema_version: .* run the point again"),
        ('{"schema_version": 3}', "has schema 3, newer than the known 2: update"),
        ('{"schema_version": 1, "name": "a", "status": "done"}', "lacks point, bits, metrics: .* run the point again"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused_by_path(write, records, text, reason):
    folder = write(records)
    path = folder / "points" / "uncompressed" / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=reason) as error:
        load_records(folder)
    assert str(error.value).startswith(str(path))
    assert one_sentence(str(error.value))


def test_tidy_has_one_row_a_point_with_its_axes_bits_and_metrics(records):
    table = tidy(records).set_index("name")
    row = table.loc["q2_rank32_lr4"]
    assert (row["method"], row["rank"], row["q"], row["l_bits"], row["seed"]) == ("caldera", 32, "e8p_2bit", 4, 0)
    assert row["bits_nominal"] == 2.368
    assert row["bits_stored"] == pytest.approx(2.379)
    assert row["megabytes"] == pytest.approx(88.265, abs=1e-3)
    assert (row[PERPLEXITY], row["compress_s"]) == (50.28, 812.5)
    assert row[f"{PERPLEXITY}:stderr"] == pytest.approx(0.905, abs=1e-3)
    assert len(table) == len(records)


def test_missing_values_stay_missing_and_ranks_stay_whole(records):
    records[0]["metrics"][PERPLEXITY] = {"value": None, "stderr": None, "higher_is_better": False}
    del records[1]["metrics"][PERPLEXITY]
    table = tidy(records)
    assert table[PERPLEXITY].isna().tolist()[:3] == [True, True, False]
    assert table[PERPLEXITY].dtype == np.float64
    assert table["rank"].dtype == pd.Int64Dtype()
    assert table.set_index("name").loc["uncompressed", ["rank", "q", "q_bits"]].isna().all()
    failed = table.set_index("name").loc["q2_rank8_lr4"]
    assert failed[["bits_stored", "megabytes", PERPLEXITY, "compress_s"]].isna().all()


def test_a_metric_describes_itself_and_says_where_points_differ(records):
    records[3]["metrics"][PERPLEXITY]["measured_on"] = {"text": "boolq", "rows": 16, "length": 1024}
    described = tidy(records).attrs["metrics"]
    assert described[PERPLEXITY] == {
        "higher_is_better": False,
        "measured_on": {"text": "boolq", "length": 1024},
        "differs": ["rows"],
    }
    assert described["arc_easy/acc"]["higher_is_better"] is True


def test_a_failure_names_stage_block_matrix_and_the_first_line(records):
    assert failure(records[-1]) == "compress, block 7, self_attn.q_proj: FactorisationError: H has 3 NaN"
    assert failure(records[0]) is None
    assert failure({"status": "failed", "error": None}) == "unknown stage: Error: no message"


def test_matrices_are_long_with_block_and_projection(records):
    fields = {"rank": 32, "q": "e8p_2bit", "l": "e8p_4bit", "r": "e8p_4bit", "nominal_bits": 2.44, "stored_bits": 2.46}
    fields |= {"stored_bytes": 102_000, "relative_error": 0.0839, "trace": [0.09, 0.0839]}
    names = ["model.layers.12.self_attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head"]
    records[0]["matrices"] = [{"name": name, "shape": [576, 1536]} | fields for name in names]
    table = matrices(records)
    assert table["point"].unique().tolist() == [records[0]["name"]]
    assert table["projection"].tolist() == ["q_proj", "down_proj", "lm_head"]
    assert table["block"].tolist() == [12, 3, pd.NA]
    first = table.iloc[0]
    assert (first["rows"], first["columns"], first["rank"], first["relative_error"]) == (576, 1536, 32, 0.0839)


def test_matrices_of_no_records_are_an_empty_table():
    assert matrices([]).empty


def test_neither_torch_nor_hydra_nor_pyplot_is_imported():
    code = "import sys, json, analysis.plots; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert not {"torch", "hydra", "matplotlib.pyplot"} & set(loaded)
