"""The benchmark of ELBOs by themselves on a case of seconds."""

import torch
from batches import make_pairs, to_batch

from benchmarks import bench_elbo
from vrpo.estimator.designs import DESIGNS
from vrpo.evaluation.score import ABSOLUTE_DESIGN
from vrpo.models import create_model


def test_bench_elbo__measures_every_weighting_of_a_drawn_design(tokenizer):
    model = create_model(tokenizer, d_model=16, n_layers=1, n_heads=2, init_std=0.3, dtype="float32", seed=0)
    batch = to_batch(make_pairs([(2, 5, 4), (1, 3, 6)], vocab_size=model.config.vocab_size))
    options = {"mask_token_id": model.config.mask_token_id, "num_repeats": 3, "seed": 0}
    for design, weightings in bench_elbo.WEIGHTINGS.items():
        found = bench_elbo.elbos(model, batch, design, 4, **options)
        assert set(found) == set(weightings)
        for name, elbo_QRK in found.items():
            assert elbo_QRK.shape == (3, 4, 4) and (elbo_QRK.mean(2) < 0).all()
            told = bench_elbo.moments(elbo_QRK, name)
            assert len(told["variance"]) == 4 and len(told["difference"]) == 2
    one = bench_elbo.elbos(model, batch, "mirrored", 4, **options)[ABSOLUTE_DESIGN].mean(2)
    assert not torch.equal(one[0], one[1]), "repeats draw afresh"


def test_bench_elbo__weighs_as_the_table_of_designs_does():
    """A weighting that bears the name of a design is that design."""
    for design, weightings in bench_elbo.WEIGHTINGS.items():
        for name, weights in weightings.items():
            if name in DESIGNS:
                assert DESIGNS[name].levels is DESIGNS[design].levels and DESIGNS[name].row_weights is weights
                assert DESIGNS[name].unbiased
