"""What a loss reports of its finite-K bias and noise, against the expectation taken outcome by outcome."""

import itertools
import math

import numpy as np
import pytest
import torch
from objectives_support import objective

from vrpo.objectives.curves import Hinge, ReverseKL, Sigmoid, Softplus, Square
from vrpo.objectives.losses import LOSSES

CURVES = {
    "softplus": Softplus(),
    "tilted": Softplus(tilt=-0.4),
    "sigmoid": Sigmoid(),
    "square": Square(0.7),
    "hinge": Hinge(),
    "kl": ReverseKL(0.1),
}
SMOOTH = sorted(set(CURVES) - {"hinge"})


def gaussian(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights that integrate polynomials against a standard Gaussian."""
    points, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return points, weights / weights.sum()


def two_points(skew: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean 0, variance 1; `skew` is the chance of the upper one."""
    ratio = math.sqrt((1 - skew) / skew)
    return np.array([ratio, -1 / ratio]), np.array([skew, 1 - skew])


def every_outcome(law, num_replicates: int, std: float, *, means=(1.5, -0.8), length=4):
    """All outcomes of the policy's ELBOs of one pair, as pairs of a batch: (policy_RK, chance_Q, lengths).

    The chosen ELBO of a replicate is means[0] + std x, the rejected one means[1] + std (x / 2 + y), x and y
    independent and of the law: the two sides of a score are correlated, as they are under shared masks.
    """
    points, weights = (torch.tensor(values) for values in law)
    picks = torch.tensor(list(itertools.product(range(len(points)), repeat=2 * num_replicates)))
    chance_Q = weights[picks].prod(dim=1)
    x_QG, y_QG = points[picks].view(-1, 2, num_replicates).unbind(dim=1)
    policy_RK = torch.empty(2 * len(picks), num_replicates, dtype=torch.float64)
    policy_RK[0::2] = means[0] + std * x_QG
    policy_RK[1::2] = means[1] + std * (x_QG / 2 + y_QG)
    return policy_RK, chance_Q, torch.full((2 * len(picks),), length)


def truth(given, means=(1.5, -0.8)):
    """The loss at the exact ELBOs, and a reference of zeros for as many responses as the objective has."""
    exact_RK = torch.tensor(means, dtype=torch.float64)[:, None].repeat(1, max(given.replicate_K) + 1)
    return exact_RK, torch.zeros_like(exact_RK)


def at_exact_elbos(given, length=4):
    exact_RK, zeros_RK = truth(given)
    pair = objective(
        *given.loss_type,
        beta=given.beta,
        label_smoothing=given.label_smoothing,
        replicate_K=given.replicate_K,
        response_length_R=torch.full((2,), length),
    )
    exact_RK.requires_grad_()
    loss_B = pair(exact_RK, zeros_RK)
    (gradient_RK,) = torch.autograd.grad(loss_B.sum(), exact_RK)
    return loss_B.detach()[0], gradient_RK.sum(dim=1)


def reported(name, law, num_replicates, std, beta=0.5):
    """(true bias, mean reported bias, chances, what each outcome reports, objective)."""
    policy_RK, chance_Q, lengths = every_outcome(law, num_replicates, std)
    replicate_K = tuple(range(num_replicates))
    given = objective(name, beta=beta, response_length_R=lengths, replicate_K=replicate_K)
    reference_RK = torch.zeros_like(policy_RK)
    noise = given.noise(policy_RK, reference_RK)
    true_bias = chance_Q @ given(policy_RK, reference_RK) - at_exact_elbos(given)[0]
    return true_bias, chance_Q @ noise["loss_bias"], chance_Q, noise, given


@pytest.mark.parametrize("num_replicates", [2, 3])
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"hinge", "sigmoid_jackknife"}))
def test_loss_bias__is_the_bias_of_the_loss_for_little_noise(name, num_replicates):
    law = gaussian(9) if num_replicates == 2 else two_points(0.5)
    true_bias, told, *_ = reported(name, law, num_replicates, std=0.15)
    assert abs(true_bias) > 1e-6
    assert told == pytest.approx(float(true_bias), rel=0.03)


@pytest.mark.parametrize(
    "law", [gaussian(9), two_points(0.5), two_points(0.05)], ids=["gauss", "even", "skew"]
)
@pytest.mark.parametrize("std", [0.1, 3.0])
@pytest.mark.parametrize("name", ["ipo", "sppo_hard"])
def test_loss_bias__of_a_square_is_exact_on_average_for_any_noise(name, std, law):
    true_bias, told, *_ = reported(name, law, 2, std)
    assert told == pytest.approx(float(true_bias), rel=1e-9)


@pytest.mark.parametrize("num_replicates", [2, 3])
def test_loss_bias__of_the_jackknife_is_its_fourth_order(num_replicates):
    true_bias, told, *_ = reported(
        "sigmoid_jackknife", gaussian(7 if num_replicates == 3 else 16), num_replicates, 0.8
    )
    plain_bias, *_ = reported("sigmoid", gaussian(7 if num_replicates == 3 else 16), num_replicates, 0.8)
    assert abs(true_bias) < plain_bias / 5
    assert told == pytest.approx(float(true_bias), rel=0.25)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"hinge"}))
def test_gradient_noise__is_that_of_the_coefficients_for_little_noise(name):
    """Root mean square over outcomes of the reported share, against the spread of dloss/dB over outcomes."""
    _, _, chance_Q, noise, given = reported(name, gaussian(7), 2, std=0.1)
    policy_RK, *_ = every_outcome(gaussian(7), 2, 0.1)
    policy_RK.requires_grad_()
    (gradient_RK,) = torch.autograd.grad(given(policy_RK, torch.zeros_like(policy_RK)).sum(), policy_RK)
    gradient_Q2 = gradient_RK.sum(dim=1).view(-1, 2)
    mean_2 = chance_Q @ gradient_Q2
    variance = chance_Q @ (gradient_Q2 - mean_2).square().sum(dim=1)
    want = variance / (mean_2.square().sum() + variance)
    assert chance_Q @ noise["gradient_noise"].square() == pytest.approx(float(want), rel=0.1)


@pytest.mark.parametrize("std", [0.02, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("skew", [0.5, 0.1, 0.98])
@pytest.mark.parametrize("name", CURVES)
def test_bound__holds_for_any_distribution(name, skew, std):
    points, weights = (torch.tensor(values) for values in two_points(skew))
    score = torch.linspace(-8, 8, 97, dtype=torch.float64)
    curve = CURVES[name]
    expected = curve(score[:, None] + std * points) @ weights
    bias = expected - curve(score)
    bound = curve.bound(score, torch.full_like(score, std))
    assert (bias.abs() <= bound * (1 + 1e-9) + 1e-15).all()
    assert (bound <= 200 * bias.abs().max()).all()  # and is not empty


def test_bound__of_the_hinge_is_attained():
    std = torch.tensor(0.7, dtype=torch.float64)
    distance = torch.tensor(-0.4, dtype=torch.float64)  # 1 - s
    reach = torch.hypot(std, distance)
    below, above = -reach - distance, reach - distance  # noise x of mean 0 and variance std^2, kink between
    chance = above / (above - below)
    assert chance * below + (1 - chance) * above == pytest.approx(0, abs=1e-12)
    assert chance * below**2 + (1 - chance) * above**2 == pytest.approx(float(std**2))
    bias = (
        chance * torch.relu(distance + below)
        + (1 - chance) * torch.relu(distance + above)
        - torch.relu(distance)
    )
    assert Hinge().bound(1 - distance, std) == pytest.approx(float(bias))


@pytest.mark.parametrize("num_replicates", [2, 3])
@pytest.mark.parametrize("std", [0.3, 2.0, 9.0])
@pytest.mark.parametrize("skew", [0.5, 0.07])
def test_jackknife_bound__holds_for_any_distribution(num_replicates, std, skew):
    for means in ((0.0, 0.0), (4.0, -1.0), (-3.0, 2.0)):
        policy_RK, chance_Q, lengths = every_outcome(two_points(skew), num_replicates, std, means=means)
        replicate_K = tuple(range(num_replicates))
        given = objective("sigmoid_jackknife", beta=1.0, response_length_R=lengths, replicate_K=replicate_K)
        zeros_RK = torch.zeros_like(policy_RK)
        score_Q = given.score(policy_RK, zeros_RK)
        score = torch.tensor(means[0] - means[1], dtype=torch.float64)
        true_std = (chance_Q @ (score_Q - score).square()).sqrt()
        bias = chance_Q @ given(policy_RK, zeros_RK) - Softplus()(score)
        assert abs(bias) <= Softplus().jackknife_bound(score, true_std, num_replicates) * (1 + 1e-9)


@pytest.mark.parametrize("std", [0.05, 0.5, 3.0])
def test_hinge__bias_slope_and_curvature_are_those_of_a_gaussian_score(std):
    score = torch.tensor([-2.0, 0.5, 1.0, 1.2, 4.0], dtype=torch.float64)
    std_B = torch.full_like(score, std)
    z = torch.linspace(-9, 9, 180_001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    weight = weight / weight.sum()
    noisy = score[:, None] + std * z
    bias = Hinge()(noisy) @ weight - Hinge()(score)
    torch.testing.assert_close(Hinge().bias(score, std_B), bias, rtol=1e-4, atol=1e-8)
    falling = -(noisy < 1).double()
    slope = falling @ weight
    spread = ((falling - slope[:, None]).square() @ weight).sqrt()
    torch.testing.assert_close(Hinge().slope(score, std_B), slope, rtol=0, atol=1e-3)
    torch.testing.assert_close(Hinge().curvature(score, std_B) * std, spread, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SMOOTH)
def test_curve__slope_and_curvature_are_its_derivatives(name):
    curve, score = CURVES[name], torch.linspace(-9, 9, 181, dtype=torch.float64, requires_grad=True)
    std = torch.ones_like(score)
    (slope,) = torch.autograd.grad(curve(score).sum(), score, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), score)
    torch.testing.assert_close(curve.slope(score, std), slope)
    torch.testing.assert_close(curve.curvature(score, std), curvature)
    assert curvature.abs().max() <= curve.max_curvature
    assert (slope.max() - slope.min()) / 2 <= curve.half_range


def test_noise__a_list_adds_up_biases_with_its_weights():
    policy_RK, _, lengths = every_outcome(two_points(0.5), 2, 0.5)
    zeros_RK = torch.zeros_like(policy_RK)
    options = {"response_length_R": lengths, "replicate_K": (0, 1), "beta": 0.3}
    listed = objective("sigmoid", "ipo", "apo_zero", loss_weights=(0.5, 2.0, 0.1), sft_weight=3.0, **options)
    for key in ("loss_bias", "loss_bias_bound"):
        want = sum(
            weight * objective(name, **options).noise(policy_RK, zeros_RK)[key]
            for name, weight in (("sigmoid", 0.5), ("ipo", 2.0), ("apo_zero", 0.1))
        )
        torch.testing.assert_close(listed.noise(policy_RK, zeros_RK)[key], want)


def test_noise__label_smoothing_has_no_bias():
    policy_RK, _, lengths = every_outcome(two_points(0.5), 2, 0.5)
    options = {"response_length_R": lengths, "replicate_K": (0, 1)}
    plain = objective("sigmoid", **options).noise(policy_RK, torch.zeros_like(policy_RK))
    for name in ("sigmoid", "robust"):
        told = objective(name, label_smoothing=0.2, **options).noise(policy_RK, torch.zeros_like(policy_RK))
        assert torch.equal(told["loss_bias"], plain["loss_bias"])
        assert torch.equal(told["loss_bias_bound"], plain["loss_bias_bound"])


@pytest.mark.parametrize("name", LOSSES)
def test_noise__says_nothing_without_replicates_and_zero_without_noise(name):
    policy_RK = torch.tensor([[3.0], [1.0], [-2.0], [5.0]]).expand(4, 3)
    options = {"response_length_R": torch.tensor([3, 4, 5, 6])}
    if name != "sigmoid_jackknife":
        assert objective(name, replicate_K=(0, 0, 0), **options).noise(policy_RK, policy_RK) == {}
    told = objective(name, replicate_K=(0, 1, 2), **options).noise(policy_RK, policy_RK)
    for key in ("score_std", "loss_bias", "loss_bias_bound", "gradient_noise"):
        assert told[key].tolist() == [0.0, 0.0], key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [1e30, -1e30])
def test_curves__tell_no_nan_of_huge_scores(score, dtype):
    """Of every curve, with no noise and with some."""
    for curve in (Softplus(), Softplus(0.1), Sigmoid(), Hinge(), ReverseKL(1e-3), Square(1.0)):
        for std in (0.0, 1.0):
            given = torch.tensor([score], dtype=dtype), torch.tensor([std], dtype=dtype)
            told = torch.stack([curve.slope(*given), curve.curvature(*given), curve.bias(*given)])
            assert torch.isfinite(told).all() and torch.isfinite(curve.bound(*given)).all(), (curve, std)


@pytest.mark.parametrize("std", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("true_score", [-2.0, 0.0, 3.0])
def test_noise__sigmoid_bounds_bias_and_variance_of_the_loss(true_score, std):
    """|E loss - loss| <= min(std / 2, v / 8) and Var loss <= v, which correct the paper's Theorem 1."""
    z = torch.linspace(-9, 9, 180_001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    weight = weight / weight.sum()
    true, std_1 = torch.tensor(true_score, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    loss = Softplus()(true + std * z)
    bias = loss @ weight - Softplus()(true)
    assert 0 < bias <= Softplus().bound(true, std_1) <= min(std / 2, std**2 / 8) * (1 + 1e-12)
    assert (loss - loss @ weight).square() @ weight <= std**2
    # Two replicates that differ by 2 std: the estimate of the score's standard error is std.
    policy_RK = torch.tensor([[true_score + std, true_score - std], [0.0, 0.0]], dtype=torch.float64)
    told = objective("sigmoid", beta=1.0, replicate_K=(0, 1), response_length_R=torch.tensor([1, 1])).noise(
        policy_RK, torch.zeros_like(policy_RK)
    )
    assert told["score_std"].item() == pytest.approx(std)
    noisy = true + std * z
    flips = (noisy.sign() != true.sign()).double() @ weight if true_score else 0.5
    assert told["sign_flips"].item() == pytest.approx(float(flips), abs=1e-3)
    if std == 0.1:
        assert told["loss_bias"].item() == pytest.approx(float(bias), rel=0.01)
        coefficient = torch.sigmoid(-noisy)
        mean = coefficient @ weight
        noise = ((coefficient - mean).square() @ weight).sqrt() / (coefficient.square() @ weight).sqrt()
        assert told["gradient_noise"].item() == pytest.approx(float(noise), rel=0.02)
