"""Answers during training, of the training commands: which prompts, how often, how they are decoded."""

from dataclasses import dataclass, field, fields
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vrpo import data
from vrpo.generation import checks
from vrpo.generation.answer import check_lengths
from vrpo.generation.callback import LogCompletionsCallback
from vrpo.generation.config import SamplerConfig
from vrpo.generation.questions import from_rows
from vrpo.models import max_positions


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CompletionArguments:
    """Answers during training; names are TRL's where it has them.

    Errors: ValueError for settings without log_completions, or out of range.
    """

    log_completions: bool = _field(
        False,
        "Answer some prompts before training, every completions_freq steps and at the end: printed, written "
        "to samples.jsonl in output_dir, and a table in W&B and Trackio.",
    )
    completions_freq: int = _field(100, "Optimizer steps between answers.")
    completions_dataset_name: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Files, folder or hub name of the prompts. Unset: those of the evaluation data, "
            "else of the training data."
        },
    )
    num_prompts: int = _field(4, "Prompts to answer, the first ones of the data.")
    num_completions_to_print: int | None = _field(None, "How many of the answers to print. Unset: all.")
    completions_max_new_tokens: int = _field(SamplerConfig.max_new_tokens, "Tokens of every answer.")
    completions_block_length: int | None = _field(None, "Tokens per block. Unset: one block.")
    completions_steps: int | None = _field(None, "Model calls per answer. Unset: one token per call.")
    completions_temperature: float = _field(0.0, "0 takes the most likely token.")

    def __post_init__(self) -> None:
        if not self.log_completions:
            for one in fields(self):
                if getattr(self, one.name) != one.default:
                    raise ValueError(f"{one.name} does nothing without log_completions")
        checks.integer("completions_freq", self.completions_freq, 1)
        checks.integer("num_prompts", self.num_prompts, 1)
        if self.num_completions_to_print is not None:
            checks.integer("num_completions_to_print", self.num_completions_to_print, 0)
        self.sampler()

    def sampler(self) -> SamplerConfig:
        try:
            return SamplerConfig(
                max_new_tokens=self.completions_max_new_tokens,
                block_length=self.completions_block_length,
                steps=self.completions_steps,
                temperature=self.completions_temperature,
            )
        except ValueError as error:
            raise ValueError(f"completions_*: {error}") from None


def completions_callback(
    args: CompletionArguments,
    train: Dataset | IterableDataset,
    evaluation: Dataset | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> LogCompletionsCallback | None:
    """The callback that `args` asks for; None where it asks for none.

    Errors: ValueError for rows without a usable prompt, and prompts that leave no room for an answer.
    """
    if not args.log_completions:
        return None
    rows = train if evaluation is None else evaluation
    if args.completions_dataset_name is not None:
        rows = data.load_rows(args.completions_dataset_name)
    first = list(rows.take(args.num_prompts))
    prompts = from_rows(Dataset.from_list(first)).token_ids(tokenizer)
    config = args.sampler()
    check_lengths(prompts, config.max_new_tokens, max_positions(model.config))
    return LogCompletionsCallback(
        prompts, args.completions_freq, config, num_completions_to_print=args.num_completions_to_print
    )
