"""Files -> rows -> token ids, checked -> batches. Needs the package `datasets`."""

from vrpo.data.encode import RowProblem, Text, encode_prompts, encode_rows
from vrpo.data.rows import (
    COMPLETION_SIDES,
    PAIR_SIDES,
    CompletionCollator,
    DataReport,
    PairCollator,
    check_token_budget,
    load_rows,
    prepare_completions,
    prepare_pairs,
)

__all__ = [
    "COMPLETION_SIDES",
    "PAIR_SIDES",
    "CompletionCollator",
    "DataReport",
    "PairCollator",
    "RowProblem",
    "Text",
    "check_token_budget",
    "encode_prompts",
    "encode_rows",
    "load_rows",
    "prepare_completions",
    "prepare_pairs",
]
