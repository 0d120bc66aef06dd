"""Row weights of least variance under a measured covariance: exact, and no worse than the flat ones."""

import pytest
import torch
from batches import make_pairs, to_batch

from benchmarks.variance.bound import best_weights
from vrpo.evaluation import noise
from vrpo.evaluation.variance import Scheme
from vrpo.models import create_model


def test_best_weights__keep_totals_and_have_the_least_predicted_variance(tokenizer):
    options = {"d_model": 16, "n_layers": 2, "n_heads": 2, "init_std": 0.3, "dtype": "float32"}
    policy, reference = (create_model(tokenizer, seed=seed, **options) for seed in (0, 1))
    sizes = [(2, 9 + i % 4, 12 - i % 3) for i in range(12)]
    batch = to_batch(make_pairs(sizes, vocab_size=policy.config.vocab_size))
    mask_token_id = policy.config.mask_token_id
    found = noise.measure(policy, reference, batch, mask_token_id=mask_token_id, num_repeats=6)
    reweigh = best_weights(found)

    def checked(chosen, rejected):
        best = reweigh(chosen, rejected)
        for before, after in zip((chosen, rejected), best, strict=True):
            torch.testing.assert_close(after.omega_BDKL.sum(3), before.omega_BDKL.sum(3))
            assert ((after.omega_BDKL != 0) <= (before.omega_BDKL != 0)).all(), "only masked rows weigh"
            assert (after.omega_BDKL - before.omega_BDKL).abs().max() > 1e-3
        return best

    for design, balanced in (("spaced", "balanced"), ("graded", "graded-balanced")):
        best = noise.predict(found, Scheme(design, 4, pair_masks="positions"), reweigh=checked)
        for name in (design, balanced):
            other = noise.predict(found, Scheme(name, 4, pair_masks="positions"))
            assert best["tokens"] + best["masks"] < other["tokens"] + other["masks"]
            assert best["levels"] == pytest.approx(other["levels"]), "totals, and with them their noise, stay"
