"""What the benchmarks report, on tiny cases. No time is asserted."""

import json
import sys

import pytest

from bench import __main__ as program
from bench.kernels import growth_rows
from bench.matrices import preset
from bench.model import sweep_rows
from bench.pipeline import Finished
from bench.problems import METHOD, decomposition_operations, ldlq_operations, lplr_operations
from bench.rows import Row
from bench.sections import SECTIONS
from bench.shapes import shape_rows
from bench.table import cells, number
from bench.timing import exponent, timed


def test_exponent_of_a_power_law():
    sizes = [512, 1024, 4096]
    assert exponent(sizes, [3e-9 * n**2.5 for n in sizes]) == pytest.approx(2.5)


def test_short_work_is_repeated_after_a_warm_up():
    calls = []
    found = timed(lambda: calls.append(1) or len(calls))
    assert (found.runs, found.result, len(calls)) == (5, 6, 6)


def test_operations_grow_with_their_parts():
    assert ldlq_operations(3, 10) == 300
    assert lplr_operations(8, 8, k=0) == 2 * 8**3
    assert decomposition_operations(6, 6, k=0, outer=1) == 6**3 / 3 + 6**3 + 3 * 6**3


def test_shape_rows_stand_beside_product_and_textbook():
    rows = shape_rows(64, 72, iterations=2)
    assert [(row.part, row.case) for row in rows] == [(p, "64 x 72") for p in ("LPLR", "LDLQ", "decomposition")]
    for row in rows:
        found = row.as_dict()
        assert min(found[key] for key in ("value", "of_product", "of_equal_product", "textbook_slower")) > 0
        assert 0 < row.error < 1 and 0 < row.textbook_error < 1
    assert "error without warm start" in rows[2].note
    assert rows[2].textbook_scaled and rows[2].textbook_s > rows[0].textbook_s


def test_growth_is_fitted_for_each_part():
    rows = growth_rows([16, 32], rank=4)
    assert [row.part for row in rows] == ["growth: product", "growth: LDLQ", "growth: decomposition"]
    assert all("to the product" in row.note for row in rows[1:])


def record(rank: int, seconds: float) -> dict:
    return {"point": {"rank": rank}, "timings_s": {"compress": seconds}, "memory": {"peak_rss_bytes": rank + 1}}


def test_sweep_rows_relate_further_ranks_to_the_first_point():
    points = [record(0, 4.0), record(32, 6.0), record(0, 2.0), record(32, 8.0)]
    rows = sweep_rows(Finished(30.0, points, record(0, 1.0)), "4 points")
    assert [row.value for row in rows] == [30.0, 4.0, 0.5, 1.75]
    assert (rows[0].peak_bytes, [row.runs for row in rows]) == (33, [1, 1, 1, 2])


def test_preset_keeps_rank_and_quantizers():
    found = preset(METHOD)
    assert (found.rank, found.q, found.l) == (METHOD.rank, METHOD.q, METHOD.l)
    assert found.outer_iterations < METHOD.outer_iterations


def test_what_does_not_apply_is_null_and_an_empty_cell():
    row = Row("part", "case", 1234.5, "vectors/s").as_dict()
    assert row["textbook_slower"] is row["of_product"] is None
    assert cells(row) == ["part", "case", "1,234 vectors/s", "1", *[""] * 8]
    assert number(0.00042) == "0.00042"


def test_program_prints_one_table_and_writes_json(tmp_path, monkeypatch, capsys):
    file = tmp_path / "deep" / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--section", "encoder", "--output", str(file)])
    program.main()
    report = json.loads(file.read_text())
    assert (report["quick"], list(report["sections"])) == (True, ["encoder"])
    assert report["environment"]["versions"]["torch"] and report["sections"]["encoder"]["peak_rss_bytes"] > 0
    assert {row["unit"] for row in report["sections"]["encoder"]["rows"]} == {"vectors/s"}
    assert "E8P 2-bit encoder" in capsys.readouterr().out


def test_failed_section_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(SECTIONS, "broken", "bench.nothing")
    monkeypatch.setattr(sys, "argv", ["bench", "--section", "broken", "--output", str(tmp_path / "bench.json")])
    with pytest.raises(SystemExit, match="failed: broken"):
        program.main()
