"""Fixtures that several tests share: tokenizer, model and a few pairs, all tiny; what property tests draw."""

import os

# Before anything imports huggingface_hub, which reads it once: no test waits for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from datasets import Dataset
from hypothesis import settings

from vrpo.commands.new_model import NewModel, build_model, train_tokenizer

# The same cases in every run of the same code: what fails for somebody else fails here. New ones, to look for
# more: pytest --hypothesis-profile=explore
settings.register_profile("same_cases", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("same_cases")


def sums(first: int, last: int) -> list[dict[str, str]]:
    """Pairs of a right and a wrong sum."""
    return [
        {"prompt": f"What is {n} plus {n + 3}?", "chosen": f" {2 * n + 3}.", "rejected": f" {2 * n}."}
        for n in range(first, last)
    ]


@pytest.fixture(scope="session")
def tokenizer():
    texts = [text for row in sums(0, 60) for text in row.values()]
    return train_tokenizer(texts, vocab_size=300)


@pytest.fixture
def tiny_model(tokenizer):
    """A fresh two-layer LLaDA with random weights, fp32, on the CPU."""
    sizes = NewModel(vocab_size=300, d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=64)
    return build_model(sizes, tokenizer, max_length=64, seed=0)


@pytest.fixture(scope="session")
def pair_rows() -> Dataset:
    """Twelve preference rows of plain text: prompt, chosen, rejected."""
    return Dataset.from_list(sums(0, 12))


@pytest.fixture(scope="session")
def completion_rows() -> Dataset:
    """Twelve SFT rows of plain text: prompt, completion."""
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in sums(0, 12)])
