"""The gradient of a micro-batch is the same however it is taken: one graph, replayed, in any cut."""

import math

import pytest
import torch
from batches import make_pairs, to_batch
from torch.utils.flop_counter import FlopCounterMode

from vrpo.gradient import JointStep, LinearStep, Parts, ReplayStep, evaluate
from vrpo.models import create_model
from vrpo.objectives import preference
from vrpo.objectives.losses import LOSSES
from vrpo.objectives.pairs import PairObjective
from vrpo.step import Estimator, num_cuts, split_segments
from vrpo.training.packed_trainer import ModelNLL

LENGTHS = [(3, 5, 2), (1, 1, 9), (6, 4, 4)]
NUM_SAMPLES = 4


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def models(request, tokenizer):
    """Policy and reference that differ."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "init_std": 0.3}
    return tuple(create_model(tokenizer, seed=seed, **sizes).to(request.param) for seed in (0, 1))


def packed(policy, design="paper", num_samples=NUM_SAMPLES, **options):
    batch = to_batch(make_pairs(LENGTHS, vocab_size=policy.config.vocab_size))
    estimator = Estimator(policy.config.mask_token_id, num_samples, design, 1, seed=11, **options)
    return batch, estimator.pack(batch, 0, "cpu")


def parts_of(models, batch, replicate_K, loss_type="sigmoid", known=None):
    objective = PairObjective(
        batch.response_length_R,
        replicate_K,
        loss_type=(loss_type,) if isinstance(loss_type, str) else loss_type,
        beta=0.2,
        sft_weight=0.05,
        label_smoothing=0.01 if loss_type == "exo_pair" else 0.0,
    )
    policy, reference = (ModelNLL(model) for model in models)
    return Parts(policy, None if known is not None else reference, objective, lambda pack: pack, known)


def gradient(model, step):
    """name -> gradient of the sum of all shares, each weighted by 1 / 3."""
    model.zero_grad()
    for index in range(step.num_shares):
        (step.share(index) / 3).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradient(one, other):
    for name, want in one.items():
        error = (other[name] - want).norm() / want.norm()
        assert error < (1e-11 if want.dtype is torch.float64 else 1e-4), name


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_jackknife"])
@pytest.mark.parametrize("max_tokens", [1, 20, 45, 10_000], ids="budget{}".format)
def test_replay__has_the_gradient_of_the_joint_graph(models, loss_type, max_tokens):
    batch, pack = packed(models[0])
    parts = parts_of(models, batch, pack.replicate_K, loss_type)
    joint = JointStep(parts, pack)
    want = gradient(models[0], joint)
    packs = split_segments(pack, max_tokens)
    assert (
        len(packs)
        == num_cuts(batch, NUM_SAMPLES, max_tokens)
        == {1: 24, 10_000: 1}.get(max_tokens, len(packs))
    )
    replay = ReplayStep(parts, packs)
    assert_same_gradient(want, gradient(models[0], replay))
    torch.testing.assert_close(replay.result.loss_B, joint.result.loss_B, rtol=1e-5, atol=0)
    torch.testing.assert_close(replay.result.policy_RK, joint.result.policy_RK, rtol=1e-5, atol=0)
    assert replay.result.num_tokens == joint.result.num_tokens
    assert replay.result.drift == 0.0


@pytest.mark.parametrize("models", [torch.float64], indirect=True, ids=str)
@pytest.mark.parametrize("loss_type", [*LOSSES, ("sigmoid_jackknife", "ipo", "simpo")], ids=str)
def test_replay__has_the_gradient_of_the_joint_graph_for_every_loss(models, loss_type):
    batch, pack = packed(models[0])
    parts = parts_of(models, batch, pack.replicate_K, loss_type)
    joint, replay = JointStep(parts, pack), ReplayStep(parts, split_segments(pack, 45))
    assert_same_gradient(gradient(models[0], joint), gradient(models[0], replay))
    torch.testing.assert_close(replay.result.loss_B, joint.result.loss_B, rtol=1e-10, atol=0)


def test_replay__policy_equal_to_reference_scores_zero_in_any_cut(models):
    policy = models[0].float()
    batch, pack = packed(policy)
    for max_tokens in (1, 30, 1000):
        step = ReplayStep(
            parts_of((policy, policy), batch, pack.replicate_K), split_segments(pack, max_tokens)
        )
        step.share(0)
        score_B = preference.preference_score(step.result.policy_RK, step.result.reference_RK, 0.2)
        assert score_B.tolist() == [0.0] * 3
        sft_B = preference.denoising_loss(step.result.policy_RK[0::2], batch.response_length_R[0::2])
        torch.testing.assert_close(step.result.loss_B, math.log(2) + 0.05 * sft_B)


def test_replay__extra_shares_are_zero_and_run_the_model(models):
    batch, pack = packed(models[0])
    parts = parts_of(models, batch, pack.replicate_K)
    packs = split_segments(pack, 60)
    want = gradient(models[0], ReplayStep(parts, packs))
    padded = ReplayStep(parts, packs, num_shares=len(packs) + 2)
    assert padded.num_shares == len(packs) + 2
    got = gradient(models[0], padded)
    assert all(torch.equal(got[name], want[name]) for name in want)
    padded = ReplayStep(parts, packs, num_shares=len(packs) + 1)
    shares = [padded.share(index) for index in range(padded.num_shares)]
    assert shares[-1].item() == 0.0 and shares[-1].requires_grad


def test_steps__take_known_elbos_for_a_reference(models):
    batch, pack = packed(models[0])
    parts = parts_of(models, batch, pack.replicate_K)
    joint = JointStep(parts, pack)
    want = gradient(models[0], joint)
    known = parts_of(models, batch, pack.replicate_K, known=joint.result.reference_RK)
    for step in (JointStep(known, pack), ReplayStep(known, split_segments(pack, 40))):
        assert_same_gradient(want, gradient(models[0], step))
        assert torch.equal(step.result.reference_RK, joint.result.reference_RK)


def test_linear__one_pass_has_the_gradient_of_the_joint_graph(models):
    batch, pack = packed(models[0], design="balanced")
    objective = lambda policy_RK, _: preference.denoising_loss(policy_RK, batch.response_length_R)  # noqa: E731
    calls = []

    class Counted(ModelNLL):
        def __call__(self, pack):
            calls.append(pack.num_segments)
            return super().__call__(pack)

    parts = Parts(Counted(models[0]), None, objective, lambda pack: pack)
    joint = JointStep(parts, pack)
    want = gradient(models[0], joint)
    calls.clear()
    packs = split_segments(pack, 45)
    step = LinearStep(parts, packs, num_shares=len(packs) + 1)
    assert_same_gradient(want, gradient(models[0], step))
    assert sum(calls[: len(packs)]) == pack.num_segments and len(calls) == len(packs) + 1
    torch.testing.assert_close(step.result.loss_B, joint.result.loss_B)
    torch.testing.assert_close(step.result.policy_RK, joint.result.policy_RK)


def test_steps__without_a_masked_row_have_a_gradient_of_zero(models):
    """Design "t" may mask nothing in a short response."""
    policy = models[0]
    batch = to_batch(make_pairs([(3, 1, 1)], vocab_size=policy.config.vocab_size))
    for seed in range(100):
        pack = Estimator(policy.config.mask_token_id, 1, "t", 1, seed=seed).pack(batch, 0, "cpu")
        if not len(pack.row_N):
            break
    assert not len(pack.row_N)
    parts = parts_of(models, batch, pack.replicate_K)
    for step in (JointStep(parts, pack), ReplayStep(parts, split_segments(pack, 1))):
        found = gradient(policy, step)
        assert all(not grad.any() for grad in found.values())
        assert step.result.loss_B.item() == pytest.approx(math.log(2))


def test_evaluate__gives_the_losses_of_the_joint_step(models):
    batch, pack = packed(models[0])
    parts = parts_of(models, batch, pack.replicate_K)
    joint = JointStep(parts, pack)
    loss_B = joint.losses()
    for max_tokens in (1, 45, 1000):
        packs = split_segments(pack, max_tokens)
        found = evaluate(parts, packs, num_passes=len(packs) + 1)
        assert not found.loss_B.requires_grad
        torch.testing.assert_close(found.loss_B, loss_B.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(found.reference_RK, joint.result.reference_RK, rtol=1e-5, atol=1e-6)


def test_segments__are_the_same_tokens_masks_and_weights(models):
    _, pack = packed(models[0], design="balanced", pair_masks="positions")
    for max_tokens in (1, 17, 45):
        packs = split_segments(pack, max_tokens)
        for name in ("tokens_T", "position_T", "target_N", "weight_N"):
            assert torch.equal(torch.cat([getattr(part, name) for part in packs]), getattr(pack, name))
        sizes = torch.cat([part.cu_seqlens_S1.diff() for part in packs])
        assert torch.equal(sizes, pack.cu_seqlens_S1.diff())
        first = torch.tensor([0, *(len(part.tokens_T) for part in packs[:-1])]).cumsum(0)
        rows = torch.cat([part.row_N + start for part, start in zip(packs, first.tolist(), strict=True)])
        assert torch.equal(rows, pack.row_N)
        for part in packs:
            assert part.num_segments == 1 or len(part.tokens_T) <= max_tokens
            assert part.max_seqlen == part.cu_seqlens_S1.diff().max()
            assert (part.tokens_T[part.row_N] == models[0].config.mask_token_id).all()


def test_replay__costs_one_forward_of_the_body_more(models):
    """Heads apart: 1 + 2 units of the policy and 1 of the reference become 2 + 2 and 1."""
    policy = models[0].float()
    batch, pack = packed(policy)
    parts = parts_of(models, batch, pack.replicate_K)

    def flops(step):
        with FlopCounterMode(display=False) as counter:
            gradient(policy, step)
        return counter.get_total_flops()

    joint, replay = flops(JointStep(parts, pack)), flops(ReplayStep(parts, split_segments(pack, 45)))
    assert 1.2 < replay / joint < 1.27
