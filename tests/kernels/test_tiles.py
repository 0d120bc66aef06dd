"""The arithmetic of the Triton backend's tile shapes: areas, waves, chunks. No Triton needed."""

from dataclasses import replace

import pytest

from vrpo_kernels.linear_cross_entropy.tiles import chunk_rows, tiles_for

HOPPER = tiles_for((9, 0), 2)


@pytest.mark.parametrize("rows", [1, 100, 128, 1000, 1024, 2047, 2048, 4096])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles__never_exceed_the_area_of_a_full_one(capability, itemsize, rows):
    tiles = tiles_for(capability, itemsize)
    tiles = replace(tiles, gemm="cublas")  # the fused form moves them to whole waves, see below
    for full_rows, full_cols, cols in (
        (tiles.rows, tiles.cols, tiles.forward_cols(rows, 132)),
        (tiles.sweep_rows, tiles.sweep_cols, tiles.sweep_tile_cols(rows, 132)),
    ):
        if rows > full_rows:
            continue
        assert rows * cols <= full_rows * full_cols
        # and use it: the next doubling would not fit
        assert 2 * cols > tiles.max_cols or 2 * cols * rows > full_rows * full_cols


@pytest.mark.parametrize("rows", [128, 512, 640, 1024, 2176, 4096])
@pytest.mark.parametrize("num_sms", [108, 132])
def test_tiles__of_the_fused_form_fill_whole_waves(rows, num_sms):
    tiles = replace(HOPPER, gemm="fused")
    plain = replace(HOPPER, gemm="cublas")
    for cols, before in (
        (tiles.forward_cols(rows, num_sms), plain.forward_cols(rows, num_sms)),
        (tiles.sweep_tile_cols(rows, num_sms), plain.sweep_tile_cols(rows, num_sms)),
    ):
        blocks = (rows // 128) * (cols // 256)
        waves = -(-blocks // num_sms)
        assert blocks >= 0.98 * waves * num_sms
        assert 0.75 * before <= cols <= 1.25 * before
    assert tiles.first_tile_cols(4096, 132) == 8448
    assert tiles.forward_cols(4096, 132) == 33792
    assert plain.first_tile_cols(4096, 132) == 0


def _waves(total, size, num_cols, num_sms):
    col_blocks = -(-num_cols // 256)
    chunks = [min(size, total - start) for start in range(0, total, size)]
    return sum(-(-(-(-chunk // 128) * col_blocks) // num_sms) for chunk in chunks)


@pytest.mark.parametrize("total", [1, 127, 128, 129, 512, 1000, 4096, 4100, 5000, 9999, 16384, 65536])
@pytest.mark.parametrize("most", [1024, 4096])
@pytest.mark.parametrize("num_cols", [70, 8192, 32768])
@pytest.mark.parametrize("num_sms", [4, 108, 132])
def test_chunk_rows__wastes_no_more_waves_than_any_other_size(total, most, num_cols, num_sms):
    size = chunk_rows(total, most, num_cols, num_sms)
    assert size % 128 == 0
    assert 128 <= size <= max(128, most)
    largest = min(most, -(-total // 128) * 128)
    others = range(-(-largest // 256) * 128, largest + 1, 128)
    assert _waves(total, size, num_cols, num_sms) == min(
        _waves(total, other, num_cols, num_sms) for other in others
    )


def test_chunk_rows__4100_rows_cost_at_most_one_more_row_block_than_4096():
    cols, sms = 32768, 132
    needed = -(-33 * 128 // sms)  # 33 row blocks of 128 x 256 blocks, never interrupted
    assert _waves(4100, chunk_rows(4100, 4096, cols, sms), cols, sms) <= needed + 1
    assert chunk_rows(4096, 4096, cols, sms) == 4096


def test_tiles__fp32_sweeps_with_the_shape_of_its_forward_pass():
    tiles = tiles_for((9, 0), 4)
    for rows in (100, 1024):
        assert tiles.forward_cols(rows, 132) == tiles.sweep_tile_cols(rows, 132)
    assert (tiles.rows, tiles.cols) == (tiles.sweep_rows, tiles.sweep_cols)
    assert replace(HOPPER, gemm="fused") == tiles_for((9, 0), 2, "fused")


def test_tiles__few_rows_have_a_deeper_pipeline_on_hopper_only():
    assert [HOPPER.stages(rows) for rows in (1, 512, 513, 4096)] == [4, 4, 3, 3]
    for other in (tiles_for((8, 0), 2), tiles_for((9, 0), 4)):
        assert other.stages(1) == other.stages(4096)


def test_tiles_for__the_default_form_is_the_measured_one():
    assert tiles_for((9, 0), 2).gemm == "fused"
    assert tiles_for((8, 0), 2).gemm == "cublas"  # nothing is measured there
    assert tiles_for((9, 0), 4).gemm == tiles_for((8, 0), 4).gemm == "cublas"  # no tensor cores in fp32
    for gemm in ("fused", "cublas"):
        assert tiles_for((9, 0), 2, gemm).gemm == gemm
