"""What `vrpo generate` answers: the prompts of rows, in every format that training takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from vrpo.data import COMPLETION_SIDES, PAIR_SIDES, RowProblem, Text, encode_prompts, read_columns
from vrpo.data.formats import EXTRA_COLUMNS, MESSAGES_COLUMNS, example, prompt_only
from vrpo.data.problems import raise_problems

_COLUMNS = ("prompt", *PAIR_SIDES, *COMPLETION_SIDES, *MESSAGES_COLUMNS, *EXTRA_COLUMNS)


@dataclass(frozen=True)
class Questions:
    """One entry per row: the prompt, text or messages, and what its chat template gets besides."""

    prompts: list[Text]
    tools: list[Any]
    template_options: list[dict[str, Any]]

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The ids that training has for these prompts. Errors: ValueError naming rows."""
        return encode_prompts(
            self.prompts, tokenizer, tools=self.tools, chat_template_kwargs=self.template_options
        )


def from_prompt(prompt: str, *, chat: bool) -> Questions:
    """A single question; with `chat` it is a user's message."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt: {prompt[error.start]!a} is half of a character: the command line was not UTF-8"
        ) from error
    return Questions([[{"role": "user", "content": prompt}] if chat else prompt], [None], [{}])


def from_rows(dataset: Dataset) -> Questions:
    """The prompts of a dataset to train on, or of one that has prompts and no responses.

    The prompt of a row is what `formats.example` makes of it; messages without an answer at the end are a
    prompt as they are.
    Errors: ValueError for a dataset that has no prompts, or naming the rows that have none and why.
    """
    names = [name for name in dataset.column_names if name in _COLUMNS]
    if not {"prompt", *MESSAGES_COLUMNS} & set(names) and not set(PAIR_SIDES) <= set(names):
        raise ValueError(
            f"the dataset lacks the column prompt: it has {', '.join(dataset.column_names)}; messages or "
            "pairs of chosen and rejected hold prompts too"
        )
    columns = read_columns(dataset, names)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    shaped, problems = [], []
    for row in rows:
        try:
            shaped.append(_question(row))
            problems.append("")
        except RowProblem as problem:
            problems.append(str(problem))
    raise_problems(problems)
    return Questions(
        [item.prompt for item in shaped],
        [item.tools for item in shaped],
        [item.template_options for item in shaped],
    )


def _question(row: Mapping[str, Any]):
    """The row as an `Example`, whose prompt counts."""
    responses = [row.get(name) for name in (*PAIR_SIDES, *COMPLETION_SIDES)]
    conversations = [row[name] for name in MESSAGES_COLUMNS if row.get(name) is not None]
    if row.get("prompt") is not None:
        # Text beside sides of messages: the prompt is what the messages begin with.
        if not isinstance(row["prompt"], str) or not any(isinstance(text, list) for text in responses):
            return prompt_only(row)
    elif conversations and not _is_answered(conversations[0]):
        return prompt_only({**row, "prompt": conversations[0]})
    elif not conversations and None in responses[:2]:
        return prompt_only(row)  # says that there is no prompt
    present = {name: value for name, value in row.items() if value is not None}
    return example(present, PAIR_SIDES if set(PAIR_SIDES) <= set(present) else COMPLETION_SIDES)


def _is_answered(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    who = (last.get("role") or last.get("from")) if isinstance(last, Mapping) else None
    return who not in ("user", "human", "tool", "observation")
