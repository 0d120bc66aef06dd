"""Files, folders and names: read as they are meant, or refused in one line with the place and the cure."""

import codecs
import errno
import gzip
import json
import logging
import os
import random
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Json, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vrpo.data.files import load_rows
from vrpo.data.readers import read_rows
from vrpo.data.table import python_rows

ROWS = [{"prompt": f"What is {n}? ", "chosen": f"one {n}", "rejected": f"two {n}"} for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of this test alone, and a working folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)


def write(name, content=LINES):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def refusal(name, **options):
    """The error, which must be one line and an error of the user's."""
    with pytest.raises((ValueError, OSError)) as caught:
        load_rows(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- formats

CSV = "prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in ROWS)
FORMATS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "A.JSONL": LINES,
    "blank lines.jsonl": "\n" + LINES.replace("\n", "\r\n \r\n"),
    "no end of line.jsonl": LINES[:-1],
    "array.jsonl": json.dumps(ROWS),
    "lines.json": LINES,
    "array.json": json.dumps(ROWS, indent=2),
    "objects.json": "".join(json.dumps(row, indent=2) for row in ROWS),
    "bom.jsonl": codecs.BOM_UTF8 + LINES.encode(),
    "bom.json": codecs.BOM_UTF8 + json.dumps(ROWS).encode(),
    "a.csv": CSV,
    "bom.csv": codecs.BOM_UTF8 + CSV.encode(),
    "crlf.csv": CSV.replace("\n", "\r\n"),
    "index.csv": "".join(f"{i - 1 if i else ''},{line}\n" for i, line in enumerate(CSV.splitlines())),
    "a.tsv": CSV.replace(",", "\t"),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv.gz": gzip.compress(CSV.encode()),
    "pairs[1].jsonl": LINES,
    "*.jsonl": LINES,
    "{a}?.csv": CSV,
    "with space \u00e9\u4e2d.jsonl": LINES,
}


@pytest.mark.parametrize("name", FORMATS)
def test_load_rows__reads_every_format_and_name(name):
    assert list(load_rows(write(name, FORMATS[name]))) == ROWS
    assert list(load_rows(name, split="train[1:3]")) == ROWS[1:3]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz", "categories.parquet"])
def test_load_rows__reads_parquet(name):
    frame = pandas.DataFrame(ROWS)
    (frame.astype("category") if "categories" in name else frame).to_parquet("whole.parquet")
    content = Path("whole.parquet").read_bytes()
    write(name, gzip.compress(content) if name.endswith(".gz") else content)
    assert list(load_rows(name)) == ROWS


def test_load_rows__one_object_is_one_row():
    assert list(load_rows(write("one.json", json.dumps(ROWS[0], indent=2)))) == ROWS[:1]


LOOKALIKES = [
    "2024-01-01",
    "2024-01-01T10:00:00Z",
    "12:30",
    "1",
    "1.0",
    "1e5",
    "true",
    "null",
    "None",
    "NaN",
    "[1]",
]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_load_rows__strings_stay_strings_whatever_they_look_like(suffix):
    rows = [{"prompt": text, "chosen": text, "rejected": "x"} for text in LOOKALIKES]
    if suffix in ("csv", "tsv"):
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        text = "\n".join(mark.join(cells) for cells in [rows[0].keys(), *(row.values() for row in rows)])
    else:
        text = "\n".join(map(json.dumps, rows))
    found = load_rows(write(f"a.{suffix}", text))
    assert list(found) == rows
    assert found.features["prompt"] == Value("string")


def test_load_rows__values_of_mixed_columns_keep_their_types():
    turn = [{"role": "user", "content": None, "tool_calls": [{"arguments": {"x": 1}}]}]
    mixed = ["12", turn, 12, None, "null", {"a": {"b": []}}, [1, "2"], True, 1.5]
    found = load_rows(write("a.jsonl", "".join(json.dumps({"chosen": value}) + "\n" for value in mixed)))
    assert found["chosen"][:] == mixed
    assert [type(value) for value in found["chosen"]] == list(map(type, mixed))


def test_load_rows__types_come_from_all_rows():
    many = [{"x": 1, "ids": [1, 2], "late": None, "half": 1} for _ in range(3000)]
    many.append({"x": "one", "ids": [3], "late": "text", "half": 0.5, "new": True})
    features = load_rows(write("a.jsonl", "".join(json.dumps(row) + "\n" for row in many))).features
    assert features == {
        "x": Json(),
        "ids": List(Value("int64")),
        "late": Value("string"),
        "half": Value("float64"),
        "new": Value("bool"),
    }


def test_load_rows__csv_columns_of_tokens_are_lists():
    text = 'prompt_ids,completion_ids,example_id,note\n"[1, 2]",[3],7,[3]\n'
    assert load_rows(write("a.csv", text))[0] == {
        "prompt_ids": [1, 2],
        "completion_ids": [3],
        "example_id": 7,
        "note": "[3]",
    }


def test_load_rows__csv_cells_may_be_long_and_hold_lines():
    assert (
        load_rows(write("a.csv", 'prompt,completion\n"' + "x" * 200_000 + '","a\nb"\n'))[0]["completion"]
        == "a\nb"
    )


# --- several files, folders


def test_load_rows__a_list_of_files_is_read_in_order():
    write("a.jsonl", '{"prompt": "a", "x": 1}\n')
    write("b.json", '[{"prompt": "b", "x": "y"}]')
    write("c.csv", "prompt\nc\n")
    assert load_rows(["b.json", "a.jsonl", "c.csv"])["prompt"][:] == ["b", "a", "c"]
    assert load_rows(["a.jsonl", "b.json"], split="train[1:]")["x"][:] == ["y"]
    assert "nope.jsonl" in refusal(["a.jsonl", "nope.jsonl"])


def test_load_rows__folder_of_files_with_and_without_splits():
    write("named/train-00000.jsonl", LINES)
    write("named/train-00001.jsonl.gz", gzip.compress(LINES.encode()))
    write("named/test/x.csv", CSV)
    assert len(load_rows("named")) == 8
    assert len(load_rows("named", split="test[:3]")) == 3
    assert "no split 'validation', only" in refusal("named", split="validation")
    write("plain/b.jsonl")
    assert len(load_rows("./plain/")) == 4
    write("none/readme.txt")
    assert "holds no file ending in .jsonl" in refusal("none")


def test_load_rows__files_that_no_split_names_are_not_left_out_silently(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    write("mixed/train.jsonl")
    write("mixed/extra.jsonl")
    assert len(load_rows("mixed")) == 4
    assert "left out are extra.jsonl" in caplog.text


def test_load_rows__folders_that_datasets_saved():
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk("single")
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk("several")
    assert list(load_rows("single")) == ROWS
    assert list(load_rows("several", split="test")) == ROWS[1:2]
    assert "only train, test" in refusal("several", split="dev")


@pytest.mark.parametrize("split", ["test", "validation", "nonsense[:2]"])
def test_load_rows__what_has_no_splits_has_no_other_one_than_train(split):
    write("test.jsonl")  # not even the one that its name tells: a training on it would be tested on it
    write("named/test/a.jsonl")
    Dataset.from_list(ROWS).save_to_disk("single")
    assert "test.jsonl: a file has no splits but 'train'" in refusal("test.jsonl", split=split)
    assert "a file has no splits" in refusal(["test.jsonl", "test.jsonl"], split=split)
    assert "single: a saved Dataset has no splits" in refusal("single", split=split)
    if split == "test":
        assert "a file has no splits" in refusal(["named", "test.jsonl"], split=split)
        assert len(load_rows("named", split=split)) == 4


# --- the content decides


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_load_rows__edited_file_of_the_same_time_stamp_is_read_anew(suffix):
    def save(text):
        if suffix == "parquet":
            Dataset.from_list([{"prompt": text}]).to_parquet("a.parquet")
        else:
            write(f"a.{suffix}", json.dumps({"prompt": text}) if suffix == "jsonl" else f"prompt\n{text}\n")
        os.utime(f"a.{suffix}", ns=(0, 0))

    save("one")
    assert load_rows(f"a.{suffix}")["prompt"][:] == ["one"]
    save("two")
    assert load_rows(f"a.{suffix}")["prompt"][:] == ["two"]
    assert load_rows(f"a.{suffix}", split="train[:1]")["prompt"][:] == ["two"]


def test_load_rows__a_cached_file_that_lost_its_end_is_written_anew(tmp_path):
    path = write("many.jsonl", LINES * 600)  # three batches: cut between two, it would read as fewer rows
    load_rows(path)
    (cached,) = (tmp_path / "cache").rglob("*.arrow")
    whole = cached.read_bytes()
    source = pa.BufferReader(whole)
    reader = pa.ipc.open_stream(source)
    ends = [source.tell() for _ in reader]
    for size in (0, 7, *ends, len(whole) - 1):
        cached.write_bytes(whole[:size])
        assert len(load_rows(path)) == 2400
        assert cached.read_bytes() == whole
    cached.write_bytes(b"?" * 64 + whole[64:])
    assert str(cached) in refusal(path)


def test_load_rows__a_full_cache_is_told_with_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vrpo.data.table._write_stream", full)
    assert str(tmp_path / "cache") in refusal(write("a.jsonl"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_load_rows__others_may_read_the_cache(tmp_path):
    before = os.umask(0o027)
    try:
        load_rows(write("a.jsonl"))
    finally:
        os.umask(before)
    (cached,) = (tmp_path / "cache").rglob("*.arrow")
    assert cached.stat().st_mode & 0o777 == 0o640


def test_load_rows__a_second_load_reads_the_cache(monkeypatch):
    write("a.jsonl")
    load_rows("a.jsonl")
    monkeypatch.setattr("vrpo.data.readers.read_rows", None)
    assert list(load_rows("a.jsonl")) == ROWS


def test_load_rows__a_failed_load_leaves_nothing_behind(tmp_path):
    refusal(write("a.jsonl", LINES + "{"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# --- what cannot be read

BAD = {
    "empty.jsonl": ("", "empty.jsonl: the file is empty"),
    "empty.json.gz": (gzip.compress(b""), "the file is empty"),
    "blank.jsonl": ("\n \n", "holds no rows"),
    "header.csv": ("a,b\n", "holds no rows"),
    "array.json": ("[]", "holds no rows"),
    "cut.jsonl": (LINES[:-20], "line 4 ends in the middle of a value: is the file cut?"),
    "cut.json": (json.dumps(ROWS)[:-9], "line 1 ends in the middle"),
    "cut2.json": (json.dumps(ROWS)[:-1], "the array has no end: is the file cut?"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-12], "not a whole gzip file"),
    "plain.jsonl.gz": (LINES, "not a whole gzip file"),
    "comma.json": (json.dumps(ROWS).replace("}, {", "} {"), "a comma is missing"),
    "behind.json": (json.dumps(ROWS) + "x", "behind the end of the array"),
    "two in a line.jsonl": (LINES.replace("\n", ""), "line 1 is not JSON: Extra data"),
    "indented.jsonl": (json.dumps(ROWS[0], indent=1), "in a .json file it may span lines"),
    "utf16.jsonl": (LINES.encode("utf-16"), "the file is UTF-16, not UTF-8; save it as UTF-8"),
    "utf16.csv": (CSV.encode("utf-16"), "the file is UTF-16"),
    "utf16 without mark.jsonl": (LINES.encode("utf-16-le"), "UTF-16"),
    "utf32.json": (json.dumps(ROWS).encode("utf-32"), "UTF-32"),
    "latin1.jsonl": (LINES.replace("one 1", "caf\u00e9").encode("latin-1"), "line 2: byte 0xe9 at column"),
    "latin1.csv": (CSV.replace("one 1", "caf\u00e9").encode("latin-1"), "line 3: byte 0xe9"),
    "surrogate.jsonl": (LINES + '{"prompt": "a\\ud800"}', "'prompt': \\ud800 is half a surrogate pair"),
    "surrogate key.jsonl": ('{"\\udc00": 1}', "half a surrogate pair"),
    "deep surrogate.jsonl": ('{"a": [{"b": "\\uD83D"}]}', "half a surrogate pair"),
    "null.jsonl": ("null", "line 1 holds null; every row must be an object"),
    "null.json": ("null", "line 1 holds null"),
    "nulls.json": ("[null]", "line 1 holds null"),
    "number.jsonl": (LINES + "5\n", "line 5 holds 5"),
    "strings.json": ('["a"]', 'holds "a"'),
    "no keys.jsonl": ("{}\n", "line 1 is an object without keys"),
    "nan.jsonl": (LINES + '{"score": NaN}\n', "line 5: NaN is not JSON"),
    "nan.json": ('[{"a": 1},\n{"score": [-Infinity]}]', "line 2: -Infinity is not JSON"),
    "huge float.jsonl": ('{"a": 1e999}', "too large for a float"),
    "huge integer.jsonl": ('{"a": {"b": 99999999999999999999}}', "line 1: an integer has more than 64 bits"),
    "huger integer.jsonl": ('{"a": %s}' % ("9" * 5000), "line 1: an integer"),
    "deep.jsonl": ('{"a": ' + "[" * 600 + "]" * 600 + "}", "nested deeper than 500"),
    "deeper.jsonl": ('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}", "line 1: lists and objects are nested"),
    "deeper.json": ('[{"a": ' + '{"b":' * 10**5 + "1" + "}" * 10**5 + "}]", "nested deeper"),
    "twice.jsonl": ('{"a": 1, "a": 2}', 'line 1: the key "a" stands twice'),
    "nul.jsonl": ('{"a\\u0000b": 1}', "line 1: the key 'a\\x00b' holds a NUL"),
    "nul.csv": ("abcd\0\n1\n", "NUL"),
    "twice.csv": ("a,a\n1,2\n", 'the column "a" stands twice'),
    "semicolons.csv": ("a;b\n1;2\n", "separate cells by ','"),
    "wide.csv": ("a,b\n1,2,3\n", "line 2 has 3 cells, the header 2"),
    "quote.csv": ('a,b\n1,"2\n', "is a quote missing, or the file cut?"),
    "ids.csv": ('prompt_ids\n"[1, 2"\n', "line 2, prompt_ids"),
    "text.parquet": (LINES, "text.parquet: not a Parquet file that can be read"),
    "empty.parquet": ("", "not a Parquet file"),
    "text.txt": (LINES, "expected a file ending in .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_load_rows__bad_file_is_refused_in_one_line(name):
    content, message = BAD[name]
    told = refusal(write(name, content))
    assert name in told
    assert message in told


def test_load_rows__damaged_parquet_is_refused():
    Dataset.from_list(ROWS * 100).to_parquet("whole.parquet")
    whole = Path("whole.parquet").read_bytes()
    assert "not a Parquet file" in refusal(write("cut.parquet", whole[:-30]))
    for start in (40, len(whole) // 2):
        damaged = whole[:start] + bytes(200) + whole[start + 200 :]
        assert "damaged.parquet" in refusal(write("damaged.parquet", damaged))
    Dataset.from_list(ROWS).select([]).to_parquet("none.parquet")
    assert refusal("none.parquet") == "none.parquet: the file holds no rows"


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("dat/pairs.jsonl", "no folder 'dat'); did you mean data/pairs.jsonl?"),
        ("data/pair.jsonl", "did you mean data/pairs.jsonl?"),
        ("data/pairs", "did you mean data/pairs.jsonl?"),
        ("data\\pairs.jsonl", "did you mean data/pairs.jsonl?"),
        ("C:\\data\\other.jsonl", "separate folders by /"),
        ("data/*.csv", "patterns are not expanded"),
        ("./pairs", ""),
        ("nope/", ""),
        ("/nowhere/at/all", "no folder '/nowhere'"),
        ("~/nowhere.jsonl", ""),
        ("https://example.org/a.jsonl", "URLs are not read"),
        ("a/b/c", ""),
        ("pairs.jsonl.bz2", ""),
        ("data/pairs.jsonl/a", ""),
    ],
)
def test_load_rows__mistyped_path_never_reaches_the_hub(name, close, monkeypatch):
    monkeypatch.setattr("vrpo.data.files.load_dataset", None)
    write("data/pairs.jsonl")
    with pytest.raises(FileNotFoundError) as caught:
        load_rows(name)
    assert str(caught.value).startswith(f"dataset {name!r}: ")
    assert close in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_rows__hub_name_that_cannot_be_loaded_is_told_in_one_line(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nat all")

    monkeypatch.setattr("vrpo.data.files.load_dataset", unreachable)
    write("dat/pairs.jsonl")
    told = refusal("data/pairs")
    assert "there is no such file or folder (did you mean dat" in told
    assert "as a dataset of the hub it cannot be loaded: Couldn't reach it at all" in told


@pytest.mark.parametrize(
    "split", ["train[", "train[x]", "", "train+test", "train[9:]", "train[:200%]", "a b"]
)
def test_load_rows__bad_split_is_refused(split):
    assert "split" in refusal(write("a.jsonl"), split=split)


def test_load_rows__other_things_than_files_are_refused():
    os.mkfifo("pipe.jsonl")
    assert "not a regular file" in refusal("pipe.jsonl")
    for name in ("", " ", [], [""]):
        assert "dataset_name must be" in refusal(name)
    assert "dataset_config='x' belongs to a hub name" in refusal(write("a.jsonl"), config="x")


# --- many files

numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
strings = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(LOOKALIKES)
values = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
tables = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "chosen", "x"]), values, min_size=1), min_size=1, max_size=5
)
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(tables, st.sampled_from(["jsonl", "json", "json.gz"]), st.booleans())
def test_load_rows__returns_every_json_value(rows, suffix, ascii_only):
    if suffix == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=ascii_only)
    write(f"a.{suffix}", gzip.compress(text.encode()) if suffix.endswith("gz") else text)
    found = load_rows(f"a.{suffix}").with_format("arrow")
    columns = dict.fromkeys(name for row in rows for name in row)
    wanted = [{name: row.get(name) for name in columns} for row in rows]
    assert python_rows(found[:], found.features) == wanted


@settings(QUICK, max_examples=250)
@given(st.data())
def test_read_rows__mutated_file_is_read_or_refused_in_one_line(data):
    suffix = data.draw(st.sampled_from(["jsonl", "json", "csv", "tsv", "jsonl.gz", "parquet"]), "format")
    if suffix == "parquet":
        Dataset.from_list(ROWS).to_parquet("a.parquet")
        content = bytearray(Path("a.parquet").read_bytes())
    else:
        text = {"json": json.dumps(ROWS), "csv": CSV, "tsv": CSV.replace(",", "\t")}.get(
            suffix, LINES
        ).encode()
        content = bytearray(gzip.compress(text, mtime=0) if suffix.endswith("gz") else text)
    generator = random.Random(data.draw(st.integers(0, 2**32), "seed"))
    for _ in range(generator.randint(1, 4)):
        start = generator.randrange(len(content) + 1)
        stop = min(len(content), start + generator.choice([0, 1, 1, 5, 60]))
        piece = generator.choice(
            [
                b"",
                b"\0",
                b"\xff\xfe",
                b'"',
                b"\\ud800",
                b"\n",
                b"[",
                b"null",
                b"NaN",
                b"{",
                b",",
                bytes([generator.randrange(256)]),
            ]
        )
        content[start:stop] = piece
    write(f"b.{suffix}", bytes(content))
    try:
        rows = load_rows(f"b.{suffix}")
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
        assert f"b.{suffix}" in str(error)
    else:
        assert len(list(rows)) > 0


def test_read_rows__is_lazy():
    write("a.jsonl", LINES + "{")
    rows = read_rows(Path("a.jsonl"), "jsonl")
    assert [next(rows) for _ in ROWS] == [(f"line {i}", row) for i, row in enumerate(ROWS, start=1)]
