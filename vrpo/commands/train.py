"""`vrpo sft`, `vrpo train` and `vrpo kto`: check, load, build, run, save. No defaults of their own."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from vrpo import data
from vrpo.commands.arguments import ModelArguments, ScriptArguments
from vrpo.commands.completions import CompletionArguments, completions_callback
from vrpo.commands.console import say, say_metrics
from vrpo.commands.dry_run import dry_run_text
from vrpo.commands.idle import check_idle
from vrpo.commands.new_model import NewModel, build_model, train_tokenizer, trained_tokenizer
from vrpo.data.formats import example
from vrpo.data.output import check_output_dir
from vrpo.models import load_tokenizer
from vrpo.models.adapter_config import ALL_LINEAR, require_peft
from vrpo.models.checkpoint import load_policy
from vrpo.models.paths import check_loading, check_model_path
from vrpo.models.quantized import Quantization
from vrpo.training.checkpoints import fault_of
from vrpo.training.config import DiffusionConfig, DiffusionSFTConfig, VRPOConfig
from vrpo.training.kto_config import DiffusionKTOConfig
from vrpo.training.kto_trainer import DiffusionKTOTrainer
from vrpo.training.resume import checkpoint_to_resume
from vrpo.training.sft_trainer import DiffusionSFTTrainer
from vrpo.training.support import check_runnable
from vrpo.training.trainer import DiffusionTrainer
from vrpo.training.vrpo_trainer import VRPOTrainer

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def sft(
    script: ScriptArguments,
    model_args: ModelArguments,
    config: DiffusionSFTConfig,
    quantization: Quantization,
    completions: CompletionArguments,
    new_model: Mapping[str, int] | None = None,
) -> None:
    sizes = None if new_model is None else NewModel.from_mapping(new_model)
    if (sizes is None) == (model_args.model_name_or_path is None):
        raise ValueError("give either model_name_or_path or a new_model section in the config file")
    if sizes is not None and quantization.name is not None:
        raise ValueError(f"{quantization.name} quantizes a checkpoint; new_model has none")
    if sizes is not None and script.dataset_streaming:
        raise ValueError("dataset_streaming: new_model trains a tokenizer, which reads all rows beforehand")

    def new(rows: Dataset, checkpoint: str | None) -> Loaded:
        if checkpoint is None:
            tokenizer = train_tokenizer(_texts(rows), sizes.vocab_size)
        else:
            tokenizer = trained_tokenizer(checkpoint, sizes)
        return build_model(sizes, tokenizer, max_length=config.max_length, seed=config.seed), tokenizer

    _run(
        DiffusionSFTTrainer,
        script,
        model_args,
        config,
        quantization,
        completions,
        make=None if sizes is None else new,
    )


def train(
    script: ScriptArguments,
    model_args: ModelArguments,
    config: VRPOConfig,
    quantization: Quantization,
    completions: CompletionArguments,
) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is needed: the checkpoint to align")
    _run(VRPOTrainer, script, model_args, config, quantization, completions)


def kto(
    script: ScriptArguments,
    model_args: ModelArguments,
    config: DiffusionKTOConfig,
    quantization: Quantization,
    completions: CompletionArguments,
) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is needed: the checkpoint to align")
    _run(DiffusionKTOTrainer, script, model_args, config, quantization, completions)


def _run(
    trainer_class: type[DiffusionTrainer],
    script: ScriptArguments,
    model_args: ModelArguments,
    config: DiffusionConfig,
    quantization: Quantization,
    completions: CompletionArguments,
    make: Callable[[Dataset, str | None], Loaded] | None = None,
) -> None:
    """Check, load, train, save; `make` builds a new model from the training rows instead of loading one."""
    check_runnable(config)
    check_idle(model_args, config)
    if quantization.name is not None and not model_args.use_peft:
        raise ValueError(f"{quantization.name} needs use_peft: quantized weights do not train, adapters do")
    if script.dataset_streaming and config.max_steps < 1:
        raise ValueError("dataset_streaming needs max_steps: the length of a stream is not known")
    # The trainer chooses, in all processes the same, and tells; a new model needs the tokenizer before.
    whole = functools.partial(fault_of, save_only_model=config.save_only_model, checksum=None)
    checkpoint = checkpoint_to_resume(
        config.resume_from_checkpoint, config.output_dir, fault=whole, is_told=False
    )
    adapter = _adapter(model_args)
    set_seed(config.seed)
    check_loading(model_args.dtype, model_args.attn_implementation)
    rows, evaluation = _load_data(script)
    _check_places(script, model_args, config, quantization)
    model, tokenizer = (
        _load_model(model_args, quantization, config) if make is None else make(rows, checkpoint)
    )
    callback = completions_callback(completions, rows, evaluation, model, tokenizer)
    if script.dry_run:
        trainer_class = type(trainer_class.__name__, (trainer_class,), {"is_dry_run": True})
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=None if callback is None else [callback],
    )
    if script.dry_run:
        # In all processes, whose packs are equalised.
        text = dry_run_text(trainer, model_args, config, quantization)
        if trainer.is_world_process_zero():
            say(text)
        return
    trainer.dataset_name = script.dataset_name
    _train_and_save(trainer)


def _load_data(script: ScriptArguments) -> tuple[Dataset | IterableDataset, Dataset | None]:
    if script.eval_dataset_name is not None and script.dataset_test_split is not None:
        raise ValueError("give either eval_dataset_name or dataset_test_split, not both")
    load = data.load_stream if script.dataset_streaming else data.load_rows
    train = load(script.dataset_name, config=script.dataset_config, split=script.dataset_train_split)
    if script.eval_dataset_name is not None:
        return train, data.load_rows(script.eval_dataset_name)
    if script.dataset_test_split is not None:
        return train, data.load_rows(
            script.dataset_name, config=script.dataset_config, split=script.dataset_test_split
        )
    return train, None


def _check_places(
    script: ScriptArguments, args: ModelArguments, config: DiffusionConfig, quantization: Quantization
) -> None:
    """ValueError or OSError unless the model is there and training writes to a place of its own."""
    if args.model_name_or_path is not None:
        found = check_model_path(
            args.model_name_or_path, argument="model_name_or_path", revision=args.model_revision
        )
        if found is None and quantization.name is not None:
            raise ValueError(
                f"{quantization.name} quantizes a checkpoint, and model_name_or_path "
                f"{args.model_name_or_path!r} is an adapter: merge it first, with "
                "vrpo.models.checkpoint.load_policy(path).save_pretrained(folder)"
            )
    check_output_dir(
        config.output_dir,
        models={"model_name_or_path": args.model_name_or_path},
        data={"dataset_name": script.dataset_name, "eval_dataset_name": script.eval_dataset_name},
    )


def _load_model(args: ModelArguments, quantization: Quantization, config: DiffusionConfig) -> Loaded:
    tokenizer = load_tokenizer(args.model_name_or_path, revision=args.model_revision)
    model = load_policy(
        args.model_name_or_path,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        revision=args.model_revision,
        quantization=quantization,
        device=config.device,
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


class SayWhere(TrainerCallback):
    """Of a run that was to go on: from which step it does."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not (args.resume_from_checkpoint and state.is_world_process_zero):
            return
        if state.global_step >= state.max_steps:
            say(f"the run is at its end already: step {state.global_step} of {state.max_steps}\n")
        elif state.global_step:
            say(f"going on from step {state.global_step} of {state.max_steps}\n")
        else:
            say(f"starting: no checkpoint in {args.output_dir}\n")


def _train_and_save(trainer: DiffusionTrainer) -> None:
    output_dir = trainer.args.output_dir
    if getattr(trainer.args, "precompute_only", False):
        if trainer.is_world_process_zero():
            say(f"the reference ELBOs are in {trainer.known_reference.folder}\n")
        return
    trainer.add_callback(SayWhere())
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    # Before the evaluation, which may fail: what was trained is not lost to it.
    trainer.save_model(output_dir)
    trainer.save_state()
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        known = trainer.last_evaluation()
        metrics |= known or trainer.evaluate()
        if known is None:
            trainer.create_model_card()  # with the evaluation's figures
    trainer.save_metrics("all", metrics)
    if trainer.is_world_process_zero():
        say_metrics(metrics)
        say(f"saved model, tokenizer and metrics in {output_dir}\n")
