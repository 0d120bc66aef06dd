"""Shapes of rows -> one shape: a prompt, its responses, and what the chat template gets besides.

Knows TRL's formats and no tokenizer. A row is a mapping of plain Python values. Arrow fills the keys that a
nested mapping lacks with None, so None counts as absent everywhere but in the `content` of a message.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vrpo.data.problems import RowProblem, shown

Message = dict[str, Any]
Text = str | list[Message]

SAME = "chosen and rejected are the same"
MESSAGES_COLUMNS = ("messages", "conversations")
EXTRA_COLUMNS = ("tools", "chat_template_kwargs", "system")  # what else of a row is read

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Who speaks in ShareGPT's rows, {"from", "value"} instead of {"role", "content"}.
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    **{role: role for role in _ROLES},
}
# What apply_chat_template takes from us or what would change the type of its result.
_RESERVED = {
    "conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict",
    "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length",
    "tokenizer_kwargs",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A row in the one shape that is encoded: all texts are strings, or all are lists of messages.

    A message has "role" and "content", a string or, beside tool calls, None; other keys are kept for the
    template. repeated: the responses of the row repeated the prompt, which was taken off them. doubled: they
    are plain text that begins with the prompt's, which may be meant, and stays.
    """

    prompt: Text
    responses: list[Text]
    tools: list[Any] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    repeated: bool = False
    doubled: bool = False

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def example(row: Mapping[str, Any], sides: Sequence[str]) -> Example:
    """The prompt and the responses of a row.

    Args:
        row: "prompt" and the sides, each a string or a list of messages, or another of TRL's formats:
            pairs without a prompt, which is then what both sides begin with; pairs whose sides are whole
            conversations beside a prompt that they repeat; for completions, "messages" (or ShareGPT's
            "conversations"), of which the last message is the completion and the rest the prompt.
            Besides "tools", a list of JSON schemas or its JSON text, and "chat_template_kwargs".
        sides: ("chosen", "rejected") or ("completion",).
    Errors: RowProblem saying what is wrong with the row.
    """
    if list(sides) == ["completion"] and row.get("completion") is None:
        for name in MESSAGES_COLUMNS:
            if row.get(name) is not None:
                return _finish(*_last_turn(_messages(row[name], name), name), False, row, sides)
    responses = [_text(row.get(side), side) for side in sides]
    if len(responses) == 2 and responses[0] == responses[1]:
        raise RowProblem(SAME)
    prompt, responses, repeated = _split(row, responses)
    return _finish(prompt, responses, repeated, row, sides)


def prompt_only(row: Mapping[str, Any]) -> Example:
    """The "prompt" of a row that has no responses, with its tools and template options.

    Errors: RowProblem, as for the prompt of a row to train on.
    """
    prompt = _text(row.get("prompt"), "prompt")
    _check_prompt(prompt)
    _check_system(row, prompt)
    return Example(prompt, [], *_template_inputs(row))


def split_prompt(responses: Sequence[Text]) -> tuple[Text, list[Text]]:
    """The implicit prompt of a pair, and what remains of its sides.

    It is what the sides begin with in common: the longest common prefix of strings (a space at the boundary
    goes to the responses, as in TRL), or the leading messages that are equal.
    """
    shared = shared_prefix(responses)
    if isinstance(responses[0], str) and shared and responses[0][shared - 1] == " ":
        shared -= 1
    return responses[0][:shared], [response[shared:] for response in responses]


def shared_prefix(sequences: Sequence[Sequence[Any]]) -> int:
    """Length of the longest common prefix."""
    first, *others = sequences
    if all(other[: len(first)] == first for other in others):
        return len(first)
    shared = 0
    while all(len(s) > shared and s[shared] == first[shared] for s in others):
        shared += 1
    return shared


def _split(row: Mapping[str, Any], responses: list[Text]) -> tuple[Text, list[Text], bool]:
    if len({type(response) for response in responses}) > 1:
        raise RowProblem("chosen and rejected mix plain text and messages")
    are_messages = isinstance(responses[0], list)
    if "prompt" not in row and len(responses) == 1:
        raise RowProblem("prompt is empty")
    if "prompt" not in row or (are_messages and not row["prompt"] and len(responses) > 1):
        return *split_prompt(responses), False
    prompt = _text(row["prompt"], "prompt")
    if isinstance(prompt, list) and not are_messages:
        raise RowProblem("prompt and responses mix plain text and messages")
    if are_messages:
        return _without_repeated_prompt(prompt, responses)
    return prompt, responses, False


def _without_repeated_prompt(prompt: Text, responses: list[Text]) -> tuple[Text, list[Text], bool]:
    """Prompt and responses of sides that may be whole conversations, as in UltraFeedback."""
    if isinstance(prompt, list):
        if all(response[: len(prompt)] == prompt and len(response) > len(prompt) for response in responses):
            return prompt, [response[len(prompt) :] for response in responses], True
        return prompt, responses, False
    if len(responses) > 1:
        opening, rest = split_prompt(responses)
    else:
        turns = [i for i, message in enumerate(responses[0]) if message["role"] == "assistant"]
        start = turns[-1] if turns else 0
        opening, rest = responses[0][:start], [responses[0][start:]]
    if not any((message["content"] or "").strip() == prompt.strip() for message in opening):
        raise RowProblem(
            "prompt and responses mix plain text and messages: the prompt is text, and the messages do not "
            'begin with it; make it [{"role": "user", "content": prompt}]'
        )
    return opening, rest, True


def _last_turn(messages: list[Message], name: str) -> tuple[list[Message], list[Text]]:
    if messages[-1]["role"] != "assistant":
        raise RowProblem(
            f"{name} ends with a {messages[-1]['role']} message; the completion is an assistant's"
        )
    return messages[:-1], [messages[-1:]]


def _finish(
    prompt: Text, responses: list[Text], repeated: bool, row: Mapping[str, Any], sides: Sequence[str]
) -> Example:
    _check_prompt(prompt)
    _check_system(row, prompt)
    for side, response in zip(sides, responses, strict=True):
        if not _says_something(response):
            raise RowProblem(f"{side} is empty")
        if isinstance(response, list):
            for turn in (response[0], response[-1]):
                if turn["role"] != "assistant":
                    raise RowProblem(
                        f"{side} must begin and end with an assistant message, not one of {turn['role']}; "
                        "earlier turns belong to the prompt"
                    )
    doubled = isinstance(prompt, str) and all(response.startswith(prompt) for response in responses)
    return Example(prompt, responses, *_template_inputs(row), repeated, doubled)


def _check_prompt(prompt: Text) -> None:
    if not _says_something(prompt):
        raise RowProblem("prompt is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise RowProblem("the prompt ends with an assistant message, which belongs to the response")


def _check_system(row: Mapping[str, Any], prompt: Text) -> None:
    """A system prompt in a column of its own, as in some ShareGPT files, would be lost without a word."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip():
        return
    texts = [prompt] if isinstance(prompt, str) else [message["content"] or "" for message in prompt]
    if not any(system.strip() in text for text in texts):
        raise RowProblem(
            "the column system holds a text that the prompt does not; make it the first message, "
            '{"role": "system", "content": ...}, or the beginning of the prompt, or drop the column'
        )


def _says_something(text: Text) -> bool:
    """Whether there is anything but white space; a call of a tool is something."""
    if isinstance(text, str):
        return bool(text.strip())
    return any((message["content"] or "").strip() or _calls(message) for message in text)


def _calls(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def _text(value: Any, name: str) -> Text:
    if isinstance(value, str):
        return value
    if value is None or value == []:
        raise RowProblem(f"{name} is empty")
    return _messages(value, name)


def _messages(value: Any, name: str) -> list[Message]:
    if isinstance(value, Mapping):
        raise RowProblem(f"{name} is a mapping; a single message, too, stands in a list")
    if not isinstance(value, list):
        kind = type(value).__name__
        raise RowProblem(f"{name} must be text or a list of messages, got {kind}: {shown(value)}")
    if not value:
        raise RowProblem(f"{name} is empty")
    return [_message(item, name) for item in value]


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowProblem(
            f'{name} holds {shown(item)} where a message {{"role": ..., "content": ...}} is needed'
        )
    message = {key: without_none(value) for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT:
            raise RowProblem(
                f"a message of {name} is from {shown(speaker)}; known are {', '.join(_SHAREGPT)}"
            )
        message = {"role": _SHAREGPT[speaker], "content": message.pop("value", None), **message}
    role = message.get("role")
    if role is not None and not isinstance(role, str):
        raise RowProblem(f"the role of a message of {name} must be text, got {shown(role)}")
    if not role or not role.strip():
        keys = ", ".join(map(str, item)) or "no keys"
        raise RowProblem(f"a message of {name} has no role: it has {keys}; needed are role and content")
    meant = _SHAREGPT.get(role.strip().lower())
    if meant is not None and meant != role:
        raise RowProblem(f"a message of {name} has the role {shown(role)}; write {meant!r}")
    message["content"] = _content(message.get("content"), message, name)
    return message


def _content(content: Any, message: Message, name: str) -> str | None:
    if isinstance(content, str) or (content is None and _calls(message)):
        return content
    if content is None:
        raise RowProblem(f"a message of {name} has no content")
    if not isinstance(content, list):
        kind = type(content).__name__
        raise RowProblem(f"the content of a message of {name} must be text, got {kind}: {shown(content)}")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowProblem(
                f"the content of a message of {name} has a part of type {kind}; only text is read"
            )
    return "".join(part["text"] for part in content)


def without_none(value: Any) -> Any:
    """The value without the keys of mappings, at any depth, that hold None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def _template_inputs(row: Mapping[str, Any]) -> tuple[list[Any] | None, dict[str, Any]]:
    tools = _from_json(row.get("tools"), "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        raise RowProblem(f"tools must be a list of JSON schemas, or its JSON text, got {shown(tools)}")
    options = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if options is not None and not isinstance(options, Mapping):
        raise RowProblem(f"chat_template_kwargs must map names to values, got {shown(options)}")
    if refused := sorted(_RESERVED & set(options or {})):
        raise RowProblem(f"chat_template_kwargs may not set {', '.join(refused)}")
    return without_none(tools) or None, without_none(options or {})


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"{name} is text and not JSON: {shown(value)}") from error
