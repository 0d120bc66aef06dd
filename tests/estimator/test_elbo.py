"""ELBOs by themselves: the noise that designs add of their own, and whether a draw knows its noise."""

from dataclasses import replace

import pytest
import torch
from enumeration import estimates, every_draw, exact_elbo, random_table

from vrpo.batch import ResponseBatch
from vrpo.estimator import designs, masking
from vrpo.estimator.designs import DESIGNS
from vrpo.estimator.elbo import elbo_std
from vrpo.estimator.masking import independent_replicates

FP32_WEIGHTS = 1e-6


def triangular(num_couples):
    """Strata of widths 1, 2, 3, .., coarse enough to enumerate."""
    bounds = tuple(c * (c + 1) // 2 for c in range(num_couples + 1))
    return bounds, bounds[-1]


def samples_of(drawn, length, table):
    """The value of every sample of every response, (R, K)."""
    value_S = estimates(replace(drawn, num_samples=1), length, table)[:, 0]
    return value_S.view(-1, drawn.num_samples)


def one_length(length, num_responses):
    return ResponseBatch(
        tokens_U=torch.zeros(num_responses * (length + 1), dtype=torch.int64),
        prompt_length_R=torch.ones(num_responses, dtype=torch.int64),
        response_length_R=torch.full((num_responses,), length),
        example_R=torch.arange(num_responses),
        side_R=torch.zeros(num_responses, dtype=torch.int64),
        num_sides=1,
    )


@pytest.mark.parametrize(
    ("design", "length", "size"),
    [
        ("mirrored", 1, 2),
        ("mirrored", 2, 2),
        ("mirrored", 3, 2),
        ("mirrored-balanced", 2, 4),
        ("graded-balanced", 2, 4),
        ("graded", 3, 3),
        ("mirrored", 3, 3),
        ("balanced", 2, 4),
        ("stratified", 3, 2),
        ("cyclic", 3, 2),
        ("paper", 3, 1),
        ("coupled", 3, 2),
        ("coupled", 2, 3),
    ],
    ids=str,
)
def test_elbo_std__square_averages_to_the_variance_over_all_draws(design, length, size, monkeypatch):
    """Two replicates, every pair of outcomes: E[std^2] is the variance of the mean, exactly."""
    monkeypatch.setattr(designs, "_spaced_bounds", triangular)
    value_RK = samples_of(every_draw(design, length, size)[0], length, random_table(length, seed=2))
    picked = value_RK[:: max(1, len(value_RK) // 600)]  # any subset will do as a law of its own
    first, second = torch.cartesian_prod(*[torch.arange(len(picked))] * 2).T
    both_RK = torch.cat([picked[first], picked[second]], dim=1)
    std_R = elbo_std(both_RK, independent_replicates(design, 2 * size, 2))
    variance = both_RK.mean(1).var(correction=0)
    torch.testing.assert_close(std_R.square().mean(), variance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("design", "num_samples", "num_replicates"),
    [
        ("mirrored-balanced", 8, 2),
        ("graded-balanced", 8, 2),
        ("mirrored", 6, 3),
        ("balanced", 8, 2),
        ("paper", 5, 1),
        ("coupled", 6, 1),
        ("folded", 8, 4),
    ],
    ids=str,
)
def test_elbo_std__of_real_draws_is_the_spread_over_draws(design, num_samples, num_replicates):
    length, num_draws = 5, 6_000
    table = random_table(length, seed=3)[:, :, :1]
    drawn = masking.draw(
        one_length(length, num_draws),
        design=design,
        num_samples=num_samples,
        num_replicates=num_replicates,
        seed=4,
        epoch=0,
    )
    value_RK = samples_of(drawn, length, table)
    square_R = elbo_std(value_RK, independent_replicates(design, num_samples, num_replicates)).square()
    mean_R = value_RK.mean(1)
    deviation_R = (mean_R - mean_R.mean()).square()
    error = ((square_R.var() + deviation_R.var()) / num_draws).sqrt()
    assert (square_R.mean() - mean_R.var()).abs() < 5 * error
    assert (mean_R.mean() - exact_elbo(table)[0]).abs() < 5 * mean_R.std() / num_draws**0.5


def test_elbo_std__would_be_many_times_the_noise_if_strata_counted():
    """Of values that depend on the level alone a stratified mean has little noise, and strata differ much."""
    length, num_samples = 40, 8
    drawn = masking.draw(
        one_length(length, 400), design="stratified", num_samples=num_samples, seed=4, epoch=0
    )
    level_RK = drawn.offsets_S1.diff().view(-1, num_samples).double()
    assert elbo_std(level_RK, drawn.replicate_K).mean() > 5 * level_RK.mean(1).std()
    assert elbo_std(level_RK, independent_replicates("stratified", num_samples, 1)).isnan().all()


@pytest.mark.parametrize("design", sorted(DESIGNS))
@pytest.mark.parametrize(("num_samples", "num_replicates"), [(1, 1), (2, 1), (3, 1), (8, 1), (8, 2), (6, 3)])
def test_independent_replicates__there_are_several_exactly_where_has_replicates_says_so(
    design, num_samples, num_replicates
):
    replicate_K = independent_replicates(design, num_samples, num_replicates)
    several = masking.has_replicates(design, num_samples, num_replicates)
    assert len(replicate_K) == num_samples and (max(replicate_K) > 0) == several
    sizes = torch.bincount(torch.tensor(replicate_K))
    assert (sizes == sizes[0]).all(), "replicates of unequal size are not identically distributed"


def constant_spread(design, length, num_samples, num_replicates=1):
    """Standard deviation over draws of the ELBO of a model whose log p is -1 everywhere, over L."""
    drawn = masking.draw(
        one_length(length, 500),
        design=design,
        num_samples=num_samples,
        num_replicates=num_replicates,
        seed=1,
        epoch=0,
    )
    offsets = drawn.offsets_S1[::num_samples]
    total = torch.cat([torch.zeros(1).double(), drawn.weight_N.double().cumsum(0)])[offsets].diff()
    assert (total.mean() / num_samples / length - 1).abs() < 0.1
    return float(total.std() / num_samples / length)


@pytest.mark.parametrize("length", [1, 2, 3, 50])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 8])
def test_designs__of_constant_total_have_no_noise_for_constant_log_p(length, num_samples):
    for design in (
        "paper",
        "stratified",
        "tiled",
        "mirrored",
        "mirrored-balanced",
        "graded",
        "graded-balanced",
    ):
        assert constant_spread(design, length, num_samples) < 1e-5


def test_designs__whose_couples_lose_an_empty_side_have_noise_for_constant_log_p():
    """Why `balanced` is noisy for an untrained model: 14 nats with 50 tokens, 7 nats each, and K = 8."""
    assert constant_spread("balanced", 50, 8, num_replicates=2) == pytest.approx(0.040, rel=0.15)
    for design in ("coupled", "folded", "spaced"):
        assert constant_spread(design, 50, 8) > 0.02


def fine_strata(num_couples):
    """(c / C)**1.5 of the product, on a grid that can be enumerated: 6/17 = .3529 for .3536."""
    return {1: ((0, 1), 1), 2: ((0, 6, 17), 17)}[num_couples]


@pytest.mark.parametrize(
    ("num_samples", "alone", "bias"),
    [(4, 0.0, 0.191), (4, 0.23, 0.12), (2, 0.0, 1 / 3), (4, 1.0, 0.0)],
)
def test_ratio__bias_at_two_tokens_is_what_its_help_says(num_samples, alone, bias, monkeypatch):
    """log p is -1 with both tokens masked, -alone with one: 12 % at .23, at most 19 % with K = 4."""
    monkeypatch.setattr(designs, "_spaced_bounds", fine_strata)
    table = torch.full((4, 2, 1), -alone, dtype=torch.float64)
    table[3] = -1.0
    drawn, _ = every_draw("ratio", 2, num_samples)
    relative = estimates(drawn, 2, table).mean() / exact_elbo(table)[0] - 1
    assert float(relative) == pytest.approx(bias, abs=2e-3)
