"""Rows of text or messages -> token ids of a prompt and its responses. Knows tokenizers.

What shapes a row may have is `formats.py`'s; nothing here truncates, checks budgets or touches files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from vrpo.data.chat import Rendered, render, render_prompt
from vrpo.data.formats import Example, Message, Text, example, prompt_only, shared_prefix
from vrpo.data.problems import RowProblem, raise_problems

_PROBES = 16
_PROBE = "zyzzyva"  # a content that no template writes by itself


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a prompt and of its responses, in the order of the sides.

    merged: the tokenizer joined the end of the prompt and the beginning of a response, so the boundary
    moved back to the last token that prompt and prompt + response share.
    repeated, doubled: the responses began with the prompt, see `formats.Example`.
    unrendered: the chat template left something of the row out. See `chat.Rendered`.
    special_in_text: a message spells special tokens.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    merged: bool
    repeated: bool = False
    doubled: bool = False
    unrendered: bool = False
    special_in_text: bool = False


def encode_rows(
    rows: Sequence[Mapping[str, Any]], sides: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[EncodedRow | RowProblem]:
    """Token ids of each row, or the reason why a row has none.

    Args:
        rows: in the formats of `formats.example`, each row in its own.
        sides: ("chosen", "rejected") or ("completion",).
        tokenizer: of plain text needs an eos_token, of messages a chat_template.
    Returns:
        One entry per row. A response starts at the first token in which it differs from the prompt. Plain
        text ends with EOS, appended where it is missing; messages end as the chat template ends them (an
        EoT token with LLaDA's). Both belong to the response and are scored like any token.
    Errors: ValueError if the tokenizer lacks what the format needs.
    """
    shapes: list[tuple[Example, Rendered] | RowProblem] = []
    for row in rows:
        try:
            shaped = example(row, sides)
            shapes.append((shaped, _rendered(shaped, sides, tokenizer)))
        except RowProblem as problem:
            shapes.append(problem)
    ids = iter(_tokenise([item[1] for item in shapes if not isinstance(item, RowProblem)], tokenizer))
    return [item if isinstance(item, RowProblem) else _encoded(next(ids), *item) for item in shapes]


def encode_prompts(
    prompts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Sequence[Any] | None = None,
) -> list[list[int]]:
    """Token ids of prompts alone, the same that `encode_rows` gives before a response.

    Args: prompts: text or messages, each in its own format; tools, chat_template_kwargs: the columns of
        those names, one entry per prompt.
    Errors: ValueError naming the rows that cannot be used and why; an empty prompt is one.
    """
    columns: dict[str, Sequence[Any]] = {"prompt": prompts}
    columns |= {} if tools is None else {"tools": tools}
    columns |= {} if chat_template_kwargs is None else {"chat_template_kwargs": chat_template_kwargs}
    rendered: list[Rendered] = []
    problems: list[str] = []
    for values in zip(*columns.values(), strict=True):
        try:
            shaped = prompt_only(dict(zip(columns, values, strict=True)))
            rendered.append(_rendered(shaped, (), tokenizer))
            problems.append("")
        except RowProblem as problem:
            problems.append(str(problem))
    raise_problems(problems)
    return [ids for [ids] in _tokenise(rendered, tokenizer)]


def _rendered(shaped: Example, sides: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if not shaped.conversational:
        return Rendered(shaped.prompt, [shaped.prompt + response for response in shaped.responses], False)
    return render(shaped, sides, tokenizer)


def _tokenise(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
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
            opening = _unasked_opening(tokenizer) if any(rendered[i].full for i in indices) else []
        else:
            ids = iter(_plain_ids(texts, tokenizer))
        for i in indices:
            prompt_ids, *full_ids = [next(ids) for _ in (None, *rendered[i].full)]
            if conversational:
                full_ids = [_without_suffix(tokens, opening) for tokens in full_ids]
            else:
                full_ids = [_ending_with_eos(tokens, tokenizer) for tokens in full_ids]
            result[i] = [prompt_ids, *full_ids]
    return result


def _encoded(ids: list[list[int]], shaped: Example, rendered: Rendered) -> EncodedRow:
    prompt_ids, *full_ids = ids
    shared = shared_prefix(ids)
    return EncodedRow(
        prompt_ids=prompt_ids[:shared],
        response_ids=[tokens[shared:] for tokens in full_ids],
        merged=shared < len(prompt_ids),
        repeated=shaped.repeated,
        doubled=shaped.doubled,
        unrendered=rendered.unrendered,
        special_in_text=rendered.special_in_text,
    )


def _plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of plain text with what the tokenizer puts before it (BOS) and without what it puts after.

    Nothing may come between a prompt and its response, and the end of a response is `_ending_with_eos`'s.
    A text that spells BOS itself, as one written by a chat template does, does not get a second one.
    """
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    all_ids = tokenizer(list(texts))["input_ids"]
    longest = max(range(len(texts[:_PROBES])), key=lambda i: len(all_ids[i]))
    before, after = _added(tokenizer, texts[longest])
    encoded = []
    for text, ids in zip(texts, all_ids, strict=True):
        doubled = bos is not None and before[-1:] == [bos_id] and text.startswith(bos)
        encoded.append(_without_suffix(ids, after)[len(before) if doubled else 0 :])
    return encoded


def _added(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after every text.

    Usually nothing or BOS, and nothing; EOS after it with `add_eos_token`.
    text: one of the data's, because a small vocabulary cannot write just any; a long one, because one of a
    single special token leaves open which of two is its own.
    """
    with_special = tokenizer(text)["input_ids"]
    without = tokenizer(text, add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return with_special[:start], with_special[start + len(without) :]
    raise ValueError("processing_class changes the tokens of a text when it adds special tokens to it")


def _unasked_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens with which the template opens an assistant turn although nobody asked; usually none.

    LLaDA's stock template ends every conversation with the assistant header, add_generation_prompt or not.
    That header is no part of a response. It is what the text before the content of an assistant message
    (start of text, header) and the text after it (end of turn, header) end with in common, in tokens.
    """
    user, answer = ([{"role": role, "content": _PROBE}] for role in ("user", "assistant"))
    try:
        asked, unasked = (render_prompt(Example(user, []), tokenizer, opening=o) for o in (True, False))
    except RowProblem:  # a template with demands that its rows meet and this probe does not
        return []
    if asked != unasked or _ends_otherwise(unasked, [*user, *answer], tokenizer):
        return []
    try:
        before, _, after = render_prompt(Example(answer, []), tokenizer, opening=False).partition(_PROBE)
    except RowProblem:
        before, after = "", ""
    before_ids, after_ids = tokenizer([before, after], add_special_tokens=False)["input_ids"]
    shared = shared_prefix([before_ids[::-1], after_ids[::-1]])
    if not shared or shared in (len(before_ids), len(after_ids)):
        raise ValueError(
            "the chat template of processing_class ignores add_generation_prompt and gives no way to tell "
            "the end of an answer from the opening of the next; pass a template that honours it, or "
            "token columns (prompt_ids, ...)"
        )
    return after_ids[-shared:]


def _ends_otherwise(question: str, talk: list[Message], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an answer ends in other tokens than a question, so that nothing is opened after both.

    Llama-2's and Mistral's templates have no header to open, and are the same asked and unasked.
    """
    try:
        text = render_prompt(Example(talk, []), tokenizer, opening=False)
    except RowProblem:
        return False
    ends = [part.rpartition(_PROBE)[2] for part in (question, text)]
    after_question, after_answer = tokenizer(ends, add_special_tokens=False)["input_ids"]
    return bool(after_answer) and after_question[-1:] != after_answer[-1:]


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids with which the chat template ends an answer; none where there is no template, or it refuses.

    With them a response can be told from one that lost its end, whatever the template puts after EoT.
    """
    if not tokenizer.chat_template:
        return ()
    talk = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
    try:
        after = render_prompt(Example(talk, []), tokenizer, opening=False).rpartition(_PROBE)[2]
        opening = _unasked_opening(tokenizer)
    except ValueError:  # a template with demands that its rows meet and this probe does not
        return ()
    return tuple(_without_suffix(tokenizer(after, add_special_tokens=False)["input_ids"], opening))


def _without_suffix(ids: list[int], suffix: list[int]) -> list[int]:
    if suffix and ids[-len(suffix) :] == suffix:
        return ids[: -len(suffix)]
    return ids


def _ending_with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("processing_class has no eos_token; plain-text responses must end with one")
    return ids if ids and ids[-1] == eos else [*ids, eos]
