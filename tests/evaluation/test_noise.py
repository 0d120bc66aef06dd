"""Predicted variances against enumerated draws, against sampled ones and against a model's."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from batches import make_pairs, to_batch
from enumeration import estimates, every_draw, random_table

from vrpo.batch import ResponseBatch
from vrpo.estimator import designs
from vrpo.estimator.designs import DESIGNS
from vrpo.estimator.row_weights import dense
from vrpo.evaluation import variance
from vrpo.evaluation.moments import DEGREE, Moments, Seen, basis, fit
from vrpo.evaluation.noise import PARTS, Noise, measure, measure_all, predict
from vrpo.evaluation.variance import Scheme
from vrpo.models import create_model

LENGTH = DEGREE + 1
NUM_PAIRS = 4_000
NUM_DRAWS = 8 * NUM_PAIRS

# A permutation for every sample and no row weights: K = 2 is as much as can be enumerated.
INDEPENDENT = ["paper", "stratified", "cyclic", "inverse-root", "time-free"]
EXACT = [name for name, design in DESIGNS.items() if design.unbiased]
CASES = [(name, 2 if name in INDEPENDENT else 4) for name in EXACT]


def triangular(num_strata):
    """Strata of widths 1, 2, 3, .."""
    bounds = tuple(c * (c + 1) // 2 for c in range(num_strata + 1))
    return bounds, bounds[-1]


@pytest.fixture
def coarse_grid(monkeypatch):
    """Grids that can be enumerated; predictions draw from the same."""
    monkeypatch.setattr(designs, "_GRID", 12)
    monkeypatch.setattr(designs, "_spaced_bounds", triangular)


MASKS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=LENGTH))[1:], dtype=torch.float64)
BITS = (MASKS @ 2 ** torch.arange(LENGTH).double()).long()
SIZE = MASKS.sum(1).long()
APART = 1 - torch.eye(LENGTH, dtype=torch.float64)


def moments_of(table):
    """Exact second moments of a table of values, enumerated level by level."""
    value_ML = MASKS * table[BITS, :, 0]
    sizes = range(1, LENGTH + 1)
    mean_SL = torch.stack([value_ML[size == SIZE].sum(0) / MASKS[size == SIZE].sum(0) for size in sizes])
    square_S = torch.stack(
        [value_ML[size == SIZE].square().sum() / MASKS[size == SIZE].sum() for size in sizes]
    )
    both_M = torch.einsum("mi,ij,mj->m", value_ML, APART, value_ML) / (SIZE * (SIZE - 1)).clamp(min=1)
    both_S = torch.stack([both_M[size == SIZE].mean() for size in sizes])
    same_SS = mean_SL @ mean_SL.T / LENGTH
    different_SS = mean_SL @ APART @ mean_SL.T / (LENGTH * (LENGTH - 1))
    to_AS = torch.linalg.inv(basis(torch.arange(1, LENGTH + 1) / LENGTH))
    return Moments(
        to_AS @ same_SS @ to_AS.T, to_AS @ different_SS @ to_AS.T, to_AS @ square_S, to_AS @ both_S
    )


def coefficients(value_of_level):
    """Of a function of levels that is a polynomial, in the basis."""
    node_N = torch.linspace(0, 1, DEGREE + 1, dtype=torch.float64)
    return torch.linalg.solve(basis(node_N), value_of_level(node_N))


def noise_of(length_B2, chosen, rejected, both):
    """Pairs that all have the same moments."""
    sides = [
        Moments(*(moment.expand(len(length_B2), *moment.shape) for moment in vars(side).values()))
        for side in (chosen, rejected, both)
    ]
    return Noise(length_B2, *sides)


def pairs_of(moments, length=LENGTH):
    return noise_of(torch.full((NUM_PAIRS, 2), length), moments, moments, moments)


def tolerance(value_R):
    """Five standard errors of a variance that is estimated from NUM_DRAWS draws, their spread enumerated."""
    deviation_R = (value_R - value_R.mean()).square()
    return 5 * float(deviation_R.std()) / math.sqrt(7 / 8 * NUM_DRAWS)


def by_level(seed=3):
    """Values f_i(level), whatever else is masked."""
    generator = torch.Generator().manual_seed(seed)
    value_SL = torch.randn(LENGTH + 1, LENGTH, generator=generator, dtype=torch.float64) - 1.0
    size_M = torch.tensor([bits.bit_count() for bits in range(2**LENGTH)])
    return value_SL[size_M][:, :, None]


def test_fit__is_exact_for_values_of_token_and_level():
    """Two responses, every mask twice."""
    tables = [by_level(seed) for seed in (3, 4)]
    masked_BKL = torch.cat([MASKS, MASKS]).expand(2, -1, -1)
    value_BKL = torch.stack([masked_BKL[0] * table[BITS.repeat(2), :, 0] for table in tables])
    seen = Seen(value_BKL, masked_BKL, torch.full((2,), LENGTH))
    found = fit(seen, seen)
    level_SA = basis(torch.arange(1, LENGTH + 1) / LENGTH)
    for index, table in enumerate(tables):
        want = moments_of(table)
        torch.testing.assert_close(found.same_BAA[index], want.same_BAA, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.different_BAA[index], want.different_BAA, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.own_BA[index], want.own_BA, rtol=1e-4, atol=1e-4)
        # A mask of one token shows no two.
        pair_S = [level_SA[1:] @ own_A for own_A in (found.own_different_BA[index], want.own_different_BA)]
        torch.testing.assert_close(*pair_S, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("design", INDEPENDENT)
def test_predict__is_exact_for_any_table_where_masks_are_independent(coarse_grid, design):
    """Values differ by token, level and mask; moments that average over tokens and masks are enough."""
    table = random_table(LENGTH, seed=7)[:, :, :1] * torch.linspace(0.2, 3, LENGTH)[:, None]
    drawn, _ = every_draw(design, LENGTH, 2)
    value_R = estimates(drawn, LENGTH, table)[:, 0]
    told = predict(pairs_of(moments_of(table)), Scheme(design, 2), num_draws=NUM_DRAWS)
    assert told["response"] == pytest.approx(float(value_R.var(correction=0)), abs=tolerance(value_R))


@pytest.mark.parametrize(("design", "num_samples"), CASES, ids=[case[0] for case in CASES])
def test_predict__is_exact_where_masks_say_nothing_of_each_other(coarse_grid, design, num_samples):
    """Values are f_i(level) + g + e_i: noise of a sample and of a token, new in every mask."""
    table = by_level()

    def of_sample(level):
        return 0.3 + 0.5 * level

    def of_token(level):
        return 2.0 - level

    moments = moments_of(table)
    moments = Moments(
        moments.same_BAA,
        moments.different_BAA,
        moments.own_BA + coefficients(lambda level: of_sample(level) + of_token(level)),
        moments.own_different_BA + coefficients(of_sample),
    )
    drawn, length_R = every_draw(design, LENGTH, num_samples)
    omega_RKL = dense(drawn, length_R, drawn.weight_N) / num_samples
    level_RK = dense(drawn, length_R, torch.ones_like(drawn.weight_N)).sum(2) / LENGTH
    noise_R = (of_sample(level_RK) * omega_RKL.sum(2).square()).sum(1)
    noise_R += (of_token(level_RK) * omega_RKL.square().sum(2)).sum(1)
    value_R = estimates(drawn, LENGTH, table)[:, 0]
    told = predict(pairs_of(moments), Scheme(design, num_samples), num_draws=NUM_DRAWS)
    want = float(value_R.var(correction=0) + noise_R.mean())
    spread = tolerance(value_R) + 5 * float(noise_R.std()) / math.sqrt(NUM_DRAWS)
    assert told["response"] == pytest.approx(want, abs=spread)
    assert told["total"] == pytest.approx(sum(told[part] for part in PARTS))
    assert told["total"] == pytest.approx(2 * told["response"])


def test_predict__sides_that_are_alike_in_everything_cancel():
    noise = pairs_of(moments_of(random_table(LENGTH, seed=7)))
    told = predict(noise, Scheme("graded-balanced", 4, pair_masks="positions"), beta=0.3)
    assert told["response"] > 0.1
    assert all(abs(told[name]) < 1e-9 for name in (*PARTS, "total"))


@pytest.mark.parametrize("design", ["stratified", "tiled", "graded", "graded-balanced", "mirrored-balanced"])
def test_predict__constant_log_p_has_no_noise_under_fixed_totals(design):
    square_A = coefficients(lambda level: torch.full_like(level, 4.0))
    square_AA = square_A[:, None] * torch.eye(DEGREE + 1)[0]
    constant = Moments(square_AA, square_AA, square_A, square_A)
    for part, value in predict(pairs_of(constant, length=7), Scheme(design, 4)).items():
        assert abs(value) < 1e-5, part
    told = predict(pairs_of(constant, length=7), Scheme("coupled", 4))
    assert told["levels"] == pytest.approx(told["total"], rel=1e-4) and told["levels"] > 1


@pytest.mark.parametrize("error", [-1e-15, 0.0, 1e-15])
def test_predict__rounding_is_no_noise(error):
    """A response of one token is worth the same under every mask."""
    square_A = coefficients(lambda level: torch.full_like(level, 4.0))
    square_AA = square_A[:, None] * torch.eye(DEGREE + 1)[0]
    own_A = square_A * (1 + error)
    told = predict(pairs_of(Moments(square_AA, square_AA, own_A, own_A), length=1), Scheme("paper", 4))
    assert all(value == 0 for value in told.values())


def test_predict__looks_at_few_pairs_at_once_where_they_are_long(monkeypatch):
    moments = moments_of(random_table(LENGTH, seed=7))
    noise = noise_of(torch.tensor([[4, 3], [2, 4], [1, 4]]), moments, moments, moments)
    scheme = Scheme("graded-balanced", 4, pair_masks="positions")
    whole = predict(noise, scheme, num_draws=30)
    monkeypatch.setattr("vrpo.evaluation.noise._MOST_CELLS", 1)
    assert predict(noise, scheme, num_draws=30) == pytest.approx(whole)


def lengths_only(length_B2):
    num_pairs = len(length_B2)
    return ResponseBatch(
        tokens_U=torch.zeros(0, dtype=torch.int64),
        prompt_length_R=torch.ones(2 * num_pairs, dtype=torch.int64),
        response_length_R=length_B2.flatten(),
        example_R=torch.arange(num_pairs).repeat_interleave(2),
        side_R=torch.arange(2).repeat(num_pairs),
        num_sides=2,
    )


@pytest.mark.parametrize("design", ["paper", "tiled", "balanced"])
@pytest.mark.parametrize("lengths", [(8, 5), (3, 6)])
def test_predict__covariance_of_sides_of_unequal_lengths(design, lengths):
    """Tokens are worth slope(level) x_i + g + e_i, x_i and noises shared where the sides share positions."""
    num_pairs, slopes, mean = 20_000, (lambda t: 1.0 + t, lambda t: 0.8 - 0.3 * t), 0.5
    shared = 0.6  # of the second side's values and noises
    length_B2 = torch.tensor(lengths).expand(num_pairs, 2).contiguous()
    generator = torch.Generator().manual_seed(5)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    worth_BL = mean + normal(num_pairs, 1, max(lengths))
    scheme = Scheme(design, 4, pair_masks="positions")
    scores = []
    for epoch in (0, 1):
        drawn = scheme.draw(lengths_only(length_B2), 11, epoch)
        omega_RKL = dense(drawn, length_B2.flatten(), drawn.weight_N) / 4
        masked_RKL = dense(drawn, length_B2.flatten(), torch.ones_like(drawn.weight_N))
        level_RK1 = (masked_RKL.sum(2) / length_B2.flatten()[:, None])[:, :, None]
        noise_BKL = normal(num_pairs, 4, 1) + normal(num_pairs, 4, max(lengths))
        sides = [
            (omega_RKL[s::2] * (slopes[s](level_RK1[s::2]) * worth_BL + noise_BKL)).sum((1, 2))
            for s in range(2)
        ]
        scores.append(sides[0] - shared * sides[1])
    square_B = (scores[0] - scores[1]).square() / 2

    def moments(first, second, scale):
        def own(square, noise):
            return coefficients(lambda t: scale * (square * slopes[first](t) * slopes[second](t) + noise))

        both_AA = scale * torch.outer(coefficients(slopes[first]), coefficients(slopes[second]))
        square = mean**2 + 1
        return Moments(square * both_AA, mean**2 * both_AA, own(square, 2), own(mean**2, 1))

    few_B2 = length_B2[:NUM_PAIRS]
    noise = noise_of(few_B2, moments(0, 0, 1), moments(1, 1, shared**2), moments(0, 1, shared))
    told = predict(noise, scheme, num_draws=NUM_DRAWS)
    spread = 5 * float(square_B.std()) * math.sqrt(1 / num_pairs + 1 / NUM_DRAWS)
    assert told["total"] == pytest.approx(float(square_B.mean()), abs=spread)
    # What the sides share is far more than the tolerance.
    assert 2 * told["response"] - told["total"] > 3 * spread


@pytest.fixture(scope="module")
def models(tokenizer):
    """Three fp64 models that differ, and twelve pairs."""
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "init_std": 0.3, "dtype": "float32"}
    three = [create_model(tokenizer, seed=seed, **sizes).double() for seed in range(3)]
    lengths = [(2, 5 + b % 4, 4 + b % 3) for b in range(12)]
    return *three, to_batch(make_pairs(lengths, vocab_size=three[0].config.vocab_size))


def measured(models, policy, reference, **options):
    return measure(policy, reference, models[3], mask_token_id=policy.config.mask_token_id, **options)


def test_measure__predicts_the_variance_that_is_measured(models):
    policy, reference, _, batch = models
    noise = measured(models, policy, reference, num_repeats=8)
    for pair_masks in ("independent", "positions"):
        scheme = Scheme("paper", 2, pair_masks=pair_masks)
        sampled = variance.sample(
            policy,
            reference,
            batch,
            scheme,
            mask_token_id=policy.config.mask_token_id,
            beta=0.2,
            num_repeats=60,
            seed=99,
        )
        want = float(variance.score_variance(sampled).mean())
        assert predict(noise, scheme, beta=0.2)["total"] == pytest.approx(want, rel=0.25)


def test_measure_all__of_several_policies_is_that_of_each(models):
    policy, reference, other, batch = models
    mask_id, scheme = policy.config.mask_token_id, Scheme("paper", 2)
    together = measure_all([policy, other], reference, batch, mask_token_id=mask_id, num_repeats=1)
    told = [predict(noise, scheme)["total"] for noise in together]
    alone = [
        measured(models, model, reference, num_repeats=1, max_tokens_per_pack=40) for model in (policy, other)
    ]
    assert told == pytest.approx([predict(noise, scheme)["total"] for noise in alone], rel=1e-6)
    assert told[0] != pytest.approx(told[1], rel=1e-3)


class TargetsAreWorth(torch.nn.Module):
    """log p of a token is minus its id, whatever is masked."""

    def forward(self, **inputs):
        return SimpleNamespace(nll=inputs["targets"].float())


def test_measure__tells_responses_and_lengths_apart():
    """Long responses of dear tokens, short ones of cheap: inside each, all tokens and masks are alike."""
    pairs = [([9], [1] * 5, [1] * 5) if b % 2 else ([9], [4] * 15, [4] * 15) for b in range(12)]
    noise = measure(TargetsAreWorth(), None, to_batch(pairs), mask_token_id=30, num_repeats=4)
    for part, value in predict(noise, Scheme("paper", 1)).items():
        assert abs(value) < 1e-3, part


def test_measure__equal_models_have_no_noise_but_log_p_has(models):
    policy = models[0]
    nothing = measured(models, policy, policy, num_repeats=1)
    assert all(value == 0 for value in predict(nothing, Scheme("paper", 2)).values())
    alone = measured(models, policy, None, num_repeats=1)
    assert predict(alone, Scheme("paper", 2))["response"] > 0


def test_measure__checks_its_arguments(models):
    policy, reference = models[:2]
    with pytest.raises(ValueError, match="num_repeats must be at least 1"):
        measured(models, policy, reference, num_repeats=0)
    single = to_batch([(prompt, chosen) for prompt, chosen, _ in make_pairs([(2, 3, 4)])])
    with pytest.raises(ValueError, match="batch must hold pairs"):
        measure(policy, reference, single, mask_token_id=policy.config.mask_token_id)


@pytest.mark.parametrize("options", [{"shared": False}, {"pair_masks": "levels"}], ids=["unshared", "levels"])
def test_predict__refuses_schemes_that_it_cannot_tell(options):
    noise = pairs_of(moments_of(random_table(LENGTH)))
    with pytest.raises(ValueError, match="scheme must share masks"):
        predict(noise, Scheme("paper", 2, **options))
