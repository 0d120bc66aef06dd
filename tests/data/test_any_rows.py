"""Any rows are prepared, or refused in one line that names what is wrong; nothing fails deeper down.

`pytest --hypothesis-show-statistics` counts how many were accepted, and which errors the others gave.
"""

import re
import traceback

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from vrpo.data.rows import prepare_completions, prepare_pairs

TEXT = st.one_of(
    st.sampled_from(["What is 1?", " 2.", "", " ", "\n", "\0", "a\ud800", "<|mdm_mask|>"]), st.text()
)
IDS = st.lists(st.one_of(st.integers(5, 290), st.sampled_from([-1, 0, 300, 2**31, 2**63])), max_size=6)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "", None, 3]),
        "content": st.one_of(TEXT, st.none(), st.integers(), st.lists(TEXT, max_size=2)),
        "tool_calls": st.one_of(st.none(), st.lists(st.dictionaries(TEXT, TEXT, max_size=1), max_size=1)),
    },
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(TEXT, max_size=2),
    st.lists(st.lists(st.integers(), max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=3), TEXT, max_size=2),
)
VALUE = st.one_of(TEXT, TEXT, st.lists(MESSAGE, max_size=3), IDS, ODD)
NAMES = ("prompt", "chosen", "rejected", "completion", "messages", "label", "example_id", "tools", "text",
         "chat_template_kwargs", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")  # fmt: skip
GOOD = st.fixed_dictionaries({name: TEXT for name in ("prompt", "chosen", "rejected", "completion")})
ROW = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=5),
    st.tuples(GOOD, st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=2)).map(
        lambda two: two[0] | two[1]
    ),
    GOOD,
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "max_length": st.sampled_from([-1, 0, 1, 2, 3, 8, 64]),
        "max_prompt_length": st.sampled_from([-1, 0, 1, 2, 7, 64]),
        "max_positions": st.sampled_from([1, 4, 64]),
        "vocab_size": st.sampled_from([10, 300]),
    },
)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.one_of(*[st.lists(ROW, min_size=1, max_size=4)] * 9, st.lists(ODD, max_size=2)),
    options=OPTIONS,
    is_pairs=st.booleans(),
)
def test_prepare__any_rows_pass_or_are_refused_in_one_line(tokenizer, rows, options, is_pairs):
    prepare = prepare_pairs if is_pairs else prepare_completions
    try:
        prepared, report = prepare(rows, tokenizer, **options)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message and "\n" not in message
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        assert "/vrpo/" in raised_in, f"{raised_in}: {message}"
        event(re.sub(r"[0-9]+|'[^']*'", "_", message)[:50])
    else:
        assert 0 < len(prepared) == report.kept <= len(rows)
        event("accepted")
