"""Rows of text or messages -> token ids of a prompt and its responses. Knows tokenizers and TRL's formats.

Nothing here truncates, checks budgets or touches files; that is `limits.py` and `rows.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Text = str | list[Message]

SAME = "chosen and rejected are the same"


class RowProblem(ValueError):
    """One row cannot be used. The text says why; the caller adds the row number."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a prompt and of its responses, in the order of the sides.

    merged: the tokenizer joined the end of the prompt and the beginning of a response, so the boundary
    moved back to the last token that prompt and prompt + response share.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    merged: bool


@dataclass(frozen=True)
class _Rendered:
    """Strings ready for the tokenizer: the prompt, and the prompt followed by each response."""

    prompt: str
    full: list[str]
    conversational: bool


def encode_rows(
    rows: Sequence[dict[str, Any]], sides: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[EncodedRow | RowProblem]:
    """Token ids of each row, or the reason why a row has none.

    Args:
        rows: mappings with the keys of `sides` and, unless it is implicit, "prompt". A value is a string
            or a list of {"role", "content"} messages, which go through the tokenizer's chat template.
        sides: ("chosen", "rejected") or ("completion",).
        tokenizer: of plain text needs an eos_token, of messages a chat_template.
    Returns:
        One entry per row. A response starts at the first token in which it differs from the prompt. Plain
        text ends with EOS, appended where it is missing; messages end as the chat template ends them (an
        EoT token with LLaDA's). Both belong to the response and are scored like any token.
    Errors: ValueError if the tokenizer lacks what the format needs.
    """
    rendered = [_attempt(row, sides, tokenizer) for row in rows]
    ids = iter(_tokenise([item for item in rendered if isinstance(item, _Rendered)], tokenizer))
    return [item if isinstance(item, RowProblem) else _encoded(next(ids)) for item in rendered]


def _tokenise(rendered: Sequence[_Rendered], tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """Token ids of the prompt and of each full text of every row, each row by its own format."""
    result: list[list[list[int]]] = [[] for _ in rendered]
    for conversational in (False, True):
        indices = [i for i, item in enumerate(rendered) if item.conversational == conversational]
        if not indices:
            continue
        texts = [text for i in indices for text in (rendered[i].prompt, *rendered[i].full)]
        if conversational:
            # A chat template writes the special tokens itself.
            ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
            opening = _unasked_opening(tokenizer)
        else:
            if tokenizer.eos_token_id is None:
                raise ValueError("processing_class has no eos_token; plain-text responses must end with one")
            ids = iter(_plain_ids(texts, tokenizer))
        for i in indices:
            prompt_ids, *full_ids = [next(ids) for _ in (None, *rendered[i].full)]
            if conversational:
                full_ids = [_without_suffix(tokens, opening) for tokens in full_ids]
            else:
                full_ids = [_ending_with(tokens, tokenizer.eos_token_id) for tokens in full_ids]
            result[i] = [prompt_ids, *full_ids]
    return result


def _encoded(ids: list[list[int]]) -> EncodedRow:
    prompt_ids, *full_ids = ids
    shared = _shared_prefix(ids)
    return EncodedRow(
        prompt_ids=prompt_ids[:shared],
        response_ids=[tokens[shared:] for tokens in full_ids],
        merged=shared < len(prompt_ids),
    )


def _plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of plain text with what the tokenizer puts before it (BOS) and without what it puts after.

    Nothing may come between a prompt and its response, and the end of a response is `_ending_with`'s.
    """
    suffix = _appended(tokenizer)
    return [_without_suffix(ids, suffix) for ids in tokenizer(list(texts))["input_ids"]]


def _appended(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts after every text: EOS with `add_eos_token`; usually none."""
    with_special, without = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return with_special[start + len(without) :]
    raise ValueError("processing_class changes the tokens of a text when it adds special tokens to it")


def encode_prompts(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompts alone, as `encode_rows` has them: text as it is, messages through the template.

    Errors: ValueError naming an empty prompt.
    """
    ids = []
    for row, prompt in enumerate(prompts):
        if not prompt or not _content(prompt):
            raise ValueError(f"prompt is empty (row {row})")
        if isinstance(prompt, str):
            ids += _plain_ids([prompt], tokenizer)
        else:
            text = _chat(tokenizer, prompt, opening=True)
            ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids


def _attempt(
    row: dict[str, Any], sides: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> _Rendered | RowProblem:
    try:
        return _render(row, sides, tokenizer)
    except RowProblem as problem:
        return problem


def _render(row: dict[str, Any], sides: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> _Rendered:
    for side in sides:
        if not row[side]:
            raise RowProblem(f"{side} is empty")
    if len(sides) == 2 and row[sides[0]] == row[sides[1]]:
        raise RowProblem(SAME)
    prompt, responses = split_prompt(row, sides)
    if len({type(part) for part in (prompt, *responses)}) > 1:
        raise RowProblem("prompt and responses mix plain text and messages")
    if not _content(prompt):
        raise RowProblem("prompt is empty")
    for side, response in zip(sides, responses, strict=True):
        if not _content(response):
            raise RowProblem(f"{side} is empty")
    if isinstance(prompt, str):
        return _Rendered(prompt, [prompt + response for response in responses], False)
    if prompt[-1]["role"] == "assistant":
        raise RowProblem("the prompt ends with an assistant message, which belongs to the response")
    return _Rendered(
        _chat(tokenizer, prompt, opening=True),
        [_chat(tokenizer, prompt + response, opening=False) for response in responses],
        True,
    )


def split_prompt(row: dict[str, Any], sides: Sequence[str]) -> tuple[Text, list[Text]]:
    """The prompt and the responses of a row whose prompt may be implicit.

    Without a "prompt", it is what the sides begin with in common: the longest common prefix of strings
    (a space at the boundary goes to the responses, as in TRL), or the leading messages that are equal.
    """
    responses = [row[side] for side in sides]
    if "prompt" in row:
        return row["prompt"] if row["prompt"] is not None else "", responses
    if len({type(response) for response in responses}) > 1:
        raise RowProblem("chosen and rejected mix plain text and messages")
    shared = _shared_prefix(responses)
    if isinstance(responses[0], str) and shared and responses[0][shared - 1] == " ":
        shared -= 1
    return responses[0][:shared], [response[shared:] for response in responses]


def _shared_prefix(sequences: Sequence[Sequence[Any]]) -> int:
    """Length of the longest common prefix."""
    first, *others = sequences
    if all(other[: len(first)] == first for other in others):
        return len(first)
    shared = 0
    while all(len(s) > shared and s[shared] == first[shared] for s in others):
        shared += 1
    return shared


def _content(text: Text) -> bool:
    """Whether there is anything but white space."""
    if isinstance(text, str):
        return bool(text.strip())
    return any((message.get("content") or "").strip() for message in text)


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, opening: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)


def _unasked_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens with which the template opens an assistant turn although nobody asked; usually none.

    LLaDA's stock template ends every conversation with the assistant header, add_generation_prompt or not.
    That header is no part of a response. It is what the text before the content of an assistant message
    (start of text, header) and the text after it (end of turn, header) end with in common, in tokens.
    """
    user = {"role": "user", "content": "question"}
    if _chat(tokenizer, [user], opening=True) != _chat(tokenizer, [user], opening=False):
        return []
    content = "answer"
    text = _chat(tokenizer, [{"role": "assistant", "content": content}], opening=False)
    before, _, after = text.partition(content)
    before_ids, after_ids = tokenizer([before, after], add_special_tokens=False)["input_ids"]
    shared = _shared_prefix([before_ids[::-1], after_ids[::-1]])
    if not shared or shared in (len(before_ids), len(after_ids)):
        raise ValueError(
            "the chat template of processing_class ignores add_generation_prompt and gives no way to tell "
            "the end of an answer from the opening of the next; pass a template that honours it, or "
            "token columns (prompt_ids, ...)"
        )
    return after_ids[-shared:]


def _without_suffix(ids: list[int], suffix: list[int]) -> list[int]:
    if suffix and ids[-len(suffix) :] == suffix:
        return ids[: -len(suffix)]
    return ids


def _ending_with(ids: list[int], eos_token_id: int) -> list[int]:
    return ids if ids and ids[-1] == eos_token_id else [*ids, eos_token_id]
