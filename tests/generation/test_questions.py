"""Prompts to answer: every format of rows, the ids that training has, and errors that name the row."""

import copy
import json

import pytest
from tokenizers import processors

from vrpo.data import COMPLETION_SIDES, PAIR_SIDES, encode_rows, load_rows
from vrpo.generation.questions import from_prompt, from_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "number"}}}},
}
ROWS = {
    "text": {"prompt": "What is 1 plus 2?", "completion": " 3."},
    "text pairs": {"prompt": "What is 1 plus 2?", "chosen": " 3.", "rejected": " 2."},
    "messages": {"prompt": [user("What is 1?")], "completion": [assistant("1.")]},
    "message pairs": {
        "prompt": [user("1 plus 2?")],
        "chosen": [assistant("3.")],
        "rejected": [assistant("2.")],
    },
    "implicit text": {"chosen": "What is 1 plus 2? 3.", "rejected": "What is 1 plus 2? 2."},
    "implicit messages": {
        "chosen": [user("1 plus 2?"), assistant("3.")],
        "rejected": [user("1 plus 2?"), assistant("2.")],
    },
    "text beside conversations": {
        "prompt": "1 plus 2?",
        "chosen": [user("1 plus 2?"), assistant("3.")],
        "rejected": [user("1 plus 2?"), assistant("2.")],
    },
    "text beside a conversation": {"prompt": "1?", "completion": [user("1?"), assistant("1.")]},
    "conversation": {"messages": [user("1?"), assistant("1."), user("2?"), assistant("2.")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "1."}]},
    "tools": {"prompt": [user("1?")], "completion": [assistant("1.")], "tools": [TOOL]},
    "options": {
        "prompt": [user("1?")],
        "completion": [assistant("1.")],
        "chat_template_kwargs": {"shout": True},
    },
}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if shout is defined %}{{ 'WHAT' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture
def chatty(tokenizer):
    """Its template shows tools and an option; like some tokenizers it appends EOS to every text."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE
    eos = changed.eos_token
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, changed.eos_token_id)]
    )
    return changed


def load(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(str(path))


@pytest.mark.parametrize("name", ROWS)
def test_from_rows__prompt_ids_are_those_of_training(tmp_path, chatty, name):
    row = ROWS[name]
    sides = PAIR_SIDES if "chosen" in row else COMPLETION_SIDES
    (trained,) = encode_rows([row], sides, chatty)
    (ids,) = from_rows(load(tmp_path, row)).token_ids(chatty)
    assert ids == trained.prompt_ids
    assert not trained.merged
    assert chatty.eos_token_id not in ids
    assert ("WHAT" in chatty.decode(ids)) == (name == "options")
    assert ("function" in chatty.decode(ids)) == (name == "tools")


def test_from_rows__rows_may_be_of_several_formats(tmp_path, chatty):
    rows = [{"prompt": "What is 1?", "tools": None}, {"prompt": [user("What is 1?")], "tools": [TOOL]}]
    together = from_rows(load(tmp_path, *rows)).token_ids(chatty)
    alone = [from_rows(load(tmp_path, row)).token_ids(chatty)[0] for row in rows]
    assert together == alone
    assert alone[0] != alone[1]


def test_from_rows__messages_that_wait_for_an_answer_are_the_prompt(tmp_path, chatty):
    messages = [user("1?"), assistant("1."), user("2?")]
    questions = from_rows(load(tmp_path, {"messages": messages}))
    assert questions.prompts == [messages]
    assert from_rows(load(tmp_path, {"prompt": messages})).token_ids(chatty) == questions.token_ids(chatty)


def test_from_rows__responses_do_not_matter_where_the_prompt_is_given(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "c", "chosen": None, "rejected": "d"}]
    assert from_rows(load(tmp_path, *rows)).prompts == ["a", "c"]


BAD_ROWS = {
    "none": ({"prompt": None}, "prompt is empty"),
    "blank": ({"prompt": " \n"}, "prompt is empty"),
    "no messages": ({"prompt": []}, "prompt is empty"),
    "number": ({"prompt": 5}, "must be text or a list of messages"),
    "mapping": ({"prompt": user("a")}, "is a mapping"),
    "no role": ({"prompt": [{"content": "a"}]}, "role"),
    "text in a list": ({"prompt": ["a"]}, "prompt"),
    "answered": ({"prompt": [user("a"), assistant("b")]}, "ends with an assistant message"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_from_rows__bad_rows_are_named(tmp_path, chatty, case):
    row, message = BAD_ROWS[case]
    rows = [row, row] if case == "none" else [{"prompt": "fine"}, row]
    with pytest.raises(ValueError, match=message) as caught:
        from_rows(load(tmp_path, *rows)).token_ids(chatty)
    assert "row 1" in str(caught.value) or "rows 0, 1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], [user("")], [{"content": "a"}]], ids=["no", "blank", "no-role"])
def test_from_rows__bad_conversations_are_named(tmp_path, chatty, messages):
    rows = [{"messages": [user("a"), assistant("b")]}, {"messages": messages}]
    with pytest.raises(ValueError, match="row 1"):
        from_rows(load(tmp_path, *rows)).token_ids(chatty)


def test_from_rows__a_dataset_without_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks the column prompt: it has question, answer"):
        from_rows(load(tmp_path, {"question": "a", "answer": "b"}))


def test_from_prompt__half_a_character_is_refused():
    with pytest.raises(ValueError, match=r"'\\udcff' is half of a character"):
        from_prompt("a\udcffb", chat=False)


def test_from_prompt__chat_is_a_message_of_the_user(chatty):
    assert chatty.decode(from_prompt("1?", chat=True).token_ids(chatty)[0]) == "<user>1?\n<assistant>"
    assert chatty.decode(from_prompt("1?", chat=False).token_ids(chatty)[0]) == "1?"
