"""Heads with a bias, a soft-cap or a scale, and the metrics of rows: what holds for every backend."""

import math

import pytest
import torch
import torch.nn.functional as F

import vrpo_kernels
from vrpo_kernels import linear_cross_entropy, linear_cross_entropy_replay, linear_cross_entropy_statistics
from vrpo_kernels.linear_cross_entropy import reference

N, D, V = 6, 5, 11
SETTINGS = [
    {"softcap": None, "scale": 1.0},
    {"softcap": None, "scale": 0.3},
    {"softcap": 1.5, "scale": 1.0},
    {"softcap": 30.0, "scale": 2.5},
]


def _inputs(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    bias = torch.randn(V, generator=generator, dtype=torch.float64) if bias else None
    return hidden.to(dtype), weight.to(dtype), targets, None if bias is None else bias.to(dtype)


def _dense_logits(hidden, weight, bias, softcap, scale):
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return logits if softcap is None else softcap * (logits / softcap).tanh()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_linear_cross_entropy__is_cross_entropy_of_the_dense_logits(settings, with_bias):
    hidden, weight, targets, bias = _inputs(bias=with_bias)
    expected = F.cross_entropy(_dense_logits(hidden, weight, bias, **settings), targets, reduction="none")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, bias=bias, **settings), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_linear_cross_entropy__gradients_of_hidden_weight_and_bias_pass_gradcheck(settings):
    hidden, weight, targets, bias = _inputs()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, **settings), leaves
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_linear_cross_entropy_replay__has_the_same_gradients(settings):
    hidden, weight, targets, bias = _inputs()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    settings = {"bias": bias, **settings}
    expected = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, **settings), leaves, upstream
    )
    nll, statistics = linear_cross_entropy_statistics(hidden, weight, targets, **settings)
    again, drift = linear_cross_entropy_replay(hidden, weight, targets, nll, statistics, **settings)
    assert drift.item() == 0.0
    torch.testing.assert_close(torch.autograd.grad(again, leaves, upstream), expected)


def test_linear_cross_entropy_statistics__holds_the_target_logit_before_the_soft_cap():
    hidden, weight, targets, bias = _inputs()
    settings = {"bias": bias, "softcap": 1.5, "scale": 2.0}
    nll, statistics = linear_cross_entropy_statistics(hidden, weight, targets, **settings)
    raw = _dense_logits(hidden, weight, bias, None, 2.0).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(statistics[0], raw)
    capped = 1.5 * (raw / 1.5).tanh()
    torch.testing.assert_close(nll, F.softplus(statistics[1] + statistics[2].log() - capped))


@pytest.mark.parametrize("settings", SETTINGS)
def test_linear_cross_entropy__metrics_are_those_of_the_softmax(settings):
    hidden, weight, targets, bias = _inputs()
    targets[0] = _dense_logits(hidden, weight, bias, **settings)[0].argmax()
    leaf = hidden.clone().requires_grad_()
    nll, metrics = linear_cross_entropy(
        leaf, weight, targets, bias=bias, return_metrics=True, backend="reference", **settings
    )
    logits = _dense_logits(hidden, weight, bias, **settings)
    torch.testing.assert_close(metrics.entropy, torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(metrics.log_sum_exp, logits.logsumexp(1))
    assert metrics.top1.tolist() == (logits.argmax(1) == targets).tolist() and metrics.top1[0]
    assert nll.requires_grad and not any(part.requires_grad for part in metrics)


def test_row_metrics__of_fused_statistics_are_those_of_the_formula():
    from vrpo_kernels.linear_cross_entropy.metrics import row_metrics

    hidden, weight, targets, bias = _inputs()
    _, statistics = linear_cross_entropy_statistics(hidden, weight, targets, bias=bias, softcap=1.5)
    others = _dense_logits(hidden, weight, bias, 1.5, 1.0).scatter(1, targets[:, None], -math.inf)
    above = (others - statistics[1][:, None]).clamp(min=-1e3)
    sums = torch.stack([others.amax(1), (above * above.exp()).sum(1)])
    found = row_metrics(statistics, sums, 1.5)
    expected = reference.with_metrics(hidden, weight, targets, bias, 1.5, 1.0)[1:]
    torch.testing.assert_close(found.entropy, expected[0].float())
    torch.testing.assert_close(found.log_sum_exp, expected[1].float())
    assert torch.equal(found.top1, expected[2])


def test_row_metrics__of_a_single_class_are_those_of_certainty():
    hidden, weight, targets = torch.ones(3, 2), torch.ones(1, 2), torch.zeros(3, dtype=torch.int64)
    nll, metrics = linear_cross_entropy(hidden, weight, targets, return_metrics=True, backend="reference")
    assert nll.tolist() == metrics.entropy.tolist() == [0.0] * 3 and metrics.top1.all()


def test_linear_cross_entropy__autocast_casts_the_bias_too():
    hidden, weight, targets, bias = _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets, bias=bias, backend="reference")
    cast = [tensor.bfloat16() for tensor in (hidden, weight, bias)]
    expected = linear_cross_entropy(*cast[:2], targets, bias=cast[2], backend="reference")
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(V, dtype=torch.float64), "bias and weight must have the same dtype"),
        (torch.zeros(V, dtype=torch.int64), "bias and weight must have the same dtype"),
        ([0.0] * V, "bias must be a tensor, got list"),
    ],
)
def test_linear_cross_entropy__autocast_casts_no_bias_that_linear_refuses(bias, message):
    hidden, weight, targets, _ = _inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets, bias=bias)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"softcap": 0.0}, "softcap must be a finite number > 0 or None, got 0.0"),
        ({"softcap": -30.0}, "softcap"),
        ({"softcap": math.inf}, "softcap"),
        ({"softcap": math.nan}, "softcap"),
        ({"softcap": torch.tensor(30.0)}, "softcap"),
        ({"scale": 0.0}, "scale must be a finite number > 0, got 0.0"),
        ({"scale": -1.0}, "scale"),
        ({"scale": None}, "scale"),
        ({"scale": 1e-50}, "scale must be a normal number of float32, 1.2e-38 to 3.4e38, got 1e-50"),
        ({"softcap": 1e39}, "softcap must be a normal number of float32"),
        ({"softcap": 10**400}, "softcap must be a normal number of float32"),
        ({"scale": True}, "scale"),
        ({"bias": torch.zeros(V - 1)}, r"bias and weight must have the same size V, got 10 and 11"),
        ({"bias": torch.zeros(V, 1)}, r"bias must have shape \(V\)"),
        ({"bias": torch.zeros(V, dtype=torch.float64)}, "bias and weight must have the same dtype"),
    ],
)
def test_linear_cross_entropy__names_a_wrong_setting(wrong, message):
    hidden, weight, targets, _ = _inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets, **wrong)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_statistics(hidden, weight, targets, **wrong)


def test_plan__a_bias_needs_the_tiles_of_a_trained_head():
    hidden, weight, _, bias = _inputs(torch.float32)
    plan = vrpo_kernels.plan_linear_cross_entropy(hidden, weight, bias=bias.requires_grad_())
    again = vrpo_kernels.plan_linear_cross_entropy(hidden, weight, bias=bias, kept_tile_bytes=0)
    if plan.backend == "reference":
        pytest.skip("the C++ extension is not built")
    assert (plan.keep_tiles, plan.forward_units, plan.backward_units) == (True, 1, 0)
    assert (again.keep_tiles, again.forward_units, again.backward_units) == (False, 1, 1)
