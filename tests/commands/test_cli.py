"""The `vrpo` command from flags to files, on tiny models; every error is one line and exit code 2."""

import dataclasses
import json
import math

import pytest
import torch
import yaml
from tiny import SIZES, error_of, score_flags, train_flags
from transformers import LlamaConfig, TrainingArguments

from vrpo.commands.arguments import ModelArguments, ScriptArguments
from vrpo.commands.main import COMMANDS, main
from vrpo.commands.options import parse
from vrpo.evaluation.score import ScoreArguments
from vrpo.models import load_model, load_tokenizer
from vrpo.training.config import VRPOConfig
from vrpo_kernels.linear_cross_entropy.cpu import resolve_gemm

# --- flags and config files


def test_parse__file_gives_values_and_flags_override(tmp_path):
    path = tmp_path / "vrpo.yaml"
    path.write_text(
        "dataset_name: a.jsonl\nmodel_name_or_path: m\nlearning_rate: 5e-7\nbeta: 0.5\nbf16: false\n"
        "lora_target_modules: [q_proj, v_proj]\nmax_prompt_length: null\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    flags = ["--beta", "0.1", "--config", str(path), "--output-dir", str(tmp_path)]
    (script, model, config, *_), sections = parse(COMMANDS["train"], flags)
    assert script.dataset_name == "a.jsonl"
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert config.learning_rate == 5e-7  # which YAML reads as a string
    assert config.beta == 0.1
    assert config.bf16 is False
    assert config.max_prompt_length is None
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert sections == {}


def test_parse__without_flags_gives_the_defaults_of_the_dataclasses(tmp_path):
    (script, model, config, *_), _ = parse(
        COMMANDS["train"], ["--dataset_name", "a", "--output_dir", str(tmp_path)]
    )
    assert script == ScriptArguments(dataset_name="a")
    assert model == ModelArguments()
    expected = VRPOConfig(output_dir=str(tmp_path))
    own = {f.name for f in dataclasses.fields(VRPOConfig)}
    differing = {name for name in own if getattr(config, name) != getattr(expected, name)}
    assert differing <= {"accelerator_config"}


def test_parse__sections_are_handed_over(files):
    _, sections = parse(COMMANDS["sft"], ["--config", str(files / "sft.yaml")])
    assert sections == {"new_model": SIZES}


BAD_CONFIGS = {
    "unknown field": ("num_sample: 4", "unknown field 'num_sample'; did you mean num_samples"),
    "section of another command": ("new_model: {}", "unknown field 'new_model'"),
    "no close match": ("zzzz: 4", "unknown field 'zzzz'; see --help"),
    "wrong type": ("num_samples: many", "num-samples: invalid int value: 'many'"),
    "not a mapping": ("- a\n- b", "must map field names to values"),
    "not YAML": ("a: [1", "is not YAML"),
    "wrong value": ("beta: -1", "beta must be positive, got -1.0"),
    "unknown design": ("mask_design: fancy", "mask_design must be one of"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_main__bad_config_is_one_clear_line(tmp_path, capsys, case):
    text, message = BAD_CONFIGS[case]
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n" if text[0] == "-" or "[" in text else f"dataset_name: a\n{text}\n")
    assert message in error_of(capsys, ["train", "--config", str(path)])


BAD_FLAGS = {
    "unknown command": (["trian"], "unknown command 'trian'; there are sft, train"),
    "unknown flag": (["train", "--datset_name", "a"], "did you mean --dataset_name"),
    "missing flag": (["train"], "required: --dataset_name"),
    "stray word": (["train", "--dataset_name=a", "b"], "unexpected argument 'b'"),
    "missing config": (["train", "--config", "absent.yaml"], "'absent.yaml': no such file"),
    "no model": (["train", "--dataset_name", "a"], "model_name_or_path is needed"),
    "neither model nor sizes": (["sft", "--dataset_name", "a"], "new_model section"),
    "missing data": (
        ["train", "--dataset_name", "absent.jsonl", "--model_name_or_path", "m"],
        "'absent.jsonl': no such file",
    ),
    "two evaluation sets": (
        [
            "train",
            "--dataset_name=a",
            "--model_name_or_path=m",
            "--eval_dataset_name=b",
            "--dataset_test_split=c",
        ],
        "not both",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_main__bad_flags_are_one_clear_line(capsys, case):
    argv, message = BAD_FLAGS[case]
    assert message in error_of(capsys, argv)


def test_main__traceback_flag_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="unknown command"):
        main(["trian", "--traceback"])


def test_sft__new_model_with_a_wrong_size_is_refused(files, capsys, tmp_path):
    settings = yaml.safe_load((files / "sft.yaml").read_text())
    for section, message in (
        (SIZES | {"width": 3}, "new_model needs exactly"),
        (SIZES | {"n_layers": 0}, "n_layers must be a positive integer"),
        (SIZES | {"vocab_size": 100}, "vocab_size must be at least 262"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(settings | {"new_model": section}))
        assert message in error_of(capsys, ["sft", "--config", str(path)])


# --- help


def test_main__overview_names_every_command(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and command.summary in text for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_help__short_form_has_all_own_fields_and_hides_most_inherited_ones(capsys, name):
    assert main([name, "--help"]) == 0
    short = capsys.readouterr().out
    assert main([name, "--help_all"]) == 0
    long = capsys.readouterr().out
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for group in COMMANDS[name].groups.values():
        for field in dataclasses.fields(group):
            assert f"--{field.name}" in long
            if field.name not in inherited:
                assert f"--{field.name}" in short
    assert "ddp_timeout" not in short
    # The longest are those of train and plan, with twelve flags of their own for quantization and answers.
    assert len(short.splitlines()) < 280 < len(long.splitlines()) or name not in ("train", "plan")
    assert len(short.splitlines()) < 240 or name in ("train", "plan")


def test_env__names_versions_devices_and_backends(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in text
    for line in ("kernels, cpu: ", "kernels, triton: ", "attention, ", "flash-attn: ", "cpu: "):
        assert line in text
    assert f"bfloat16 {resolve_gemm('auto', torch.bfloat16)}" in text


# --- runs


def test_sft__new_model_and_tokenizer_can_be_loaded(files, model_path):
    model = load_model(model_path)
    assert model.config.num_hidden_layers == 2
    results = json.loads((files / "sft" / "all_results.json").read_text())
    assert math.isfinite(results["train_loss"])


def test_sft__same_seed_gives_the_same_model(files, model_path, tmp_path):
    assert main(["sft", "--config", str(files / "sft.yaml"), f"--output_dir={tmp_path}"]) == 0
    first, second = load_model(model_path).state_dict(), load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_train__changes_the_model_evaluates_and_says_where(files, model_path, tmp_path, capsys):
    flags = train_flags(
        files, model_path, tmp_path, f"--eval_dataset_name={files / 'pairs.jsonl'}", "--logging_steps=1"
    )
    assert main(flags) == 0
    assert f"saved model, tokenizer and metrics in {tmp_path}" in capsys.readouterr().out
    before, after = load_model(model_path).state_dict(), load_model(str(tmp_path)).state_dict()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["eval_rewards/margins"] != 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert history[0]["rewards/margins"] == 0.0  # policy == reference before the first update


def test_train__an_evaluation_that_fails_loses_no_model(files, model_path, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("vrpo.VRPOTrainer.evaluate", fails)
    flags = train_flags(files, model_path, tmp_path, f"--eval_dataset_name={files / 'pairs.jsonl'}")
    assert main(flags) == 2
    assert load_model(str(tmp_path)).config.num_hidden_layers == 2


def test_train__precomputes_references_for_runs_to_come(files, model_path, tmp_path, capsys):
    cache = [f"--ref_log_probs_cache={tmp_path / 'cache'}"]
    assert main(train_flags(files, model_path, tmp_path / "a", *cache, "--precompute_only")) == 0
    cache.append("--precompute_ref_log_probs")
    assert f"the reference ELBOs are in {tmp_path / 'cache'}" in capsys.readouterr().out
    assert not list((tmp_path / "a").glob("*.safetensors"))
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("**/*.arrow")}
    assert main(train_flags(files, model_path, tmp_path / "b", *cache, "--beta=0.5")) == 0
    assert parts and {path: path.stat().st_mtime_ns for path in parts} == parts
    history = json.loads((tmp_path / "b" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["rewards/margins"] == 0.0


def test_train__resume_goes_on_from_the_last_checkpoint(files, model_path, tmp_path, capsys):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    schedule = ["--lr_scheduler_type=constant", "--save_steps=1"]
    assert main(train_flags(files, model_path, straight, *schedule)) == 0
    first = train_flags(files, model_path, stopped, *schedule, "--max_steps=1")
    assert main([*first, "--resume_from_checkpoint=auto"]) == 0
    assert f"starting: no checkpoint in {stopped}" in capsys.readouterr().out
    resumed = train_flags(files, model_path, stopped, *schedule, "--resume_from_checkpoint=true")
    assert main(resumed) == 0
    assert "going on from step 1 of 2" in capsys.readouterr().out
    assert main(resumed) == 0
    assert "the run is at its end already: step 2 of 2" in capsys.readouterr().out
    first, second = (load_model(str(path)).state_dict() for path in (straight, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_train__lora_saves_an_adapter_that_score_understands(files, model_path, tmp_path):
    output = tmp_path / "lora"
    assert main(train_flags(files, model_path, output, "--use_peft", "--lora_r=2")) == 0
    assert (output / "adapter_config.json").is_file()
    scores = tmp_path / "scores.jsonl"
    flags = score_flags(files, str(output), scores, f"--ref_model_name_or_path={model_path}")
    assert main(flags) == 0
    margins = [json.loads(line)["margin"] for line in scores.read_text().splitlines()]
    assert all(margin != 0 for margin in margins)


def test_score__model_as_its_own_reference_has_margin_zero(files, model_path, tmp_path, capsys):
    scores = tmp_path / "deep" / "scores.jsonl"
    flags = score_flags(files, model_path, scores, f"--ref_model_name_or_path={model_path}")
    assert main(flags) == 0
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [row["example_id"] for row in rows] == list(range(12))
    for row in rows:
        assert row["margin"] == row["reward_chosen"] == row["reward_rejected"] == 0.0
        assert row["elbo_chosen"] == row["ref_elbo_chosen"] < 0
    summary = json.loads((tmp_path / "deep" / "scores.summary.json").read_text())
    assert summary["rewards/margins"] == summary["rewards/accuracies"] == 0
    assert summary["elbo/chosen"] == pytest.approx(sum(row["elbo_chosen"] for row in rows) / 12)
    right = [row["elbo_chosen"] > row["elbo_rejected"] for row in rows]
    assert summary["elbo/accuracies"] == pytest.approx(sum(right) / 12)
    assert summary["elbo/accuracies"] == summary["ref_elbo/accuracies"]
    tokens = sum(row["tokens_chosen"] for row in rows)
    assert summary["elbo/chosen_per_token"] == pytest.approx(12 * summary["elbo/chosen"] / tokens)
    text = capsys.readouterr().out
    assert "rewards/margins" in text
    assert str(scores) in text


def test_score__does_not_depend_on_the_pack_size(files, model_path, tmp_path):
    outputs = []
    for budget in (256, 65536):
        path = tmp_path / f"{budget}.jsonl"
        assert main(score_flags(files, model_path, path, f"--max_tokens_per_pack={budget}")) == 0
        outputs.append([json.loads(line) for line in path.read_text().splitlines()])
    for small, large in zip(*outputs, strict=True):
        assert small["elbo_chosen"] == pytest.approx(large["elbo_chosen"], rel=1e-5)


def test_score__completions_have_one_side(files, model_path, tmp_path):
    path = tmp_path / "scores.jsonl"
    flags = score_flags(files, model_path, path, f"--dataset_name={files / 'sft.jsonl'}")
    assert main(flags) == 0
    row = json.loads(path.read_text().splitlines()[0])
    assert set(row) == {"example_id", "tokens_completion", "elbo_completion", "elbo_std_completion"}


# --- bad checkpoints and places


def test_train__unwritable_output_is_told_before_any_work(files, model_path, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = train_flags(files, "absent-model", tmp_path / "file" / "out")
    assert "output_dir must be a writable directory" in error_of(capsys, flags)


def test_score__unwritable_output_is_told_before_any_work(files, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = score_flags(files, "absent-model", tmp_path / "file" / "scores.jsonl")
    assert "cannot be written" in error_of(capsys, flags)


def test_train__missing_columns_are_named(files, model_path, tmp_path, capsys):
    flags = train_flags(files, model_path, tmp_path, f"--dataset_name={files / 'sft.jsonl'}")
    assert "lacks the columns chosen, rejected" in error_of(capsys, flags)


def test_train__token_budget_below_one_masked_copy_is_refused(files, model_path, tmp_path, capsys):
    flags = train_flags(files, model_path, tmp_path, "--max_tokens_per_pack=4")
    assert "longer than the token budget" in error_of(capsys, flags)


def test_train__causal_checkpoint_is_refused(files, model_path, tmp_path, capsys, tokenizer):
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    flags = train_flags(files, str(tmp_path), tmp_path / "out")
    assert "causal" in error_of(capsys, flags)


def test_train__wrong_dtype_is_refused(files, model_path, tmp_path, capsys):
    flags = train_flags(files, model_path, tmp_path, "--dtype=int8")
    assert "dtype must be" in error_of(capsys, flags)


def copied_model(model_path, target, tokenizer):
    """The model with another tokenizer beside it, whose mask token (or its absence) goes into the config."""
    model = load_model(model_path)
    model.config.mask_token_id = tokenizer.mask_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def test_train__missing_mask_token_is_refused(files, model_path, tmp_path, capsys):
    maskless = load_tokenizer(model_path)
    maskless.mask_token = None
    copied_model(model_path, tmp_path / "model", maskless)
    flags = train_flags(files, str(tmp_path / "model"), tmp_path / "out")
    assert "no mask token" in error_of(capsys, flags)


def test_train__tokenizer_larger_than_the_embedding_is_refused(files, model_path, tmp_path, capsys):
    larger = load_tokenizer(model_path)
    larger.add_tokens([f"<extra-{i}>" for i in range(40)])
    copied_model(model_path, tmp_path / "model", larger)
    flags = train_flags(files, str(tmp_path / "model"), tmp_path / "out")
    assert "embedding only" in error_of(capsys, flags)


def test_score_arguments__defaults_are_the_trainers():
    own = {field.name: field.default for field in dataclasses.fields(ScoreArguments)}
    for name in ("beta", "num_samples", "max_length", "max_tokens_per_pack", "seed"):
        assert own[name] == getattr(VRPOConfig, name)


def test_main__peft_missing_is_told(files, model_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vrpo.models.adapter_config.is_peft_available", lambda: False)
    flags = train_flags(files, model_path, tmp_path, "--use_peft")
    assert "pip install 'vrpo[peft]'" in error_of(capsys, flags)


# --- generate


def generate_flags(model_path, *more):
    return ["generate", f"--model_name_or_path={model_path}", "--max_new_tokens=8", "--device=cpu", *more]


def test_generate__answers_every_row_as_often_as_asked(files, model_path, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    flags = generate_flags(
        model_path,
        f"--dataset_name={files / 'pairs.jsonl'}",
        f"--output_file={output}",
        "--num_return_sequences=2",
        "--temperature=1",
        "--steps=2",
    )
    assert main(flags) == 0
    first = output.read_text()
    answers = [json.loads(line) for line in first.splitlines()]
    assert [(item["row"], item["sample"]) for item in answers] == [(r, s) for r in range(12) for s in (0, 1)]
    assert answers[2]["prompt"] == "What is 1 plus 4?"
    assert all("<|mdm_mask|>" not in item["response"] for item in answers)
    assert f"saved 24 answers in {output}" in capsys.readouterr().out
    assert main(flags) == 0
    assert output.read_text() == first


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_generate__prints_the_answer_to_one_prompt(model_path, capsys, monkeypatch, chat):
    seen = []

    def prompts_only(model, prompts, sampler, **options):
        seen.extend(prompts)
        return torch.tensor([model_tokenizer("3.")["input_ids"] + [model_tokenizer.eos_token_id] * 6])

    model_tokenizer = load_tokenizer(model_path)
    monkeypatch.setattr("vrpo.generation.answer.generate", prompts_only)
    assert main(generate_flags(model_path, "--prompt=What is 1 plus 2?", f"--chat={chat}")) == 0
    assert capsys.readouterr().out == "3.\n"
    header = "<|start_header_id|>"
    assert model_tokenizer.decode(seen[0]).count(header) == (2 if chat else 0)


BAD_GENERATE = {
    "no prompt": ([], "either prompt or dataset_name"),
    "empty prompt": (["--prompt= "], "prompt is empty (row 0)"),
    "no output": (["--dataset_name=a.jsonl"], "needs output_file"),
    "chat with data": (["--dataset_name=a.jsonl", "--chat"], "chat belongs to prompt"),
    "equal answers": (["--prompt=a", "--num_return_sequences=2"], "raise temperature"),
    "no answers": (["--prompt=a", "--num_return_sequences=0"], "at least 1"),
    "block": (["--prompt=a", "--block_length=3"], "block_length must divide"),
}


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_generate__bad_requests_are_refused(model_path, capsys, case):
    flags, message = BAD_GENERATE[case]
    assert message in error_of(capsys, generate_flags(model_path, *flags))
