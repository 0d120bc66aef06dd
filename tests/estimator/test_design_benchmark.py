"""The benchmark of mask designs on a case of seconds."""

from benchmarks import bench_designs


def test_bench_designs__times_the_draw_and_the_step_of_every_design():
    rows = bench_designs.time_draws(((4, 4, 8),), repeats=1, threads=1)
    rows += bench_designs.time_steps((2, 4, 8), repeats=1, threads=1)
    assert [row["what"] for row in rows] == ["draw"] * len(bench_designs.KINDS) + ["step"] * len(
        bench_designs.KINDS
    )
    for row in rows:
        assert row["ms_p50"] > 0
        if (row["design"], row["pair_masks"]) == ("paper", "independent"):
            assert row["to_paper"] == 1.0
