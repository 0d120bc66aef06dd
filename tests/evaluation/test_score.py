"""`vrpo score` as a whole: which masks it uses, and that its figures are exact."""

import pytest

from vrpo.evaluation.score import ABSOLUTE_DESIGN, ScoreArguments, mask_options, summarise
from vrpo.training.config import VRPOConfig


def options(**given):
    return mask_options(ScoreArguments("model", "data", "out.jsonl", **given))


def test_mask_options__follow_the_purpose():
    """Margins have the masks of training, ELBOs by themselves those that suit them; what is given stays."""
    assert options(num_samples=4) == {
        "mask_design": ABSOLUTE_DESIGN,
        "pair_masks": VRPOConfig.pair_masks,
        "num_replicates": 1,
    }
    assert options(num_samples=8)["num_replicates"] == 2
    assert options(ref_model_name_or_path="base")["mask_design"] == VRPOConfig.mask_design
    for reference in (None, "base"):
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
