"""`vrpo sft` and `vrpo train`: check, load, build, run, save. They have no defaults of their own."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from vrpo import data
from vrpo.commands.arguments import ModelArguments, ScriptArguments
from vrpo.commands.console import say, say_metrics
from vrpo.commands.new_model import NewModel, build_model, train_tokenizer, trained_tokenizer
from vrpo.data.formats import example
from vrpo.data.output import check_output_dir
from vrpo.models import load_tokenizer
from vrpo.models.adapter_config import ALL_LINEAR, require_peft
from vrpo.models.checkpoint import load_policy
from vrpo.models.paths import check_loading, check_model_path
from vrpo.training.config import DiffusionConfig, DiffusionSFTConfig, VRPOConfig
from vrpo.training.sft_trainer import DiffusionSFTTrainer
from vrpo.training.support import check_runnable
from vrpo.training.trainer import DiffusionTrainer
from vrpo.training.vrpo_trainer import VRPOTrainer


def sft(
    script: ScriptArguments,
    model_args: ModelArguments,
    config: DiffusionSFTConfig,
    new_model: Mapping[str, int] | None = None,
) -> None:
    sizes = None if new_model is None else NewModel.from_mapping(new_model)
    if (sizes is None) == (model_args.model_name_or_path is None):
        raise ValueError("give either model_name_or_path or a new_model section in the config file")
    check_runnable(config)
    _checkpoint(config)
    adapter = _adapter(model_args)
    set_seed(config.seed)
    check_loading(model_args.dtype, model_args.attn_implementation)
    train, evaluation = _load_data(script)
    _check_places(script, model_args, config)
    if sizes is None:
        model, tokenizer = _load_model(model_args)
    else:
        checkpoint = _checkpoint(config)
        tokenizer = (
            train_tokenizer(_texts(train), sizes.vocab_size)
            if checkpoint is None
            else trained_tokenizer(checkpoint, sizes)
        )
        model = build_model(sizes, tokenizer, max_length=config.max_length, seed=config.seed)
    trainer = DiffusionSFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.dataset_name = script.dataset_name
    _train_and_save(trainer, config)


def train(script: ScriptArguments, model_args: ModelArguments, config: VRPOConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is needed: the checkpoint to align")
    check_runnable(config)
    _checkpoint(config)
    adapter = _adapter(model_args)
    set_seed(config.seed)
    check_loading(model_args.dtype, model_args.attn_implementation)
    train, evaluation = _load_data(script)
    _check_places(script, model_args, config)
    model, tokenizer = _load_model(model_args)
    trainer = VRPOTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.dataset_name = script.dataset_name
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


def _check_places(script: ScriptArguments, args: ModelArguments, config: DiffusionConfig) -> None:
    """ValueError or OSError unless the model is there and training writes to a place of its own."""
    if args.model_name_or_path is not None:
        check_model_path(args.model_name_or_path, argument="model_name_or_path", revision=args.model_revision)
    check_output_dir(
        config.output_dir,
        models={"model_name_or_path": args.model_name_or_path},
        data={"dataset_name": script.dataset_name, "eval_dataset_name": script.eval_dataset_name},
    )


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

    targets = args.lora_target_modules or [ALL_LINEAR]
    if [target.lower() for target in targets] == [ALL_LINEAR]:
        targets = ALL_LINEAR  # to PEFT the word means all layers, a list of it a layer of that name
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        revision=None if args.model_revision == "main" else args.model_revision,
    )


def _texts(rows: Dataset) -> Iterator[str]:
    """Every text of the rows, messages included; rows that are unusable are named when they are prepared.

    Errors: ValueError if the rows are token ids.
    """
    if "prompt_ids" in rows.column_names:
        raise ValueError(
            "new_model trains a tokenizer and needs text: the dataset holds token ids, prompt_ids"
        )
    for row in rows:
        try:
            shaped = example(row, data.COMPLETION_SIDES)
        except data.RowProblem:
            continue
        for text in (shaped.prompt, *shaped.responses):
            messages = [{"content": text}] if isinstance(text, str) else text
            yield from (message["content"] for message in messages if message.get("content"))


def _resume_from(config: DiffusionConfig) -> str | bool | None:
    """A checkpoint's path; True for the last one in output_dir; None to start anew."""
    word = str(config.resume_from_checkpoint or "false").lower()
    if word in ("true", "yes", "on", "false", "no", "off"):
        return True if word in ("true", "yes", "on") else None
    if not os.path.isdir(config.resume_from_checkpoint):
        raise ValueError(
            "resume_from_checkpoint must be the folder of a checkpoint, or true for the last one in "
            f"output_dir; got {config.resume_from_checkpoint!r}"
        )
    return config.resume_from_checkpoint


def _checkpoint(config: DiffusionConfig) -> str | None:
    """The checkpoint that training goes on from, or None."""
    resume = _resume_from(config)
    if resume is not True:
        return resume
    found = get_last_checkpoint(config.output_dir) if os.path.isdir(config.output_dir) else None
    if found is None:
        raise ValueError(
            f"resume_from_checkpoint=true, but output_dir {config.output_dir!r} has no checkpoint"
        )
    return found


def _train_and_save(trainer: DiffusionTrainer, config: DiffusionConfig) -> None:
    result = trainer.train(resume_from_checkpoint=_checkpoint(config))
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics |= trainer.last_evaluation() or trainer.evaluate()
    trainer.save_model(config.output_dir)
    trainer.save_state()
    trainer.save_metrics("all", metrics)
    if trainer.is_world_process_zero():
        say_metrics(metrics)
        say(f"saved model, tokenizer and metrics in {config.output_dir}\n")
