"""Every preference loss against its plain formula and TRL's, and where it must stay finite or symmetric."""

import math
from types import SimpleNamespace

import pytest
import torch
from objectives_support import LENGTHS, elbos, objective
from plain_losses import plain_loss

from vrpo.objectives.losses import LOSSES, REFERENCE_FREE, check_losses

PLAIN = sorted(set(LOSSES) - {"sigmoid_jackknife"})
SMOOTHED = {"sigmoid", "sigmoid_jackknife", "robust", "exo_pair", "sigmoid_norm", "simpo"}
ONE_SIDED = {"apo_zero", "apo_down", "nca_pair", "bco_pair", "sppo_hard"}


def smoothing_of(name):
    return 0.1 if name in SMOOTHED else 0.0


def plain_of(name, policy_RK, reference_RK, **given):
    """The plain formula at the means over samples, pair by pair."""
    policy, reference = policy_RK.mean(1), reference_RK.mean(1)
    pairs = range(len(policy) // 2)
    return torch.stack(
        [
            plain_loss(
                name,
                policy[2 * b : 2 * b + 2],
                reference[2 * b : 2 * b + 2],
                LENGTHS[2 * b : 2 * b + 2],
                **given,
            )
            for b in pairs
        ]
    )


@pytest.mark.parametrize("smoothed", [False, True], ids=["hard", "smoothed"])
@pytest.mark.parametrize("name", PLAIN)
def test_pair_objective__matches_the_plain_formula_and_its_gradient(name, smoothed):
    smoothing = smoothing_of(name) if smoothed or name == "exo_pair" else 0.0
    reference_RK = elbos(seed=1)
    upstream_B = torch.tensor([-3.0, 0.01, 250.0], dtype=torch.float64)
    gradients, losses = [], []
    for formula in (
        objective(name, beta=0.3, label_smoothing=smoothing, simpo_gamma=0.7),
        lambda *sides: plain_of(name, *sides, beta=0.3, smoothing=smoothing, gamma=0.7),
    ):
        policy_RK = elbos(seed=0).requires_grad_()
        loss_B = formula(policy_RK, reference_RK)
        loss_B.backward(upstream_B)
        losses.append(loss_B.detach())
        gradients.append(policy_RK.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-14)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_pair_objective__passes_gradcheck(name):
    given = objective(name, label_smoothing=smoothing_of(name), replicate_K=(0, 0, 1, 1))
    reference_RK = elbos(seed=1)
    torch.autograd.gradcheck(lambda policy_RK: given(policy_RK, reference_RK), elbos(seed=2).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_pair_objective__is_finite_for_any_score(name, dtype):
    given = objective(name, beta=1.0, label_smoothing=smoothing_of(name), replicate_K=(0, 0, 1, 1))
    for size in (0.0, 1.0, 89.0, 1e4, 1e8, 1e15):
        for signs in ((1, -1), (-1, 1), (1, 1)):
            policy_RK = torch.zeros(6, 4, dtype=dtype)
            policy_RK[0::2], policy_RK[1::2] = size * signs[0], size * signs[1]
            policy_RK.requires_grad_()
            loss_B = given(policy_RK, torch.zeros(6, 4, dtype=dtype))
            loss_B.sum().backward()
            assert torch.isfinite(loss_B).all() and torch.isfinite(policy_RK.grad).all(), (size, signs)
            told = given.noise(policy_RK, torch.zeros(6, 4, dtype=dtype))
            assert all(torch.isfinite(value).all() for value in told.values()), (size, signs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.02, 0.2, 3.0])
def test_pair_objective__sigmoid_starts_at_exactly_log_two(dtype, beta):
    policy_RK = elbos(seed=3).to(dtype).requires_grad_()
    for name in ("sigmoid", "sigmoid_norm"):
        loss_B = objective(name, beta=beta)(policy_RK, policy_RK.detach())
        assert loss_B.tolist() == [torch.tensor(2, dtype=dtype).log().item()] * 3
    given = objective("sigmoid", beta=beta)
    assert given.score(policy_RK, policy_RK).tolist() == [0.0] * 3
    given(policy_RK, policy_RK.detach()).sum().backward()
    for pair in range(3):
        assert policy_RK.grad[2 * pair].sum().item() == pytest.approx(-beta / 2)
        assert policy_RK.grad[2 * pair + 1].sum().item() == pytest.approx(beta / 2)


START = {
    "hinge": 1.0,
    "ipo": 6.25,
    "robust": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 12.5,
}


@pytest.mark.parametrize("name", START)
def test_pair_objective__starts_where_its_formula_says(name):
    policy_RK = elbos(seed=3)
    loss_B = objective(name, beta=0.2)(policy_RK, policy_RK)
    torch.testing.assert_close(loss_B, torch.full_like(loss_B, START[name]))


SWAP = torch.tensor([1, 0, 3, 2, 5, 4])


@pytest.mark.parametrize("name", sorted(set(LOSSES) - ONE_SIDED))
def test_pair_objective__score_negates_when_sides_swap(name):
    given = objective(name, simpo_gamma=0.0)
    swapped = objective(name, simpo_gamma=0.0, response_length_R=LENGTHS[SWAP])
    policy_RK, reference_RK = elbos(seed=4), elbos(seed=5)
    score_B = given.score(policy_RK, reference_RK)
    assert torch.equal(swapped.score(policy_RK[SWAP], reference_RK[SWAP]), -score_B)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_jackknife", "robust", "sigmoid_norm", "simpo"])
def test_pair_objective__swapped_sides_differ_by_a_linear_function_of_the_score(name):
    """f(-s) - f(s) = (1 - 2 e) s for softplus with label smoothing e, s for robust DPO times its scale."""
    smoothing = 0.15
    options = {"beta": 0.2, "label_smoothing": smoothing, "simpo_gamma": 0.0, "replicate_K": (0, 0, 1, 1)}
    policy_RK, reference_RK = elbos(seed=4), elbos(seed=5)
    given = objective(name, **options)
    swapped = objective(name, **options, response_length_R=LENGTHS[SWAP])
    difference_B = swapped(policy_RK[SWAP], reference_RK[SWAP]) - given(policy_RK, reference_RK)
    scale = 1 / (1 - 2 * smoothing) if name == "robust" else 1 - 2 * smoothing
    term = given.terms[0][1]
    score_B = given._score(term.score, policy_RK, reference_RK)
    torch.testing.assert_close(difference_B, scale * score_B)


@pytest.mark.parametrize(
    "losses", [("sigmoid", "ipo"), ("apo_zero", "simpo", "sigmoid_jackknife"), ("bco_pair", "sigmoid")]
)
def test_pair_objective__a_list_is_the_weighted_sum(losses):
    policy_RK, reference_RK = elbos(seed=6), elbos(seed=7)
    weights = (0.8, 0.2, 1.5)[: len(losses)]
    options = {"replicate_K": (0, 1, 2, 3), "beta": 0.05}
    want_B = sum(
        weight * objective(name, **options)(policy_RK, reference_RK)
        for name, weight in zip(losses, weights, strict=True)
    )
    given = objective(*losses, loss_weights=weights, sft_weight=0.05, **options)
    want_B = want_B - 0.05 * policy_RK[0::2].mean(1) / LENGTHS[0::2]
    torch.testing.assert_close(given(policy_RK, reference_RK), want_B)
    summed = objective(*losses, **options)(policy_RK, reference_RK)
    torch.testing.assert_close(
        summed, sum(objective(name, **options)(policy_RK, reference_RK) for name in losses)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_pair_objective__a_reference_is_asked_for_where_it_is_needed(name):
    given = objective(name, label_smoothing=smoothing_of(name), replicate_K=(0, 1, 2, 3), sft_weight=0.1)
    assert given.uses_reference == (name not in REFERENCE_FREE)
    if given.uses_reference:
        with pytest.raises(ValueError, match=rf"loss_type=\['{name}'\] needs the reference's ELBOs"):
            given(elbos(seed=0), None)
    else:
        policy_RK = elbos(seed=0)
        torch.testing.assert_close(given(policy_RK, None), given(policy_RK, elbos(seed=1)))
        want_B2 = 0.2 * (policy_RK.mean(1) / LENGTHS).view(-1, 2)
        torch.testing.assert_close(given.rewards(policy_RK, None), want_B2)
        torch.testing.assert_close(given.score(policy_RK, None), want_B2[:, 0] - want_B2[:, 1])


def test_pair_objective__mixed_with_a_reference_the_margin_is_that_of_dpo():
    given = objective("simpo", "sigmoid", beta=0.4)
    policy_RK, reference_RK = elbos(seed=0), elbos(seed=1)
    assert given.uses_reference
    ratio_B2 = 0.4 * (policy_RK - reference_RK).mean(1).view(-1, 2)
    torch.testing.assert_close(given.rewards(policy_RK, reference_RK), ratio_B2)
    torch.testing.assert_close(given.score(policy_RK, reference_RK), ratio_B2[:, 0] - ratio_B2[:, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": ["dpo"]}, "loss_type must be one or several of sigmoid, .*got 'dpo'"),
        ({"loss_type": ["sft"]}, r"got 'sft' \(sft_weight is the weight of that term\)"),
        ({"loss_type": [3]}, "got 3"),
        ({"loss_type": []}, "loss_type must name at least one loss"),
        ({"loss_type": ["ipo", "ipo"]}, "loss_type names a loss twice"),
        ({"loss_type": ["ipo", "hinge"], "loss_weights": [1.0]}, "got 1 weights for 2 losses"),
        ({"loss_type": ["ipo"], "loss_weights": [0.0]}, "loss_weights must be positive numbers, got 0.0"),
        ({"loss_type": ["ipo"], "loss_weights": ["much"]}, "loss_weights must be positive numbers"),
        ({"loss_type": ["ipo"], "loss_weights": [math.nan]}, "loss_weights must be positive numbers"),
        ({"loss_type": ["sigmoid"], "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"loss_type": ["sigmoid"], "label_smoothing": -0.1}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"loss_type": ["exo_pair"]}, "needs label_smoothing above 0"),
        ({"loss_type": ["hinge", "ipo"], "label_smoothing": 0.1}, "does nothing in hinge, ipo"),
        ({"loss_type": ["simpo"], "simpo_gamma": -1.0}, "simpo_gamma must not be negative"),
        ({"loss_type": ["sigmoid"], "beta": 0.0}, "beta must be positive"),
        ({"loss_type": ["sigmoid"], "sft_weight": -1.0}, "sft_weight must not be negative"),
    ],
)
def test_check_losses__names_what_is_wrong(fields, message):
    given = {"loss_weights": None, "beta": 0.2} | fields
    with pytest.raises(ValueError, match=message):
        check_losses(**given)


def trl_loss(name, policy_RK, reference_RK, **given):
    """TRL's DPOTrainer._compute_loss, pair by pair, on a model whose log-probabilities sum to our ELBOs."""
    trainer_module = pytest.importorskip("trl.trainer.dpo_trainer")
    longest = int(LENGTHS.max())
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        loss_types=[name],
        loss_weights=[1.0],
        beta=given["beta"],
        label_smoothing=given["smoothing"],
        _metrics={"train": trainer_module.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    losses = []
    for pair in range(len(policy_RK) // 2):
        rows = slice(2 * pair, 2 * pair + 2)
        length = LENGTHS[rows]
        position = torch.arange(longest + 1)[None]  # the first token is the prompt
        completion = (position >= 1) & (position <= length[:, None])
        log_probs = completion[:, 1:] * (policy_RK.mean(1)[rows] / length)[:, None]
        outputs = SimpleNamespace(
            log_probs=log_probs,
            entropy=torch.zeros_like(log_probs),
            mean_logits=torch.zeros_like(log_probs),
            is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
        )
        inputs = {
            "input_ids": torch.zeros_like(completion, dtype=torch.long),
            "attention_mask": torch.ones_like(completion, dtype=torch.long),
            "completion_mask": completion.long(),
            "ref_chosen_logps": reference_RK.mean(1)[rows][:1],
            "ref_rejected_logps": reference_RK.mean(1)[rows][1:],
        }
        losses.append(
            trainer_module.DPOTrainer._compute_loss(
                trainer, lambda outputs=outputs, **_: outputs, inputs, return_outputs=False
            )
        )
    return torch.stack(losses)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"simpo"}))
def test_pair_objective__agrees_with_trl(name):
    # TRL's sigmoid and sigmoid_norm ignore label_smoothing, its CPOTrainer's sigmoid does not.
    smoothing = 0.1 if name in ("robust", "exo_pair") else 0.0
    given = {"beta": 0.3, "smoothing": smoothing}
    gradients, losses = [], []
    for formula in (
        objective(name, beta=0.3, label_smoothing=smoothing),
        lambda *sides: trl_loss(name, *sides, **given),
    ):
        policy_RK = elbos(seed=8).requires_grad_()
        loss_B = formula(policy_RK, elbos(seed=9))
        loss_B.backward(torch.tensor([1.0, -2.0, 30.0], dtype=torch.float64))
        losses.append(loss_B.detach())
        gradients.append(policy_RK.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["simpo", "sigmoid"])
def test_pair_objective__agrees_with_trls_cpo(name, smoothing):
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=0.0,
        beta=2.0,
        label_smoothing=smoothing,
        simpo_gamma=0.7,
        loss_type=name,
    )
    policy_RK = elbos(seed=8)
    policy = policy_RK.mean(1) / LENGTHS if name == "simpo" else policy_RK.mean(1)
    want_B, _, _ = cpo.CPOTrainer.cpo_loss(trainer, policy[0::2], policy[1::2])
    given = objective(name, beta=2.0, label_smoothing=smoothing, simpo_gamma=0.7)
    # CPO has no reference: that of zeros.
    torch.testing.assert_close(given(policy_RK, torch.zeros_like(policy_RK)), want_B)
