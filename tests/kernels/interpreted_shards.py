"""A head in shards on the Triton backend in its CPU interpreter; `test_triton_interpreter.py` runs it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from interpreter_support import KEEP, MARKS, RECOMPUTE, make_inputs, small_tiles
from shards import sharded, sharded_ratios

from vrpo_kernels import testing, vocab_parallel_linear_cross_entropy
from vrpo_kernels.linear_cross_entropy import kernel

pytestmark = MARKS
FORMS = [("cublas", torch.float32), ("cublas", torch.float16), ("fused", torch.float16)]
V = 137


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(kernel, "_tiles", small_tiles)


def _head(dtype):
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {"bias": bias, "softcap": 6.0, "scale": 0.8}


@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
@pytest.mark.parametrize("keep", [False, True], ids=["swept", "kept"])
def test_backend__shards_of_the_head_add_up(gemm, dtype, keep):
    inputs = make_inputs(9, V, 24, dtype)
    testing.assert_ratios(sharded_ratios(gemm, (100, V), *inputs, keep=keep))
    testing.assert_ratios(sharded_ratios(gemm, (3, 75, V), *inputs, keep=keep, **_head(dtype)))


@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
@pytest.mark.parametrize("nats", [30.0, 64.0, 200.0])
def test_rebase_kept__a_shard_whose_best_logit_lies_far_below(gemm, dtype, nats):
    # Rows 0 to 2 have the target in the low shard, rows 3 to 5 in the high one.
    hidden, weight, targets, upstream = make_inputs(6, V, 24, dtype, scale=0.3)
    hidden[:, 0] = 4.0
    weight[:, 0] = 0.0
    weight[100:, 0] = -nats / 4
    targets[:] = torch.tensor([100, 120, 136, 0, 50, 99])
    testing.assert_ratios(sharded_ratios(gemm, (100, V), hidden, weight, targets, upstream, keep=True))


@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
def test_rebase_kept__a_shard_of_one_class_which_is_the_target(gemm, dtype):
    hidden, weight, targets, upstream = make_inputs(5, V, 24, dtype)
    targets[:] = torch.tensor([100, 100, 3, 100, 136])
    inputs = (hidden, weight, targets, upstream)
    testing.assert_ratios(sharded_ratios(gemm, (100, 101, V), *inputs, keep=True, **_head(dtype)))


def test_rebase_kept__rows_within_reach_of_the_heads_maximum_are_not_rounded_again():
    hidden, weight, targets, _ = make_inputs(5, V, 24, torch.float32)
    targets[:] = torch.iinfo(torch.int64).min  # in another shard
    wanted = {"want_dhidden": False, "keep_tiles": True}
    _, local, _, kept, *_ = kernel.forward(hidden, weight, targets, gemm="cublas", **wanted)
    joined = local.clone()
    joined[1] += torch.tensor([0.0, 10.0, 59.0, 61.0, 300.0])
    before = kept.clone()
    under = kernel.rebase_kept(kept, targets, local, joined, V, 0.0)
    testing.assert_bitwise_equal(kept[:3], before[:3], "kept")
    testing.assert_bitwise_equal(under[1, :3], local[1, :3], "m")
    torch.testing.assert_close(kept[3], before[3] * (local[1, 3] - under[1, 3]).exp())
    assert not kept[4].any()
    torch.testing.assert_close(under[1] + under[2].log(), joined[1] + joined[2].log())


def test_sharded__equal_shards_of_kept_and_swept_tiles_agree_on_everything_but_the_head():
    inputs = make_inputs(5, V, 24, torch.float16)
    swept = sharded("fused", (64, V), *inputs)
    kept = sharded("fused", (64, V), *inputs, keep=True)
    for index, name in ((0, "nll"), (1, "dhidden")):
        testing.assert_bitwise_equal(kept[index], swept[index], name)


def _run_rank(rank, folder, edges):
    torch.set_num_threads(1)
    kernel._tiles = small_tiles
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(edges))
    hidden, weight, targets, upstream = make_inputs(5, V, 24, torch.float16)
    head = _head(torch.float16)
    shard = slice(edges[rank - 1] if rank else 0, edges[rank])
    results = []
    sweep = kernel.sweep_tiles
    for budget in (KEEP, RECOMPUTE):
        kernel.sweep_tiles = (
            None if budget else sweep
        )  # kept tiles take 2 + 1 units: nothing is computed again
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight[shard], head["bias"][shard])]
        nll = vocab_parallel_linear_cross_entropy(
            *leaves[:2], targets, group=dist.group.WORLD, first_class=shard.start, backend="triton",
            **{**head, "bias": leaves[2]}, kept_tile_bytes=budget,
        )  # fmt: skip
        results.append((nll.detach(), *torch.autograd.grad(nll, leaves, upstream)))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_vocab_parallel__kept_and_recomputed_tiles_within_the_policy_on_two_ranks(tmp_path):
    edges = (75, V)
    mp.spawn(_run_rank, (str(tmp_path), edges), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    inputs = make_inputs(5, V, 24, torch.float16)
    for budget in range(2):
        nll, dhidden, *_ = ranks[0][budget]
        for other in ranks[1:]:
            testing.assert_bitwise_equal(other[budget][0], nll, "nll of another rank")
            testing.assert_bitwise_equal(other[budget][1], dhidden, "dhidden of another rank")
        dweight, dbias = (torch.cat([rank[budget][index] for rank in ranks]) for index in (2, 3))
        ratios = testing.linear_cross_entropy_ratios(
            nll, dhidden, dweight, *inputs, dbias=dbias, **_head(torch.float16)
        )
        testing.assert_ratios(ratios)
