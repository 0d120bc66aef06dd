"""The benchmark of EOS fills: its rival laws, and a case of seconds."""

import ast

import pytest
from batches import to_batch

from benchmarks import bench_eos_fill


@pytest.mark.parametrize("law", list(bench_eos_fill.LAWS))
def test_laws__stay_within_their_bounds(law):
    rows = [([9, 9], [7] * (index % 8) + [1]) for index in range(64)]
    fill = bench_eos_fill.LAWS[law](1, ((1,),), max_fill=36, max_length=40, seed=3)
    batch = fill(to_batch(rows), epoch=2)
    assert 0 <= int(batch.fill_R.min()) < int(batch.fill_R.max()) <= 36
    assert int(batch.length_R.max()) <= 40


def test_main__tiny_measures_every_column_and_records_nothing(capsys, monkeypatch):
    monkeypatch.setattr(bench_eos_fill, "append", lambda *args: pytest.fail("a tiny run was recorded"))
    bench_eos_fill.main(["--tiny", "--normalised_by", "answer"])
    row = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    measured = bench_eos_fill.FIELDS[bench_eos_fill.FIELDS.index("law") :]
    assert set(row) == set(measured)
