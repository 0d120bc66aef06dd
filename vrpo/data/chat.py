"""Messages -> the text that a chat template makes of them, with a look at what the template leaves out."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from vrpo.data.formats import Example, Message
from vrpo.data.problems import RowProblem, one_line

_SHORT = 16  # characters of a content that may stand in the rest of a text by chance


@dataclass(frozen=True)
class Rendered:
    """Strings ready for the tokenizer: the prompt, and the prompt followed by each response.

    unrendered: the template has no place for something of the row: the content of a message, the tools, or
    the tool calls of a message of the prompt. Of an answer that is an error.
    special_in_text: a message spells special tokens, which become those tokens.
    """

    prompt: str
    full: list[str]
    conversational: bool
    unrendered: bool = False
    special_in_text: bool = False


def render(shaped: Example, sides: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The texts of a conversational row.

    Contents are strings; to a template that reads only lists of parts they are given as such.

    Errors: RowProblem where the template raises, leaves an answer out, or writes the prompt differently
        when an answer follows. ValueError without a template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("processing_class has no chat_template, which rows of messages need; set one")
    prompt = render_prompt(shaped, tokenizer, opening=True)
    if missing := _missing(shaped, prompt, tokenizer, opening=True):
        in_parts = replace(shaped, prompt=_in_parts(shaped.prompt))
        as_parts = _render_or_none(in_parts, tokenizer, opening=True)
        if as_parts is not None:
            still_missing = _missing(in_parts, as_parts, tokenizer, opening=True)
            if len(still_missing) < len(missing):
                responses = [_in_parts(response) for response in shaped.responses]
                shaped, prompt, missing = replace(in_parts, responses=responses), as_parts, still_missing
    unrendered = bool(missing)
    if shaped.tools:
        unrendered |= render_prompt(replace(shaped, tools=None), tokenizer, opening=True) == prompt
    unrendered |= _ignores_calls(shaped, shaped.prompt, tokenizer)
    full = []
    for side, response in zip(sides, shaped.responses, strict=True):
        whole = replace(shaped, prompt=[*shaped.prompt, *response])
        text = render_prompt(whole, tokenizer, opening=False)
        _check_prompt_is_kept(shaped.prompt, prompt, text, side)
        _check_answer_is_there(whole, response, text, side, tokenizer)
        full.append(text)
    special = _special_pattern(tuple(_special_tokens(tokenizer)))
    messages = [*shaped.prompt, *(message for response in shaped.responses for message in response)]
    spelt = special is not None and any(special.search(_string(message)) for message in messages)
    return Rendered(prompt, full, True, unrendered, spelt)


def render_prompt(shaped: Example, tokenizer: PreTrainedTokenizerBase, *, opening: bool) -> str:
    """`shaped.prompt` through the chat template, with the header of an answer after it if `opening`.

    Errors: RowProblem where the template raises.
    """
    if not any(message["content"] is None for message in shaped.prompt):
        return _apply(shaped, tokenizer, opening)
    # Beside tool calls. A template that does not ask about it fails, or writes the word None.
    text = _render_or_none(shaped, tokenizer, opening=opening)
    blank = replace(
        shaped, prompt=[message | {"content": message["content"] or ""} for message in shaped.prompt]
    )
    if text is None:
        return _apply(blank, tokenizer, opening)
    as_blank = _render_or_none(blank, tokenizer, opening=opening)
    return as_blank if as_blank is not None and as_blank.count("None") < text.count("None") else text


def _apply(shaped: Example, tokenizer: PreTrainedTokenizerBase, opening: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            shaped.prompt,
            tools=shaped.tools,
            tokenize=False,
            add_generation_prompt=opening,
            **shaped.template_options,
        )
    except Exception as error:  # whatever the template's own code raises
        raise RowProblem(f"the chat template refuses the row: {one_line(error)}") from error


def _render_or_none(shaped: Example, tokenizer: PreTrainedTokenizerBase, *, opening: bool) -> str | None:
    try:
        return _apply(shaped, tokenizer, opening)
    except RowProblem:
        return None


def _string(message: Message) -> str:
    content = message["content"] or ""
    return content if isinstance(content, str) else content[0]["text"]


def _missing(shaped: Example, text: str, tokenizer: PreTrainedTokenizerBase, *, opening: bool) -> set[int]:
    """Which messages' content the template does not write, judged by its text."""
    contents = [_string(message).strip() for message in shaped.prompt]
    missing = {i for i, content in enumerate(contents) if content not in text}
    short = {i for i, content in enumerate(contents) if 0 < len(content) < _SHORT} - missing
    if short:  # they may stand there by chance, in the header of a turn say; so write them longer
        longer = [
            _with_text(message, f"{contents[i]}<{i}>") if i in short else message
            for i, message in enumerate(shaped.prompt)
        ]
        marked = _render_or_none(replace(shaped, prompt=longer), tokenizer, opening=opening)
        if marked is not None:
            missing |= {i for i in short if f"{contents[i]}<{i}>" not in marked}
    return missing


def _with_text(message: Message, text: str) -> Message:
    in_parts = isinstance(message["content"], list)
    return message | {"content": [{"type": "text", "text": text}] if in_parts else text}


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    return [
        message if message["content"] is None
        else message | {"content": [{"type": "text", "text": _string(message)}]}
        for message in messages
    ]  # fmt: skip


def _ignores_calls(shaped: Example, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the text of shaped.prompt stays as it is when `messages`, some of it, lose their tool calls."""
    if not any(message.get("tool_calls") for message in messages):
        return False
    without = [
        {key: value for key, value in message.items() if key != "tool_calls"} | {"content": _string(message)}
        if any(message is one for one in messages)
        else message
        for message in shaped.prompt
    ]
    text = _render_or_none(replace(shaped, prompt=without), tokenizer, opening=False)
    return text is not None and text == render_prompt(shaped, tokenizer, opening=False)


def _check_prompt_is_kept(messages: Sequence[Message], prompt: str, full: str, side: str) -> None:
    """A template may end the prompt otherwise when an answer follows, but not change what was said in it."""
    if full.startswith(prompt):
        return
    last = _string(messages[-1]).strip()
    end = prompt.rfind(last) + len(last) if last in prompt else 0
    if full[:end] != prompt[:end]:
        raise RowProblem(
            f"the chat template writes the prompt differently when {side} follows, so that the two cannot be "
            "told apart; give text or token columns, or change the template"
        )


def _check_answer_is_there(
    whole: Example, response: Sequence[Message], text: str, side: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    if _ignores_calls(whole, response, tokenizer):
        raise RowProblem(f"the chat template does not write the tool calls of {side}; pass one that does")
    first = len(whole.prompt) - len(response)
    if not any(i >= first for i in _missing(whole, text, tokenizer, opening=False)):
        return
    # A template may write an answer in its own way, its thoughts apart say; it is lost if nothing changes.
    blank = [message | {"content": ""} if message["content"] else message for message in response]
    if (
        _render_or_none(replace(whole, prompt=[*whole.prompt[:first], *blank]), tokenizer, opening=False)
        == text
    ):
        raise RowProblem(f"the chat template does not write the content of {side}; pass one that does")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return sorted({str(token) for token in tokenizer.all_special_tokens})


@functools.lru_cache(maxsize=4)
def _special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None
