"""vocab_parallel_linear_cross_entropy on two gloo processes: bad targets and shards, missing derivatives.

Every rank has to come to the same end: where one raised alone, the other would wait for it until its timeout.
"""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from backends import needs_extension

from vrpo_kernels import checks, linear_cross_entropy, vocab_parallel_linear_cross_entropy

pytestmark = needs_extension
V, D = 100, 8
TARGETS = [1, 49, 99, 50]
BAD_TARGETS = [-(2**63), -100, -1, V, 2**40, 2**63 - 1]
FITTING = {"in-order": ((0, 50), (50, 100)), "reversed": ((30, 100), (0, 30))}
BAD_SHARDS = {
    "overlap": ((0, 60), (40, 100)),
    "gap": ((0, 40), (60, 100)),
    "gap-and-overlap": ((0, 50), (20, 70)),
    "late-start": ((10, 50), (50, 100)),
    "negative-start": ((-10, 50), (50, 100)),
    "the-same": ((0, 50), (0, 50)),
}


def inputs(rank, bounds=FITTING["in-order"]):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, D, generator=generator), torch.randn(V, D, generator=generator)
    first, last = bounds[rank]
    return hidden, weight[max(first, 0) : last], {"group": dist.group.WORLD, "first_class": first}


def outcome(rank, targets=None, bounds=FITTING["in-order"], function=vocab_parallel_linear_cross_entropy):
    """The nll, or the words of the error."""
    hidden, shard, options = inputs(rank, bounds)
    try:
        return function(hidden, shard, torch.tensor(targets or TARGETS), **options).tolist()
    except ValueError as error:
        return str(error)


def with_bad(wrong):
    return [*TARGETS[:2], wrong, *TARGETS[3:]]


def unseen(rank):
    """As on a GPU, where nobody looks: the values, and the gradients of the first bad target."""
    looked_at, checks.values_are_checked = checks.values_are_checked, lambda device: False
    try:
        found = [outcome(rank, with_bad(wrong)) for wrong in BAD_TARGETS]
        found += [outcome(rank, bounds=bounds) for bounds in BAD_SHARDS.values()]
        hidden, shard, options = inputs(rank)
        leaves = hidden.requires_grad_(), shard.clone().requires_grad_()
        targets = torch.tensor(with_bad(-100))
        vocab_parallel_linear_cross_entropy(*leaves, targets, **options).sum().backward()
        return found, leaves[0].grad, leaves[1].grad
    finally:
        checks.values_are_checked = looked_at


def derivatives(rank):
    """First-order gradient with create_graph, and the words of what raises."""
    hidden, shard, options = inputs(rank)
    hidden.requires_grad_()
    targets = torch.tensor(TARGETS)
    nll = vocab_parallel_linear_cross_entropy(hidden, shard, targets, **options)
    (gradient,) = torch.autograd.grad(nll.sum(), hidden, create_graph=True)
    words = []
    for raising in (
        lambda: gradient.square().sum().backward(),
        lambda: torch.func.grad(
            lambda x: vocab_parallel_linear_cross_entropy(x, shard, targets, **options).sum()
        )(hidden.detach()),
    ):
        try:
            raising()
        except RuntimeError as error:
            words.append(str(error))
    return gradient.detach(), words


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    compiled = torch.compile(vocab_parallel_linear_cross_entropy, fullgraph=True, backend="aot_eager")
    results = {
        "targets": [outcome(rank, with_bad(wrong)) for wrong in BAD_TARGETS],
        "shards": [outcome(rank, bounds=bounds) for bounds in BAD_SHARDS.values()],
        "fitting": [outcome(rank, bounds=bounds) for bounds in FITTING.values()],
        "compiled": outcome(rank, with_bad(-100), function=compiled),
        "unseen": unseen(rank),
        "derivatives": derivatives(rank),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_values")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def whole(targets):
    hidden, weight, _ = inputs(0, ((0, V), None))
    return linear_cross_entropy(hidden, weight, torch.tensor(targets))


both_ranks = pytest.mark.parametrize("rank", [0, 1])


@both_ranks
@pytest.mark.parametrize("index", range(len(BAD_TARGETS)), ids=map(str, BAD_TARGETS))
def test_vocab_parallel__a_target_in_no_shard_raises_on_every_rank(outcomes, rank, index):
    words = f"targets must lie in [0, {V}), got {BAD_TARGETS[index]} in row 2"
    assert outcomes[rank]["targets"][index].startswith(words)


@both_ranks
@pytest.mark.parametrize("index", range(len(BAD_SHARDS)), ids=BAD_SHARDS)
def test_vocab_parallel__shards_that_do_not_fit_raise_on_every_rank(outcomes, rank, index):
    assert "without overlap or gap, got shards [" in outcomes[rank]["shards"][index]


@both_ranks
@pytest.mark.parametrize("index", range(len(FITTING)), ids=FITTING)
def test_vocab_parallel__shards_in_any_order_of_ranks_are_right(outcomes, rank, index):
    torch.testing.assert_close(torch.tensor(outcomes[rank]["fitting"][index]), whole(TARGETS))


@both_ranks
def test_vocab_parallel__compiled_code_looks_too(outcomes, rank):
    assert f"targets must lie in [0, {V}), got -100 in row 2" in outcomes[rank]["compiled"]


@both_ranks
def test_vocab_parallel__where_nobody_looks_bad_values_are_nan(outcomes, rank):
    found, dhidden, dweight = outcomes[rank]["unseen"]
    others = [0, 1, 3]
    want = whole(TARGETS)
    for nll in map(torch.tensor, found[: len(BAD_TARGETS)]):
        assert nll[2].isnan()
        torch.testing.assert_close(nll[others], want[others])
    assert torch.tensor(found[len(BAD_TARGETS) :]).isnan().all()
    assert dhidden[2].isnan().all() and dhidden[others].isfinite().all() and dweight.isnan().all()


@both_ranks
def test_vocab_parallel__second_derivatives_and_transforms_raise(outcomes, rank):
    gradient, (second, transform) = outcomes[rank]["derivatives"]
    hidden, weight, _ = inputs(0, ((0, V), None))
    leaf = hidden.requires_grad_()
    linear_cross_entropy(leaf, weight, torch.tensor(TARGETS)).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)
    assert "vocab_parallel_linear_cross_entropy has no second derivative" in second
    assert "torch.func transforms" in transform
