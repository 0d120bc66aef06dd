"""Files -> rows -> token ids, checked -> batches. Needs the package `datasets`."""

from vrpo.data.budget import TokenBudget, check_token_budget, num_tokens
from vrpo.data.containers import as_dataset, read_columns
from vrpo.data.encode import encode_prompts, encode_rows
from vrpo.data.files import load_rows
from vrpo.data.formats import Text
from vrpo.data.problems import RowProblem
from vrpo.data.report import DataReport
from vrpo.data.rows import (
    COMPLETION_SIDES,
    PAIR_SIDES,
    CompletionCollator,
    LabelledCollator,
    PairCollator,
    prepare_completions,
    prepare_labelled,
    prepare_pairs,
    without,
)
from vrpo.data.stream_files import load_stream

__all__ = [
    "COMPLETION_SIDES",
    "PAIR_SIDES",
    "CompletionCollator",
    "DataReport",
    "LabelledCollator",
    "PairCollator",
    "RowProblem",
    "Text",
    "TokenBudget",
    "as_dataset",
    "check_token_budget",
    "encode_prompts",
    "encode_rows",
    "load_rows",
    "load_stream",
    "num_tokens",
    "prepare_completions",
    "prepare_labelled",
    "prepare_pairs",
    "read_columns",
    "without",
]
