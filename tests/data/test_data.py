"""Rows of every accepted format become the right token ids; every bad one is named before training."""

import copy
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from vrpo.data.budget import check_token_budget
from vrpo.data.encode import encode_prompts, encode_rows
from vrpo.data.files import load_rows
from vrpo.data.formats import split_prompt
from vrpo.data.limits import truncated_lengths
from vrpo.data.rows import (
    CompletionCollator,
    PairCollator,
    prepare_completions,
    prepare_pairs,
)

# The stock template of LLaDA-8B-Instruct: the assistant header comes whether asked for or not.
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

PLAIN = {"prompt": "What is 1 plus 2?", "chosen": " It is 3.", "rejected": " It is 12."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pairs(*rows):
    return Dataset.from_list(list(rows))


def llada_tokenizer(tokenizer):
    changed = copy.deepcopy(tokenizer)  # the fixture is shared
    changed.chat_template = LLADA_TEMPLATE
    return changed


# --- formats


def test_prepare_pairs__plain_text_ends_with_eos_and_loses_nothing(tokenizer):
    prepared, report = prepare_pairs(pairs(PLAIN), tokenizer)
    row = prepared[0]
    assert tokenizer.decode(row["prompt_ids"]) == PLAIN["prompt"]
    assert tokenizer.decode(row["chosen_ids"]) == PLAIN["chosen"] + tokenizer.eos_token
    assert tokenizer.decode(row["rejected_ids"]) == PLAIN["rejected"] + tokenizer.eos_token
    assert report.kept == report.rows == 1
    assert report.num_changed == 0
    assert report.response_tokens == len(row["chosen_ids"]) + len(row["rejected_ids"])


def test_prepare_pairs__eos_in_the_text_is_not_doubled(tokenizer):
    row = PLAIN | {"chosen": PLAIN["chosen"] + tokenizer.eos_token}
    prepared, _ = prepare_pairs(pairs(row), tokenizer)
    assert prepared[0]["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_prepare_pairs__implicit_prompt_equals_explicit(tokenizer):
    implicit = {
        "chosen": "What is 1 plus 2? Three.",
        "rejected": "What is 1 plus 2? One.",
    }
    explicit = {"prompt": "What is 1 plus 2?", "chosen": " Three.", "rejected": " One."}
    assert prepare_pairs(pairs(implicit), tokenizer)[0][0] == prepare_pairs(pairs(explicit), tokenizer)[0][0]


@pytest.mark.parametrize("template", ["own", "llada"])
@pytest.mark.parametrize("prompt", ["explicit", "implicit"])
def test_prepare_pairs__messages_end_with_end_of_turn_and_not_with_a_header(tokenizer, template, prompt):
    if template == "llada":
        tokenizer = llada_tokenizer(tokenizer)
    question = [user("What is 1 plus 2?")]
    shared = [] if prompt == "explicit" else question
    row = {"chosen": [*shared, assistant("3.")], "rejected": [*shared, assistant("12.")]}
    if prompt == "explicit":
        row["prompt"] = question
    prepared, report = prepare_pairs(pairs(row), tokenizer)
    assert tokenizer.decode(prepared[0]["prompt_ids"]) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhat is 1 plus 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.decode(prepared[0]["chosen_ids"]) == "3.<|eot_id|>"
    assert tokenizer.decode(prepared[0]["rejected_ids"]) == "12.<|eot_id|>"
    assert report.boundaries_merged == 0


def appending_eos(tokenizer):
    changed = copy.deepcopy(tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    return changed


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)], ids=["plain first", "messages first"])
def test_encode_rows__each_row_ends_by_its_own_format(tokenizer, order):
    chat = {"prompt": [user("1+2?")], "completion": [assistant("3.")]}
    rows = [(PLAIN | {"completion": " 3."}, chat)[kind] for kind in order]
    encoded = encode_rows(rows, ["completion"], tokenizer)
    ends = [tokenizer.decode(row.response_ids[0]) for row in encoded]
    assert ends == [(" 3.<|endoftext|>", "3.<|eot_id|>")[kind] for kind in order]
    for row, alone in zip(rows, encoded, strict=True):
        assert encode_rows([row], ["completion"], tokenizer) == [alone]


@pytest.mark.parametrize("prompt", ["1 plus 2?", "1<|endoftext|>", "<|endoftext|>"])
def test_encode_prompts__equals_training_where_the_tokenizer_appends_eos(tokenizer, prompt):
    tokenizer = appending_eos(tokenizer)
    [encoded] = encode_rows([{"prompt": prompt, "completion": " 3."}], ["completion"], tokenizer)
    assert encode_prompts([prompt], tokenizer) == [encoded.prompt_ids]
    assert tokenizer.decode(encoded.prompt_ids) == tokenizer.bos_token + prompt
    assert tokenizer.decode(encoded.response_ids[0]) == " 3.<|endoftext|>"
    assert not encoded.merged


def test_prepare_completions__several_turns_are_one_response(tokenizer):
    row = {
        "prompt": [user("1 plus 2?")],
        "completion": [assistant("3."), user("And 4?"), assistant("7.")],
    }
    prepared, _ = prepare_completions(pairs(row), llada_tokenizer(tokenizer))
    text = tokenizer.decode(prepared[0]["completion_ids"])
    assert text.startswith("3.<|eot_id|>")
    assert text.endswith("7.<|eot_id|>")


def test_prepare_pairs__token_columns_are_taken_as_they_are():
    rows = pairs({"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]})
    prepared, _ = prepare_pairs(rows, None)
    assert prepared[0] == {
        "prompt_ids": [5, 6],
        "chosen_ids": [7],
        "rejected_ids": [8, 9],
        "example_id": 0,
    }


def test_encode_rows__merge_across_the_boundary_keeps_the_text_and_is_reported(tokenizer):
    # " plus" is one token, so a prompt that ends in " pl" cannot be a token prefix of prompt + response.
    assert len(tokenizer(" plus")["input_ids"]) == 1
    row = {"prompt": "What is 1 pl", "completion": "us 2?"}
    [encoded] = encode_rows([row], ["completion"], tokenizer)
    assert encoded.merged
    assert (
        tokenizer.decode(encoded.prompt_ids + encoded.response_ids[0])
        == "What is 1 plus 2?" + tokenizer.eos_token
    )
    assert encoded.prompt_ids == tokenizer("What is 1")["input_ids"]


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_split_prompt__prompt_and_responses_rebuild_the_sides(common, chosen, rejected):
    row = {"chosen": common + chosen, "rejected": common + rejected}
    prompt, responses = split_prompt([row["chosen"], row["rejected"]])
    assert [prompt + response for response in responses] == [row["chosen"], row["rejected"]]
    assert not prompt.endswith(" ")


def test_prepare_pairs__example_id_survives_shuffling_of_the_source(tokenizer, pair_rows):
    numbered = pair_rows.add_column("example_id", list(range(100, 100 + len(pair_rows))))
    straight, _ = prepare_pairs(numbered, tokenizer)
    shuffled, _ = prepare_pairs(numbered.shuffle(seed=1), tokenizer)
    assert straight["example_id"][:] == list(range(100, 112))
    assert shuffled["example_id"][:] != straight["example_id"][:]
    by_id = {row["example_id"]: row for row in shuffled}
    assert all(by_id[row["example_id"]] == row for row in straight)


def test_prepare_pairs__example_id_is_the_row_and_survives_later_selection(tokenizer, pair_rows):
    prepared, _ = prepare_pairs(pair_rows, tokenizer)
    assert prepared.select([7, 2])["example_id"][:] == [7, 2]


def test_prepare_pairs__processes_do_not_change_the_result(tokenizer, pair_rows):
    one, _ = prepare_pairs(pair_rows, tokenizer)
    two, _ = prepare_pairs(pair_rows, tokenizer, num_proc=2)
    assert one[:] == two[:]


# --- truncation

lengths = st.integers(1, 60)


@given(
    prompt=lengths,
    responses=st.lists(lengths, min_size=1, max_size=2),
    max_length=st.integers(2, 80),
    limited=st.floats(0, 1),
    has_limit=st.booleans(),
)
def test_truncated_lengths__fits_and_empties_nothing(prompt, responses, max_length, limited, has_limit):
    max_prompt_length = 1 + int(limited * (max_length - 2)) if has_limit else None
    kept_prompt, kept = truncated_lengths(prompt, responses, max_length, max_prompt_length)
    assert kept_prompt + max(kept) <= max_length
    assert 1 <= kept_prompt <= min(prompt, max_prompt_length or prompt)
    assert all(1 <= a <= b for a, b in zip(kept, responses, strict=True))
    half = max_length // 2
    if max_prompt_length is None:
        assert kept_prompt >= min(prompt, half)
    if max_prompt_length is None:
        assert all(a >= min(b, max_length - half) for a, b in zip(kept, responses, strict=True))
    if prompt + max(responses) <= max_length and max_prompt_length is None:
        assert (kept_prompt, kept) == (prompt, responses)
    # No room is wasted: something is cut only where the sequence fills max_length.
    if kept != responses:
        assert kept_prompt + max(kept) == max_length


def test_prepare_pairs__truncation_keeps_end_of_prompt_and_beginning_of_response():
    rows = pairs(
        {"prompt_ids": [1, 2, 3, 4, 5, 6], "chosen_ids": [11, 12, 13], "rejected_ids": [21]},
        {"prompt_ids": [1, 2], "chosen_ids": [*range(11, 19)], "rejected_ids": [21, 22]},
    )
    prepared, report = prepare_pairs(rows, None, max_length=6)
    assert prepared[0]["prompt_ids"] == [4, 5, 6]
    assert prepared[0]["chosen_ids"] == [11, 12, 13]
    assert prepared[1]["prompt_ids"] == [1, 2]
    assert prepared[1]["chosen_ids"] == [11, 12, 13, 14]
    assert prepared[1]["rejected_ids"] == [21, 22]
    assert (report.prompts_truncated, report.prompt_tokens_cut) == (1, 3)
    assert (report.responses_truncated, report.response_tokens_cut) == (1, 4)
    assert report.longest == 6
    assert "1 prompts lost their beginning (3 tokens)" in str(report)


def test_prepare_pairs__max_prompt_length_applies_without_max_length():
    rows = pairs({"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]})
    prepared, _ = prepare_pairs(rows, None, max_prompt_length=2)
    assert prepared[0]["prompt_ids"] == [2, 3]


def test_prepare_pairs__sides_equal_after_truncation_are_dropped_and_counted():
    rows = pairs(
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5, 6], "rejected_ids": [3, 4, 5, 7]},
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
    )
    prepared, report = prepare_pairs(rows, None, max_length=4)
    assert prepared["example_id"][:] == [1]
    assert (report.rows, report.kept, report.dropped_same) == (2, 1, 1)
    assert report.response_tokens == 3
    assert "1 pairs dropped" in str(report)


def test_prepare_pairs__nothing_left_after_truncation_raises():
    rows = pairs({"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [3, 4, 6]})
    with pytest.raises(ValueError, match="no pair is left"):
        prepare_pairs(rows, None, max_length=4)


# --- bad input

BAD_ROWS = {
    "empty prompt": (PLAIN | {"prompt": ""}, "prompt is empty"),
    "blank prompt": (PLAIN | {"prompt": " \n"}, "prompt is empty"),
    "missing prompt": (PLAIN | {"prompt": None}, "prompt is empty"),
    "empty chosen": (PLAIN | {"chosen": ""}, "chosen is empty"),
    "blank rejected": (PLAIN | {"rejected": "  "}, "rejected is empty"),
    "missing rejected": (PLAIN | {"rejected": None}, "rejected is empty"),
    "equal sides": (PLAIN | {"rejected": PLAIN["chosen"]}, "chosen and rejected are the same"),
    "same tokens": (PLAIN | {"rejected": PLAIN["chosen"] + "<|endoftext|>"}, "are the same"),
    "negative example id": (PLAIN | {"example_id": -1}, "example_id must be in"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_prepare_pairs__bad_row_is_named(tokenizer, case):
    bad, message = BAD_ROWS[case]
    good = PLAIN | ({"example_id": 3} if "example_id" in bad else {})
    with pytest.raises(ValueError, match=message) as caught:
        prepare_pairs(pairs(good, bad), tokenizer)
    assert "(row 1)" in str(caught.value)


def test_prepare_pairs__all_problems_are_told_at_once(tokenizer):
    rows = [PLAIN | {"prompt": ""}] * 7 + [PLAIN, PLAIN | {"chosen": ""}]
    with pytest.raises(ValueError) as caught:
        prepare_pairs(pairs(*rows), tokenizer)
    assert "prompt is empty (rows 0, 1, 2, 3, 4 and 2 more)" in str(caught.value)
    assert "chosen is empty (row 8)" in str(caught.value)


BAD_CHATS = {
    "nothing in common": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "prompt is empty",
    ),
    "answer in the prompt": (
        {
            "prompt": [user("a"), assistant("b")],
            "chosen": [assistant("c")],
            "rejected": [assistant("d")],
        },
        "ends with an assistant message",
    ),
    "text and messages": (
        {"prompt": "a", "chosen": [assistant("c")], "rejected": [assistant("d")]},
        "mix plain text and messages",
    ),
    "empty message": (
        {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant(" ")]},
        "rejected is empty",
    ),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_prepare_pairs__bad_messages_are_named(tokenizer, case):
    row, message = BAD_CHATS[case]
    with pytest.raises(ValueError, match=message):
        prepare_pairs(pairs(row), tokenizer)


def test_prepare_pairs__missing_columns_are_named(tokenizer):
    rows = pairs({"question": "a", "chosen": "b"})
    with pytest.raises(ValueError, match=r"lacks the column rejected: it has question, chosen"):
        prepare_pairs(rows, tokenizer)


def test_prepare_completions__missing_columns_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"lacks the columns completion, prompt"):
        prepare_completions(pairs({"text": "a"}), tokenizer)


@pytest.mark.parametrize("kind", ["stream", "list"])
def test_prepare_pairs__other_containers_are_refused(tokenizer, pair_rows, kind):
    rows = pair_rows.to_iterable_dataset() if kind == "stream" else pair_rows[:]
    with pytest.raises(ValueError, match=r"must be a datasets\.Dataset, got"):
        prepare_pairs(rows, tokenizer)


def test_prepare_pairs__no_rows_raises(tokenizer):
    empty = Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})
    with pytest.raises(ValueError, match="no rows"):
        prepare_pairs(empty, tokenizer)


def test_prepare_pairs__ids_outside_the_embedding_are_named():
    rows = pairs({"prompt_ids": [1], "chosen_ids": [300], "rejected_ids": [2]})
    with pytest.raises(ValueError, match=r"token id 300 is outside .* 300 rows \(row 0\)"):
        prepare_pairs(rows, None, vocab_size=300)
    assert prepare_pairs(rows, None, vocab_size=301)[1].kept == 1


def test_check_token_budget__counts_every_copy_of_both_sides():
    rows = pairs(
        {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [6]},
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]},
    )
    prepared, _ = prepare_pairs(rows, None)
    need = 4 * ((2 + 3) + (2 + 1))
    check_token_budget(prepared, 4, need)
    with pytest.raises(ValueError, match=f"1 of 2 .* example 1: its num_samples=4 .* {need} tokens"):
        check_token_budget(prepared, 4, need - 1)
    check_token_budget(prepared.select([0]), 4, need - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must hold"),
        ({"max_length": 8, "max_prompt_length": 8}, "leaves no room for a response"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_prepare_pairs__limits_without_room_raise(options, message):
    rows = pairs({"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [6]})
    with pytest.raises(ValueError, match=message):
        prepare_pairs(rows, None, **options)


def test_prepare_pairs__text_needs_a_tokenizer(pair_rows):
    with pytest.raises(ValueError, match="processing_class is None"):
        prepare_pairs(pair_rows, None)


@pytest.mark.parametrize(
    ("question", "before", "after"),
    [("[INST] {} [/INST]", " ", "<|endoftext|>"), ("USER: {} ASSISTANT:", " ", " <|endoftext|>")],
    ids=["mistral", "vicuna"],
)
@pytest.mark.parametrize("alternate", [True, False])
def test_prepare_pairs__template_without_a_header_is_the_same_asked_and_unasked(
    tokenizer, question, before, after, alternate
):
    changed = llada_tokenizer(tokenizer)
    ahead, behind = question.split("{}")
    demand = (
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    )
    changed.chat_template = (
        "{% for m in messages %}" + demand * alternate + "{% if m.role == 'user' %}"
        f"{{{{ '{ahead}' + m.content + '{behind}' }}}}{{% else %}}"
        f"{{{{ '{before}' + m.content + '{after}' }}}}{{% endif %}}{{% endfor %}}"
    )
    row = {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant("d")]}
    prepared, _ = prepare_pairs(pairs(row), changed)
    told = {name: changed.decode(prepared[0][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    assert told["prompt_ids"] == question.format("a")
    assert told["chosen_ids"] == f"{before}c{after}"
    assert told["rejected_ids"] == f"{before}d{after}"


def test_prepare_pairs__template_that_hides_the_end_of_a_turn_is_refused(tokenizer):
    changed = llada_tokenizer(tokenizer)
    changed.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row = {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant("d")]}
    with pytest.raises(ValueError, match="ignores add_generation_prompt"):
        prepare_pairs(pairs(row), changed)


# --- files


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_load_rows__reads_local_files_and_slices(tmp_path, pair_rows, suffix):
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pair_rows.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in pair_rows))
    assert load_rows(str(path))[:] == pair_rows[:]
    assert load_rows(str(path), split="train[2:5]")[:] == pair_rows[2:5]


def test_load_rows__missing_file_and_unknown_suffix_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_rows(str(tmp_path / "absent.jsonl"))
    (tmp_path / "pairs.txt").write_text("prompt\n")
    with pytest.raises(ValueError, match=re.escape(".jsonl")):
        load_rows(str(tmp_path / "pairs.txt"))


def test_load_rows__folder_with_splits(tmp_path, pair_rows):
    for split, rows in (("train", range(3)), ("test", range(3, 5))):
        pair_rows.select(rows).to_parquet(tmp_path / f"{split}.parquet")
    assert len(load_rows(str(tmp_path), split="train")) == 3
    assert len(load_rows(str(tmp_path), split="test")) == 2
    with pytest.raises(ValueError, match="validation"):
        load_rows(str(tmp_path), split="validation")


GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the checkout")
def test_prepare_pairs__gsm8k_text_is_preserved(tokenizer):
    rows = load_rows(str(GSM8K / "preferences_test.jsonl"), split="train[:50]")
    prepared, report = prepare_pairs(rows, tokenizer)
    assert report.kept == 50
    for row, source in zip(prepared, rows, strict=True):
        for side in ("chosen", "rejected"):
            text = tokenizer.decode(row["prompt_ids"] + row[f"{side}_ids"])
            assert text == source["prompt"] + source[side] + tokenizer.eos_token


TEMPLATES = {
    "llada-8b-instruct": "3<|eot_id|>",
    "llada2.0-mini": "3<|role_end|>",
    "sdar-1dot7b-chat": "<think>\n\n</think>\n\n3<|im_end|>\n",
    "dream-v0-instruct-7b": "3<|im_end|>\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.skipif(not GSM8K.is_dir(), reason="the checkpoints' files are not beside the checkout")
def test_encode_rows__templates_of_real_checkpoints(tokenizer, name):
    config = json.loads((GSM8K.parent / name / "tokenizer_config.json").read_text())
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = config["chat_template"]
    turns = ["<|im_start|>", "<|im_end|>", "<|role_end|>", "<role>", "</role>"]
    changed.add_tokens(turns, special_tokens=True)
    row = {"prompt": [user("1 + 2?")], "completion": [assistant("3")]}
    [encoded] = encode_rows([row], ["completion"], changed)
    assert changed.decode(encoded.response_ids[0]) == TEMPLATES[name]
    assert not encoded.merged


# --- collators


def test_pair_collator__responses_are_in_pair_and_side_order():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "example_id": 9},
        {"prompt_ids": [6], "chosen_ids": [7, 8], "rejected_ids": [9], "example_id": 4},
    ]
    collated = PairCollator()(rows)
    batch = collated["responses"]
    assert collated["example_id"].tolist() == [9, 4]
    assert batch.tokens_U.tolist() == [1, 2, 3, 1, 2, 4, 5, 6, 7, 8, 6, 9]
    assert batch.prompt_length_R.tolist() == [2, 2, 1, 1]
    assert batch.response_length_R.tolist() == [1, 2, 2, 1]
    assert batch.example_R.tolist() == [9, 9, 4, 4]
    assert batch.side_R.tolist() == [0, 1, 0, 1]
    assert batch.num_sides == 2
    assert batch.examples(1, 2).tokens_U.tolist() == [6, 7, 8, 6, 9]


def test_completion_collator__one_response_per_example():
    rows = [{"prompt_ids": [1, 2], "completion_ids": [3], "example_id": 5}]
    batch = CompletionCollator()(rows)["responses"]
    assert batch.tokens_U.tolist() == [1, 2, 3]
    assert (batch.example_R.tolist(), batch.side_R.tolist()) == ([5], [0])
    assert batch.num_sides == 1


def test_prepare_pairs__drops_and_lists_unusable_rows_where_asked_to(tokenizer):
    other, same = PLAIN | {"rejected": " It is 4."}, PLAIN | {"rejected": PLAIN["chosen"]}
    rows = [PLAIN, PLAIN | {"chosen": None}, other, same]
    with pytest.raises(ValueError, match=r"chosen .*\(row 1\).*\(row 3\)"):
        prepare_pairs(rows, tokenizer)
    prepared, report = prepare_pairs(rows, tokenizer, drop_unusable_rows=True)
    assert prepared["example_id"][:] == [0, 2]  # what keys the masks is the number in the data, as before
    assert (report.rows, report.kept, report.num_changed) == (4, 2, 2)
    assert [row for row, _ in report.unusable] == [1, 3]
    assert "2 unusable rows dropped" in str(report) and "50% OF ALL ROWS" in str(report)
    whole, _ = prepare_pairs([rows[0], rows[2]], tokenizer)
    assert prepared["chosen_ids"][:] == whole["chosen_ids"][:]


def test_prepare_pairs__a_few_dropped_rows_raise_no_doubt_about_the_format(tokenizer):
    rows = [PLAIN | {"rejected": f" It is {n}."} for n in range(4, 40)] + [PLAIN | {"chosen": ""}]
    _, report = prepare_pairs(rows, tokenizer, drop_unusable_rows=True)
    assert "1 unusable rows dropped" in str(report) and "OF ALL ROWS" not in str(report)


def test_prepare_pairs__names_the_reasons_if_all_rows_are_unusable(tokenizer):
    with pytest.raises(ValueError, match=r"drop_unusable_rows leaves none of the 2 rows: .*\(rows 0, 1\)"):
        prepare_pairs([PLAIN | {"chosen": PLAIN["rejected"]}] * 2, tokenizer, drop_unusable_rows=True)


def test_prepare_pairs__names_repeated_ids_by_their_row_in_the_data(tokenizer):
    ids = [4, 7, 9, 9]
    rows = [PLAIN | {"rejected": f" It is {n}{n}.", "example_id": n} for n in ids]
    rows[0]["chosen"] = None
    with pytest.raises(ValueError, match="example_id 9 stands in rows 2 and 3"):
        prepare_pairs(rows, tokenizer, drop_unusable_rows=True)
