"""The paper's theorems on tables of known values, and the measurement of models."""

import json
import math

import pytest
import torch
from batches import make_pairs, to_batch
from datasets import Dataset
from enumeration import estimates, every_draw, random_table

from vrpo.batch import ResponseBatch
from vrpo.commands.main import main
from vrpo.estimator import masking
from vrpo.estimator.designs import DESIGNS
from vrpo.estimator.elbo import elbo
from vrpo.estimator.packing import pack
from vrpo.evaluation import noise_report, variance
from vrpo.evaluation.noise import PARTS
from vrpo.evaluation.variance import Estimate, Sampled, Scheme
from vrpo.evaluation.variance_report import advise, schemes_of, table
from vrpo.models import create_model
from vrpo.objectives import preference

LENGTHS = [(3, 5, 2), (1, 4, 9), (6, 4, 4)]


def one_length(length, num_responses):
    return ResponseBatch(
        tokens_U=torch.zeros(num_responses * (length + 1), dtype=torch.int64),
        prompt_length_R=torch.ones(num_responses, dtype=torch.int64),
        response_length_R=torch.full((num_responses,), length),
        example_R=torch.arange(num_responses),
        side_R=torch.zeros(num_responses, dtype=torch.int64),
        num_sides=1,
    )


def between_and_within_levels(values_table, length):
    """V_t and V_y of Lemma 5 by enumeration: variance of the level means, mean of the level variances."""
    drawn, _ = every_draw("paper", length, 1)
    value = estimates(drawn, length, values_table)[:, 0]
    level = drawn.offsets_S1.diff()
    means = torch.stack([value[level == size].mean() for size in range(1, length + 1)])
    spreads = torch.stack([value[level == size].var(correction=0) for size in range(1, length + 1)])
    return means.var(correction=0), spreads.mean()


@pytest.mark.parametrize(("num_levels", "masks_per_level"), [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_allocation__variance_is_that_of_lemma_five(num_levels, masks_per_level):
    """V[B_hat] = V_t / n_t + V_y / (n_t n_yt): arXiv 2505.19223 Lemma 5."""
    length, num_draws = 4, 20_000
    values = random_table(length, seed=3)[:, :, :1]
    between, within = between_and_within_levels(values, length)
    predicted = between / num_levels + within / (num_levels * masks_per_level)
    drawn = masking.draw(
        one_length(length, num_draws),
        num_samples=num_levels * masks_per_level,
        masks_per_level=masks_per_level,
        seed=2,
        epoch=0,
    )
    value = estimates(drawn, length, values)[:, 0]
    deviation = (value - value.mean()).square()
    assert (value.var() - predicted).abs() < 5 * deviation.std() / math.sqrt(num_draws)


@pytest.mark.parametrize("slope", [0.7, -0.7], ids=["reference alike", "reference opposite"])
def test_sharing__helps_if_and_only_if_the_estimates_correlate(slope):
    """V[shared] - V[unshared] = -2 Cov (Eq. 9, Prop. 2); an opposite reference is the counter-example."""
    length, num_draws = 4, 20_000
    policy = random_table(length, seed=4)[:, :, :1] + 2.0
    reference = slope * policy + 0.2 * (random_table(length, seed=5)[:, :, :1] + 2.0)
    batch = one_length(length, num_draws)
    first, second = (masking.draw(batch, num_samples=2, seed=2, epoch=epoch) for epoch in (0, 1))
    shared = estimates(first, length, policy) - estimates(first, length, reference)
    unshared = estimates(first, length, policy) - estimates(second, length, reference)
    drawn, _ = every_draw("paper", length, 2)
    pair = torch.cat([estimates(drawn, length, policy), estimates(drawn, length, reference)], dim=1)
    covariance = torch.cov(pair.T, correction=0)
    assert (covariance[0, 1] > 0) == (slope > 0)
    assert (shared.var() < unshared.var()) == (slope > 0)
    assert float(shared.var()) == pytest.approx(float(covariance.trace() - 2 * covariance[0, 1]), rel=0.1)
    assert float(unshared.var()) == pytest.approx(float(covariance.trace()), rel=0.1)


@pytest.fixture
def models(tokenizer):
    """fp64 policy and reference that differ, and three pairs."""
    policy, reference = (
        create_model(tokenizer, d_model=16, n_layers=2, n_heads=2, init_std=0.3, dtype="float32", seed=seed)
        for seed in (0, 1)
    )
    batch = to_batch(make_pairs(LENGTHS, vocab_size=policy.config.vocab_size), example_ids=[4, 0, 17])
    return policy.double(), reference.double(), batch


def nll(model, packed):
    return model(**packed.model_inputs()).nll


def test_sharing__leaves_the_gradient_of_the_score_unchanged(models):
    """Eq. 20: the reference has no gradient, so its draws act through the coefficient sigmoid(-s) alone."""
    policy, reference, batch = models
    mask_id = policy.config.mask_token_id
    packs = [
        pack(batch, masking.draw(batch, num_samples=4, seed=2, epoch=epoch), mask_id) for epoch in (0, 1)
    ]
    gradients, scores = [], []
    for other in packs:
        reference_RK = elbo(nll(reference, other), other).detach()
        score_B = preference.preference_score(elbo(nll(policy, packs[0]), packs[0]), reference_RK, 0.2)
        gradients.append(torch.autograd.grad(score_B.sum(), list(policy.parameters())))
        scores.append(score_B.detach())
    assert not torch.equal(*scores)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def run_sample(models, scheme, **options):
    policy, reference, batch = models
    settings = {"mask_token_id": policy.config.mask_token_id, "beta": 0.2, "num_repeats": 6, "seed": 3}
    return variance.sample(policy, reference, batch, scheme, **settings | options)


def test_sample__probe_gives_the_gradient_variance_of_the_layer(models):
    policy, reference, batch = models
    layer = policy.model.layers[0].mlp.up_proj
    sampled = run_sample(models, Scheme("paper", 2), probe=layer)
    gradients = []
    for repeat in range(6):
        drawn = masking.draw(batch, num_samples=2, seed=3, epoch=repeat)
        packed = pack(batch, drawn, policy.config.mask_token_id)
        with torch.no_grad():
            reference_RK = elbo(nll(reference, packed), packed)
        score_B = preference.preference_score(elbo(nll(policy, packed), packed), reference_RK, 0.2)
        loss_B = preference.dpo_loss(score_B)
        gradients.append(
            torch.stack([torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in loss_B])
        )
        torch.testing.assert_close(sampled.score_BQ[:, repeat], score_B.detach())
    want_B = torch.stack(gradients).var(dim=0, correction=1).sum((1, 2))
    torch.testing.assert_close(sampled.gradient_B, want_B, rtol=1e-8, atol=1e-14)


def test_sample__does_not_depend_on_the_packs(models):
    whole = run_sample(models, Scheme("balanced", 4))
    split = run_sample(models, Scheme("balanced", 4), max_tokens_per_pack=60)
    torch.testing.assert_close(whole.score_BQ, split.score_BQ, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("design", ["paper", "balanced", "ratio"])
def test_sample__a_policy_equal_to_the_reference_scores_zero_with_shared_masks(models, design):
    policy, _, batch = models
    same = (policy, policy, batch)
    assert torch.equal(run_sample(same, Scheme(design, 4)).score_BQ, torch.zeros(3, 6).double())
    unshared = run_sample(same, Scheme(design, 4, shared=False)).score_BQ
    assert unshared.abs().min() > 0


def test_sample__iid_variance_agrees_with_that_of_the_scores(models):
    sampled = run_sample(models, Scheme("paper", 2), num_repeats=150)
    direct_B = sampled.score_BQ.var(dim=1)
    torch.testing.assert_close(variance.score_variance(sampled), direct_B, rtol=0.5, atol=0.0)
    assert run_sample(models, Scheme("folded", 2)).iid_variance_B is None


@pytest.mark.parametrize(("design", "twin"), [("ratio", "balanced"), ("folded-jackknife", "folded-balanced")])
def test_sample__bias_is_the_difference_to_the_unbiased_twin_on_the_same_masks(models, design, twin):
    assert variance.unbiased_twin(design) == twin
    biased, exact = (run_sample(models, Scheme(name, 4)) for name in (design, twin))
    torch.testing.assert_close(biased.bias_BQ, biased.score_BQ - exact.score_BQ, rtol=1e-5, atol=1e-7)
    assert biased.bias_BQ.abs().max() > 1e-3 and exact.bias_BQ is None
    assert variance.unbiased_twin("gauss-legendre") is None


def test_sample__jackknife_is_the_loss_of_the_step(models):
    scheme = Scheme("balanced", 4, num_replicates=2)
    policy, reference, batch = models
    sampled = run_sample(models, scheme, num_repeats=2)
    packed = pack(batch, scheme.draw(batch, 3, 1), policy.config.mask_token_id)
    with torch.no_grad():
        sides = [elbo(nll(model, packed), packed) for model in (policy, reference)]
    want_B = preference.jackknife_dpo_loss(*sides, 0.2, packed.replicate_K)
    torch.testing.assert_close(sampled.jackknife_BQ[:, 1], want_B, rtol=1e-9, atol=1e-12)
    assert run_sample(models, Scheme("balanced", 4), num_repeats=1).jackknife_BQ is None


def test_mean_over_pairs__of_equal_values_has_no_spread():
    told = variance.mean_over_pairs(torch.full((9,), 2.0).double(), torch.full((9,), 4.0).double())
    assert told == Estimate(0.5, 0.5, 0.5)


def test_true_scores__leave_biased_and_unshared_schemes_out():
    good = Sampled(torch.tensor([[1.0, 3.0]]).double(), None)
    bad = Sampled(torch.tensor([[100.0, 101.0]]).double(), None)
    found = {Scheme("folded", 2): good, Scheme("ratio", 2): bad, Scheme("paper", 2, shared=False): bad}
    assert variance.true_scores(found).tolist() == [2.0]


def figures(**variance_of):
    return {
        Scheme(name.split("_")[0], int(name.split("_")[1])): {"score_variance": Estimate(value, value, value)}
        for name, value in variance_of.items()
    }


def test_advise__prefers_the_fewest_forwards_then_the_least_variance():
    known = figures(paper_4=2.0, paper_8=1.0, balanced_4=1.1, balanced_8=0.4, ratio_4=0.9)
    exact = advise(known, target=1.05, unbiased=True)
    assert (exact.design, exact.num_samples, exact.extrapolated) == ("balanced", 8, False)
    every = advise(known, target=1.05, unbiased=False)
    assert (every.design, every.num_samples) == ("ratio", 4)


def test_advise__extrapolates_with_one_over_k_to_an_even_number():
    advice = advise(figures(paper_4=2.0, balanced_4=1.0), target=0.3, unbiased=True)
    assert (advice.design, advice.num_samples, advice.extrapolated) == ("balanced", 14, True)
    assert advice.variance == pytest.approx(4 / 14)
    assert advise(figures(ratio_4=1.0), target=1.0, unbiased=True) is None


def test_table__has_one_line_per_scheme():
    assert len(table(figures(paper_2=1.0, balanced_2=0.5)).splitlines()) == 3


@pytest.mark.parametrize(("designs", "num_samples"), [(["paper"], []), ([], [0])])
def test_schemes_of__refuses_numbers_that_leave_nothing_to_measure(designs, num_samples):
    with pytest.raises(ValueError, match="num_samples must"):
        schemes_of(designs, num_samples, ["positions"])


def test_noise_report__says_what_pays():
    """Everything as noisy as the paper's score but for positions, and for the balanced weights of graded."""
    parts = dict(zip(PARTS, (1.0, 2.0, 3.0, 4.0), strict=True))
    predicted = {}
    for number in (2, 8):
        for name in (name for name, design in DESIGNS.items() if design.unbiased):
            for pair_masks, factor in (("positions", 0.5), ("independent", 1.0)):
                total = 10.0 * factor * {"graded-balanced": 1.2, "graded": 0.98}.get(name, 1.0)
                told = {**parts, "total": total, "response": 5.0}
                predicted[Scheme(name, number, pair_masks=pair_masks)] = told
    content = noise_report.content(predicted)
    assert content["paper"] == dict(zip(PARTS, (0.1, 0.2, 0.3, 0.4), strict=True)) | {"correlation": 0.5}
    assert [(best["design"], best["num_samples"]) for best in content["best"]] == [
        ("graded", 2),
        ("graded", 8),
    ]
    assert [best["score_ratio"] for best in content["best"]] == pytest.approx([0.49, 0.49])
    text = "\n".join(noise_report.lines(content))
    assert "too few draws" not in text
    wild = content | {"paper": content["paper"] | {"masks": -0.2}}
    assert "shares (masks cannot be negative)" in "\n".join(noise_report.lines(wild))
    assert "sharing positions pays: at K=8, graded, positions, has 0.50 times" in text
    assert "balancing row weights costs: at K=8, graded-balanced, positions, has 1.22 times" in text
    assert (
        "masking few tokens more often makes little difference: at K=8, graded, positions, has 0.98" in text
    )


def test_noise_report__takes_nothing_below_zero_for_the_best():
    """Moments of too few draws."""
    predicted = {}
    for name in (name for name, design in DESIGNS.items() if design.unbiased):
        for pair_masks in ("positions", "independent"):
            total = {"paper": 2.0, "graded": -1.0, "tiled": 0.5}.get(name, 1.0)
            told = {part: total / 4 for part in PARTS} | {"total": total, "response": 1.0}
            predicted[Scheme(name, 4, pair_masks=pair_masks)] = told
    content = noise_report.content(predicted)
    assert [best["design"] for best in content["best"]] == ["tiled"]
    assert [found["what"] for found in content["findings"]] == ["sharing positions"]
    assert any(row["score_ratio"] == -0.5 for row in content["predicted"])


def test_noise_report__has_nothing_to_tell_where_the_paper_shows_no_noise():
    none = {part: -0.5 for part in PARTS} | {"total": -2.0, "response": 0.0}
    assert noise_report.content({Scheme("paper", 4): none}) is None


def test_cli_variance__writes_figures_and_plot(tmp_path, capsys, monkeypatch, tokenizer, pair_rows):
    for name, seed in (("policy", 0), ("reference", 1)):
        model = create_model(tokenizer, d_model=16, n_layers=1, n_heads=2, init_std=0.3, seed=seed)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    Dataset.from_list(list(pair_rows)).to_json(tmp_path / "pairs.jsonl")
    command = ["variance", "--model_name_or_path", str(tmp_path / "policy")]
    command += ["--ref_model_name_or_path", str(tmp_path / "reference")]
    command += ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_file", str(tmp_path / "v.json")]
    command += ["--num_samples", "2", "--num_pairs", "3", "--num_repeats", "2", "--gradient", "true"]
    assert main([*command, "--designs", "folded", "balanced"]) == 0
    shown = capsys.readouterr().out
    assert "recommended, exactly unbiased: mask_design=" in shown and "gradient_ratio" in shown
    assert "score_bias" in shown and "sign_flips" in shown and "positions" in shown
    assert "noise of the paper's score: levels" in shown and "best predicted, K=2: mask_design=" in shown
    assert all(f"\n{what}" in shown for what in ("sharing positions", "balancing row", "masking few tokens"))
    assert (tmp_path / "v.json").exists() and (tmp_path / "v.png").exists()
    told = json.loads((tmp_path / "v.json").read_text())["noise"]
    assert sum(told["paper"][part] for part in PARTS) == pytest.approx(1)
    assert {row["design"] for row in told["predicted"]} == {n for n, d in DESIGNS.items() if d.unbiased}
    assert main([*command, "--designs", "balanced", "--noise_repeats", "0"]) == 0
    assert "best predicted" not in capsys.readouterr().out
    assert json.loads((tmp_path / "v.json").read_text())["noise"] is None
    assert main([*command, "--designs", "nothing"]) == 2
    assert "mask_design must be one of" in capsys.readouterr().err
    monkeypatch.setattr(noise_report, "content", lambda predicted: None)
    assert main([*command, "--designs", "balanced"]) == 0
    assert "noise of the paper's score: none that the draws of noise_repeats show" in capsys.readouterr().out
