"""`vrpo score` as a whole: which masks it uses, and that its figures are exact."""

import math
from types import SimpleNamespace

import pytest
import torch
from batches import to_batch
from enumeration import estimates, every_draw, exact_elbo, random_table
from torch import nn

from vrpo.estimator import designs, masking
from vrpo.evaluation.score import ScoreArguments, Scorer, mask_options, summarise
from vrpo.step import Estimator
from vrpo.training.config import VRPOConfig

MASK = 63
PROMPT = [50, 51]


def options(**given):
    return mask_options(ScoreArguments("model", "data", "out.jsonl", **given))


def test_mask_options__are_those_of_training():
    """For margins and for ELBOs by themselves; what is given stays."""
    for reference in (None, "base"):
        assert options(ref_model_name_or_path=reference, num_samples=4) == {
            "mask_design": VRPOConfig.mask_design,
            "pair_masks": VRPOConfig.pair_masks,
            "num_replicates": 1,
        }
        assert options(ref_model_name_or_path=reference, num_samples=8)["num_replicates"] == 2
        given = options(ref_model_name_or_path=reference, mask_design="tiled", pair_masks="levels")
        assert (given["mask_design"], given["pair_masks"]) == ("tiled", "levels")


@pytest.mark.parametrize(
    ("name", "value"), [("mask_design", "nothing"), ("pair_masks", "some"), ("num_replicates", 3)]
)
def test_mask_options__bad_ones_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        options(**{name: value})


def test_summarise__noise_of_the_masks_is_a_root_mean_square_and_absent_where_unknown():
    rows = [
        {"tokens_completion": 2, "elbo_completion": -1.0, "elbo_std_completion": 3.0},
        {"tokens_completion": 2, "elbo_completion": -3.0, "elbo_std_completion": 4.0},
    ]
    told = summarise(rows)
    assert told["elbo/completion_std"] == pytest.approx(12.5**0.5)
    assert told["elbo/completion"] == -2.0 and told["elbo/completion_error"] == pytest.approx(1.0)
    assert "elbo/completion_std" not in summarise(
        [row | {"elbo_std_completion": float("nan")} for row in rows]
    )


class TableModel(nn.Module):
    """log p of a token is table[bits of the masked positions, position]: any function of the mask."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids, position_ids, cu_seq_lens_q, rows, targets, **_):
        assert (input_ids[0, rows] == MASK).all()
        position_N = position_ids[0, rows] - len(PROMPT)
        assert torch.equal(position_N, targets), "token i of the response is i"
        segment_N = torch.searchsorted(cu_seq_lens_q, rows.int(), right=True) - 1
        bits_S = torch.zeros(len(cu_seq_lens_q), dtype=torch.int64).index_add_(0, segment_N, 1 << position_N)
        return SimpleNamespace(nll=-self.table[bits_S[segment_N], position_N])


def table_scorer(table, design, num_samples, reference=None):
    estimator = Estimator(MASK, num_samples, design, masks_per_level=1, seed=5)
    return Scorer(TableModel(table), reference, estimator, 1.0, 10**9, "cpu")


def triangular(num_couples):
    """Strata of widths 1, 2, 3, .., coarse enough to enumerate."""
    bounds = tuple(c * (c + 1) // 2 for c in range(num_couples + 1))
    return bounds, bounds[-1]


CASES = [
    (design, length, num_samples)
    for design in ("mirrored-balanced", "paper", "balanced", VRPOConfig.mask_design)
    for length in (1, 2, 3)
    for num_samples in (1, 2, 3, 4, 5)
    if (design, length) != ("paper", 3) or num_samples < 3
]


@pytest.mark.parametrize(("design", "length", "num_samples"), CASES, ids=str)
def test_score__mean_over_every_draw_is_the_exact_elbo(design, length, num_samples, monkeypatch):
    """Draw, pack, model, weights and mean as `vrpo score` runs them; a row for every outcome of the draw."""
    monkeypatch.setattr(designs, "_spaced_bounds", triangular)
    table = random_table(length, seed=6)[:, :, 0]
    drawn, length_R = every_draw(design, length, num_samples)
    monkeypatch.setattr(masking, "draw", lambda *_, **__: drawn)
    batch = to_batch([(PROMPT, list(range(length)))] * len(length_R))
    rows = list(table_scorer(table, design, num_samples).score(batch))
    found = torch.tensor([row["elbo_completion"] for row in rows], dtype=torch.float64)
    each = estimates(drawn, length, table[:, :, None])[:, 0]
    torch.testing.assert_close(found, each, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.mean(), exact_elbo(table[:, :, None])[0], rtol=1e-6, atol=1e-6)


def test_score__elbo_std_is_the_spread_between_rows():
    """The same answer under many example ids: its rows differ by the noise that each row states."""
    length, num_rows = 5, 4_000
    table = random_table(length, seed=6)[:, :, 0]
    batch = to_batch([(PROMPT, list(range(length)))] * num_rows)
    options = mask_options(ScoreArguments("model", "data", "out.jsonl", num_samples=8))
    estimator = Estimator(MASK, 8, masks_per_level=1, seed=5, **options)
    rows = list(Scorer(TableModel(table), None, estimator, 1.0, 10**9, "cpu").score(batch))
    elbo, std = (torch.tensor([row[f"{name}_completion"] for row in rows]) for name in ("elbo", "elbo_std"))
    error = ((std.square().var() + (elbo - elbo.mean()).square().var()) / num_rows).sqrt()
    assert (std.square().mean() - elbo.var()).abs() < 5 * error
    assert summarise(rows)["elbo/completion_std"] == pytest.approx(float(elbo.std()), rel=0.1)


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_score__elbo_std_is_nan_where_the_draw_has_no_replicates(num_samples):
    scorer = table_scorer(random_table(3)[:, :, 0], VRPOConfig.mask_design, num_samples)
    (row,) = scorer.score(to_batch([(PROMPT, [0, 1, 2])]))
    assert math.isnan(row["elbo_std_completion"])


def test_score__a_reference_has_its_own_elbo_and_noise_from_the_same_masks():
    tables = [random_table(3, seed=seed)[:, :, 0] for seed in (6, 7)]
    batch = to_batch([(PROMPT, [0, 1, 2])] * 5)
    scorer = table_scorer(tables[0], "paper", 4, reference=TableModel(tables[1]))
    alone = table_scorer(tables[1], "paper", 4)
    for row, other in zip(scorer.score(batch), alone.score(batch), strict=True):
        assert row["ref_elbo_completion"] == other["elbo_completion"]
        assert row["ref_elbo_std_completion"] == other["elbo_std_completion"] > 0
        assert row["reward_completion"] == pytest.approx(row["elbo_completion"] - row["ref_elbo_completion"])
