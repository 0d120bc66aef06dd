"""The `vrpo` command: parse, check, load, build, run, save. It has no defaults of its own."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from vrpo import data
from vrpo.commands import environment
from vrpo.commands.arguments import ModelArguments, ScriptArguments
from vrpo.commands.new_model import NewModel, build_model, train_tokenizer
from vrpo.commands.options import Command, help_text, overview, parse
from vrpo.evaluation.score import ScoreArguments, score_file
from vrpo.evaluation.variance_report import VarianceArguments
from vrpo.evaluation.variance_report import report as variance_report
from vrpo.generation.answer import GenerateArguments, answer
from vrpo.models import load_tokenizer
from vrpo.models.adapters import require_peft
from vrpo.models.checkpoint import load_policy
from vrpo.training.config import DiffusionConfig, DiffusionSFTConfig, VRPOConfig
from vrpo.training.sft_trainer import DiffusionSFTTrainer
from vrpo.training.trainer import DiffusionTrainer
from vrpo.training.vrpo_trainer import VRPOTrainer

_USER_ERRORS = (ValueError, OSError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is 0, or 2 after an error, told in one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        _dispatch(words)
    except _USER_ERRORS as error:
        if show_traceback:
            raise
        sys.stderr.write(f"vrpo: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview(COMMANDS.values()))
        return
    name, *argv = words
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    if {"-h", "--help", "--help_all", "--help-all"} & set(argv):
        everything = bool({"--help_all", "--help-all"} & set(argv))
        sys.stdout.write(help_text(command, everything=everything))
        return
    parsed, sections = parse(command, argv)
    command.run(*parsed, **sections)


def _sft(
    script: ScriptArguments,
    model_args: ModelArguments,
    config: DiffusionSFTConfig,
    new_model: Mapping[str, int] | None = None,
) -> None:
    sizes = None if new_model is None else NewModel.from_mapping(new_model)
    if (sizes is None) == (model_args.model_name_or_path is None):
        raise ValueError("give either model_name_or_path or a new_model section in the config file")
    adapter = _adapter(model_args)
    set_seed(config.seed)
    train, evaluation = _load_data(script)
    if sizes is None:
        model, tokenizer = _load_model(model_args)
    else:
        tokenizer = train_tokenizer(_texts(train), sizes.vocab_size)
        model = build_model(sizes, tokenizer, max_length=config.max_length, seed=config.seed)
    trainer = DiffusionSFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    _train_and_save(trainer, config)


def _train(script: ScriptArguments, model_args: ModelArguments, config: VRPOConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is needed: the checkpoint to align")
    adapter = _adapter(model_args)
    set_seed(config.seed)
    train, evaluation = _load_data(script)
    model, tokenizer = _load_model(model_args)
    trainer = VRPOTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    _train_and_save(trainer, config)


def _load_data(script: ScriptArguments) -> tuple[Dataset, Dataset | None]:
    if script.eval_dataset_name is not None and script.dataset_test_split is not None:
        raise ValueError("give either eval_dataset_name or dataset_test_split, not both")
    train = data.load_rows(
        script.dataset_name, config=script.dataset_config, split=script.dataset_train_split
    )
    if script.eval_dataset_name is not None:
        return train, data.load_rows(script.eval_dataset_name)
    if script.dataset_test_split is not None:
        return train, data.load_rows(
            script.dataset_name, config=script.dataset_config, split=script.dataset_test_split
        )
    return train, None


def _load_model(args: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(args.model_name_or_path, revision=args.model_revision)
    model = load_policy(
        args.model_name_or_path,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        revision=args.model_revision,
    )
    return model, tokenizer


def _adapter(args: ModelArguments) -> Any:
    """The LoraConfig that the flags describe, or None."""
    if not args.use_peft:
        return None
    require_peft("use_peft")
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or "all-linear",
    )


def _texts(rows: Dataset) -> Iterator[str]:
    """Every string of the prompt and response columns, messages included."""
    for row in rows:
        for name in ("prompt", "completion"):
            value = row.get(name)
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield from (message["content"] for message in value)


def _train_and_save(trainer: DiffusionTrainer, config: DiffusionConfig) -> None:
    resume = config.resume_from_checkpoint
    # "true" resumes from the last checkpoint in output_dir, a path from that checkpoint.
    result = trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(config.output_dir)
    trainer.save_state()
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_metrics("all", metrics)
    if trainer.is_world_process_zero():
        _say_metrics(metrics)
        sys.stdout.write(f"saved model, tokenizer and metrics in {config.output_dir}\n")


def _score(args: ScoreArguments) -> None:
    summary, report = score_file(args)
    sys.stdout.write(f"data: {report}\n")
    _say_metrics(summary)
    sys.stdout.write(f"saved the score of each row in {args.output_file}\n")


def _variance(args: VarianceArguments) -> None:
    sys.stdout.write(variance_report(args))


def _generate(args: GenerateArguments) -> None:
    answers = answer(args)
    if args.prompt is not None:
        sys.stdout.write("\n\n".join(item["response"] for item in answers) + "\n")
    if args.output_file is not None:
        sys.stdout.write(f"saved {len(answers)} answers in {args.output_file}\n")


def _env() -> None:
    sys.stdout.write(environment.report())


def _say_metrics(metrics: Mapping[str, Any]) -> None:
    width = max(map(len, metrics))
    for name, value in metrics.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        sys.stdout.write(f"  {name:<{width}}  {shown}\n")


def _command(
    name: str, summary: str, example: str, run: Callable[..., None], groups: dict[str, type], **more: Any
) -> tuple[str, Command]:
    return name, Command(name, summary, example, run, groups, **more)


_NEW_MODEL = (
    "sizes of a model that starts from random weights, with a BPE tokenizer trained on the training "
    "text: vocab_size, d_model, n_layers, n_heads, mlp_hidden_size. Instead of model_name_or_path."
)

COMMANDS: dict[str, Command] = dict(
    (
        _command(
            "sft",
            "train a masked-diffusion model on prompt/completion rows",
            "vrpo sft --model_name_or_path GSAI-ML/LLaDA-8B-Base --dataset_name sft.jsonl --output_dir out",
            _sft,
            {"Data": ScriptArguments, "Model": ModelArguments, "Masked diffusion": DiffusionSFTConfig},
            sections={"new_model": _NEW_MODEL},
        ),
        _command(
            "train",
            "align a masked-diffusion model with preference pairs (VRPO)",
            "vrpo train --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dataset_name pairs.jsonl "
            "--output_dir out",
            _train,
            {"Data": ScriptArguments, "Model": ModelArguments, "VRPO": VRPOConfig},
        ),
        _command(
            "score",
            "write the ELBO of each response of a file, and rewards against a reference",
            "vrpo score --model_name_or_path out --dataset_name pairs.jsonl --output_file scores.jsonl",
            _score,
            {"Score": ScoreArguments},
        ),
        _command(
            "variance",
            "measure the noise of score, loss and gradient by mask design, and recommend one",
            "vrpo variance --model_name_or_path out --ref_model_name_or_path GSAI-ML/LLaDA-8B-Instruct "
            "--dataset_name pairs.jsonl --output_file variance.json",
            _variance,
            {"Variance": VarianceArguments},
        ),
        _command(
            "generate",
            "answer one prompt, or the prompts of a file",
            "vrpo generate --model_name_or_path out --prompt 'What is 2 + 3?'",
            _generate,
            {"Generate": GenerateArguments},
        ),
        _command("env", "print versions, devices and backends for bug reports", "vrpo env", _env, {}),
    )
)
