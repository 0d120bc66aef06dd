"""The token budget of a pack: which examples cannot be trained on within it, and what to tell of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as compute
from datasets import Dataset

SIDE_COLUMNS = ("chosen_ids", "rejected_ids", "completion_ids")


@dataclass(frozen=True)
class TokenBudget:
    """An example fits if

        K * sum over its responses of (P + L + F) <= max_tokens_per_pack

    num_samples: K. max_tokens_per_pack: tokens.
    max_fill: the largest EOS fill F of a response, as far as P + L + F stays within max_length.
    divisible: packs may divide an example, down to one masked copy of one response: P + L + F of the longer
        one counts.
    """

    num_samples: int
    max_tokens_per_pack: int
    max_fill: int = 0
    max_length: int = 0
    divisible: bool = False

    def tokens(self, prompt: Any, responses: Sequence[Any]) -> Any:
        """What an example takes; lengths as integers, or as arrays of one entry per example."""
        lengths = [prompt + response for response in responses]
        filled = [length + np.clip(self.max_length - length, 0, self.max_fill) for length in lengths]
        return np.maximum.reduce(filled) if self.divisible else self.num_samples * sum(filled)

    def over(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """(index, tokens) of the examples of a prepared dataset that do not fit."""
        sides = [name for name in dataset.column_names if name in SIDE_COLUMNS]
        found = [np.zeros(0, dtype=np.int64)]
        columns = dataset.select_columns(["prompt_ids", *sides])
        for part in columns.with_format("arrow").iter(batch_size=10_000):
            prompt, *responses = (
                compute.list_value_length(part[name]).to_numpy() for name in ("prompt_ids", *sides)
            )
            found.append(self.tokens(prompt, responses))
        tokens = np.concatenate(found)
        index = np.flatnonzero(tokens > self.max_tokens_per_pack)
        return index, tokens[index]

    def check(self, dataset: Dataset) -> None:
        """ValueError with the number of examples that do not fit, and the longest."""
        index, tokens = self.over(dataset)
        if len(index):
            longest = int(index[tokens.argmax()])
            raise ValueError(
                f"{len(index)} of {len(dataset)} examples are longer than the token budget, the longest is "
                f"example {dataset['example_id'][longest]}: {self.told(int(tokens.max()))}"
            )

    def told(self, tokens: int) -> str:
        """Why an example of so many tokens does not fit, and what to do."""
        copies = "one masked copy takes"
        if not self.divisible:
            copies = f"its num_samples={self.num_samples} masked copies take"
        remedy = "" if self.divisible else ", num_samples"
        fill = f" or max_eos_fill (up to {self.max_fill} tokens a response)" if self.max_fill else ""
        return (
            f"{copies} {tokens} tokens, but max_tokens_per_pack={self.max_tokens_per_pack}; raise that, or "
            f"lower max_length{remedy}{fill}"
        )


def check_token_budget(dataset: Dataset, num_samples: int, max_tokens_per_pack: int) -> None:
    """ValueError unless every example of a prepared dataset fits into one pack, see `TokenBudget`."""
    TokenBudget(num_samples, max_tokens_per_pack).check(dataset)


def num_tokens(dataset: Dataset) -> np.ndarray:
    """Tokens of each example of a prepared dataset, its prompt once per response; (E,) int64."""
    sides = [name for name in dataset.column_names if name in SIDE_COLUMNS]
    parts = [np.zeros(0, np.int64)]
    for part in dataset.select_columns(["prompt_ids", *sides]).with_format("arrow").iter(batch_size=10_000):
        prompt, *responses = (compute.list_value_length(part[name]) for name in ("prompt_ids", *sides))
        total = len(sides) * prompt.to_numpy().astype(np.int64)
        parts.append(sum((response.to_numpy() for response in responses), start=total))
    return np.concatenate(parts)
