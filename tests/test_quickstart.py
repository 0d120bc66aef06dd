"""The quickstart's task, its verifier, and the whole road in miniature."""

import json
import math

import pytest

from examples import arithmetic, quickstart
from examples.arithmetic import CARELESS, CORRECT, OTHER, Problem
from vrpo.models import load_model, load_tokenizer


def test_working__running_totals_with_and_without_carries():
    problem = Problem((7, 4, 8, 3))
    assert problem.prompt == "7+4+8+3="
    assert problem.working(carries=True) == "11 19 22"
    assert problem.working(carries=False) == "01 09 02"


def test_all_problems__each_once_and_always_with_a_carry():
    problems = arithmetic.all_problems(seed=3)
    # 36 of the 81 sums of two digits and 84 of the 729 of three stay below 10; of four there are enough.
    assert len(set(problems)) == len(problems) == 45 + 645 + arithmetic.PROBLEMS_OF_EACH
    assert {len(problem.terms) for problem in problems[:1000]} == set(arithmetic.NUM_TERMS)
    for problem in problems:
        assert problem.working(True) != problem.working(False)
        assert int(problem.working(True).split()[-1]) == sum(problem.terms)


def test_all_problems__order_is_a_function_of_the_seed():
    assert arithmetic.all_problems(3) == arithmetic.all_problems(3)
    assert arithmetic.all_problems(3) != arithmetic.all_problems(4)


def test_write_corpus__both_writers_in_proportion():
    problems = arithmetic.all_problems(0)[:1000]
    rows = arithmetic.write_corpus(problems, careful_share=0.4, seed=0)
    verdicts = [arithmetic.verify(p, row["completion"]) for p, row in zip(problems, rows, strict=True)]
    assert OTHER not in verdicts
    assert abs(verdicts.count(CORRECT) / 1000 - 0.4) < 0.05
    assert rows == arithmetic.write_corpus(problems, careful_share=0.4, seed=0)


def test_write_corpus__rejects_a_share_above_one():
    with pytest.raises(ValueError, match="careful_share"):
        arithmetic.write_corpus([], careful_share=1.5, seed=0)


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("11 19 22", CORRECT),
        ("01 09 02", CARELESS),
        ("11 18 22", OTHER),  # the right answer from wrong working
        ("11 19 23", OTHER),
        ("11 19", OTHER),
        ("11 19 22 ", OTHER),
        ("", OTHER),
    ],
)
def test_verify__checks_the_working_and_the_answer(response, verdict):
    assert arithmetic.verify(Problem((7, 4, 8, 3)), response) == verdict


def test_build_tokenizer__one_token_per_character_and_back():
    tokenizer = arithmetic.build_tokenizer()
    for problem in arithmetic.all_problems(0)[:20]:
        text = problem.prompt + problem.working(True)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert len(problem.working(True)) + 1 == problem.response_length <= arithmetic.LONGEST_RESPONSE
    assert tokenizer.mask_token_id not in ids
    assert tokenizer.mask_token_id != tokenizer.eos_token_id


def test_parse__every_setting_is_a_flag(tmp_path):
    settings, output_dir = quickstart.parse(
        ["--sft_steps", "7", "--beta", "0.5", "--output_dir", str(tmp_path)]
    )
    assert settings == quickstart.Settings(sft_steps=7, beta=0.5)
    assert output_dir == tmp_path


def test_sample_pairs__chosen_is_right_and_rejected_wrong(tmp_path, monkeypatch):
    settings = quickstart.Settings()
    problems = arithmetic.all_problems(0)[:5]
    run = quickstart.Run(settings, tmp_path, arithmetic.build_tokenizer(), test=[])
    right, wrong = ([problem.working(carries) for problem in problems] for carries in (True, False))
    # Right then wrong, wrong then right, both right, both wrong, right then nothing at all.
    first = [right[0], wrong[1], right[2], wrong[3], right[4]]
    second = [wrong[0], right[1], right[2], wrong[3], ""]
    tries = iter([first, second])
    monkeypatch.setattr(quickstart, "answers", lambda *args, **kwargs: next(tries))
    assert quickstart.sample_pairs(run, None, problems, seed=0) == [
        {"prompt": problems[i].prompt, "chosen": right[i], "rejected": wrong[i]} for i in (0, 1)
    ]


def test_quickstart__too_many_problems_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="6090 problems"):
        quickstart.quickstart(quickstart.Settings(sft_problems=9000), tmp_path)


def test_quickstart__whole_road_in_miniature(tmp_path, monkeypatch):
    """A few steps from random weights write every result; the model is too young to be judged by accuracy."""
    honest = arithmetic.verify

    def lenient(problem, response):  # so that an untrained model's answers already make pairs
        return CORRECT if response[:1] in "01234" else honest(problem, response)

    monkeypatch.setattr(arithmetic, "verify", lenient)
    sizes = dict(sft_problems=64, pair_problems=40, test_problems=24, d_model=16, n_layers=1)
    steps = dict(sft_steps=3, sft_batch=8, vrpo_steps=2, vrpo_batch=4, curve_every=1, num_samples=2)
    flags = {**sizes, **steps, "mlp_hidden_size": 16, "variance_repeats": 2, "output_dir": tmp_path}
    quickstart.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["held_out"]) == {"sft", "sft_on_chosen", "vrpo"}
    for measured in metrics["held_out"].values():
        for shares in measured["outcomes"].values():
            assert sum(shares.values()) == pytest.approx(1)
        assert 0 <= measured["elbo/accuracies"] <= 1
        assert list(measured["lengths"]) == ["1x", "2x", "4x", "4x, in blocks of"]
        assert all(0 <= share <= 1 for share in measured["lengths"].values())
    assert metrics["first_step"]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["first_step"]["margin"] == 0
    assert metrics["held_out"]["sft"]["rewards/margins"] == 0  # the start is its own reference
    assert metrics["held_out"]["vrpo"]["rewards/margins"] != 0
    assert [step for step, _ in metrics["vrpo"]["curve"]] == [0, 1, 2]
    assert 0 < metrics["score_variance"]["shared"] < metrics["score_variance"]["separate"]
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    for folder in ("sft", "sft_on_chosen", "vrpo"):
        load_model(str(tmp_path / folder))
        assert (
            load_tokenizer(str(tmp_path / folder)).mask_token_id == arithmetic.build_tokenizer().mask_token_id
        )


def test_lengths__decodes_each_problem_into_multiples_of_its_own_answer(tmp_path, monkeypatch):
    problems = [Problem((9, 9, 9)), Problem((9, 9, 9, 9)), Problem((1, 9, 9))]
    run = quickstart.Run(quickstart.Settings(), tmp_path, arithmetic.build_tokenizer(), test=problems)
    calls = []

    def write(run, model, alike, *, max_new_tokens, block_length, **kwargs):
        calls.append((len(alike), max_new_tokens, block_length))
        return [problem.working(carries=max_new_tokens < 12) for problem in alike]

    monkeypatch.setattr(quickstart, "answers", write)
    assert quickstart.lengths(run, None) == {
        "1x": 1.0,
        "2x": 0.0,
        "4x": 0.0,
        "4x, in blocks of": 0.0,
    }
    assert calls[:4] == [(2, 6, None), (2, 12, None), (2, 24, None), (2, 24, 6)]
    assert calls[4:] == [(1, 9, None), (1, 18, None), (1, 36, None), (1, 36, 9)]


def test_quickstart__says_when_there_is_nothing_to_learn_from(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "supervised", lambda run, problems: None)
    monkeypatch.setattr(quickstart, "sample_pairs", lambda *args: [])
    with pytest.raises(ValueError, match="no pairs to learn from"):
        quickstart.quickstart(quickstart.Settings(), tmp_path)


def test_parse__help_names_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        quickstart.parse(["--help"])
    assert "--sft_weight" in capsys.readouterr().out
