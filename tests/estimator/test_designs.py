"""Mask designs and row weights against full enumeration: expectation, variance, calibration."""

from itertools import pairwise

import pytest
import torch
from enumeration import estimates, every_draw, exact_elbo, random_table

from vrpo.batch import ResponseBatch
from vrpo.estimator import designs, masking
from vrpo.estimator.designs import DESIGNS
from vrpo.estimator.row_weights import dense

# The weights of a draw are float32; everything else here is float64.
FP32_WEIGHTS = 1e-6

# (design, L, K): small enough to enumerate, with odd K, K > L and L = 1 among them.
CASES = [
    ("paper", 3, 2),
    ("paper", 4, 1),
    ("paper", 2, 3),
    ("stratified", 3, 3),
    ("stratified", 4, 2),
    ("stratified", 2, 3),
    ("cyclic", 3, 2),
    ("cyclic", 2, 4),
    ("tiled", 3, 3),
    ("tiled", 4, 4),
    ("tiled", 2, 5),
    ("inverse-root", 3, 2),
    ("time-free", 3, 2),
    ("coupled", 3, 3),
    ("coupled", 4, 2),
    ("folded", 3, 4),
    ("folded", 4, 4),
    ("folded", 3, 5),
    ("folded", 1, 4),
    ("arcsine", 3, 4),
    ("arcsine", 3, 3),
    ("spaced", 3, 4),
    ("spaced", 3, 5),
    ("spaced", 2, 6),
    ("folded-loo", 3, 4),
    ("folded-loo", 4, 4),
    ("folded-balanced", 3, 4),
    ("folded-balanced", 4, 4),
    ("folded-balanced", 3, 5),
    ("folded-balanced", 1, 3),
    ("balanced", 3, 4),
    ("balanced", 3, 5),
    ("balanced", 2, 6),
    ("mirrored", 1, 2),
    ("mirrored", 2, 1),
    ("mirrored", 2, 2),
    ("mirrored", 3, 2),
    ("mirrored", 3, 4),
    ("mirrored", 3, 5),
    ("mirrored", 2, 6),
    ("mirrored", 4, 4),
    ("mirrored-balanced", 3, 4),
    ("mirrored-balanced", 3, 5),
    ("mirrored-balanced", 2, 6),
    ("graded", 1, 3),
    ("graded", 3, 1),
    ("graded", 4, 2),
    ("graded", 3, 4),
    ("graded", 2, 5),
    ("graded-balanced", 1, 2),
    ("graded-balanced", 4, 2),
    ("graded-balanced", 4, 3),
    ("graded-balanced", 3, 4),
    ("graded-balanced", 3, 5),
    ("graded-balanced", 2, 6),
]
IDS = [f"{design}-L{length}-K{num_samples}" for design, length, num_samples in CASES]


def triangular(num_couples):
    """Strata of widths 1, 2, 3, .."""
    bounds = tuple(c * (c + 1) // 2 for c in range(num_couples + 1))
    return bounds, bounds[-1]


@pytest.fixture(autouse=True)
def coarse_grid(monkeypatch):
    """Some designs draw from grids too fine to enumerate; exact on any grid, they get coarse ones."""
    monkeypatch.setattr(designs, "_GRID", 24)
    monkeypatch.setattr(designs, "_spaced_bounds", triangular)


@pytest.mark.parametrize(("design", "length", "num_samples"), CASES, ids=IDS)
def test_design__expectation_is_the_exact_elbo_and_gradient(design, length, num_samples):
    assert DESIGNS[design].unbiased
    table = random_table(length)
    drawn, _ = every_draw(design, length, num_samples)
    mean = estimates(drawn, length, table).mean(0)
    assert torch.allclose(mean, exact_elbo(table), rtol=FP32_WEIGHTS, atol=FP32_WEIGHTS)


def test_cases__cover_every_unbiased_design():
    assert {design for design, _, _ in CASES} == {name for name, d in DESIGNS.items() if d.unbiased}


# What the others estimate instead: their relative bias on the steep table of the test below.
RELATIVE_BIAS = {
    "gauss-legendre": -0.0559,
    "folded-ratio": 0.0212,
    "folded-jackknife": -0.0270,
    "ratio": 0.0293,
}
BIASED = [(design, 4, 4) for design in RELATIVE_BIAS]


def smooth_table(length, slope):
    """log p = -(i + 1) (1 + slope * size of the mask): its expectation moves with the level by `slope`."""
    bits = torch.arange(2**length)
    size = sum((bits >> i) & 1 for i in range(length)).double()
    token = torch.arange(1, length + 1).double()
    return (-token * (1 + slope * size[:, None]))[:, :, None]


@pytest.mark.parametrize(("design", "length", "num_samples"), BIASED, ids=[case[0] for case in BIASED])
def test_design__the_biased_ones_are_exact_for_tokens_that_do_not_depend_on_the_mask(
    design, length, num_samples
):
    assert not DESIGNS[design].unbiased
    drawn, _ = every_draw(design, length, num_samples)
    flat, sloped = smooth_table(length, 0.0), smooth_table(length, 0.3)
    bias_flat = estimates(drawn, length, flat).mean(0) - exact_elbo(flat)
    bias_sloped = estimates(drawn, length, sloped).mean(0) - exact_elbo(sloped)
    assert bias_flat.abs() < FP32_WEIGHTS * 10
    relative = float(bias_sloped / exact_elbo(sloped))
    assert relative == pytest.approx(RELATIVE_BIAS[design], abs=1e-4)


def mean_weight_by_level(design, length, num_samples):
    """E[omega_ki | M_k] / b_k over all outcomes, for every sample and level: a design's calibration."""
    drawn, _ = every_draw(design, length, num_samples)
    base = DESIGNS[design].levels
    plain = next(name for name, d in DESIGNS.items() if d.levels is base and d.row_weights is None)
    base_N = every_draw(plain, length, num_samples)[0].weight_N.double()
    segment_N = torch.arange(len(drawn.offsets_S1) - 1).repeat_interleave(drawn.offsets_S1.diff())
    cell_N = (segment_N % num_samples) * (length + 1) + drawn.offsets_S1.diff()[segment_N]
    size = num_samples * (length + 1)
    weight = torch.zeros(size, dtype=torch.float64).index_add_(0, cell_N, drawn.weight_N.double())
    wanted = torch.zeros(size, dtype=torch.float64).index_add_(0, cell_N, base_N)
    return (weight / wanted)[wanted > 0]


@pytest.mark.parametrize("design", [name for name, d in DESIGNS.items() if d.row_weights])
def test_row_weights__calibration_tells_exact_from_nearly_unbiased(design):
    """E[omega_ki | M_k] = b_k for every level if and only if the design claims to be unbiased."""
    ratio = mean_weight_by_level(design, 4, 4)
    deviation = float((ratio - 1).abs().max())
    if DESIGNS[design].unbiased:
        assert deviation < FP32_WEIGHTS
    else:
        assert deviation > 0.05


@pytest.mark.parametrize(
    ("design", "num_samples", "num_replicates", "share"),
    [
        ("paper", 4, 1, 0.5),
        ("balanced", 8, 2, 0.5),
        ("t", 4, 1, 0.5),
        ("graded-balanced", 1, 1, 0.5),
        ("graded-balanced", 4, 1, 0.412),
        ("graded-balanced", 8, 2, 0.412),
        ("graded-balanced", 8, 1, 0.406),
        ("inverse-root", 4, 1, 0.342),
    ],
)
def test_masked_share__is_the_mean_level(design, num_samples, num_replicates, share, monkeypatch):
    monkeypatch.undo()
    assert masking.masked_share(design, num_samples, num_replicates) == pytest.approx(share, abs=0.006)
    batch = same_length_batch(1024, 500)
    drawn = masking.draw(
        batch, design=design, num_samples=num_samples, num_replicates=num_replicates, seed=1, epoch=0
    )
    assert len(drawn.position_N) / (500 * num_samples * 1024) == pytest.approx(share, abs=0.03)


def test_masked_share__needs_no_table_of_all_draws(monkeypatch):
    """A thousand at a time, a few, one: the same draws."""
    monkeypatch.undo()
    shares = []
    for cells in (2**22, 2**16, 1):
        monkeypatch.setattr(masking, "_CELLS_AT_ONCE", cells)
        shares.append(masking.masked_share("inverse-root", 2, length=50))
    assert shares == pytest.approx([shares[0]] * 3)


@pytest.mark.parametrize(("length", "number"), [(1, 50), (2, 50), (7, 50), (1000, 50), (600_000, 1)])
def test_graded__is_the_paper_draw_for_one_sample(length, number, monkeypatch):
    monkeypatch.undo()
    batch = same_length_batch(length, number)
    ours, paper = (
        masking.draw(batch, design=design, num_samples=1, seed=3, epoch=5)
        for design in ("graded-balanced", "paper")
    )
    assert torch.equal(ours.position_N, paper.position_N) and torch.equal(ours.weight_N, paper.weight_N)


@pytest.mark.parametrize("num_samples", [3, 4, 5, 8, 16, 64])
def test_graded__cancels_what_is_linear_in_the_level(num_samples, monkeypatch):
    """A log p that grows with the level errs by less than a tenth of what independent strata would."""
    monkeypatch.undo()
    bounds, grid = designs._spaced_bounds(num_samples)
    square_K = torch.tensor([(high - low) / grid for low, high in pairwise(bounds)]).square()
    signs_K = torch.tensor(designs._antithetic_signs(square_K.tolist()))
    assert abs((signs_K * square_K).sum()) < 0.35 * square_K.norm()
    length, num_draws = 100_000, 400
    batch = same_length_batch(length, num_draws)
    uniform = masking.Uniform(0, 0, batch.example_R, batch.side_R)
    levels = designs.graded(uniform, batch.response_length_R, num_samples)
    level_RK = levels.count_RK / length
    value_R = (levels.weight_RK * levels.count_RK * level_RK).mean(1) / length
    independent = (square_K.square().sum() / 12).sqrt()
    assert value_R.mean() == pytest.approx(0.5, abs=0.01)
    assert value_R.std() == pytest.approx(float(abs((signs_K * square_K).sum()) / 12**0.5), rel=0.1, abs=1e-5)
    assert value_R.std() < 0.35 * independent


def same_length_batch(length, num_responses):
    return ResponseBatch(
        tokens_U=torch.zeros(num_responses * (length + 1), dtype=torch.int64),
        prompt_length_R=torch.ones(num_responses, dtype=torch.int64),
        response_length_R=torch.full((num_responses,), length),
        example_R=torch.arange(num_responses),
        side_R=torch.zeros(num_responses, dtype=torch.int64),
        num_sides=1,
    )


def assert_law(sampled, every, copies=1):
    """Mean and variance of draws lie within five standard errors of those of the mean of independent copies.

    every: all equally likely outcomes of one copy.
    """
    num_draws, mean = len(sampled), every.mean(0)
    second, fourth = ((every - mean).pow(power).mean(0) for power in (2, 4))
    fourth = (fourth + 3 * (copies - 1) * second**2) / copies**3
    variance = second / copies
    assert ((sampled.mean(0) - mean).abs() < 5 * (variance / num_draws).sqrt() + FP32_WEIGHTS).all()
    error_of_variance = ((fourth - variance**2).clamp(min=0) / num_draws).sqrt()
    # The square of the mean's own error; of two equally likely values it is all the error there is.
    of_the_mean = 26 * variance / num_draws
    assert ((sampled.var(0) - variance).abs() < 5 * error_of_variance + of_the_mean + FP32_WEIGHTS).all()


@pytest.mark.parametrize(
    ("design", "length", "num_samples"),
    [case for case in CASES + BIASED if case[1] > 1],
    ids=str,
)
def test_draw__has_the_mean_and_the_variance_that_enumeration_gives(design, length, num_samples):
    table = random_table(length)
    drawn, _ = every_draw(design, length, num_samples)
    every = estimates(drawn, length, table)
    batch = same_length_batch(length, 8_000)
    drawn = masking.draw(batch, design=design, num_samples=num_samples, seed=1, epoch=0)
    assert_law(estimates(drawn, length, table), every)


@pytest.mark.parametrize("design", sorted(DESIGNS))
@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 8, 17])
def test_draw__works_for_odd_k_for_k_above_l_and_for_lengths_from_one_to_thousands(design, num_samples):
    lengths = torch.tensor([1, 2, 7, 2500])
    batch = ResponseBatch(
        tokens_U=torch.zeros(int((lengths + 1).sum()), dtype=torch.int64),
        prompt_length_R=torch.ones(4, dtype=torch.int64),
        response_length_R=lengths,
        example_R=torch.arange(4),
        side_R=torch.zeros(4, dtype=torch.int64),
        num_sides=1,
    )
    drawn = masking.draw(batch, design=design, num_samples=num_samples, seed=1, epoch=0)
    assert drawn.num_samples == num_samples == len(drawn.replicate_K)
    if DESIGNS[design].row_weights and num_samples > 1:
        assert set(drawn.replicate_K) == {0}, "weights tie the samples together: no independent replicates"
    assert len(drawn.offsets_S1) == 4 * num_samples + 1
    assert torch.isfinite(drawn.weight_N).all()
    # A constant log p of -1 has the ELBO -L. Designs that keep the level totals say so without noise.
    minus_elbo_R = dense(drawn, lengths, drawn.weight_N).sum((1, 2)) / num_samples
    if design not in ("t", "inverse-root", "time-free", "arcsine", "coupled", "gauss-legendre"):
        assert (minus_elbo_R[3] / 2500 - 1).abs() < 1e-2


@pytest.mark.parametrize("design", sorted(DESIGNS))
def test_draw__does_not_depend_on_the_other_responses(design):
    """Row weights are solved per response, so a batch and its halves must agree bit for bit."""
    batch = same_length_batch(9, 4)
    whole = masking.draw(batch, design=design, num_samples=5, seed=1, epoch=0)
    halves = [
        masking.draw(batch.examples(a, a + 2), design=design, num_samples=5, seed=1, epoch=0) for a in (0, 2)
    ]
    assert torch.equal(whole.position_N, torch.cat([half.position_N for half in halves]))
    assert torch.allclose(whole.weight_N, torch.cat([half.weight_N for half in halves]), rtol=1e-6)


@pytest.mark.parametrize(
    ("design", "length", "size"),
    [("balanced", 3, 4), ("folded-loo", 3, 4), ("ratio", 4, 4), ("stratified", 3, 2), ("coupled", 3, 3)],
    ids=str,
)
def test_num_replicates__are_independent_repetitions_of_the_design(design, length, size):
    """The mean of two has the design's expectation and half its variance, both enumerated."""
    num_draws = 8_000
    table = random_table(length)
    every = estimates(every_draw(design, length, size)[0], length, table)
    batch = same_length_batch(length, num_draws)
    drawn = masking.draw(batch, design=design, num_samples=2 * size, num_replicates=2, seed=1, epoch=0)
    assert_law(estimates(drawn, length, table), every, copies=2)
    assert not set(drawn.replicate_K[:size]) & set(drawn.replicate_K[size:])


@pytest.mark.parametrize("design", sorted(DESIGNS))
@pytest.mark.parametrize("num_replicates", [2, 3, 6])
def test_num_replicates__begin_with_what_a_smaller_draw_would_be(design, num_replicates):
    batch, size = same_length_batch(9, 3), 6 // num_replicates
    drawn = masking.draw(batch, design=design, num_samples=6, num_replicates=num_replicates, seed=1, epoch=0)
    alone = masking.draw(batch, design=design, num_samples=size, seed=1, epoch=0)
    rows = slice(0, int(alone.offsets_S1[size]))
    assert torch.equal(drawn.position_N[rows], alone.position_N[rows])
    assert torch.allclose(drawn.weight_N[rows], alone.weight_N[rows], rtol=1e-6)
    assert max(drawn.replicate_K) + 1 >= num_replicates


def pair_batch(lengths, num_pairs):
    """num_pairs pairs whose chosen and rejected responses have these two lengths."""
    length_R = torch.tensor(lengths).repeat(num_pairs)
    return ResponseBatch(
        tokens_U=torch.zeros(int((length_R + 1).sum()), dtype=torch.int64),
        prompt_length_R=torch.ones(2 * num_pairs, dtype=torch.int64),
        response_length_R=length_R,
        example_R=torch.arange(num_pairs).repeat_interleave(2),
        side_R=torch.tensor([0, 1]).repeat(num_pairs),
        num_sides=2,
    )


def test_pair_masks__levels_are_the_same_fraction_of_both_sides():
    draws = {
        name: masking.draw(
            pair_batch([100, 50], 2), design="paper", num_samples=6, pair_masks=name, seed=1, epoch=0
        )
        for name in masking.PAIR_MASKS
    }
    counts = {name: drawn.offsets_S1.diff().view(2, 2, 6) for name, drawn in draws.items()}
    for name in ("levels", "positions"):
        assert torch.equal((counts[name][:, 0] - 1) // 2, counts[name][:, 1] - 1)
    assert not torch.equal((counts["independent"][:, 0] - 1) // 2, counts["independent"][:, 1] - 1)
    assert not torch.equal(draws["levels"].position_N, draws["positions"].position_N)


@pytest.mark.parametrize("design", sorted(DESIGNS))
def test_pair_masks__positions_are_equal_for_equal_lengths_and_near_for_others(design):
    options = {"design": design, "num_samples": 4, "pair_masks": "positions", "seed": 1, "epoch": 0}
    drawn = masking.draw(pair_batch([9, 9], 3), **options)
    weight = dense(drawn, torch.full((6,), 9), drawn.weight_N).view(3, 2, 4, 9)
    assert torch.allclose(weight[:, 0], weight[:, 1], rtol=1e-6)
    drawn = masking.draw(pair_batch([300, 280], 40), **options)
    masked = dense(drawn, torch.tensor([300, 280]).repeat(40), drawn.weight_N).view(40, 2, 4, 300) != 0
    agree = (masked[:, 0, :, :280] == masked[:, 1, :, :280]).double().mean()
    assert agree > 0.93  # ranks among 300 and among 280 words are not quite the same fraction


@pytest.mark.parametrize(
    ("design", "enumerated"), [("paper", 2), ("balanced", 4), ("ratio", 4), ("folded-loo", 4)]
)
def test_pair_masks__positions_leave_the_law_of_each_side(design, enumerated):
    """Mean and variance of either side, with lengths of their own, are those that enumeration gives."""
    drawn = masking.draw(
        pair_batch([4, 3], 8_000), design=design, num_samples=4, pair_masks="positions", seed=1, epoch=0
    )
    for side, length in enumerate((4, 3)):
        table = random_table(length, seed=side)
        padded = torch.zeros(2**4, 4, 4, dtype=torch.float64)
        padded[: 2**length, :length] = table
        every = estimates(every_draw(design, length, enumerated)[0], length, table)
        # 4 samples of `paper` are too many to list, but they are two independent halves.
        assert_law(estimates(drawn, 4, padded)[side::2], every, copies=4 // enumerated)


@pytest.mark.parametrize("slope", [0.7, -0.7], ids=["sides alike", "sides opposite"])
def test_pair_masks__help_if_and_only_if_the_sides_correlate(slope):
    """Var[B_w - B_l] = Var + Var - 2 Cov: with opposite sides the shared masks cost variance."""
    length, num_pairs = 4, 8_000
    chosen = random_table(length, seed=4)[:, :, :1] + 2.0
    rejected = slope * chosen + 0.3 * (random_table(length, seed=5)[:, :, :1] + 2.0)
    every = every_draw("balanced", length, 4)[0]
    sides = torch.cat([estimates(every, length, side) for side in (chosen, rejected)], dim=1)
    covariance = torch.cov(sides.T, correction=0)
    mean = exact_elbo(chosen) - exact_elbo(rejected)
    spread = {}
    for name, shared in (("independent", 0.0), ("positions", 2.0)):
        drawn = masking.draw(
            pair_batch([4, 4], num_pairs), design="balanced", num_samples=4, pair_masks=name, seed=1, epoch=0
        )
        score = estimates(drawn, length, chosen)[0::2] - estimates(drawn, length, rejected)[1::2]
        assert ((score.mean(0) - mean).abs() < 5 * score.std() / num_pairs**0.5).all()
        spread[name] = float(score.var())
        assert spread[name] == pytest.approx(float(covariance.trace() - shared * covariance[0, 1]), rel=0.1)
    assert (spread["positions"] < spread["independent"]) == (slope > 0)


def test_spaced__strata_of_the_product_cover_the_interval_and_none_is_empty(monkeypatch):
    monkeypatch.undo()
    for num_couples in (1, 2, 3, 4, 64, 1000):
        bounds, grid = designs._spaced_bounds(num_couples)
        assert bounds[0] == 0 and bounds[-1] == grid
        assert all(low < high for low, high in pairwise(bounds))
