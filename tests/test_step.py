"""The whole pipeline against a naive objective that shares no code with it."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from batches import make_pairs, to_batch
from naive import naive_loss
from plain_llada import PlainLLaDA

from vrpo.estimator import masking
from vrpo.models import create_model
from vrpo.step import Estimator, preference_step

LENGTHS = [(3, 5, 2), (1, 1, 9), (6, 4, 4)]


def make_models(tokenizer, **sizes):
    """fp64 policy and reference that differ."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "init_std": 0.3} | sizes
    return tuple(create_model(tokenizer, dtype="float64", seed=seed, **sizes) for seed in (0, 1))


@pytest.fixture
def models(tokenizer):
    return make_models(tokenizer)


def as_nll(model):
    return lambda pack: model(**pack.model_inputs()).nll


def run(batch, policy, reference, estimator, **options):
    settings = {"beta": 0.2, "sft_weight": 0.05, "epoch": 0, "device": "cpu"} | options
    return preference_step(batch, as_nll(policy), as_nll(reference), estimator=estimator, **settings)


def estimator_of(model, design="paper", num_samples=4, masks_per_level=1):
    return Estimator(model.config.mask_token_id, num_samples, design, masks_per_level, seed=11)


def pairs_with_eos(config):
    """Random pairs in which EOS, LLaDA's pad token, stands in a prompt and ends some answers."""
    assert config.pad_token_id == config.eos_token_id
    pairs = make_pairs(LENGTHS, vocab_size=config.vocab_size)
    eos = config.eos_token_id
    pairs[0][0][1] = eos
    pairs[0][1][-2:] = [eos, eos]
    pairs[2][2][-1] = eos
    return pairs


@pytest.mark.parametrize(
    "sizes", [{}, {"weight_tying": True}, {"n_kv_heads": 2}], ids=["plain", "tied", "gqa"]
)
@pytest.mark.parametrize(("design", "masks_per_level"), [("paper", 1), ("paper", 2), ("t", 1)])
def test_step__gradient_equals_the_naive_objective(tokenizer, design, masks_per_level, sizes):
    policy, reference = make_models(tokenizer, **sizes)
    pairs = pairs_with_eos(policy.config)
    batch = to_batch(pairs, example_ids=[4, 0, 17])
    estimator = estimator_of(policy, design, masks_per_level=masks_per_level)
    loss = run(batch, policy, reference, estimator).loss_B.mean()
    loss.backward()

    drawn = masking.draw(
        batch, design=design, num_samples=4, masks_per_level=masks_per_level, seed=11, epoch=0
    )
    bounds = drawn.offsets_S1.tolist()
    segments = [(drawn.position_N[a:b].tolist(), drawn.weight_N[a:b].tolist()) for a, b in pairwise(bounds)]
    samples = [[segments[8 * b + 4 * side : 8 * b + 4 * side + 4] for side in (0, 1)] for b in range(3)]
    mask_id = policy.config.mask_token_id
    plain = PlainLLaDA.like(policy)
    want = naive_loss(plain, PlainLLaDA.like(reference), pairs, samples, mask_id, beta=0.2, sft_weight=0.05)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    for name, parameter in policy.named_parameters():
        expected = plain.gradient_of(name)
        scale = expected.abs().max().item()
        assert scale > 0, name
        assert (parameter.grad - expected).abs().max().item() <= 1e-11 * scale, name
    rows = plain.gradient_of("model.embed_tokens.weight").norm(dim=1)
    assert rows[policy.config.eos_token_id] > 1e-3 * rows.max()  # the case is not empty


@pytest.mark.parametrize("which", [[0], [1], [0, 1, 2], [2, 0]])
def test_step__policy_equal_to_reference_scores_zero(models, which):
    policy = models[0].float()
    pairs = make_pairs(LENGTHS, vocab_size=policy.config.vocab_size)
    batch = to_batch([pairs[i] for i in which], example_ids=which)
    result = run(batch, policy, copy.deepcopy(policy), estimator_of(policy), sft_weight=0.0)
    assert result.loss_B.requires_grad
    assert result.score_B.tolist() == [0.0] * len(which)
    assert result.loss_B.tolist() == [torch.tensor(math.log(2)).item()] * len(which)


def test_step__hands_the_same_pack_to_both_models(models):
    policy, reference = (model.float() for model in models)
    seen = []

    def recording(model):
        def nll(pack):
            seen.append(pack)
            return as_nll(model)(pack)

        return nll

    batch = to_batch(make_pairs(LENGTHS, vocab_size=policy.config.vocab_size))
    preference_step(
        batch,
        recording(policy),
        recording(reference),
        estimator=estimator_of(policy),
        beta=0.2,
        sft_weight=0.0,
        epoch=0,
        device="cpu",
    )
    assert len(seen) == 2 and seen[0] is seen[1]


def test_step__elbo_of_an_example_does_not_depend_on_its_batch(models):
    policy, reference = models
    pairs = make_pairs(LENGTHS, vocab_size=policy.config.vocab_size)
    together = run(to_batch(pairs), policy, reference, estimator_of(policy))
    reordered = run(to_batch(pairs[::-1], example_ids=[2, 1, 0]), policy, reference, estimator_of(policy))
    for index in range(3):
        alone = run(to_batch([pairs[index]], [index]), policy, reference, estimator_of(policy))
        torch.testing.assert_close(alone.policy_B2[0], together.policy_B2[index], rtol=1e-12, atol=0)
        torch.testing.assert_close(alone.loss_B[0], together.loss_B[index], rtol=1e-12, atol=0)
        torch.testing.assert_close(reordered.loss_B[2 - index], together.loss_B[index], rtol=1e-12, atol=0)


def test_step__leaves_global_random_state_alone(models):
    policy, reference = models
    batch = to_batch(make_pairs(LENGTHS, vocab_size=policy.config.vocab_size))
    before = torch.get_rng_state()
    run(batch, policy, reference, estimator_of(policy)).loss_B.sum().backward()
    assert torch.equal(before, torch.get_rng_state())
