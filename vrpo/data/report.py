"""DataReport: what preparing a dataset changed, in counts and in one line."""

from dataclasses import dataclass

from vrpo.data.problems import told_problems

MANY_UNUSABLE = 0.1
"""Share of unusable rows from which on the format of the data is in doubt, and not some of its rows."""


@dataclass(frozen=True)
class DataReport:
    """What preparing a dataset changed. Counts of rows, responses or tokens; `str()` is one line to log.

    rows: rows read. kept: rows that remain.
    dropped_same: pairs whose sides became equal by truncation, and were dropped.
    prompts_truncated: rows whose prompt lost its beginning; responses_truncated: responses that lost
        their end (EOS included).
    prompt_tokens_cut, response_tokens_cut: tokens lost that way.
    boundaries_merged: rows in which the tokenizer joined the end of the prompt and a response's beginning.
    prompt_tokens, response_tokens: tokens that remain, summed over rows (a pair's prompt counts once).
    longest: tokens of the longest prompt + response that remains.
    repeated: rows whose responses began with the prompt again, as whole conversations do; it was taken off.
    doubled: rows whose responses are plain text that begins with the prompt's, which stays.
    unrendered: rows of which the chat template left something out: a message, tools, or calls of tools.
    special_in_text: rows in whose messages special tokens are spelt out, which become those tokens.
    examples_per_row: examples that a row becomes, 2 where pairs are taken apart.
    unusable: (row, reason) of each row that was dropped because it cannot be used (drop_unusable_rows).
    """

    rows: int
    kept: int
    dropped_same: int
    prompts_truncated: int
    responses_truncated: int
    prompt_tokens_cut: int
    response_tokens_cut: int
    boundaries_merged: int
    prompt_tokens: int
    response_tokens: int
    longest: int
    repeated: int = 0
    doubled: int = 0
    unrendered: int = 0
    special_in_text: int = 0
    unusable: tuple[tuple[int, str], ...] = ()
    examples_per_row: int = 1

    @property
    def num_changed(self) -> int:
        """Rows and responses that lost something or are not what they seem; 0: nothing worth a warning."""
        lost = self.dropped_same + self.prompts_truncated + self.responses_truncated + self.unrendered
        return lost + self.boundaries_merged + self.special_in_text + self.doubled + len(self.unusable)

    def __str__(self) -> str:
        told = [
            f"{self.kept} of {self.rows} rows, {self.prompt_tokens} prompt tokens, "
            f"{self.response_tokens} response tokens, longest sequence {self.longest}"
        ]
        if self.prompts_truncated:
            told.append(
                f"{self.prompts_truncated} prompts lost their beginning ({self.prompt_tokens_cut} tokens)"
            )
        if self.responses_truncated:
            told.append(
                f"{self.responses_truncated} responses lost their end ({self.response_tokens_cut} tokens)"
            )
        for count, text in (
            (self.dropped_same, "pairs dropped: equal after truncation"),
            (self.boundaries_merged, "rows where prompt and response share a token"),
            (self.repeated, "rows whose responses repeat the prompt; taken off"),
            (self.doubled, "rows whose responses begin with the text of the prompt, which stays"),
            (self.unrendered, "rows of which the chat template leaves out a message, tools or tool calls"),
            (self.special_in_text, "rows whose messages spell special tokens"),
        ):
            if count:
                told.append(f"{count} {text}")
        if self.unusable:
            told.append(f"{len(self.unusable)} unusable rows dropped: {told_problems(self.unusable)}")
        if len(self.unusable) > MANY_UNUSABLE * self.rows:
            told.append(
                f"THESE ARE {len(self.unusable) / self.rows:.0%} OF ALL ROWS: check the format of the data "
                "before you trust what is left"
            )
        return "; ".join(told)
