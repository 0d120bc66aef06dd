"""A verifiable miniature of GSM8K: sums of two to four digits, answered with working. No model in here.

    prompt    7+4+8+3=
    careful   11 19 22      each number is the running total so far; the last one is the answer
    careless  01 09 02      the same sum by somebody who forgets to carry

Every problem has at least one carry, so the two ways of answering never agree. Answers have one to three
numbers of two digits, one character per token: that is what a model of 0.2 M parameters learns in minutes.
"""

import itertools
import random
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NUM_TERMS = (2, 3, 4)
PROBLEMS_OF_EACH = 5400  # at most; there are 45 sums of two digits and 645 of three
EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"
CORRECT, CARELESS, OTHER = "correct", "forgot to carry", "other mistake"


@dataclass(frozen=True)
class Problem:
    """A sum of digits from 1 to 9 that reaches 10 at least."""

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return "+".join(map(str, self.terms)) + "="

    @property
    def response_length(self) -> int:
        """Tokens of an answer: two digits and a space for each number, with EOS for the last space."""
        return 3 * (len(self.terms) - 1)

    def working(self, carries: bool) -> str:
        """The running totals as a careful (`carries`) or a careless person writes them."""
        totals = list(itertools.accumulate(self.terms))[1:]
        return " ".join(f"{total if carries else total % 10:02d}" for total in totals)


LONGEST_RESPONSE = Problem((9,) * max(NUM_TERMS)).response_length


def all_problems(seed: int) -> list[Problem]:
    """Different problems of every length, in an order that is a pure function of the seed."""
    drawn = random.Random(seed)
    problems = []
    for num_terms in NUM_TERMS:
        digits = itertools.product(range(1, 10), repeat=num_terms)
        of_this_length = [Problem(terms) for terms in digits if sum(terms) >= 10]
        problems += drawn.sample(of_this_length, min(PROBLEMS_OF_EACH, len(of_this_length)))
    drawn.shuffle(problems)
    return problems


def write_corpus(problems: list[Problem], careful_share: float, seed: int) -> list[dict[str, str]]:
    """One answer to each problem, from a careful writer with probability `careful_share`.

    Returns: rows {"prompt", "completion"}, in the order of the problems.
    Errors: ValueError if careful_share is not in [0, 1].
    """
    if not 0 <= careful_share <= 1:
        raise ValueError(f"careful_share must be in [0, 1], got {careful_share}")
    writer = random.Random(seed)
    return [
        {"prompt": problem.prompt, "completion": problem.working(writer.random() < careful_share)}
        for problem in problems
    ]


def verify(problem: Problem, response: str) -> str:
    """CORRECT if the answer and all the working are right, CARELESS if every carry is missing, else OTHER."""
    if response == problem.working(carries=True):
        return CORRECT
    return CARELESS if response == problem.working(carries=False) else OTHER


def build_tokenizer() -> PreTrainedTokenizerBase:
    """One token per character of the task, EOS (which is also the padding) and the mask token."""
    characters = "0123456789+= "
    vocabulary = {token: index for index, token in enumerate([*characters, EOS, MASK])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK)
