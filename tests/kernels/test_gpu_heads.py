"""Heads with bias, soft-cap and scale, row metrics and sharded kept tiles on a GPU, at real shapes too.

As `test_gpu.py`, it runs without the suite's conftest: `make gpu`.
"""

import pytest
import torch
from feature_orders import ratios_of, unluckiest_ratios
from gpu_support import (
    FORMS,
    HALF_FORMS,
    KEEP,
    MARKS,
    RECOMPUTE,
    hold,
    make_inputs,
    name_of,
    room_on_the_device,
    use_small_tiles,
)
from shards import sharded_ratios

from vrpo_kernels import testing
from vrpo_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    reference,
)

pytestmark = MARKS
MODELS = {  # D, V, head
    "LLaDA": (4096, 126464, {}),
    "Dream": (3584, 152064, {}),
    "LLaDA2-mini": (2048, 157184, {}),
    "DiffusionGemma": (2304, 262144, {"softcap": 30.0}),
    "everything": (2304, 100003, {"bias": 1.0, "softcap": 20.0, "scale": 0.7}),
}
HEADS = {
    "bias": {"bias": 2.0},
    "softcap": {"softcap": 5.0},
    "tiny_softcap": {"softcap": 0.1},
    "huge_softcap": {"softcap": 1e5},
    "everything": {"bias": 2.0, "softcap": 4.0, "scale": 0.7},
    "everything_saturated": {"bias": 2.0, "softcap": 3.0, "scale": 30.0},
}


def _head(head, V, dtype):
    """The settings, with a bias of (V,) of the standard deviation that stands for it."""
    head = {"bias": None, "softcap": None, "scale": 1.0, **head}
    if head["bias"] is not None:
        generator = torch.Generator().manual_seed(V)
        head["bias"] = torch.randn(V, generator=generator).mul_(head["bias"]).to("cuda", dtype)
    return head


def _make_op(gemm, kept_tile_bytes=KEEP, **options):
    def op(hidden, weight, targets, **head):
        settings = {"gemm": gemm, "kept_tile_bytes": kept_tile_bytes, **options}
        return linear_cross_entropy(hidden, weight, targets, **settings, **head)

    return op


def _make_replay(gemm):
    def op(hidden, weight, targets, **head):
        known = linear_cross_entropy_statistics(hidden, weight, targets, gemm=gemm, **head)
        value, drift = linear_cross_entropy_replay(hidden, weight, targets, *known, gemm=gemm, **head)
        assert drift.item() == 0.0
        return value

    return op


def _gradients(op, hidden, weight, targets, upstream, head):
    """(nll, dhidden, dweight, dbias or None)."""
    bias = head["bias"]
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, *(() if bias is None else (bias,)))]
    settings = head if bias is None else {**head, "bias": leaves[2]}
    nll = op(*leaves[:2], targets, **settings)
    grads = torch.autograd.grad(nll, leaves, upstream)
    return nll.detach(), *grads, *((None,) if bias is None else ())


@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("gemm", "dtype"), FORMS, ids=name_of)
def test_linear_cross_entropy__heads_within_the_policy(gemm, dtype, name, kept_tile_bytes):
    for size in ((17, 513, 48), (1100, 9001, 133)):
        inputs, head = make_inputs(*size, dtype, scale=4.0), _head(HEADS[name], size[1], dtype)
        with testing.poisoned_empty():
            results = _gradients(_make_op(gemm, kept_tile_bytes), *inputs, head)
        policy = unluckiest_ratios if dtype is torch.float32 else ratios_of
        testing.assert_ratios(policy(results, inputs, head))


@pytest.mark.parametrize("model", MODELS)
def test_linear_cross_entropy__within_the_policy_at_real_shapes(model, record_property):
    D, V, settings = MODELS[model]
    with room_on_the_device(40):
        # Of Gemma's logits many come near the cap.
        inputs = make_inputs(128, V, D, torch.bfloat16, scale=12.0 if "softcap" in settings else 2.0)
        head = _head(settings, V, torch.bfloat16)
        ratios = {}
        for gemm, _ in HALF_FORMS:
            modes = {
                "kept": _make_op(gemm),
                "recomputed": _make_op(gemm, RECOMPUTE),
                "replay": _make_replay(gemm),
            }
            for mode, run in modes.items():
                nll, dhidden, dweight, dbias = _gradients(run, *inputs, head)
                found = testing.linear_cross_entropy_ratios(
                    nll, dhidden, dweight, *inputs, dbias=dbias, **head
                )
                ratios |= {f"{gemm} {mode} {output}": ratio for output, ratio in found.items()}
    hold(ratios, record_property)


@pytest.mark.parametrize("tiles", ["default", "small"])
@pytest.mark.parametrize("name", ["plain", "bias", "everything"])
@pytest.mark.parametrize(("gemm", "dtype"), FORMS, ids=name_of)
def test_linear_cross_entropy__same_bits_with_gradients_metrics_and_again(
    gemm, dtype, name, tiles, monkeypatch
):
    if tiles == "small":
        use_small_tiles(monkeypatch)
    hidden, weight, targets, upstream = make_inputs(2100, 20000, 256, dtype, scale=4.0)
    head = _head(HEADS.get(name, {}), 20000, dtype)
    with torch.no_grad():
        plain = _make_op(gemm)(hidden, weight, targets, **head)
        with_metrics, metrics = _make_op(gemm, return_metrics=True)(hidden, weight, targets, **head)
    testing.assert_bitwise_equal(with_metrics, plain, "nll with metrics")
    for kept_tile_bytes in (KEEP, RECOMPUTE):
        run = _make_op(gemm, kept_tile_bytes)
        first, second = (_gradients(run, hidden, weight, targets, upstream, head) for _ in range(2))
        testing.assert_bitwise_equal(first[0], plain, "nll")
        for a, b, output in zip(first, second, ("nll", "dhidden", "dweight", "dbias"), strict=True):
            if a is not None:
                testing.assert_bitwise_equal(a, b, output)
    leaf = hidden.detach().requires_grad_()
    nll, again = _make_op(gemm, return_metrics=True)(leaf, weight, targets, **head)
    testing.assert_bitwise_equal(nll.detach(), plain, "nll with metrics and gradients")
    for value, wanted, field in zip(again, metrics, metrics._fields, strict=True):
        testing.assert_bitwise_equal(value, wanted, field)


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize(("gemm", "dtype"), FORMS, ids=name_of)
def test_linear_cross_entropy__metrics_are_those_of_the_dense_softmax(gemm, dtype, name, monkeypatch):
    use_small_tiles(monkeypatch)
    hidden, weight, targets, _ = make_inputs(300, 20000, 256, dtype, scale=3.0)
    weight[:, 0] = (torch.arange(20000, device="cuda") // 5000) * 12.0  # m rises, or stays
    hidden[:, 0] = torch.tensor([-1.0, 1.0], device="cuda").repeat(150)
    head = _head({**HEADS["everything"], "softcap": 30.0} if name == "everything" else {}, 20000, dtype)
    bias = None if head["bias"] is None else head["bias"].double()
    settings = (head["softcap"] or 0.0, head["scale"])
    dense = reference.logits(hidden.double(), weight.double(), bias, *settings)
    targets[:10] = dense[:10].argmax(1)
    _, metrics = _make_op(gemm, return_metrics=True)(hidden, weight, targets, **head)
    entropy = torch.special.entr(dense.softmax(1)).sum(1)
    torch.testing.assert_close(metrics.entropy.double(), entropy, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(metrics.log_sum_exp.double(), dense.logsumexp(1), rtol=2e-6, atol=1e-5)
    assert metrics.top1[:10].all()
    sure = dense.topk(2).values.diff().abs()[:, 0] > 1e-4
    assert torch.equal(metrics.top1[sure], (dense.argmax(1) == targets)[sure])


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("edges", [(3000, 9000), (70, 6000, 9000)], ids=["two", "three"])
@pytest.mark.parametrize(("gemm", "dtype"), FORMS, ids=name_of)
def test_backend__kept_tiles_of_shards_add_up(gemm, dtype, edges, name, record_property):
    inputs = make_inputs(200, 9000, 128, dtype, scale=4.0)
    head = _head(HEADS["everything"], 9000, dtype) if name == "everything" else {}
    hold(sharded_ratios(gemm, edges, *inputs, keep=True, **head), record_property)


@pytest.mark.parametrize("nats", [30.0, 64.0, 200.0])
@pytest.mark.parametrize(("gemm", "dtype"), HALF_FORMS, ids=name_of)
def test_backend__kept_tiles_of_a_shard_far_below(gemm, dtype, nats, record_property):
    hidden, weight, targets, upstream = make_inputs(200, 9000, 128, dtype)
    hidden[:, 0], weight[:, 0] = 4.0, 0.0
    weight[3000:, 0] = -nats / 4
    hold(sharded_ratios(gemm, (3000, 9000), hidden, weight, targets, upstream, keep=True), record_property)


@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__a_whole_head_never_waits_for_the_device(gemm, kept_tile_bytes):
    inputs = make_inputs(300, 9000, 128, torch.bfloat16)
    head = _head(HEADS["everything"], 9000, torch.bfloat16)

    def run(**options):
        _gradients(_make_op(gemm, kept_tile_bytes), *inputs, head)
        return _make_op(gemm, return_metrics=True)(*inputs[:3], **head)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
