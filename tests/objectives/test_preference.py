"""Score, loss and their diagnostics against closed forms."""

import math

import pytest
import torch

from vrpo.estimator.masking import check_replicates
from vrpo.objectives.preference import (
    denoising_loss,
    dpo_loss,
    jackknife_dpo_loss,
    preference_score,
    score_std,
)


def elbos(num_pairs: int, num_samples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 30 * torch.randn(2 * num_pairs, num_samples, dtype=torch.float64, generator=generator)


def test_preference_score__matches_its_formula():
    policy, reference = elbos(3, 4, seed=0), elbos(3, 4, seed=1)
    want = [
        0.2 * (policy[2 * b].mean() - reference[2 * b].mean())
        - 0.2 * (policy[2 * b + 1].mean() - reference[2 * b + 1].mean())
        for b in range(3)
    ]
    torch.testing.assert_close(preference_score(policy, reference, 0.2), torch.stack(want))


def test_preference_score__negates_when_sides_swap():
    policy, reference = elbos(5, 3, seed=2), elbos(5, 3, seed=3)
    swap = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6, 9, 8])
    score = preference_score(policy, reference, 0.1)
    assert torch.equal(preference_score(policy[swap], reference[swap], 0.1), -score)


def test_dpo_loss__is_log_two_at_zero_with_gradient_minus_half_beta():
    beta = 0.2
    policy = elbos(1, 4, seed=4).requires_grad_()
    loss = dpo_loss(preference_score(policy, policy.detach(), beta))
    assert loss.item() == math.log(2)
    loss.sum().backward()
    # One nat of chosen ELBO, spread over its four samples.
    assert policy.grad[0].sum().item() == pytest.approx(-beta / 2)
    assert policy.grad[1].sum().item() == pytest.approx(beta / 2)


@pytest.mark.parametrize("score", [-1e4, -89.0, 0.0, 89.0, 1e4])
def test_dpo_loss__is_finite_for_large_scores(score):
    s = torch.tensor([score], requires_grad=True)
    loss = dpo_loss(s)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(s.grad).all()
    assert loss.item() == pytest.approx(max(-score, 0.0), abs=0.7)


def test_score_std__agrees_with_the_variance_of_the_mean():
    policy = elbos(4, 6, seed=5)
    reference = torch.zeros_like(policy)
    per_sample = 0.2 * (policy[0::2] - policy[1::2])
    want = per_sample.var(dim=1, correction=1).div(6).sqrt()
    torch.testing.assert_close(score_std(policy, reference, 0.2, tuple(range(6))), want)


def test_score_std__averages_inside_replicates_first():
    policy = elbos(4, 6, seed=6)
    reference = torch.zeros_like(policy)
    grouped = policy.view(8, 3, 2).mean(dim=2)
    want = score_std(grouped, torch.zeros_like(grouped), 0.2, (0, 1, 2))
    torch.testing.assert_close(score_std(policy, reference, 0.2, (0, 0, 1, 1, 2, 2)), want)


def test_score_std__is_nan_for_a_single_replicate():
    policy = elbos(2, 4, seed=7)
    assert score_std(policy, policy, 0.2, (0, 0, 0, 0)).isnan().all()


def test_denoising_loss__divides_by_the_response_length():
    elbo_RK = torch.tensor([[-6.0, -10.0], [-3.0, -3.0]])
    want = torch.tensor([8.0 / 4, 3.0 / 3])
    torch.testing.assert_close(denoising_loss(elbo_RK, torch.tensor([4, 3])), want)


def noisy_scores(num_replicates: int, true_score: float, std: float, num_pairs: int = 200_000):
    """Policy ELBOs of pairs whose per-replicate scores (beta 1) are Gaussian around true_score."""
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(num_pairs, num_replicates, dtype=torch.float64, generator=generator)
    policy_RK = torch.zeros(2 * num_pairs, num_replicates, dtype=torch.float64)
    policy_RK[0::2] = true_score + std * noise
    return policy_RK, torch.zeros_like(policy_RK)


@pytest.mark.parametrize("true_score", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("num_replicates", [2, 4, 8])
def test_jackknife_dpo_loss__removes_most_of_the_bias_at_a_small_price(true_score, num_replicates):
    """Before: E f(s) - f(E s) = about f'' v / (2 G). After: at most a third of it, for v = 2.25."""
    policy, reference = noisy_scores(num_replicates, true_score, std=1.5)
    exact = dpo_loss(torch.tensor(true_score, dtype=torch.float64))
    plain = dpo_loss(preference_score(policy, reference, 1.0))
    corrected = jackknife_dpo_loss(policy, reference, 1.0, tuple(range(num_replicates)))
    before, after = plain.mean() - exact, corrected.mean() - exact
    assert before > 0.01
    assert after.abs() < before / 3
    assert corrected.std() < 1.35 * plain.std()


def test_jackknife_dpo_loss__is_log_two_when_policy_equals_reference():
    policy = elbos(2, 4, seed=9)
    loss = jackknife_dpo_loss(policy, policy, 0.2, (0, 1, 2, 3))
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def test_jackknife_dpo_loss__needs_replicates():
    policy = elbos(2, 4, seed=9)
    with pytest.raises(ValueError, match="at least 2 independent replicates"):
        jackknife_dpo_loss(policy, policy, 0.2, (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("loss_type", "design", "num_levels", "message"),
    [
        ("sigmoid_jackknife", "balanced", 8, "independent samples"),
        ("sigmoid_jackknife", "folded", 8, "independent samples"),
        ("sigmoid_jackknife", "coupled", 2, "2 whole replicates"),
        ("sigmoid_jackknife", "coupled", 5, "2 whole replicates"),
        ("sigmoid_jackknife", "paper", 1, "2 whole replicates"),
    ],
)
def test_check_replicates__names_what_is_wrong(loss_type, design, num_levels, message):
    with pytest.raises(ValueError, match=message):
        check_replicates(loss_type, design, num_levels)


@pytest.mark.parametrize(("design", "num_levels"), [("paper", 2), ("t", 3), ("coupled", 4)])
def test_check_replicates__accepts_independent_samples(design, num_levels):
    check_replicates("sigmoid_jackknife", design, num_levels)


def test_check_replicates__accepts_replicates_of_any_design():
    check_replicates("sigmoid_jackknife", "balanced", 8, num_replicates=2)
