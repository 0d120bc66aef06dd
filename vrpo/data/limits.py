"""What one example may hold: truncation to max_length, and the checks of one row's token ids."""

from collections.abc import Sequence
from dataclasses import dataclass

from vrpo.data.encode import EncodedRow
from vrpo.data.formats import SAME
from vrpo.data.problems import RowProblem


def truncated_lengths(
    prompt: int,
    responses: Sequence[int],
    max_length: int | None,
    max_prompt_length: int | None = None,
) -> tuple[int, list[int]]:
    """How many tokens to keep: the last ones of the prompt, the first ones of each response.

    Prompt and response are each guaranteed half of max_length and may use what the other leaves. A
    max_prompt_length cuts the prompt first; the prompt then keeps what it has. The prompt is the same for
    all responses. Nothing is emptied: whoever has tokens keeps at least one.

    Args: prompt, responses: lengths in tokens, at least 1; max_length: tokens of prompt + response, at
        least 2, or None for no limit; max_prompt_length: in [1, max_length), or None.
    """
    if max_prompt_length is not None:
        prompt = min(prompt, max_prompt_length)
    if max_length is None:
        return prompt, list(responses)
    share = max_length // 2 if max_prompt_length is None else max_prompt_length
    room = max(max_length - prompt, max_length - share)
    kept = [min(length, room) for length in responses]
    return min(prompt, max_length - max(kept)), kept


@dataclass(frozen=True)
class Limits:
    """What the rows are checked against; picklable, because the map may run in several processes."""

    max_length: int | None
    max_prompt_length: int | None
    max_positions: int | None
    vocab_size: int | None
    mask_token_id: int | None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must hold a prompt and a response token, got {self.max_length}")
        if self.max_prompt_length is None:
            return
        if self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}")
        if self.max_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a response within "
                f"max_length={self.max_length}"
            )

    def check_ids(self, ids: list[int]) -> None:
        worst = min(ids)
        if worst >= 0 and self.vocab_size is not None and max(ids) >= self.vocab_size:
            worst = max(ids)
        if worst < 0 or (self.vocab_size is not None and worst >= self.vocab_size):
            rows = (
                "any embedding"
                if self.vocab_size is None
                else f"the model's embedding of {self.vocab_size} rows"
            )
            raise RowProblem(f"token id {worst} is outside {rows}")
        if max(ids) >= 2**31:
            raise RowProblem(f"token id {max(ids)} has more than 31 bits")
        if self.mask_token_id is not None and self.mask_token_id in ids:
            raise RowProblem(
                f"the mask token (id {self.mask_token_id}) stands in the data, where it means nothing"
            )

    def check_length(self, length: int) -> None:
        if self.max_positions is not None and length > self.max_positions:
            raise RowProblem(
                f"prompt and response are longer than the model's {self.max_positions} positions; set "
                f"max_length={self.max_positions}"
            )


@dataclass(frozen=True)
class RowCounts:
    """One row's part of the DataReport."""

    same: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    prompt_tokens_cut: int = 0
    response_tokens_cut: int = 0
    boundaries_merged: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    repeated: int = 0
    doubled: int = 0
    unrendered: int = 0
    special_in_text: int = 0


def truncate(
    prompt: list[int],
    responses: list[list[int]],
    sides: tuple[str, ...],
    limits: Limits,
    encoded: EncodedRow | None = None,
) -> tuple[list[list[int]], RowCounts]:
    """Prompt and responses within the limits, and what that cost; `encoded`: where the tokens come from."""
    for name, ids in zip(("prompt", *sides), (prompt, *responses), strict=True):
        if not ids and encoded is not None and encoded.merged:
            raise RowProblem(f"{name} has no token of its own: the tokenizer joins prompt and response")
        if not ids:
            raise RowProblem(f"{name} has no tokens")
        limits.check_ids(ids)
    if len(responses) == 2 and responses[0] == responses[1]:
        raise RowProblem(SAME)
    kept_prompt, kept = truncated_lengths(
        len(prompt), [len(ids) for ids in responses], limits.max_length, limits.max_prompt_length
    )
    limits.check_length(kept_prompt + max(kept))
    cut = [ids[:length] for ids, length in zip(responses, kept, strict=True)]
    return [prompt[len(prompt) - kept_prompt :], *cut], RowCounts(
        same=len(cut) == 2 and cut[0] == cut[1],
        prompts_truncated=kept_prompt < len(prompt),
        responses_truncated=sum(a < len(b) for a, b in zip(kept, responses, strict=True)),
        prompt_tokens_cut=len(prompt) - kept_prompt,
        response_tokens_cut=sum(len(b) - a for a, b in zip(kept, responses, strict=True)),
        boundaries_merged=encoded is not None and encoded.merged,
        prompt_tokens=kept_prompt,
        response_tokens=sum(kept),
        longest=kept_prompt + max(kept),
        repeated=encoded is not None and encoded.repeated,
        doubled=encoded is not None and encoded.doubled,
        unrendered=encoded is not None and encoded.unrendered,
        special_in_text=encoded is not None and encoded.special_in_text,
    )
