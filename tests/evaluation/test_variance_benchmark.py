"""The benchmark of mask designs on cases of seconds: what it measures, keeps, goes on with and tells."""

import csv
import inspect
import json
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from batches import make_pairs, to_batch
from torch.nn.functional import softplus

from benchmarks.variance import command, measure, report, run, training
from benchmarks.variance import models as models_script
from benchmarks.variance.measure import BETA, Draw
from vrpo.estimator.designs import DESIGNS
from vrpo.estimator.elbo import elbo
from vrpo.estimator.packing import pack
from vrpo.evaluation import variance
from vrpo.evaluation.variance import Scheme
from vrpo.models import create_model

DRAWS = measure.score_draws(0.1) + measure.absolute_draws(0.1)
PROVENANCE = {"date", "git", "dirty", "device", "torch", "triton"}
SIZES = {"d_model": 16, "n_layers": 1, "n_heads": 2, "init_std": 0.3, "dtype": "float32"}


def draw_id(draw):
    return f"{draw.design}-{draw.num_samples}"


@pytest.fixture(scope="module")
def models(tokenizer):
    """Policy and reference."""
    return [create_model(tokenizer, seed=seed, **SIZES) for seed in (0, 1)]


@pytest.fixture(scope="module")
def batch(models):
    return to_batch(make_pairs([(2, 5, 4), (1, 3, 6)], vocab_size=models[0].config.vocab_size))


# What is drawn


@pytest.mark.parametrize("draw", DRAWS, ids=draw_id)
def test_elbos__gives_every_weighting_of_every_model(models, batch, draw):
    found = measure.elbos(models, batch, draw, mask_token_id=models[0].config.mask_token_id, seed=0)
    assert list(found) == list(draw.weightings)
    for by_model in found.values():
        assert [elbo_QRK.shape for elbo_QRK in by_model] == [(draw.repeats, 4, draw.num_samples)] * 2
        one_QR, other_QR = (elbo_QRK.mean(2) for elbo_QRK in by_model)
        assert (one_QR < 0).all() and not torch.equal(one_QR, other_QR)
        assert not torch.equal(one_QR[0], one_QR[1]), "repeats draw afresh"


@pytest.mark.parametrize("draw", DRAWS, ids=draw_id)
def test_elbos__a_weighting_with_the_name_of_a_design_is_that_design(models, batch, draw):
    """By the table of designs, and by the scores that `variance.sample` measures."""
    policy, reference = models
    options = {"mask_token_id": policy.config.mask_token_id, "seed": 3}
    found = measure.elbos([reference, policy], batch, draw, **options)
    named = [name for name in draw.weightings if name in DESIGNS]
    assert draw.design in named
    for name in named:
        assert DESIGNS[name].levels is DESIGNS[draw.design].levels
        assert DESIGNS[name].row_weights is draw.weightings[name]
        scheme = Scheme(name, draw.num_samples, pair_masks="positions")
        sampled = variance.sample(
            policy, reference, batch, scheme, beta=BETA, num_repeats=draw.repeats, **options
        )
        ratio_QR = (found[name][1] - found[name][0]).mean(2)
        score_QB = BETA * (ratio_QR[:, 0::2] - ratio_QR[:, 1::2])
        torch.testing.assert_close(score_QB.T, sampled.score_BQ, rtol=1e-4, atol=1e-5)


def test_draws__the_designs_of_the_tables_are_among_them():
    assert {"paper", "graded-balanced", "balanced", "inverse-root", "ratio"} <= {
        name for draw in measure.score_draws(1) for name in draw.weightings
    }
    assert all(draw.repeats >= 2 for draw in DRAWS), "one draw has no variance"


# Rows of it


def random_elbos(num_repeats, num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_repeats, 4, num_samples, generator=generator, dtype=torch.float64)


def close(values, want):
    """Rows keep four digits."""
    return np.array(values) == pytest.approx(np.asarray(want), rel=1e-3)


def test_score_rows__of_the_paper_come_from_single_samples():
    reference, policy = random_elbos(3, 8), random_elbos(3, 8, seed=1)
    draw = Draw("paper", 8, 3, {"paper": None})
    four, eight = measure.score_rows(draw, {"paper": [reference, policy]}, ["late"])
    single_NR = (policy - reference).transpose(1, 2).reshape(24, 4)
    chosen, rejected = single_NR[:, 0::2], single_NR[:, 1::2]
    assert (four["num_samples"], four["repeats"]) == (4, 6)
    assert (eight["num_samples"], eight["repeats"]) == (8, 3)
    for row, number in ((four, 4), (eight, 8)):
        assert close(row["score"], BETA**2 * (chosen - rejected).var(0) / number)
        assert close(row["score_independent"], BETA**2 * (chosen.var(0) + rejected.var(0)) / number)
        assert close(row["mean"], BETA * (chosen - rejected).mean(0))
    halves = (policy - reference).view(3, 4, 2, 4).mean(3)
    score_QB2 = BETA * (halves[:, 0::2] - halves[:, 1::2])
    assert close(four["loss"], softplus(-score_QB2.transpose(1, 2).reshape(6, 2)).var(0))


def test_score_rows__of_other_designs_are_plain_variances_over_draws():
    reference, *policies = (random_elbos(5, 4, seed) for seed in range(3))
    draw = Draw("graded", 4, 5, {"graded": None})
    rows = list(measure.score_rows(draw, {"graded": [reference, *policies]}, ["late", "early"]))
    assert [(row["drift"], row["design"], row["num_samples"]) for row in rows] == [
        ("late", "graded", 4),
        ("early", "graded", 4),
    ]
    for row, policy in zip(rows, policies, strict=True):
        value_QR = (policy - reference).mean(2)
        chosen, rejected = BETA * value_QR[:, 0::2], BETA * value_QR[:, 1::2]
        assert row["kind"] == "score" and row["repeats"] == 5
        assert close(row["score"], (chosen - rejected).var(0))
        assert close(row["score_independent"], chosen.var(0) + rejected.var(0))
        assert close(row["loss"], softplus(rejected - chosen).var(0))
        shifted = rejected[[1, 2, 3, 4, 0]]
        assert close(row["loss_independent"], softplus(shifted - chosen).var(0))
        assert close(row["mean"], (chosen - rejected).mean(0))


def test_score_rows__equal_sides_have_noise_only_where_they_are_drawn_apart():
    policy = random_elbos(5, 4)
    policy[:, 1::2] = policy[:, 0::2]
    draw = Draw("spaced", 4, 5, {"spaced": None})
    (row,) = measure.score_rows(draw, {"spaced": [torch.zeros_like(policy), policy]}, ["late"])
    assert row["score"] == row["loss"] == row["mean"] == [0, 0]
    assert min(row["score_independent"]) > 0 and min(row["loss_independent"]) > 0


def test_absolute_rows__paper_by_single_samples_and_others_by_draws():
    elbo_QRK = random_elbos(3, 8) - 5
    single_NR = elbo_QRK.transpose(1, 2).reshape(24, 4)
    draw = Draw("paper", 8, 3, {"paper": None})
    rows = measure.absolute_rows(draw, {"paper": [elbo_QRK]}, ["reference"])
    for row, number in zip(rows, (4, 8), strict=True):
        assert (row["kind"], row["drift"], row["num_samples"]) == ("absolute", "reference", number)
        assert close(row["response"], single_NR.var(0) / number)
        assert close(row["difference"], (single_NR[:, 0::2] - single_NR[:, 1::2]).var(0) / number)
    draw = Draw("tiled", 8, 3, {"tiled": None})
    (row,) = measure.absolute_rows(draw, {"tiled": [elbo_QRK]}, ["reference"])
    value_QR = elbo_QRK.mean(2)
    assert close(row["response"], value_QR.var(0)) and row["repeats"] == 3
    assert close(row["difference"], (value_QR[:, 0::2] - value_QR[:, 1::2]).var(0))
    assert row["elbo"] == pytest.approx(float(elbo_QRK.mean()), rel=1e-3)


def test_sft_row__is_the_gradient_variance_of_the_chosen_responses(models, batch):
    """Against one backward pass per response and draw."""
    model, scheme, mask_token_id = models[0], Scheme("coupled", 2), models[0].config.mask_token_id
    row = measure.sft_row(model, batch, scheme, mask_token_id=mask_token_id, repeats=3, seed=5)
    weight = model.model.layers[0].mlp.up_proj.weight
    gradients = []
    for repeat in range(3):
        packed = pack(batch, scheme.draw(batch, 5, repeat), mask_token_id)
        loss_R = -elbo(model(**packed.model_inputs()).nll, packed).mean(1) / batch.response_length_R
        gradients += [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in loss_R[0::2]]
    gradient_QB = torch.stack(gradients).double().unflatten(0, (3, 2))
    assert row["kind"] == "sft" and close(row["gradient"], gradient_QB.var(0).sum((1, 2)))


# The runner


@pytest.fixture(scope="module")
def trained(tokenizer, pair_rows, tmp_path_factory):
    """A folder as models.py leaves it, of tiny models with random weights."""
    folder = tmp_path_factory.mktemp("models") / "arithmetic-1"
    for seed, name in enumerate(["reference", "sft-early", "small", "early", "late"]):
        create_model(tokenizer, seed=seed, **SIZES).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "reference")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows))
    (folder / "training.json").write_text(json.dumps({"max_length": 64}))
    return folder


@pytest.fixture
def small_runs(monkeypatch, tmp_path):
    """Few pairs and draws, results in tmp_path/variance. A run sets the number of threads."""
    monkeypatch.setattr(run, "EFFORT", {"arithmetic": (2, 0.1)})
    monkeypatch.setattr(run, "FOLDER", tmp_path / "variance")
    monkeypatch.setattr(run, "PREDICTED", ["paper", "balanced", "graded-balanced"])
    monkeypatch.setattr(report, "NUM_RESAMPLES", 50)
    threads = torch.get_num_threads()
    yield tmp_path / "variance" / "arithmetic-1.jsonl"
    torch.set_num_threads(threads)


def measure_models(trained, *options):
    common = ["--tasks", "arithmetic", "--models", "1", "--folder", str(trained.parent)]
    assert command.main(["run", *common, *options]) == 0


def figures(file):
    """key -> what was measured, without when and where."""
    return {
        run.key(row): {name: value for name, value in row.items() if name not in PROVENANCE}
        for row in run.read_rows(file)
    }


@pytest.mark.parametrize("kind", run.KINDS)
def test_run__goes_on_where_it_was_cut(trained, small_runs, kind):
    measure_models(trained, "--kinds", kind)
    whole, want = small_runs.read_text(), figures(small_runs)
    assert len(want) == len(whole.splitlines()), "every key once"
    measure_models(trained, "--kinds", kind)
    assert small_runs.read_text() == whole, "nothing is measured twice"
    last_line = whole.rindex("\n", 0, -1) + 1
    for cut in (last_line, len(whole) - 20, len(whole) - 1, len(whole) // 2):
        small_runs.write_text(whole[:cut])
        assert len(figures(small_runs)) < len(want)
        measure_models(trained, "--kinds", kind)
        assert figures(small_runs) == want
        assert small_runs.read_text().startswith(whole[: whole.rfind("\n", 0, cut) + 1]), "rows stay"


def test_run__measures_everything_the_report_tells(trained, small_runs, capsys):
    measure_models(trained, "--models", "1", "2")
    assert "arithmetic-2: not trained, left out" in capsys.readouterr().out
    rows = run.read_rows(small_runs)
    assert {row["kind"] for row in rows} >= {"score", "absolute", "gradient", "predicted", "sft", "table2"}
    for row in rows:
        assert set(row) >= PROVENANCE and (row["task"], row["model"]) == ("arithmetic", 1)
    assert {row["drift"] for row in rows if row["kind"] == "absolute"} == {"reference", "sft-early"}
    assert not any(row["design"] == "ratio" for row in rows if row["kind"] == "absolute"), "it is biased"
    assert command.main(["report", "--results", str(small_runs.parent)]) == 0
    told = capsys.readouterr().out
    for part in (
        "\nscore-8\n",
        "\ngradient-4\n",
        "\nabsolute-8\n",
        "n_t x n_y",
        "| `coupled` |",
        "\nparts\n",
    ):
        assert part in told
    assert {row["seed"] for row in rows} == {1000}
    assert {row["weights"] for row in rows} == {run.fingerprint(trained)}
    gradients = {(row["drift"], row["num_samples"]) for row in rows if row["kind"] == "gradient"}
    assert gradients == {("late", 4), ("late", 8), ("early", 4)}
    with pytest.raises(SystemExit, match="draws of --seed 1000, not 1"):
        measure_models(trained, "--seed", "1")


@pytest.mark.parametrize(("row", "seed"), [({"seed": 7}, 7), ({}, 0)], ids=["named", "first files"])
def test_model__a_file_goes_on_with_its_own_seed_and_new_files_have_one_each(trained, small_runs, row, seed):
    assert run.Model(trained).seed == 1000
    assert run.Model(trained.with_name("arithmetic-3")).seed == 3000
    assert run.Model(trained, 5).seed == 5
    run.append_rows(small_runs, [{"kind": "score", "design": "paper", "num_samples": 4} | row])
    assert run.Model(trained).seed == run.Model(trained, seed).seed == seed
    with pytest.raises(SystemExit, match=f"draws of --seed {seed}, not 5"):
        run.Model(trained, 5)


def test_model__a_file_takes_no_rows_of_other_weights(trained, small_runs, tmp_path):
    other = tmp_path / trained.name
    shutil.copytree(trained, other)
    assert run.fingerprint(other) == run.fingerprint(trained)
    run.Model(trained).write([{"kind": "sft", "design": "paper", "num_samples": 2}], 0.0)
    run.Model(other)
    shutil.copytree(trained / "small", other / "early", dirs_exist_ok=True)
    with pytest.raises(SystemExit, match=f"figures of the weights {run.fingerprint(trained)}, and .* has"):
        run.Model(other)


def test_run__trains_no_model_for_a_file_of_another(small_runs, tmp_path, monkeypatch, capsys):
    run.append_rows(small_runs, [{"kind": "sft", "design": "paper", "num_samples": 2, "weights": "gone"}])
    kept = small_runs.read_text()
    made = []
    monkeypatch.setattr(run, "train", lambda folder, *_: made.append(folder.name))
    measure_models(tmp_path / "models" / "arithmetic-1", "--train", "--models", "1", "2")
    assert made == ["arithmetic-2"]
    assert "arithmetic-1: its file is of a model that is not here" in capsys.readouterr().out
    assert small_runs.read_text() == kept


def test_run__refuses_a_gpu_that_is_not_there_before_any_work(trained, small_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ([], ["--train"]):
        with pytest.raises(SystemExit, match="torch sees no CUDA device"):
            measure_models(trained, "--device", "cuda", *options)
    arguments = ["models", "carrying", "--device", "cuda", "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        models_script.main()
    assert not small_runs.exists() and not (tmp_path / "new").exists()


def test_run__measures_where_it_is_told(trained, small_runs, monkeypatch):
    made = []

    class Model(run.Model):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(run, "Model", Model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "provenance", lambda device: {"device": device})
    measure_models(trained, "--device", "cuda", "--kinds")
    assert [model.options for model in made] == [{"seed": 1000, "device": "cuda"}]
    made[0].write([{"kind": "sft", "design": "paper", "num_samples": 2}], 0.0)
    assert [row["device"] for row in run.read_rows(small_runs)] == ["cuda"]


def test_predictions__come_from_draws_of_their_own(trained, small_runs, monkeypatch):
    seeds = []
    measured = run.noise.measure_all

    def measure_all(*given, seed, **options):
        seeds.append(seed)
        return measured(*given, seed=seed, **options)

    monkeypatch.setattr(run.noise, "measure_all", measure_all)
    measure_models(trained, "--kinds", "predictions", "--seed", "40")
    assert set(seeds) == {41}


def test_append_rows__half_a_line_goes_away(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    assert run.read_rows(file) == []
    run.append_rows(file, [{"a": 1}, {"a": 2}])
    file.write_text(file.read_text() + '{"a": ')
    assert run.read_rows(file) == [{"a": 1}, {"a": 2}]
    run.append_rows(file, [{"a": 3}])
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    file.write_text('{"a": 1')
    run.append_rows(file, [{"a": 4}])
    assert run.read_rows(file) == [{"a": 4}]


# The report


def test_load__refuses_figures_that_are_not_finite(tmp_path):
    row = {"task": "gsm8k", "model": 1, "kind": "sft", "design": "paper", "num_samples": 4}
    folder = write_results(tmp_path, [row | {"gradient": [1.0, float("nan")]}])
    with pytest.raises(ValueError, match=r"'gradient' of .* must be finite"):
        report.load(folder)


def test_over_models__means_ratios_of_means():
    told = report.over_models([(1, [1.0, 3.0], [2.0, 6.0]), (2, [2.0, 4.0], [2.0, 2.0])])
    assert told.models == {1: 0.5, 2: 1.5} and told.pairs == 2
    assert (told.mean, told.best, told.worst) == (1.0, 0.5, 1.5)
    assert report.over_models([]) is None
    still = (3, [1.0, 1.0], [0.0, 0.0])  # there is nothing to be relative to
    assert report.over_models([still]) is None
    assert report.over_models([still, (1, [1.0, 3.0], [2.0, 6.0])]).models == {1: 0.5}


def test_over_models__interval_of_equal_models_is_that_of_pairs():
    """A task's models are measured on the same pairs, so more of them tell no more about pairs."""
    one = report.over_models([(1, [1.0, 3.0], [4.0, 4.0])])
    assert (one.low, one.mean, one.high) == (0.25, 0.5, 0.75)
    values, base = [float(x) for x in range(1, 11)], [5.0] * 10
    one, four = (report.over_models([(m, values, base) for m in range(number)]) for number in (1, 4))
    assert (four.low, four.mean, four.high) == pytest.approx((one.low, one.mean, one.high))
    assert one.low < 0.9 < one.mean < 1.3 < one.high


def test_over_models__interval_of_equal_pairs_is_that_of_models():
    told = report.over_models([(1, [2.0] * 5, [4.0] * 5), (2, [1.0] * 5, [1.0] * 5)])
    assert (told.low, told.mean, told.high) == (0.5, 0.75, 1.0)
    same = report.over_models([(model, [2.0] * 5, [4.0] * 5) for model in range(3)])
    assert (same.low, same.mean, same.high) == (0.5, 0.5, 0.5)


def test_over_models__takes_the_pairs_that_both_have():
    told = report.over_models([(1, [1.0, 1.0], [2.0, 2.0, 100.0])])
    assert (told.low, told.mean, told.high, told.pairs) == (0.5, 0.5, 0.5, 2)


def test_two__has_two_digits():
    assert [report.two(x) for x in (0.444, 1.0, 9.99, 12.3)] == [".44", "1.00", "9.99", "12"]


def score_row(task, model, design, value, *, number=4, drift="late"):
    """Three pairs; independent sides double the variance."""
    values = [value, 2 * value, 3 * value]
    doubled = [2 * x for x in values]
    figures = {"score": values, "score_independent": doubled, "loss": values, "loss_independent": doubled}
    names = {"kind": "score", "drift": drift, "design": design, "num_samples": number}
    return {"task": task, "model": model} | names | figures | {"mean": [0.0] * 3}


def predicted_row(model, design, pair_masks, total):
    names = {"kind": "predicted", "drift": "late", "design": design, "pair_masks": pair_masks}
    parts = dict.fromkeys(report.PARTS, total / 4)
    return {"task": "gsm8k", "model": model, "num_samples": 4, "total": total} | names | parts


def write_results(tmp_path, rows):
    folder = tmp_path / "variance"
    for row in rows:
        run.append_rows(folder / f"{row['task']}-{row['model']}.jsonl", [row])
    return folder


def read_csv(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


SCORES = [
    score_row("gsm8k", model, design, value * (1 + model / 10))
    for model in (1, 2)
    for design, value in (("paper", 4.0), ("ratio", 1.5), ("graded-balanced", 2.0), ("graded", 3.0))
    if (model, design) != (2, "graded")
]


def test_load__keeps_the_last_of_rows_with_one_key(tmp_path):
    folder = write_results(tmp_path, [*SCORES, score_row("gsm8k", 2, "paper", 9.0)])
    with (folder / "gsm8k-1.jsonl").open("a") as file:
        file.write('{"task": "gsm8k", "mod')
    found = report.load(folder)
    (models,) = found.values()
    assert {model: len(rows) for model, rows in models.items()} == {1: 4, 2: 3}
    assert found["gsm8k"][2]["score", "late", "paper", None, 4]["score"] == [9.0, 18.0, 27.0]


def test_ratio__is_to_the_paper_with_independent_sides(tmp_path):
    models = report.load(write_results(tmp_path, SCORES))["gsm8k"]

    def mean(*names):
        told = report.ratio(models, "score", "late", *names, 4)
        return told and told.mean

    assert mean("paper", "independent") == 1 and mean("paper", "positions") == 0.5
    assert mean("graded-balanced", "positions") == pytest.approx(0.25)
    assert mean("graded-balanced", "independent") == pytest.approx(0.5)
    assert mean("mirrored", "positions") is None
    assert list(report.ratio(models, "score", "late", "graded", "positions", 4).models) == [1]


def test_design_table__sorts_by_the_mean_and_marks_biased_designs(tmp_path):
    found = report.load(write_results(tmp_path, SCORES))
    header, _, *lines = report.design_table(found, "score", 4, report.COLUMNS).splitlines()
    assert header == "| design | mean, worst | GSM8K, late |", "columns that nobody measured are left out"
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert names[:3] == ["`ratio` (biased), positions", "`graded-balanced`, positions", "`graded`, positions"]
    assert len(names) == 8 and names[-1] == "`paper`"
    means = [float(line.split(" | ")[1].split(",")[0]) for line in lines]
    assert means == sorted(means)
    assert report.design_table(found, "gradient", 4, report.COLUMNS) == ""


def test_report__writes_tables_and_figures_of_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "NUM_RESAMPLES", 50)
    predicted = [
        predicted_row(model, design, pair_masks, total)
        for model in (1, 2)
        for design, pair_masks, total in (
            ("paper", "independent", 8.0),
            ("graded-balanced", "positions", 2.4),
            ("coupled", "positions", 6.0),
        )
    ]
    folder = write_results(tmp_path, SCORES + predicted)
    assert command.main(["report", "--results", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "\nscore-4\n" in told and "\nscore-8\n" not in told and "\ngradient-" not in told
    rows = read_csv(tmp_path / "variance.csv")
    (row,) = [
        row
        for row in rows
        if (row["quantity"], row["design"], row["pair_masks"]) == ("score", "graded-balanced", "positions")
    ]
    assert (row["mean"], row["models"], row["pairs"], row["each"]) == ("0.25", "2", "3", "1:0.25 2:0.25")
    assert {row["design"] for row in rows if row["unbiased"] == "False"} == {"ratio"}
    rows = read_csv(tmp_path / "prediction.csv")
    ours = [row for row in rows if row["design"] == "graded-balanced"]
    assert [(row["predicted"], row["measured"], row["tokens"]) for row in ours] == [
        ("0.3", "0.25", "0.075")
    ] * 2
    assert [row["measured"] for row in rows if row["design"] == "coupled"] == ["", ""]
    assert "| `graded-balanced`, positions | 4 | +0.05; .05, .05; 2 of 2 |" in told
    for name in ("variance.png", "prediction.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_report__needs_no_predictions_and_no_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "NUM_RESAMPLES", 50)
    names = {"task": "gsm8k-long", "model": 1, "kind": "absolute", "drift": "reference", "num_samples": 8}
    rows = [
        names | {"design": design, "response": [1.0, 2.0], "difference": [1.0]}
        for design in ("paper", "tiled-balanced")
    ]
    cut_short = predicted_row(1, "graded-balanced", "positions", 1.0)
    folder = write_results(tmp_path, [*rows, cut_short])
    assert command.main(["report", "--results", str(folder)]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["variance", "variance.csv"]


def test_report__says_so_where_nothing_was_measured(tmp_path):
    with pytest.raises(SystemExit, match="no variances in"):
        command.main(["report", "--results", str(tmp_path / "variance")])


# Training outcomes


def test_train__hands_on_where_to_train(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(run.subprocess, "run", lambda command, check: commands.append(command))
    run.train(tmp_path / "gsm8k-long-3", "gsm8k-long", 3, tmp_path, "cuda")
    assert [command[3] for command in commands] == ["gsm8k", "gsm8k-long"], "what it starts from goes first"
    for told in commands:
        assert told[told.index("--device") + 1] == "cuda" and told[told.index("--seed") + 1] == "3"


def test_paired__is_the_t_interval_of_the_mean():
    """Mean -.2, deviation .1 of three: 4.303 * .1 / sqrt 3 = .248."""
    told = training.paired(np.array([-0.1, -0.2, -0.3]))
    assert told == "-0.200 [-0.448, +0.048], lower in 3 of 3"
    assert training.paired(np.array([1.0, -0.5])).startswith("+0.250 [-9.282, +9.782], lower in 1 of 2")
    assert training.paired(np.zeros(3)) == "-"


def outcome(task, model, arm, loss):
    return {"task": task, "model": model, "arm": arm, "steps": 60, "loss": loss, "accuracy": 0.75}


def of_designs(kind, drift, numbers, left_out=()):
    """Rows of one model: numbers maps a design to K, and the place of a design is its variance."""
    names = [((kind, drift, design, None, number), design) for design, number in numbers.items()]
    return {
        name: {part: [float(place + 1)] * 2 for part in ("score", "loss", "gradient")}
        for place, (name, design) in enumerate(names)
        if design not in left_out
    }


def test_sft_table__compares_designs_on_the_models_that_have_all_of_them():
    numbers = dict.fromkeys(measure.SFT_DESIGNS, 4)
    whole = of_designs("sft", "reference", numbers)
    lacking = of_designs("sft", "reference", numbers, left_out=["coupled"])
    lacking["sft", "reference", "graded-balanced", None, 4] = {"gradient": [99.0, 99.0]}
    two = of_designs("sft", "sft-early", dict.fromkeys(measure.SFT_DESIGNS, 2))
    told = report.sft_table(
        {"gsm8k": {1: whole, 2: lacking}, "arithmetic": {1: lacking}, "gsm8k-long": {1: two, 2: two}}
    )
    assert "| design | K | GSM8K, reference | five GSM8K problems, sft-early |" in told and "99" not in told
    assert "| `paper` | 4 | 1.00 [1.00, 1.00] (1) | - |" in told
    assert "| `paper` | 2 | - | 1.00 [1.00, 1.00]; 1.00 to 1.00 (2) |" in told
    assert "| `graded-balanced` | 4 | 4.00 [4.00, 4.00] (1) | - |" in told


def test_table2__is_of_models_that_have_all_of_its_rows():
    numbers = {design: scheme.num_samples for design, scheme in measure.TABLE2.items()}
    whole = of_designs("table2", "late", numbers)
    lacking = of_designs("table2", "late", numbers, left_out=["paper, 2 x 2"])
    double = {name: {part: [2 * x for x in xs] for part, xs in row.items()} for name, row in whole.items()}
    told = report.table2({"gsm8k": {1: whole, 2: lacking, 3: double}, "gsm8k-long": {1: lacking}})
    assert told.splitlines()[0] == "| n_t x n_y | score, GSM8K | loss, GSM8K | gradient, GSM8K |"
    assert "| paper, 4 x 1, not shared | 9 | 9 | 9 |" in told
    assert report.table2({"gsm8k-long": {1: lacking}}) == ""


def test_say_predictions__counts_those_within_a_tenth():
    row = {"task": "gsm8k", "design": "graded-balanced", "pair_masks": "positions", "num_samples": 4}
    rows = [row | {"predicted": "0.5", "measured": measured} for measured in ("0.4", "0.35", "0.8", None)]
    told = report.say_predictions([*rows, row | {"design": "paper", "predicted": "1", "measured": "9"}])
    assert told.splitlines()[-1] == "| `graded-balanced`, positions | 4 | -0.02; .18, .30; 1 of 3 |"


def test_gradient_noise_table__holds_the_paper_against_itself():
    def row(number, *values):
        return {("gradient", "late", "paper", "independent", number): {"gradient": list(values)}}

    models = {1: row(4, 1.0, 3.0) | row(8, 1.0, 1.0), 2: row(4, 2.0, 2.0) | row(8, 2.0, 2.0), 3: {}}
    models[4] = row(4, 0.0, 0.0) | row(8, 0.0, 0.0)
    told = report.gradient_noise_table({"gsm8k": models, "gsm8k-long": {1: row(4, 1.0)}})
    assert told.splitlines()[2:] == ["| GSM8K | 2 | .62; .50 to .75 (2) | .75; .50 to 1.00 (2) |"]


def test_beside_table__counts_models_that_have_both():
    def row(design, *values, pair_masks="positions"):
        return {("gradient", "late", design, pair_masks, 4): {"gradient": list(values)}}

    paper = row("paper", 1.0, 1.0, pair_masks="independent")
    models = {
        1: paper | row("graded-balanced", 0.1, 0.2) | row("balanced", 0.2, 0.2),
        2: paper | row("graded-balanced", 0.4, 0.2) | row("balanced", 0.2, 0.2),
        3: paper | row("graded-balanced", 0.1, 0.1),
        4: paper | row("balanced", 0.2, 0.2),
        5: paper | row("graded-balanced", 0.2, 0.2) | row("balanced", 0.2, 0.2),
    }
    (line,) = report.beside_table({"gsm8k": models}).splitlines()[2:]
    assert line.split(" | ")[1:] == ["-", "1 of 3", "-", "-", "1 of 3 |"]
    assert "gradient, K = 4: `graded-balanced` below `balanced`" in line
    assert report.beside_table({}) == ""


def test_paired_table__leaves_out_tasks_with_fewer_than_two_seeds():
    rows = [
        outcome("carrying", model, arm, 0.5 + 0.1 * model * (arm != training.OURS))
        for model in (1, 2)
        for arm in training.ARMS
    ]
    rows += [outcome("arithmetic", 1, arm, 0.5) for arm in training.ARMS]
    rows += [outcome("arithmetic", 2, training.OURS, 0.5)]
    _, _, *lines = training.paired_table(rows).splitlines()
    losses, accuracies, differences = (line.split(" | ") for line in lines)
    assert losses[0] == "| carrying, 60 steps, mean of 2: held-out loss"
    assert losses[1:] == ["0.650", "0.650", "0.650", "0.500 |"]
    assert accuracies[1:] == ["0.750", "0.750", "0.750", "0.750 |"]
    assert differences[1:] == ["-0.150 [-0.785, +0.485], lower in 2 of 2"] * 3 + ["- |"]


def test_training_run__does_not_repeat_what_the_file_has(tmp_path, monkeypatch):
    made = []

    def pretend(task, number, scheme, args):
        made.append((task, number, scheme))
        return {"loss": 0.5}

    monkeypatch.setattr(training, "FILE", tmp_path / "outcome.jsonl")
    monkeypatch.setattr(training, "trained", pretend)
    # As `run.train` takes them: not one argument fewer.
    arguments = inspect.signature(run.train)
    monkeypatch.setattr(
        training, "train", lambda *given: made.append(arguments.bind(*given).arguments["folder"].name)
    )
    options = {"models": [1], "tasks": ["carrying"], "folder": tmp_path, "data": tmp_path}
    args = Namespace(steps=3, threads=torch.get_num_threads(), **options)
    run.append_rows(training.FILE, [outcome("carrying", 1, arm, 0.5) | {"steps": 3} for arm in training.ARMS])
    training.run(args)
    assert made == [], "nor is the model trained of which everything is known"
    training.FILE.write_text(training.FILE.read_text()[:-5])
    training.run(args)
    assert made == ["carrying-1", ("carrying", 1, training.ARMS[training.OURS])]
    args.steps = 4
    training.run(args)
    assert len(made) == 2 + 2 * len(training.ARMS)
    rows = run.read_rows(training.FILE)
    assert len(rows) == 2 * len(training.ARMS) and set(rows[-1]) >= PROVENANCE
