"""Rows of every shape that people have: encoded right, or refused in one line with the row."""

import copy
import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from vrpo.data import (
    as_dataset,
    encode_prompts,
    load_rows,
    prepare_completions,
    prepare_pairs,
    read_columns,
)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


Q, A, B = [turn("user", "What is it?")], [turn("assistant", "It is one.")], [turn("assistant", "Or two.")]
SYSTEM = [turn("system", "Be brief.")]
CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"x": 0.471}}}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"properties": {"x": {"type": "number"}}}},
    }
]
TOOL_TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }} {% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls %}CALL {{ call | tojson }}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)  # the fixture is shared
    changed.chat_template = template
    return changed


def refusal(rows, tokenizer, prepare=prepare_completions, **options):
    with pytest.raises(ValueError) as caught:
        prepare(rows, tokenizer, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(row, tokenizer):
    return {name: tokenizer.decode(ids) for name, ids in row.items() if name.endswith("_ids")}


# --- TRL's formats

SAME_AS_EXPLICIT = {
    "implicit prompt": {"chosen": Q + A, "rejected": Q + B},
    "implicit prompt beside None": {"prompt": None, "chosen": Q + A, "rejected": Q + B},
    "prompt as text beside conversations": {"prompt": Q[0]["content"], "chosen": Q + A, "rejected": Q + B},
    "prompt as messages beside conversations": {"prompt": Q, "chosen": Q + A, "rejected": Q + B},
    "content in parts": {
        "prompt": [turn("user", [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}])],
        "chosen": [turn("assistant", [{"type": "text", "text": "It is one.", "image": None}])],
        "rejected": B,
    },
    "other keys": {
        "prompt": [Q[0] | {"name": None}],
        "chosen": [A[0] | {"tool_calls": None}],
        "rejected": B,
        "score": 1.5,
    },
    "ShareGPT": {
        "prompt": [{"from": "human", "value": "What is it?"}],
        "chosen": [{"from": "gpt", "value": "It is one."}],
        "rejected": [{"from": "gpt", "value": "Or two."}],
    },
}


@pytest.mark.parametrize("shape", SAME_AS_EXPLICIT)
@pytest.mark.parametrize("container", ["list", "Dataset", "file"])
def test_prepare_pairs__shapes_of_one_pair_give_the_same_tokens(tokenizer, tmp_path, shape, container):
    rows = [SAME_AS_EXPLICIT[shape]]
    if container == "Dataset":
        rows = Dataset.from_list(rows)
    elif container == "file":
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(rows[0]))
        rows = load_rows(str(path))
    expected, _ = prepare_pairs([{"prompt": Q, "chosen": A, "rejected": B}], tokenizer)
    prepared, report = prepare_pairs(rows, tokenizer)
    assert prepared[:] == expected[:]
    assert report.repeated == ("beside conversations" in shape)
    assert report.num_changed == 0


def test_prepare_pairs__conversations_keep_the_system_message_before_the_prompt(tokenizer):
    row = {"prompt": Q[0]["content"], "chosen": SYSTEM + Q + A, "rejected": SYSTEM + Q + B}
    prepared, _ = prepare_pairs([row], tokenizer)
    explicit, _ = prepare_pairs([{"prompt": SYSTEM + Q, "chosen": A, "rejected": B}], tokenizer)
    assert prepared[:] == explicit[:]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_prepare_completions__last_message_is_the_completion(tokenizer, column):
    explicit, _ = prepare_completions([{"prompt": Q + A + Q, "completion": B}], tokenizer)
    prepared, _ = prepare_completions([{column: Q + A + Q + B}], tokenizer)
    assert prepared[:] == explicit[:]
    beside, _ = prepare_completions([{column: Q + A + Q + B, "prompt": "What is it?"}], tokenizer)
    assert beside[:] == explicit[:]


def test_prepare_completions__each_row_in_its_own_format(tokenizer, tmp_path):
    rows = [
        {"messages": Q + A},
        {"prompt": "a", "completion": "b"},
        {"prompt": Q, "completion": B},
        {"prompt": Q[0]["content"], "completion": Q + A},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    prepared, report = prepare_completions(load_rows(str(path)), tokenizer)
    for index, row in enumerate(rows):
        alone, _ = prepare_completions([row], tokenizer)
        assert prepared[index] == alone[0] | {"example_id": index}
    assert report.kept == 4


def test_prepare_pairs__tools_reach_the_template_per_row(tokenizer):
    tokenizer = with_template(tokenizer, TOOL_TEMPLATE)
    other = [
        {
            "type": "function",
            "function": {"name": "go", "parameters": {"properties": {"y": {"type": "string"}}}},
        }
    ]
    pair = {"prompt": Q, "chosen": A, "rejected": B}
    rows = [pair | {"tools": tools} for tools in (TOOLS, other, None, [])]
    in_arrow, report = prepare_pairs(Dataset.from_list(rows), tokenizer)
    as_text, _ = prepare_pairs([pair | {"tools": json.dumps(row["tools"])} for row in rows], tokenizer)
    assert in_arrow[:] == as_text[:]
    for row, tools in zip(in_arrow, (TOOLS, other, None, None), strict=True):
        wanted = tokenizer.apply_chat_template(Q, tools=tools, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(row["prompt_ids"]) == wanted
    prompts = encode_prompts([Q] * 4, tokenizer, tools=[row["tools"] for row in rows])
    assert prompts == in_arrow["prompt_ids"][:]
    assert report.unrendered == 0


@pytest.mark.parametrize("content", [None, "", "Let me look."])
@pytest.mark.parametrize("container", [list, Dataset.from_list])
def test_prepare_completions__a_tool_call_is_an_answer(tokenizer, content, container):
    tokenizer = with_template(tokenizer, TOOL_TEMPLATE)
    row = {"prompt": Q, "completion": [turn("assistant", content, tool_calls=CALLS)], "tools": TOOLS}
    prepared, report = prepare_completions(container([row]), tokenizer)
    call = json.dumps(CALLS[0])
    assert texts(prepared[0], tokenizer)["completion_ids"] == f"{content or ''}CALL {call}<|eot_id|>"
    assert report.unrendered == 0


def test_prepare_completions__calls_that_the_template_drops_are_refused_as_answers(tokenizer):
    for content in (None, "Let me look."):
        row = {"prompt": Q, "completion": [turn("assistant", content, tool_calls=CALLS)]}
        assert "does not write the tool calls of completion" in refusal([row], tokenizer)
    history = [*Q, turn("assistant", "Let me look.", tool_calls=CALLS), turn("tool", "1")]
    _, report = prepare_completions([{"prompt": history, "completion": A}], tokenizer)
    assert report.unrendered == 1
    assert "leaves out a message, tools or tool calls" in str(report)


def test_prepare_completions__chat_template_kwargs_reach_the_template(tokenizer):
    tokenizer = with_template(tokenizer, "{{ 'THINK ' if think }}" + TOOL_TEMPLATE)
    row = {"prompt": Q, "completion": A}
    rows = [row | {"chat_template_kwargs": options} for options in ({"think": True}, None, '{"think": true}')]
    prepared, _ = prepare_completions(rows, tokenizer)
    assert [texts(row, tokenizer)["prompt_ids"].startswith("THINK") for row in prepared] == [
        True,
        False,
        True,
    ]
    bad = row | {"chat_template_kwargs": {"tokenize": True}}
    assert "chat_template_kwargs may not set tokenize (row 0)" in refusal([bad], tokenizer)


# --- containers


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow", "transform"])
@pytest.mark.parametrize("shape", ["text", "messages", "tokens"])
def test_prepare_pairs__format_of_the_dataset_does_not_matter(tokenizer, kind, shape):
    row = {
        "text": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "messages": {"prompt": Q, "chosen": A, "rejected": B},
        "tokens": {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "example_id": 3},
    }[shape]
    plain = Dataset.from_list([row])
    expected, _ = prepare_pairs(plain, tokenizer)
    if kind == "transform":

        def transform(batch):
            return {
                name: [np.array(v) if shape == "tokens" else v for v in values]
                for name, values in batch.items()
            }

        formatted = plain.with_transform(transform)
    else:
        formatted = plain.with_format(kind)
    assert prepare_pairs(formatted, tokenizer)[0][:] == expected[:]
    assert formatted.format["type"] == ("custom" if kind == "transform" else kind)


def test_prepare_pairs__columns_that_nobody_reads_are_not_decoded(tokenizer):
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "image": "/nowhere.png"}])
    assert prepare_pairs(rows.cast_column("image", Image()), tokenizer)[1].kept == 1


def test_as_dataset__says_what_to_pass_instead(pair_rows):
    one = as_dataset(DatasetDict(train=pair_rows))
    assert one[:] == pair_rows[:]
    several = DatasetDict(train=pair_rows, test=pair_rows)
    for data, message in (
        (several, "train_dataset is a DatasetDict of the splits train, test: pass one of them"),
        (pair_rows.to_iterable_dataset(), "streams are not supported yet"),
        (pair_rows.to_pandas(), "pass Dataset.from_pandas"),
        (pair_rows[:], "pass Dataset.from_dict"),
        (["a"], "row 0 must map column names to values"),
        ([], "has no rows"),
        ([{}], "no columns"),
        ([{"a": {1, 2}}], "row 0: a set is neither text"),
        ([{"a": float("nan")}], "row 0: NaN and infinity are no data"),
        ([{"a": "\ud800"}], "row 0: \\ud800 is half a surrogate pair"),
        ([{"a": 2**70}], "row 0: an integer has more than 64 bits"),
        (None, "got NoneType"),
    ):
        with pytest.raises(ValueError) as caught:
            as_dataset(data, "train_dataset")
        assert message in str(caught.value)
        assert str(caught.value).startswith("train_dataset")


def test_prepare_pairs__prepared_data_come_back_as_they_are(tokenizer, pair_rows):
    once, _ = prepare_pairs(pair_rows, tokenizer, max_length=20)
    again, report = prepare_pairs(once, None, max_length=20)
    assert again is not once or again[:] == once[:]
    assert again[:] == once[:]
    assert (report.rows, report.num_changed) == (12, 0)
    assert report.longest == prepare_pairs(pair_rows, tokenizer, max_length=20)[1].longest
    part, _ = prepare_pairs(once.select([3, 1]).with_format("torch"), tokenizer, max_length=20)
    assert part["example_id"][:] == [3, 1]
    shorter, report = prepare_pairs(once, None, max_length=4)
    assert report.longest == 4
    with pytest.raises(ValueError, match="lacks the columns completion, prompt"):
        prepare_completions(shorter, tokenizer)


# --- what cannot be used, each with its row

SYSTEM_COLUMN = {"system": "Be brief."}


@pytest.mark.parametrize("kind", ["conversations", "messages", "prompt"])
def test_prepare__a_system_prompt_in_its_own_column_is_not_lost(tokenizer, kind):
    row = {"prompt": "q?", "completion": "a"} if kind == "prompt" else {kind: Q + A}
    with pytest.raises(ValueError, match=r"the column system holds a text that the prompt does not.*row 0"):
        prepare_completions([row | SYSTEM_COLUMN], tokenizer)
    told = {"prompt": "Be brief. q?", "completion": "a"}
    told = told if kind == "prompt" else {kind: [turn("system", "Be brief."), *Q, *A]}
    for extra in (SYSTEM_COLUMN, {"system": ""}, {"system": None}):
        assert len(prepare_completions([told | extra], tokenizer)[0]) == 1


CHAT_ROWS = {
    "no role": ([{"content": "a"}], "has no role: it has content"),
    "role None": ([{"role": None, "content": "a"}], "has no role"),
    "role number": ([{"role": 1, "content": "a"}], "the role of a message of messages must be text, got 1"),
    "role of ShareGPT": ([turn("human", "a")], "has the role \"human\"; write 'user'"),
    "role in capitals": ([turn("User", "a")], "write 'user'"),
    "speaker unknown": ([{"from": "alien", "value": "a"}], 'is from "alien"; known are human'),
    "no content": ([turn("user", None)], "has no content"),
    "content number": ([turn("user", 5)], "must be text, got int: 5"),
    "content mapping": ([turn("user", {"text": "a"})], "must be text, got dict"),
    "image": ([turn("user", [{"type": "image", "image": "a.png"}])], "a part of type image; only text"),
    "part of text": ([turn("user", ["a"])], "a part of type str"),
    "message None": ([None], "holds null where a message"),
    "list of lists": ([Q], "where a message"),
    "list of strings": (["a"], 'holds "a" where a message'),
    "list of numbers": ([5], "holds 5 where a message"),
    "empty": ([], "is empty"),
    "mapping": (Q[0], "is a mapping; a single message, too, stands in a list"),
    "number": (5, "must be text or a list of messages, got int: 5"),
    "boolean": (True, "got bool: true"),
    "no answer": (Q, "ends with a user message; the completion is an assistant's"),
    "only an answer": (A, "prompt is empty"),
    "answer before": (Q + A + A, "the prompt ends with an assistant message"),
    "blank answer": ([*Q, turn("assistant", " \n")], "completion is empty"),
    "blank question": ([turn("user", " "), *A], "prompt is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAT_ROWS)
def test_prepare_completions__bad_messages_are_refused_with_their_row(tokenizer, case):
    messages, message = CHAT_ROWS[case]
    told = refusal([{"messages": Q + A}, {"messages": messages}], tokenizer)
    assert message in told
    assert "(row 1)" in told


PROBLEMS = {
    "numbers": ({"prompt": 1, "completion": 2}, "completion must be text or a list of messages, got int"),
    "text and messages": ({"prompt": Q, "completion": "a"}, "mix plain text and messages"),
    "prompt not repeated": ({"prompt": "a", "completion": A}, 'make it [{"role": "user", "content"'),
    "user in the answer": ({"prompt": Q, "completion": Q + A}, ""),
    "answer of a user": ({"prompt": Q, "completion": Q}, "must begin and end with an assistant message"),
    "tools not JSON": ({"prompt": Q, "completion": A, "tools": "{"}, "tools is text and not JSON"),
    "tools of text": ({"prompt": Q, "completion": A, "tools": ["a"]}, "tools must be a list of JSON schemas"),
    "mask token": ({"prompt": "a<|mdm_mask|>", "completion": "b"}, "the mask token (id 2) stands in"),
    "merged away": ({"prompt": "e", "completion": "\u0301"}, "prompt has no token of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_prepare_completions__bad_row_is_refused(tokenizer, case):
    row, message = PROBLEMS[case]
    if not message:
        assert prepare_completions([row], tokenizer)[1].repeated == 1
        return
    told = refusal([row], tokenizer)
    assert message in told
    assert "(row 0)" in told


@pytest.mark.parametrize(
    "value", [datetime.datetime(2024, 1, 1), datetime.date(2024, 1, 1), b"bytes"], ids=repr
)
def test_prepare_completions__other_types_of_arrow_are_refused(tokenizer, value):
    rows = Dataset.from_list([{"prompt": "a", "completion": value}])
    assert f"got {type(value).__name__}" in refusal(rows, tokenizer)


def test_prepare_completions__a_completion_beside_messages_lacks_its_prompt(tokenizer):
    assert "prompt is empty (row 0)" in refusal([{"completion": "c", "messages": Q + A}], tokenizer)


def test_prepare_completions__text_alone_is_refused_with_the_reason(tokenizer):
    assert "a text alone does not say where the response begins" in refusal([{"text": "a"}], tokenizer)


TOKENS = {"prompt_ids": [5], "completion_ids": [6]}
BAD_TOKENS = {
    "float": [1.5], "whole float": [1.0], "negative": [-1], "None": [None], "boolean": [True], "text": "abc",
    "nested": [[1]], "empty": [], "long": [2**40], "missing": None, "mixed": [1, "a"], "mapping": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_prepare_completions__bad_tokens_are_refused_with_their_row(case):
    told = refusal([TOKENS, TOKENS | {"prompt_ids": BAD_TOKENS[case]}], None)
    assert "prompt" in told or "token id" in told
    assert "(row 1)" in told


@pytest.mark.parametrize("values", [[0.5, 1.0], [True], [-1], [None], ["a"]], ids=repr)
def test_prepare_completions__bad_token_columns_of_arrow_are_refused(values):
    assert "(row 0)" in refusal(Dataset.from_list([TOKENS | {"prompt_ids": values}]), None)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 4, 3], "example_id 3 stands in rows 0 and 2"),
        ([-1, 0, 1], "example_id must be in [0, 2**32), an integer, got -1 (row 0)"),
        ([0, 2**32, 1], "(row 1)"),
        (["a", "b", "c"], 'got "a" (row 0)'),
        ([0, None, 1], "got null (row 1)"),
        ([0.0, 1.0, 2.0], "got 0.0 (row 0)"),
        ([True, False, None], "got true (row 0)"),
    ],
)
def test_prepare_completions__bad_example_ids_are_refused(ids, message):
    assert message in refusal([TOKENS | {"example_id": value} for value in ids], None)


def test_prepare_completions__rows_beyond_the_positions_are_refused():
    rows = [TOKENS, {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9]}]
    told = refusal(rows, None, max_positions=4)
    assert "longer than the model's 4 positions; set max_length=4 (row 1)" in told
    assert refusal(rows, None, max_positions=4, max_length=5) == told
    assert prepare_completions(rows, None, max_positions=4, max_length=4)[1].longest == 4
    assert prepare_completions(rows, None, max_positions=5, max_length=100)[1].longest == 5


def test_prepare_completions__mask_token_in_token_columns_is_refused():
    assert "mask token (id 6)" in refusal([TOKENS], None, mask_token_id=6)


# --- templates

ROLE_AND_CONTENT = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}"
OPENING = "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role\nnot supported') }}", "refuses the row: System role not supported"),
        ("{{ messages[0].nope.deeper }}", "the chat template refuses the row"),
        ("{{ messages[0]['content'] + 1 }}", "the chat template refuses the row"),
        ("{% for %}", "the chat template refuses the row"),
        (
            "{{ messages | length }}" + ROLE_AND_CONTENT + OPENING,
            "writes the prompt differently when completion",
        ),
        (
            ROLE_AND_CONTENT.replace("m.content", "m.content if m.role == 'user'") + OPENING,
            "the content of completion",
        ),
    ],
    ids=["raises", "undefined", "types", "syntax", "rewrites", "drops"],
)
def test_prepare_completions__template_that_cannot_serve_is_told_with_the_rows(tokenizer, template, message):
    told = refusal([{"messages": Q + A}], with_template(tokenizer, template))
    assert message in told
    assert "(row 0)" in told


def test_prepare_completions__missing_template_is_told(tokenizer):
    assert "processing_class has no chat_template" in refusal(
        [{"messages": Q + A}], with_template(tokenizer, None)
    )


@pytest.mark.parametrize("content", ["a", "What is it?"])
def test_prepare_completions__template_of_parts_gets_parts(tokenizer, content):
    parts = ROLE_AND_CONTENT.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    row = {"messages": [turn("user", content), turn("assistant", content)]}
    expected, _ = prepare_completions([row], with_template(tokenizer, ROLE_AND_CONTENT + OPENING))
    prepared, _ = prepare_completions([row], with_template(tokenizer, parts + OPENING))
    assert prepared[:] == expected[:]


@pytest.mark.parametrize("content", ["s", "Be brief and exact in all."])
def test_prepare_completions__what_the_template_leaves_out_of_the_prompt_is_counted(tokenizer, content):
    silent = ROLE_AND_CONTENT.replace("messages %}", "messages if m.role != 'system' %}") + OPENING
    rows = [{"messages": [turn("system", content), *Q, *A]}, {"messages": Q + A}]
    _, report = prepare_completions(rows, with_template(tokenizer, silent))
    assert (report.unrendered, report.num_changed) == (1, 1)


def test_prepare_completions__special_tokens_in_messages_are_counted(tokenizer):
    rows = [{"messages": [turn("user", "a <|eot_id|> b"), *A]}, {"messages": Q + A}]
    assert prepare_completions(rows, tokenizer)[1].special_in_text == 1


def test_prepare_pairs__plain_responses_that_begin_with_the_prompt_are_counted(tokenizer):
    row = {"prompt": "a b", "chosen": "a b c", "rejected": "a b d"}
    _, report = prepare_pairs([row], tokenizer)
    assert report.doubled == 1
    assert "begin with the text of the prompt" in str(report)


def test_encode_prompts__bos_in_the_text_is_not_doubled(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    spelt, plain = encode_prompts([tokenizer.bos_token + "one", "one"], changed)
    assert spelt == plain
    assert plain.count(tokenizer.bos_token_id) == 1


def test_encode_prompts__unusable_prompts_are_named(tokenizer):
    with pytest.raises(ValueError) as caught:
        encode_prompts(["a", "", None, 5, Q + A, [{"role": "user"}]], tokenizer)
    assert "prompt is empty (rows 1, 2)" in str(caught.value)
    for row in (3, 4, 5):
        assert f"(row {row})" in str(caught.value)


def test_encode_prompts__a_prompt_of_a_special_token_does_not_mislead(tokenizer):
    changed = copy.deepcopy(tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    ids = encode_prompts([bos, "one"], changed)
    assert ids == [[tokenizer.bos_token_id], [tokenizer.bos_token_id, *tokenizer("one")["input_ids"]]]


def test_read_columns__json_is_exact():
    rows = as_dataset([{"a": [0.471], "b": "x"}, {"a": "1"}])
    assert read_columns(rows, ("a", "c")) == {"a": [[0.471], "1"]}
    assert read_columns(rows, ("c",)) == {}


# --- many rows

cells = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["a", "b c", "", " ", "user", "\u0301", "<|eot_id|>", "<|mdm_mask|>", "{}", "[]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls"]), inner, max_size=3
    ),
    max_leaves=6,
)  # fmt: skip
messages = st.builds(
    turn,
    st.sampled_from(["user", "assistant", "assistant", "system", "tool", "human"]),
    cells | st.text(max_size=5),
)
sides = st.lists(messages, max_size=3) | st.text(max_size=6) | cells
ids = st.lists(st.integers(0, 300), min_size=1, max_size=5) | cells
fields = {
    **dict.fromkeys(["prompt", "chosen", "rejected", "completion", "messages", "conversations"], sides),
    **dict.fromkeys(["prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"], ids),
    **dict.fromkeys(["example_id", "tools", "chat_template_kwargs", "other"], cells),
}
words = st.text("ab ?\u00e9", min_size=1, max_size=8).filter(str.strip)
questions = st.builds(lambda text: [turn("user", text)], words)
answers = st.builds(lambda text: [turn("assistant", text)], words)
good_rows = st.one_of(
    st.fixed_dictionaries(dict.fromkeys(["prompt", "chosen", "rejected", "completion"], words)),
    st.builds(lambda q, a, b: {"prompt": q, "chosen": a, "rejected": b, "completion": a},
              questions, answers, answers),
    st.builds(
        lambda q, a, b: {"prompt": None, "chosen": q + a, "rejected": q + b, "messages": q + a},
        questions, answers, answers,
    ),
    st.builds(
        lambda q, a, b: {"prompt": q[0]["content"], "chosen": q + a, "rejected": q + b, "completion": q + a},
        questions, answers, answers,
    ),
)  # fmt: skip
changes = st.none() | st.none() | st.sampled_from(sorted(fields)).flatmap(
    lambda name: st.tuples(st.just(name), fields[name])
)  # fmt: skip
rows = st.builds(lambda row, change: row | dict([change] if change else []), good_rows, changes)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(rows, min_size=1, max_size=3), st.booleans(), st.sampled_from(["list", "jsonl", "json"]))
def test_prepare__any_rows_are_prepared_or_refused_in_one_line(
    tokenizer, tmp_path, rows, in_pairs, container
):
    prepare = prepare_pairs if in_pairs else prepare_completions
    data = rows
    try:
        if container != "list":
            path = Path(tmp_path / f"a.{container}")
            lines = "\n".join(map(json.dumps, rows)) if container == "jsonl" else json.dumps(rows)
            path.write_text(lines)
            data = load_rows(str(path))
        prepared, report = prepare(data, tokenizer, max_length=64, max_positions=64, vocab_size=300)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert len(prepared) == report.kept > 0
    for row in prepared:
        for name in prepared.column_names:
            assert name == "example_id" or row[name]
