"""ld_alpha: length-desensitised DPO, by the weights of the rows."""

import copy
from itertools import pairwise

import pytest
import torch
from batches import make_pairs, to_batch
from datasets import Dataset
from naive import naive_loss
from plain_llada import PlainLLaDA
from trainers import config, logged, parameters, trainer_of

from vrpo.estimator import masking
from vrpo.models import create_model
from vrpo.step import Estimator, preference_step

LENGTHS = [(3, 5, 2), (1, 1, 9), (6, 4, 4)]
UNEVEN = Dataset.from_list(
    [{"prompt": f"What is {n}?", "chosen": "one " * (1 + n % 7), "rejected": f"two {n}"} for n in range(12)]
)


def estimator_of(model, ld_alpha, design="balanced", num_samples=4):
    return Estimator(model.config.mask_token_id, num_samples, design, 1, seed=11, ld_alpha=ld_alpha)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_step__tokens_beyond_the_common_length_count_alpha(tokenizer, ld_alpha):
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "init_std": 0.3, "dtype": "float64"}
    policy, reference = (create_model(tokenizer, seed=seed, **sizes) for seed in (0, 1))
    pairs = make_pairs(LENGTHS, vocab_size=policy.config.vocab_size)
    batch, num_samples = to_batch(pairs, example_ids=[4, 0, 17]), 4
    result = preference_step(
        batch,
        lambda pack: policy(**pack.model_inputs()).nll,
        lambda pack: reference(**pack.model_inputs()).nll,
        estimator=estimator_of(policy, ld_alpha),
        beta=0.2,
        sft_weight=0.0,
        epoch=0,
        device="cpu",
    )
    result.loss_B.mean().backward()
    drawn = masking.draw(batch, design="balanced", num_samples=num_samples, seed=11, epoch=0)
    segments = []
    for index, (a, b) in enumerate(pairwise(drawn.offsets_S1.tolist())):
        common = min(LENGTHS[index // (2 * num_samples)][1:])
        rows = list(zip(drawn.position_N[a:b].tolist(), drawn.weight_N[a:b].tolist(), strict=True))
        weights = [weight if position < common else ld_alpha * weight for position, weight in rows]
        segments.append(([position for position, _ in rows], weights))
    samples = [[segments[8 * b + 4 * side : 8 * b + 4 * side + 4] for side in (0, 1)] for b in range(3)]
    plain = PlainLLaDA.like(policy)
    mask_id = policy.config.mask_token_id
    want = naive_loss(plain, PlainLLaDA.like(reference), pairs, samples, mask_id, beta=0.2, sft_weight=0.0)
    want.backward()
    assert result.loss_B.mean().item() == pytest.approx(want.item(), rel=1e-7)  # weights are float32
    for name, parameter in policy.named_parameters():
        expected = plain.gradient_of(name)
        assert (parameter.grad - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def test_pack__the_mean_over_draws_is_the_weighted_elbo(tiny_model):
    # Of terms that depend on the token and on the mask: many draws against the definition.
    batch = to_batch(make_pairs([(2, 6, 3)], vocab_size=300), example_ids=[0])
    term = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.2, 1.5], dtype=torch.float64)
    sums = []
    for epoch in range(400):
        pack = estimator_of(tiny_model, 0.25).pack(batch, epoch, "cpu")
        position_N = pack.position_T[pack.row_N] - 2
        chosen = pack.offsets_S1[4]
        sums.append((pack.weight_N[:chosen].double() * term[position_N[:chosen]]).sum() / 4)
    found = torch.stack(sums)
    want = term[:3].sum() + 0.25 * term[3:].sum()
    assert (found.mean() - want).abs() < 4 * found.std() / 20
    assert 4 * found.std() / 20 < 0.05 * want  # so that the weights of all tokens would be noticed


def test_pack__alpha_one_and_equal_lengths_are_the_plain_draw(tiny_model):
    batch = to_batch(make_pairs(LENGTHS, vocab_size=300))
    plain, one, zero = (estimator_of(tiny_model, alpha).pack(batch, 0, "cpu") for alpha in (None, 1.0, 0.0))
    assert torch.equal(plain.weight_N, one.weight_N)
    assert torch.equal(plain.tokens_T, zero.tokens_T) and torch.equal(plain.row_N, zero.row_N)
    equal = slice(int(plain.offsets_S1[16]), None)  # of the third pair, two responses of 4 tokens
    assert torch.equal(plain.weight_N[equal], zero.weight_N[equal])
    assert (zero.weight_N == 0).any()


def test_train__replayed_and_precomputed_are_the_same_run(tmp_path, tiny_model, tokenizer):
    # AdamW would divide gradients of next to nothing by themselves, and clipping hides a factor.
    common = {"sft_weight": 0.0, "max_steps": 3, "optim": "sgd", "max_grad_norm": 1e9}

    def run(**fields):
        model = copy.deepcopy(tiny_model)
        trainer = trainer_of(tmp_path, model, tokenizer, UNEVEN, ld_alpha=0.2, **common, **fields)
        trainer.train()
        return logged(trainer, "loss"), parameters(trainer.model), trainer

    losses, weights, trainer = run()
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert "vrpo/sft_loss" not in trainer.state.log_history[0]
    for fields in (
        {"gradient_mode": "replay", "max_tokens_per_pack": 40},
        {"precompute_ref_log_probs": True},
    ):
        again, moved, _ = run(**fields)
        assert again == pytest.approx(losses, rel=1e-5)
        assert torch.allclose(moved, weights, rtol=0.0, atol=2e-7)
    plain = trainer_of(tmp_path, copy.deepcopy(tiny_model), tokenizer, UNEVEN, **common)
    plain.train()
    assert logged(plain, "loss")[1:] != losses[1:]


def test_precompute__the_reference_of_another_alpha_is_another(tmp_path, tiny_model, tokenizer):
    def build(**fields):
        model = copy.deepcopy(tiny_model)
        return trainer_of(tmp_path, model, tokenizer, UNEVEN, precompute_ref_log_probs=True, **fields)

    build()
    with pytest.raises(ValueError, match=r"the mask draw .*ld_alpha None -> 0.2"):
        build(ld_alpha=0.2, sft_weight=0.0)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"ld_alpha": 1.1, "sft_weight": 0.0}, r"ld_alpha must be in \[0, 1\], or None, got 1.1"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5 needs sft_weight=0"),
        ({"ld_alpha": "half"}, "ld_alpha must be a number"),
    ],
)
def test_config__refuses_alphas_out_of_range(tmp_path, fields, told):
    with pytest.raises(ValueError, match=told):
        config(tmp_path, **fields)
