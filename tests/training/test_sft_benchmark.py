"""`python -m benchmarks sft`: it trains, times every part, and compares revisions that exist."""

import csv

import pytest

from benchmarks import bench_sft, sft_child


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What a quick run of SFT writes."""
    output = tmp_path_factory.mktemp("sft") / "sft.csv"
    assert bench_sft.main(["--quick", "--objectives", "sft", "--threads", "1", "--output", str(output)]) == 0
    with output.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_run__times_every_part_of_a_step(rows):
    (row,) = rows
    parts = [float(row[f"{part}_ms"]) for part in (*sft_child.PARTS, "rest")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(float(row["ms"]), abs=0.1)
    assert float(row["backward_ms"]) > float(row["data_ms"])


def test_run__counts_the_tokens_of_the_packs(rows):
    (row,) = rows
    # 64 rows of 4 to 8 prompt and 3 to 9 response tokens, filled by up to 27
    assert 64 * 7 < int(row["masked"]) + 64 * 4 < int(row["tokens"]) < 64 * 44
    rate = 1e3 * int(row["tokens"]) / float(row["ms"])
    assert int(row["tokens_per_second"]) == pytest.approx(rate, rel=1e-2)


def test_rows__the_speedup_is_that_of_the_fastest_blocks():
    args = bench_sft.parse(["--against", "old", "--quick"])
    parts = dict.fromkeys(sft_child.PARTS, 1.0)
    blocks = {
        "tree": [{"ms": ms, "tokens": 1000, "rows": 300, **parts} for ms in (60.0, 20.0)],
        "old": [{"ms": ms, "tokens": 1000, "rows": 300, **parts} for ms in (50.0, 90.0)],
    }
    new, old = bench_sft.rows_of(blocks, "sft", 1, args)
    assert (new["revision"], new["against"], new["speedup"]) == ("tree", "old", 2.5)
    assert (new["ms"], new["rest_ms"], new["tokens_per_second"]) == (20.0, 15.0, 50_000)
    assert old["revision"] == "old" and "speedup" not in old
    assert new["matmul_ms"] > 0


def test_main__names_a_revision_that_does_not_exist(capsys):
    assert bench_sft.main(["--against", "no-such-revision", "--quick"]) == 2
    assert "'no-such-revision' must be a commit" in capsys.readouterr().err


def test_parse__refuses_no_blocks(capsys):
    with pytest.raises(SystemExit):
        bench_sft.parse(["--blocks", "0"])
    assert "--blocks must be at least 1, got 0" in capsys.readouterr().err


def test_meter__adds_up_what_it_wraps():
    meter = sft_child.Meter(threads=2)
    now = iter(range(100))
    meter.clock = lambda: float(next(now))
    meter.restart()  # at 0
    double = meter.timed("draw", lambda x: 2 * x)
    assert double(3) == 6 and double(4) == 8
    meter.tokens = 50
    answer = meter.answer(steps=2)
    assert answer["draw"] == 1e3 and answer["ms"] == 2.5e3 and answer["tokens"] == 25
