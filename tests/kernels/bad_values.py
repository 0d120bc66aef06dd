"""Bad values where nobody looks at them: NaN or -1 of what they enter, and nothing out of bounds.

Run by `test_gpu_bad_values.py` on a GPU, and by `test_triton_bad_values.py` in Triton's CPU interpreter.
There tensors are on the CPU, where values are checked: that is switched off, as it is on a GPU, and switched
on by `set_debug`. Reading far out of bounds would end the process.
"""

import os

import pytest
import torch

from vrpo_kernels import (
    checks,
    cross_entropy,
    elbo_from_hidden,
    elbo_from_logits,
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    mask_select,
    pack_masked,
    token_logps,
    token_weight_sums,
)
from vrpo_kernels.testing import assert_bitwise_equal

pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
BAD_TARGETS = [-(2**63), -100, -1, 9, 2**40, 2**63 - 1]
OTHERS = [0, 1, 3]  # rows of four beside the bad one
BAD_ROWS = [-(2**63), -1, 6, 2**40, 2**63 - 1]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    """New tensors are on the device, and CPU tensors are looked at in debug mode only."""
    looked_at = checks.values_are_checked
    if DEVICE == "cpu":
        monkeypatch.setattr(checks, "values_are_checked", lambda device: checks._debug and looked_at(device))
    with torch.device(DEVICE):
        yield


def differentiate(logits, targets, rows=None, **options):
    leaf = logits.clone().requires_grad_()
    computed = leaf * 1
    nll = cross_entropy(computed, targets, rows, **options)
    nll.sum().backward()
    return nll.detach(), leaf.grad


@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in_place"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("wrong", BAD_TARGETS)
def test_cross_entropy__a_bad_target_is_nan_in_its_row_alone(wrong, backend, in_place):
    logits, targets = torch.randn(4, 9), torch.tensor([0, 8, wrong, 3])
    nll, dlogits = differentiate(logits, targets, backend=backend, in_place=in_place)
    want, dwant = differentiate(logits, targets.clamp(0, 8), backend=backend)
    assert nll[2].isnan() and dlogits[2].isnan().all()
    assert_bitwise_equal(nll[OTHERS], want[OTHERS])
    assert_bitwise_equal(dlogits[OTHERS], dwant[OTHERS])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("wrong", BAD_ROWS)
def test_cross_entropy__a_bad_row_is_nan_and_reads_nothing(wrong, backend):
    logits, targets = torch.randn(6, 9), torch.tensor([0, 8, 3])
    nll, dlogits = differentiate(logits, targets, torch.tensor([5, wrong, 2]), backend=backend)
    want, dwant = differentiate(logits, targets[[0, 2]], torch.tensor([5, 2]), backend=backend)
    assert nll[1].isnan()
    assert_bitwise_equal(nll[[0, 2]], want)
    if backend == "triton":  # the reference's NaN reaches the row it read instead
        assert_bitwise_equal(dlogits, dwant)


def test_cross_entropy__a_row_given_twice_has_no_gradient_but_nan():
    logits, targets = torch.randn(6, 9), torch.tensor([0, 8, 3])
    nll, dlogits = differentiate(logits, targets, torch.tensor([5, 1, 5]), backend="triton")
    _, dwant = differentiate(logits, targets[1:2], torch.tensor([1]), backend="triton")
    assert nll.isfinite().all() and dlogits[5].isnan().all()
    assert_bitwise_equal(dlogits[:5], dwant[:5])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_set_debug__names_the_bad_value(backend):
    logits, targets = torch.randn(6, 9), torch.tensor([0, -100, 3])
    rows = torch.tensor([0, 1, 2])
    with checks.set_debug(True):
        with pytest.raises(ValueError, match=r"targets must lie in \[0, 9\), got -100 in row 1"):
            cross_entropy(logits, targets, rows, backend=backend)
        with pytest.raises(ValueError, match=r"rows must lie in \[0, 6\), got 6 at index 2"):
            cross_entropy(logits, targets.abs() % 9, torch.tensor([0, 1, 6]), backend=backend)
        with pytest.raises(ValueError, match="all different, got 4 more than once"):
            cross_entropy(logits, targets.abs() % 9, torch.tensor([4, 1, 4]), backend=backend)


def head():
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(4, 16, generator=generator), torch.randn(9, 16, generator=generator)


def head_gradients(targets, **options):
    leaves = [part.requires_grad_() for part in head()]
    nll = linear_cross_entropy(*leaves, targets, **options)
    nll.sum().backward()
    return nll.detach(), leaves[0].grad, leaves[1].grad


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kept_tile_bytes", [2**30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("wrong", BAD_TARGETS)
def test_linear_cross_entropy__a_bad_target_is_nan_in_its_row_and_the_head(wrong, backend, kept_tile_bytes):
    options = {"backend": backend, "kept_tile_bytes": kept_tile_bytes}
    nll, dhidden, dweight = head_gradients(torch.tensor([0, 8, wrong, 3]), **options)
    want, dwant, _ = head_gradients(torch.tensor([0, 8, 1, 3]), **options)
    assert nll[2].isnan() and dhidden[2].isnan().all() and dweight.isnan().all()
    assert_bitwise_equal(nll[OTHERS], want[OTHERS])
    assert_bitwise_equal(dhidden[OTHERS], dwant[OTHERS])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("wrong", BAD_TARGETS)
def test_linear_cross_entropy__metrics_of_a_bad_target_are_nan(wrong, backend):
    options = {"bias": torch.linspace(-1, 1, 9), "softcap": 3.0, "return_metrics": True, "backend": backend}
    nll, metrics = linear_cross_entropy(*head(), torch.tensor([0, 8, wrong, 3]), **options)
    want, others = linear_cross_entropy(*head(), torch.tensor([0, 8, 1, 3]), **options)
    assert nll[2].isnan() and metrics.entropy[2].isnan() and metrics.log_sum_exp[2].isnan()
    assert not metrics.top1[2]
    assert_bitwise_equal(nll[OTHERS], want[OTHERS])
    for found, right in zip(metrics, others, strict=True):
        assert_bitwise_equal(found[OTHERS], right[OTHERS])


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
@pytest.mark.parametrize("kept_tile_bytes", [2**30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["hidden", "upstream"])
def test_linear_cross_entropy__a_bad_number_stays_in_its_row(where, value, kept_tile_bytes, gemm):
    def gradients(row):
        hidden, weight = (part.half() for part in head())
        upstream = torch.ones(4)
        if row is not None:
            (hidden if where == "hidden" else upstream)[row] = value
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        options = {"backend": "triton", "gemm": gemm, "kept_tile_bytes": kept_tile_bytes}
        nll = linear_cross_entropy(*leaves, torch.tensor([0, 8, 1, 3]), **options)
        nll.backward(upstream)
        return nll.detach(), leaves[0].grad, leaves[1].grad

    (nll, dhidden, dweight), (want, dwant, _) = gradients(2), gradients(None)
    assert_bitwise_equal(nll[OTHERS], want[OTHERS])
    assert_bitwise_equal(dhidden[OTHERS], dwant[OTHERS])
    assert not dhidden[2].isfinite().any() and not dweight.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("wrong", BAD_TARGETS)
def test_replay__a_bad_target_is_nan_in_every_number_of_its_row(wrong, backend):
    targets = torch.tensor([0, 8, wrong, 3])
    hidden, weight = head()
    nll, statistics = linear_cross_entropy_statistics(hidden, weight, targets, backend=backend)
    assert nll[2].isnan() and statistics[0, 2].isnan() and nll[OTHERS].isfinite().all()
    leaf = hidden.requires_grad_()
    again, drift = linear_cross_entropy_replay(leaf, weight, targets, nll, statistics, backend=backend)
    again.sum().backward()
    assert again[2].isnan() and drift.isnan() and leaf.grad[2].isnan().all()
    assert leaf.grad[OTHERS].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_set_debug__names_the_bad_target_of_a_head(backend):
    targets = torch.tensor([0, 1, 9, 3])
    hidden, weight = head()
    known = linear_cross_entropy_statistics(hidden, weight, targets % 9, backend=backend)
    with checks.set_debug(True):
        for call in (
            lambda: linear_cross_entropy(hidden, weight, targets, backend=backend),
            lambda: linear_cross_entropy_statistics(hidden, weight, targets, backend=backend),
            lambda: linear_cross_entropy_replay(hidden, weight, targets, *known, backend=backend),
        ):
            with pytest.raises(ValueError, match=r"targets must lie in \[0, 9\), got 9 in row 2"):
                call()


PACK = {
    "tokens_U": [*range(10, 20)],
    "prompt_length_R": [2, 1],
    "response_length_R": [3, 4],
    "position_N": [0, 2, 1, 3],
    "offsets_S1": [0, 2, 4],
}
FAR = 2**40


def tensors(lists):
    return {name: torch.tensor(values) for name, values in lists.items()}


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("prompt_length_R", [2, FAR]),
        ("prompt_length_R", [FAR, 1]),
        ("prompt_length_R", [-FAR, 1]),
        ("response_length_R", [3, -FAR]),
        ("response_length_R", [-FAR, 4]),
        ("position_N", [0, FAR, 1, -FAR]),
        ("offsets_S1", [0, FAR, 4]),
        ("offsets_S1", [-FAR, 2, 4]),
        ("offsets_S1", [FAR, -FAR, FAR]),
    ],
)
def test_pack_masked__bad_values_write_nothing_out_of_bounds(name, bad):
    arguments = tensors(PACK | {name: bad})
    packed = pack_masked(**arguments, num_samples=1, mask_token_id=3, backend="triton")
    good = pack_masked(**tensors(PACK), num_samples=1, mask_token_id=3, backend="triton")
    for found, right in zip(packed[:2], good[:2], strict=True):
        assert found.shape == right.shape and found.min() >= -1 and found.max() < 20
    # A row that no token claims is no index, and has no target.
    assert ((packed.row_N == -1) == (packed.target_N == -1)).all()
    assert packed.row_N.min() >= -1 and packed.row_N.max() < 10
    assert (packed.row_N == -1).any() or (packed.tokens_T == -1).any()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("response_length_R", [3, -FAR]),
        ("position_N", [0, FAR, 1, -FAR]),
        ("offsets_S1", [-FAR, 2, 4]),
        ("offsets_S1", [FAR, -FAR, FAR]),
    ],
)
def test_token_weight_sums__what_bad_values_leave_out_is_nan(name, bad):
    rows = {key: PACK[key] for key in ("position_N", "offsets_S1", "response_length_R")}
    options = {"num_samples": 1, "num_tokens": 7, "backend": "triton"}
    sum_M, sum_N = token_weight_sums(torch.ones(4), **tensors(rows | {name: bad}), **options)
    assert sum_M.isnan().any() or sum_N.isnan().any()


@pytest.mark.parametrize("by_rank", [True, False])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("count_S", [-FAR, 2]),
        ("count_S", [FAR, 2]),
        ("length_S", [0, 6]),
        ("length_S", [-FAR, 6]),
        ("first_S", [-FAR, 0]),
    ],
)
def test_mask_select__bad_values_write_nothing_out_of_bounds(name, bad, by_rank):
    draw = {
        "length_S": [5, 6],
        "counter_S3": [[0, 1, 2], [3, 4, 5]],
        "first_S": [0, 0],
        "count_S": [2, 2],
    }
    draw = tensors(draw | {name: bad})
    options = {"seed": 3, "by_rank": by_rank, "backend": "triton"}
    position, _ = mask_select(**draw, num_rows=4, **options)
    assert position.shape == (4,) and position.min() >= -1 and position.max() < 6
    with checks.set_debug(True), pytest.raises(ValueError, match=f"{name} must be in"):
        mask_select(**draw, **options)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_counts__a_wrong_number_of_rows_is_nan_in_all_of_them(wrong, shift, backend):
    hidden, weight = torch.randn(2, 4, 16), torch.randn(9, 16)
    tokens = torch.arange(8).view(2, 4)
    wanted = torch.tensor([[False, True, True, False], [False, False, True, True]])
    options = {"shift": shift, "backend": backend}
    elbo = elbo_from_hidden(hidden, weight, tokens, wanted, torch.ones(2), num_masked=4 + wrong, **options)
    assert elbo.isnan().all()
    logits = hidden @ weight.T
    elbo = elbo_from_logits(logits, tokens, wanted, torch.ones(2), num_masked=4 + wrong, **options)
    assert elbo.isnan().all()
    logp = token_logps(hidden, weight, tokens, wanted, num_wanted=4 + wrong, **options)
    assert logp[wanted].isnan().sum() >= 3 and not (logp[wanted] < 0).any()
    right = token_logps(hidden, weight, tokens, wanted, num_wanted=4, **options)
    assert (right[wanted] < 0).all() and (right[~wanted] == 0).all()
