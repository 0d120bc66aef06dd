"""`python -m benchmarks liger-view`: nothing is lost, and Liger's plots can read it."""

import csv
import json

import pytest

from benchmarks import liger_view
from benchmarks.bench_linear_cross_entropy import FIELDS
from benchmarks.record import RESULTS

COMMITTED = [RESULTS / "kernels.csv", RESULTS / "gpu" / "h100-2026-11-26" / "rivals.csv"]


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("source", COMMITTED, ids=lambda path: path.name)
def test_convert__there_and_back_is_the_same_file(tmp_path, source):
    there, back = tmp_path / "there.csv", tmp_path / "back.csv"
    assert liger_view.main([str(source), str(there)]) == 0
    assert liger_view.main([str(there), str(back), "--back"]) == 0
    assert back.read_bytes() == source.read_bytes()


def test_to_liger__has_its_columns_metrics_and_one_config_per_case(tmp_path):
    """A plot of Liger's shows the rows of one mode and metric whose extra config is the same string."""
    target = tmp_path / "there.csv"
    liger_view.convert(COMMITTED[1], target)
    rows = rows_of(target)
    assert list(rows[0]) == list(liger_view.FIELDS)
    speed = [row for row in rows if row["metric_name"] == "speed" and row["y_value_50"]]
    assert {row["metric_unit"] for row in speed} == {"ms"}
    assert {row["kernel_operation_mode"] for row in speed} == {"no-grad-forward", "full"}
    for one in speed:
        assert float(one["y_value_20"]) <= float(one["y_value_50"]) <= float(one["y_value_80"])
        assert int(one["x_value"]) > 0 and json.loads(one["extra_benchmark_config_str"])["D"]
    config = next(row["extra_benchmark_config_str"] for row in speed)
    plotted = {row["kernel_provider"] for row in speed if row["extra_benchmark_config_str"] == config}
    assert {"vrpo", "Liger", "torch eager"} <= plotted
    assert {row["metric_unit"] for row in rows if row["metric_name"] == "memory"} == {"MB"}


def test_convert__keeps_notes_quotes_and_empty_fields(tmp_path):
    source, there, back = (tmp_path / name for name in ("in.csv", "there.csv", "back.csv"))
    row = dict.fromkeys(FIELDS, "") | {
        "provider": 'a "b", c',
        "N": "3",
        "note": 'fails: x, "y"\u00b5',
        "reps": "0",
    }
    with source.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows([row, row])
    assert liger_view.convert(source, there) == 6  # speed, reps and note of each
    assert liger_view.convert(there, back, back=True) == 2
    assert back.read_bytes() == source.read_bytes()


def test_convert__refuses_other_files(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert liger_view.main([str(other), str(tmp_path / "out.csv")]) == 1
    assert "must have the columns" in capsys.readouterr().out
    liger_view.convert(COMMITTED[0], other)
    rows = rows_of(other)
    for name, wrong in (("metric_name", "heat"), ("kernel_name", "rope")):
        with pytest.raises(ValueError, match=wrong):
            liger_view.from_liger([{**rows[0]}, {**rows[1], name: wrong}])
