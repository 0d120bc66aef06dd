"""linear_cross_entropy at the size of LLaDA's head: gradients against fp64, 50 equal runs, error over D.

Every ratio and error is recorded and printed (`pytest -rP` or `--junitxml`), so that one run on a GPU says by
how much the tensor cores' sums stay within, or exceed, what the policy allows.
"""

import pytest
import torch
from gpu_support import (
    KEEP,
    MARKS,
    RECOMPUTE,
    gradients,
    hold,
    make_modes,
    make_op,
    make_replay,
    room_on_the_device,
)

from benchmarks.cases import Case, make_inputs
from benchmarks.gate import Gate
from vrpo_kernels import testing
from vrpo_kernels.linear_cross_entropy import reference

pytestmark = MARKS
CLASSES, HIDDEN = 126464, 4096


def _case(num_rows, size=HIDDEN, num_classes=CLASSES, logits="random"):
    return make_inputs(Case(num_rows, size, num_classes, torch.bfloat16, "cuda", logits))


@pytest.mark.parametrize("logits", ["random", "peaked"])
def test_linear_cross_entropy__gradients_at_the_size_of_llada(logits, record_property):
    with room_on_the_device(40):
        gate = Gate(_case(256, logits=logits))
        ratios = {}
        for gemm in ("cublas", "fused"):
            for name, op in make_modes(gemm).items():
                verdict = gate.judge(op)
                record_property(f"{name}, nats", f"{verdict.nll_error:.3g}")
                ratios |= {f"{name} {output}": ratio for output, ratio in verdict.ratios.items()}
        del gate
    hold(ratios, record_property)


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__fifty_runs_with_the_same_bits_at_the_size_of_llada(gemm):
    with room_on_the_device(16):
        inputs = _case(300)
        arguments = inputs.hidden, inputs.weight, inputs.targets, inputs.upstream
        runs = {"kept": make_op(gemm, KEEP), "recomputed": make_op(gemm, RECOMPUTE)}
        differ = {}
        for mode, op in runs.items():
            first = [_bits(value) for value in gradients(op, *arguments)]
            counts = torch.zeros(3, dtype=torch.int64, device="cuda")
            for _ in range(49):
                again = [_bits(value) for value in gradients(op, *arguments)]
                counts += torch.stack([(a != b).any() for a, b in zip(again, first, strict=True)])
            differ |= dict(
                zip((f"{mode} nll", f"{mode} dhidden", f"{mode} dweight"), counts.tolist(), strict=True)
            )
        del first, again
    assert not any(differ.values()), f"runs of 49 that differ from the first: {differ}"


def _bits(value):
    return value.view(torch.int16 if value.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__every_mode_has_the_same_nll_at_the_size_of_llada(gemm):
    with room_on_the_device(16):
        inputs = _case(300)
        arguments = inputs.hidden, inputs.weight, inputs.targets, inputs.upstream
        with torch.no_grad():
            plain = make_op(gemm)(*arguments[:3])
        swept = gradients(make_op(gemm, RECOMPUTE), *arguments)
        replayed = gradients(make_replay(gemm), *arguments)
        kept = gradients(make_op(gemm, KEEP), *arguments)
        for mode, found in (("kept", kept), ("recomputed", swept), ("replay", replayed)):
            testing.assert_bitwise_equal(found[0], plain, f"nll {mode}")
        for index, output in ((1, "dhidden"), (2, "dweight")):  # both are the same sweep
            testing.assert_bitwise_equal(replayed[index], swept[index], output)


def _sum_bound(hidden, weight):
    """(N,) what one truncation per step of the sum can do to a row's nll, in nats.

    A tensor core adds k = 16 products to an fp32 accumulator and truncates: at most 2^-23 of a partial sum,
    which is at most S = sum_i |h_i w_i|. After D / 16 steps a logit is off by at most (D / 16) 2^-23 S, and
    nll, a difference of two averages of logits, by twice the largest of a row.
    """
    largest = (hidden.float().abs() @ weight.float().abs().T).amax(dim=1)
    return 2 * (hidden.shape[1] / 16) * 2.0**-23 * largest


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__error_grows_with_the_hidden_size_as_truncation_allows(gemm, record_property):
    excess = {}
    with room_on_the_device(16):
        for size in (256, 1024, 4096, 8192):
            inputs = _case(256, size, 32768)
            hidden, weight, targets = inputs.hidden, inputs.weight, inputs.targets
            truth = reference.linear_cross_entropy(hidden.double(), weight.double(), targets)
            baseline = reference.linear_cross_entropy(hidden.float(), weight.float(), targets)
            nll = make_op(gemm)(hidden, weight, targets)
            error = nll.double() - truth
            # The softmax over V: 32 additions per lane, exponentials and a logarithm of a few ulp each.
            bound = _sum_bound(hidden, weight) + 2.0**-24 * (64 + 4 * truth)
            found = {
                "largest error": error.abs().max().item(),
                "mean error": error.mean().item(),
                "share of the bound": (error.abs() / bound).max().item(),
                "policy ratio": testing.fp32_error_ratio(
                    nll, truth, baseline, testing.fp32_floor(hidden.dtype, size)
                ),
            }
            for name, value in found.items():
                record_property(f"D={size} {name}", f"{value:.3g}")
            print(f"{gemm} D={size}:", ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
            excess[size] = max(found["share of the bound"], found["policy ratio"])
    assert all(share <= 1 for share in excess.values()), f"error over what is allowed, by D: {excess}"
