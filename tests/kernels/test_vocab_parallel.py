"""vocab_parallel_linear_cross_entropy on two gloo processes against the whole head on one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vrpo_kernels import backend, testing, vocab_parallel_linear_cross_entropy

N, D, V, FIRST_SHARD = 37, 24, 700, 560
CASES = [  # dtype, kept_tile_bytes, need_hidden, need_weight
    (torch.float32, 2**30, True, True),
    (torch.float32, 0, True, True),
    (torch.float32, 2**30, True, False),
    (torch.bfloat16, 2**30, True, True),
    (torch.bfloat16, 0, True, True),
]


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 2 * D**-0.5
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[:4] = torch.tensor([0, FIRST_SHARD - 1, FIRST_SHARD, V - 1])
    return hidden.to(dtype), weight.to(dtype), targets, testing.wide_range_upstream(N, generator)


def shard_of(rank):
    return slice(0, FIRST_SHARD) if rank == 0 else slice(FIRST_SHARD, V)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for dtype, budget, need_hidden, need_weight in CASES:
        hidden, weight, targets, upstream = make_inputs(dtype)
        shard = shard_of(rank)
        x = hidden.requires_grad_(need_hidden)
        w = weight[shard].clone().requires_grad_(need_weight)

        def nll_of(x, w, y=targets, first=shard.start, budget=budget):
            return vocab_parallel_linear_cross_entropy(
                x, w, y, group=dist.group.WORLD, first_class=first, kept_tile_bytes=budget
            )

        nll = nll_of(x, w)
        nll.backward(upstream)
        with torch.no_grad():
            plain = nll_of(x, w)
        results.append((nll.detach(), plain, x.grad, w.grad))
    results.append(run_compiled(rank, dist.group.WORLD))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_compiled(rank, group):
    """The first case once more, traced as one graph."""
    hidden, weight, targets, upstream = make_inputs(torch.float32)
    shard = shard_of(rank)
    x, w = hidden.requires_grad_(True), weight[shard].clone().requires_grad_(True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def nll_of(x, w, y):
        return vocab_parallel_linear_cross_entropy(x, w, y, group=group, first_class=shard.start)

    nll = nll_of(x, w, targets)
    nll.backward(upstream)
    return nll.detach(), x.grad, w.grad


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """outcomes[rank][case] = (nll, nll without gradients, dhidden, dweight)."""
    if backend.availability().cpu is not None:
        pytest.skip(backend.availability().cpu)
    folder = tmp_path_factory.mktemp("vocab_parallel")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_vocab_parallel__within_policy_of_the_whole_head(outcomes, case):
    dtype, _, need_hidden, need_weight = CASES[case]
    (nll, plain, dhidden, dweight_0), (nll_1, _, dhidden_1, dweight_1) = outcomes[0][case], outcomes[1][case]
    testing.assert_bitwise_equal(nll_1, nll, "nll of the other rank")
    testing.assert_bitwise_equal(plain, nll, "nll without gradients")
    if need_hidden:
        testing.assert_bitwise_equal(dhidden_1, dhidden, "dhidden of the other rank")
    dweight = torch.cat([dweight_0, dweight_1]) if need_weight else None
    testing.assert_ratios(
        testing.linear_cross_entropy_ratios(
            nll, dhidden if need_hidden else None, dweight, *make_inputs(dtype)
        )
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_vocab_parallel__compiles_to_one_graph_of_the_same_bits(outcomes, rank):
    nll, _, dhidden, dweight = outcomes[rank][0]
    for name, got, want in zip(
        ("nll", "dhidden", "dweight"), outcomes[rank][-1], (nll, dhidden, dweight), strict=True
    ):
        testing.assert_bitwise_equal(got, want, name)


def test_vocab_parallel__nll_of_logits_far_apart_is_finite():
    """exp of a difference beyond 709 overflows in float64."""
    hidden, weight, targets, _ = make_inputs(torch.float32)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    nll = vocab_parallel_linear_cross_entropy(
        hidden, weight, targets, group=dist.group.WORLD, first_class=0, scale=1e4
    )
    logits = 1e4 * (hidden.double() @ weight.double().T)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none").float()
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=0.1)


def test_vocab_parallel__reference_backend_is_refused():
    hidden, weight, targets, _ = make_inputs(torch.float32)
    with pytest.raises(ValueError, match="no sharded form"):
        vocab_parallel_linear_cross_entropy(
            hidden, weight, targets, group=None, first_class=0, backend="reference"
        )
