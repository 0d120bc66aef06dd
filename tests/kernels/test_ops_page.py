"""docs/ops.md: its blocks run, they do what is said, and no public op is left out."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from backends import needs_extension

import vrpo_kernels
from vrpo_kernels.backend import availability

PAGE = (Path(__file__).parents[2] / "docs/ops.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names():
    """What the page's names stand for after its last block; its printed lines as `printed`."""
    if availability().cpu is not None:
        pytest.skip(f"the sharded head has no reference: {availability().cpu}")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    found, printed = {}, io.StringIO()
    if not dist.is_initialized():  # left for the tests that follow: see the sharded head's benchmark
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(printed):
        torch.manual_seed(4)
        for block in blocks:
            exec(compile(block, "docs/ops.md", "exec"), found)
    return found | {"printed": printed.getvalue()}


def test_ops_page__names_every_public_op_and_no_other():
    for name in vrpo_kernels.__all__:
        if name not in ("PackedTokens", "Plan", "RowMetrics"):  # what ops return
            assert re.search(rf"\b{name}\b", PAGE), name
    for name in re.findall(r"\bops\.(\w+)", PAGE):
        assert name in vrpo_kernels.__all__
    titles = re.findall(r"^## (.*)$", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#(.*?)\)", PAGE)) <= anchors


def test_ops_page__lines_stay_short():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert all(len(line) <= 115 for block in blocks for line in block.splitlines())


def log_p(names, **change):
    logits = names["hidden"] @ names["weight"].T
    return F.log_softmax(change["of"](logits) if change else logits, dim=-1)


def picked(names, log_probabilities):
    rows = log_probabilities.gather(-1, names["tokens"][..., None]).squeeze(-1)
    return torch.where(names["masked"], rows, torch.zeros_like(rows))


def test_ops_page__elbos_and_log_probabilities_are_the_formulas(names):
    plain = picked(names, log_p(names))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(names["logp"], plain, **close)
    torch.testing.assert_close(names["packed_elbo"], plain.sum(1) / names["t"], **close)
    shifted = picked(names, log_p(names).roll(1, dims=1))
    torch.testing.assert_close(names["dream_elbo"], shifted.sum(1) / names["t"], **close)
    cooled = picked(names, log_p(names, of=lambda logits: logits / 0.7))
    torch.testing.assert_close(names["policy"], cooled, **close)
    every = log_p(names).gather(-1, names["tokens"][..., None]).squeeze(-1)
    torch.testing.assert_close(names["every_logp"], every, **close)
    capped = picked(names, log_p(names, of=lambda logits: 30 * torch.tanh(0.9 * logits / 30)))
    torch.testing.assert_close(names["elbo"], capped.sum(1) / names["t"], **close)
    hits = (log_p(names).argmax(-1) == names["tokens"])[names["masked"]]
    assert names["accuracy"] == hits.float().mean()
    assert names["states"].shape == (2, 8, 16) and names["states"].requires_grad
    seen = picked(names, names["model"](names["tokens"]).log_softmax(-1))
    torch.testing.assert_close(names["loss"], -(seen.sum(1) / names["t"]).sum() / 16, **close)


def test_ops_page__log_sum_exp_and_entropy_are_those_of_the_logits(names):
    logits, masked, metrics = (
        (names["hidden"] @ names["weight"].T).detach(),
        names["masked"],
        names["metrics"],
    )
    log_probabilities = logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    torch.testing.assert_close(metrics.entropy[masked], entropy[masked], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics.log_sum_exp[masked], logits.logsumexp(-1)[masked])


ONE_LINERS = {"nll_bumped": "tokens", "nll_without": "targets"}


def changed_nll(names, which):
    """The one-liner's value by its definition: one logit of each row changed before the softmax."""
    logits = (names["hidden"] @ names["weight"].T)[names["masked"]]
    if which == "nll_bumped":
        targets = names["tokens"][names["masked"]]
        assert 0 < (names["observed"] == targets).sum() < len(targets)  # the bump's last term, there and not
        one_hot = F.one_hot(names["observed"], logits.shape[1])
        return F.cross_entropy(logits + names["c"] * one_hot, targets, reduction="none")
    allowed = torch.arange(logits.shape[1]) != names["mask_id"]
    return F.cross_entropy(logits.where(allowed, -torch.inf), names["targets"], reduction="none")


def test_ops_page__a_temperature_after_a_soft_cap_is_in_both_arguments(names):
    head = (names["hidden"], names["weight"], names["tokens"], names["masked"])
    got = vrpo_kernels.token_logps(*head, scale=1 / 0.7, softcap=5.0 / 0.7)
    want = picked(names, log_p(names, of=lambda logits: 5 * torch.tanh(logits / 5) / 0.7))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_ops_page__a_bias_forbids_a_class_with_the_right_value_and_gradient(names):
    assert names["wanted"].any()
    allowed = torch.arange(40) != names["mask_id"]
    want = log_p(names, of=lambda logits: logits.where(allowed, -torch.inf))
    want = want.gather(-1, names["tokens"][..., None]).squeeze(-1)[names["wanted"]]
    got = names["logp_without"][names["wanted"]]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    leaves, upstream = (names["hidden"], names["weight"]), torch.linspace(-1, 1, len(want))
    wanted = torch.autograd.grad(want, leaves, upstream)
    found = torch.autograd.grad(got, leaves, upstream, retain_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["nll_bumped", "nll_without"])
def test_ops_page__one_liners_have_the_right_value_and_gradient(names, which):
    leaves = (names["hidden"], names["weight"])
    want = changed_nll(names, which)
    torch.testing.assert_close(names[which], want, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(-1, 1, len(want))
    wanted = torch.autograd.grad(want, leaves, upstream)
    got = torch.autograd.grad(names[which], leaves, upstream, retain_graph=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@needs_extension
def test_ops_page__forbidding_a_sure_class_keeps_its_accuracy():
    """p_mask = 1 - 1e-9 in fp32: 1 - p_mask would be 0, and the row's nll infinite."""
    weight = torch.tensor([[0.0], [0.3], [20.0]], requires_grad=True)
    rows = torch.ones(1, 1)
    nll = vrpo_kernels.linear_cross_entropy(rows, weight, torch.tensor([0]))
    nll_mask = vrpo_kernels.linear_cross_entropy(rows, weight, torch.tensor([2]))
    without = nll + torch.log(-torch.expm1(-nll_mask))
    want = F.cross_entropy(weight[:2].T.double(), torch.tensor([0]), reduction="none")
    torch.testing.assert_close(without.double(), want, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(without.sum(), weight)
    p = torch.softmax(torch.tensor([0.0, 0.3]), 0)
    torch.testing.assert_close(gradient[:2, 0], torch.stack([p[0] - 1, p[1]]), rtol=1e-3, atol=1e-4)
    assert abs(float(gradient[2])) < 1e-4


def test_ops_page__the_rest_ran_as_it_says(names):
    assert names["drift"] == 0
    assert names["pack"].tokens_T.shape == (15,)
    assert (names["pack"].tokens_T == 39).sum() >= 6
    assert "triton" in names["printed"] and "cpu" in names["printed"]
