"""Flags and YAML: what is taken, and that everything else ends in one line before any work."""

import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vrpo.commands.main import main
from vrpo.commands.options import parse
from vrpo.commands.table import COMMANDS


def parsed(folder, text, *flags, command="train"):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    groups, sections = parse(COMMANDS[command], ["--config", str(path), *flags])
    return {name: value for group in groups for name, value in vars(group).items()} | sections


# --- words of YAML

TAKEN = {
    "no where a word is meant": ("save_strategy: no", "save_strategy", "no"),
    "a number as a name": ("output_dir: 2024", "output_dir", "2024"),
    "a date as a name": ("run_name: 2024-01-01", "run_name", "2024-01-01"),
    "a time as a name": ("run_name: 12:30:00", "run_name", "12:30:00"),
    "no as a name": ("run_name: no", "run_name", "no"),
    "a leading zero in a name": ("run_name: 007", "run_name", "007"),
    "quoted null": ("run_name: 'null'", "run_name", "null"),
    "null": ("run_name: null", "run_name", None),
    "nothing": ("max_prompt_length:", "max_prompt_length", None),
    "float": ("learning_rate: 5e-7", "learning_rate", 5e-7),
    "int as float": ("beta: 1", "beta", 1.0),
    "negative": ("weight_decay: -1e-3", "weight_decay", -1e-3),
    "yes": ("use_cpu: yes", "use_cpu", True),
    "off": ("disable_dropout: off", "disable_dropout", False),
    "quoted true": ('use_cpu: "true"', "use_cpu", True),
    "list of words": ("lora_target_modules: [q_proj, no, 7]", "lora_target_modules", ["q_proj", "no", "7"]),
    "a word for a list": ("lora_target_modules: q_proj", "lora_target_modules", ["q_proj"]),
    "several files": ("dataset_name: [a, b]", "dataset_name", ["a", "b"]),
    "one file": ("dataset_name: a", "dataset_name", "a"),
    "mapping": ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
    "JSON": ("lr_scheduler_kwargs: '{\"a\": 2}'", "lr_scheduler_kwargs", {"a": 2}),
    "anchor": ("output_dir: &x out\nrun_name: *x", "run_name", "out"),
    "resume": ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
    "byte order mark": ("\ufeffbeta: 0.5", "beta", 0.5),
}


@pytest.mark.parametrize("case", TAKEN)
def test_config__values_are_what_stands_in_the_file(tmp_path, case):
    text, name, value = TAKEN[case]
    if "dataset_name" not in text:
        text += "\ndataset_name: a"
    found = parsed(tmp_path, text)[name]
    assert found == value
    assert type(found) is type(value) or name == "save_strategy"


def test_config__report_to_takes_one_word_or_several(tmp_path):
    assert parsed(tmp_path, "dataset_name: a\nreport_to: [wandb, mlflow]")["report_to"] == ["wandb", "mlflow"]
    assert parsed(tmp_path, "dataset_name: a\nreport_to: none")["report_to"] == []


REFUSED = {
    "duplicate": ("beta: 1\nseed: 2\nbeta: 3", "beta stands in line 2 and in line 4"),
    "nested duplicate": ("lr_scheduler_kwargs: {a: 1, a: 2}", "a stands in line 2 and in line 2"),
    "boolean for a word": ("eval_strategy: false", "'no'"),
    "boolean for a number": ("beta: yes", "invalid float value: 'yes' (config"),
    "octal": ("seed: 010", "which YAML takes for octal"),
    "mapping for a number": ("beta: {a: 1}", "beta takes one value, not a mapping"),
    "list for a number": ("beta: [1, 2]", "line 2: beta takes one value, not a list"),
    "list of lists": ("lora_target_modules: [[a]]", "takes a list of plain values"),
    "empty list": ("lora_target_modules: []", "is an empty list"),
    "null for a number": ("seed: null", "seed needs a value"),
    "null for a word": ("output_dir: ~\nsave_strategy:", "needs a value"),
    "fraction": ("num_samples: 2.5", "invalid int value: '2.5' (config"),
    "exponent": ("num_samples: 1e3", "invalid int value: '1e3'"),
    "nan": ("beta: nan", "is not finite"),
    "YAML's infinity": ("beta: .inf", "invalid float value"),
    "huge": ("seed: 99999999999999999999999", "more than 64 bits"),
    "tab": ("beta:\n\t1", "not tabs"),
    "list": ("- a", "must map field names to values"),
    "word": ("hello", "must map field names to values"),
    "two documents": ("beta: 1\n---\nbeta: 2", "is not YAML"),
    "Python tag": ("output_dir: !!python/name:os.system", "tag"),
    "own tag": ("output_dir: !env HOME", "tag"),
    "binary tag": ("output_dir: !!binary aGk=", "tag"),
    "set": ("output_dir: !!set {a}", "tag"),
    "key that is a list": ("[a, b]: 1", "a key must be a word"),
    "boolean key": ("yes: 1", "unknown field 'yes'"),
    "undefined alias": ("output_dir: *nothing", "is not YAML"),
    "an anchor that holds itself": ("lr_scheduler_kwargs: &x {a: *x}", "holds itself"),
    "merge of a word": ("<<: a", "<< needs a mapping"),
    "half a surrogate pair": ('output_dir: "\\ud800"', "surrogate"),
    "NUL": ('output_dir: "a\\0b"', "NUL"),
    "empty name": ('output_dir: ""', "the value is empty"),
    "text for a mapping": ("lr_scheduler_kwargs: fast", "needs a JSON object"),
    "broken JSON": ("lr_scheduler_kwargs: '{a'", "is no JSON object"),
    "accelerator key": ("accelerator_config: {a: 1}", "unknown key 'a'"),
    "deep": ("lr_scheduler_kwargs: " + "[" * 5000, "config"),
    "nested": ("lr_scheduler_kwargs: {a: " + "[" * 50 + "]" * 50 + "}", "nested too deeply"),
}


def error_line(capsys, argv):
    capsys.readouterr()
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vrpo: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("case", REFUSED)
def test_config__what_no_field_takes_is_one_line(tmp_path, capsys, case):
    text, message = REFUSED[case]
    path = tmp_path / "config.yaml"
    path.write_text(text if text[0] in "-h" else f"dataset_name: a\n{text}\n", encoding="utf-8")
    assert message in error_line(capsys, ["train", "--config", str(path)])


FILES = {
    "empty": (b"", "is empty"),
    "comments": (b"# nothing\n", "is empty"),
    "UTF-16": ("beta: 1".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "latin-1": ("run_name: \u00e9t\u00e9".encode("latin-1"), "line 1: not UTF-8"),
    "binary": (bytes(range(128, 256)), "not UTF-8"),
    "control characters": (b"beta: \x01", "is not YAML"),
}


@pytest.mark.parametrize("case", FILES)
def test_config__a_file_that_is_no_text_is_named(tmp_path, capsys, case):
    content, message = FILES[case]
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    line = error_line(capsys, ["train", f"--config={path}"])
    assert message in line
    assert str(path) in line


def test_config__is_one_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("beta: 1")
    for flags, message in (
        ([f"--config={tmp_path}"], "is a folder"),
        (["--config"], "--config needs the path"),
        (["--config", "--beta", "1"], "--config needs the path"),
        (["--config="], "--config needs the path"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given twice, as 'a.yaml' and 'b.yaml'"),
    ):
        assert message in error_line(capsys, ["train", *flags])


# --- flags


def flags_of(*words):
    groups, _ = parse(COMMANDS["train"], ["--dataset_name=a", *words])
    return {name: value for group in groups for name, value in vars(group).items()}


def test_flags__are_taken_in_every_usual_form():
    assert flags_of("--beta", "0.1", "--beta=0.3")["beta"] == 0.3  # the last one counts
    assert flags_of("--bf16", "--use_cpu")["bf16"] is True
    assert flags_of("--bf16", "off")["bf16"] is False
    assert flags_of("--weight_decay", "-1e-3")["weight_decay"] == -1e-3
    assert flags_of("--dataset_name", "a.csv", "b.jsonl.gz")["dataset_name"] == ["a.csv", "b.jsonl.gz"]
    assert flags_of("--no-disable-dropout")["disable_dropout"] is False
    assert flags_of("--eval_dataset_name", "e")["eval_dataset_name"] == "e"


BAD_FLAGS = {
    "unknown": (["--bta=1"], "did you mean --beta"),
    "negation that is none": (["--no_bf16"], "did you mean --bf16=false"),
    "no value": (["--beta"], "argument --beta: expected one argument"),
    "empty value": (["--beta="], "invalid float value: ''"),
    "empty name": (["--output_dir="], "the value is empty"),
    "bool": (["--bf16", "maybe"], "true or false is needed"),
    "fraction": (["--num_samples", "2.5"], "invalid int value: '2.5'"),
    "exponent": (["--num_samples", "1e3"], "invalid int value: '1e3'"),
    "negative": (["--num_samples", "-4"], "num_samples must be at least 1, got -4"),
    "infinite": (["--learning_rate", "-inf"], "is not finite"),
    "two values": (["--beta", "1", "2"], "unexpected argument '2'"),
    "dashes alone": (["--"], "unknown flag --"),
    "short flag": (["-b", "1"], "unexpected argument '-b'"),
    "logger": (["--report_to=no", "--model_name_or_path=m"], "report_to must be none, all or some of"),
    "checkpoint": (
        ["--resume_from_checkpoint=yess", "--model_name_or_path=m"],
        "there is no folder 'yess'; 'true' takes the last whole checkpoint",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_flags__what_no_field_takes_is_one_line(capsys, case):
    flags, message = BAD_FLAGS[case]
    assert message in error_line(capsys, ["train", "--dataset_name=a", *flags])


# --- anything at all

_WORDS = (
    *(
        "no",
        "yes",
        "on",
        "off",
        "true",
        "null",
        "~",
        ".nan",
        "nan",
        "inf",
        "-1",
        "0",
        "010",
        "0x1F",
        "1e3",
        "5e-7",
    ),
    *(
        "2.5",
        "1_000",
        "2024-01-01",
        "12:30",
        "''",
        "[]",
        "{}",
        "[1]",
        "{a: 1}",
        "[[1]]",
        "&a",
        "*a",
        "!!str",
        "|",
    ),
)
SCALARS = st.one_of(
    st.sampled_from(_WORDS),
    st.text(st.sampled_from(string.printable + "\u00e9\u4e2d\u2028"), max_size=8),
    st.integers().map(str),
    st.floats().map(str),
)
_FIELDS = (
    *("beta", "seed", "num_samples", "learning_rate", "output_dir", "run_name", "report_to", "save_strategy"),
    *("eval_strategy", "bf16", "optim", "lora_target_modules", "lr_scheduler_kwargs", "lr_scheduler_type"),
    *("max_steps", "logging_steps", "dataset_name", "new_model", "max_length", "mask_design", "use_peft"),
    *("accelerator_config", "debug", "fsdp", "warmup_steps", "unknown", "<<"),
)
NAMES = st.sampled_from(_FIELDS)
RIDDLES = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def is_told(argv):
    """Whether the words are refused; any error but ValueError or OSError with a text fails the test."""
    command = COMMANDS[argv[0]]
    try:
        parse(command, argv[1:])
    except (ValueError, OSError) as error:
        assert str(error).strip()
        return True
    return False


@RIDDLES
@given(
    st.sampled_from(["train", "sft"]),
    st.lists(st.tuples(NAMES, SCALARS), min_size=1, max_size=4),
    st.sampled_from([": ", ":", ":\n  ", ": - ", "- ", "=", ":\t"]),
)
def test_config__any_file_is_taken_or_told(tmp_path_factory, command, lines, colon):
    path = tmp_path_factory.getbasetemp() / "riddle.yaml"
    path.write_text("".join(f"{name}{colon}{value}\n" for name, value in lines), encoding="utf-8")
    is_told([command, f"--config={path}"])


@RIDDLES
@given(
    st.sampled_from(["train", "sft", "score", "variance", "generate"]),
    st.lists(
        st.one_of(
            st.tuples(NAMES, SCALARS).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
            st.tuples(NAMES, SCALARS).map(lambda pair: [f"--{pair[0]}", pair[1]]),
            st.tuples(NAMES).map(lambda name: [f"--{name[0]}"]),
            SCALARS.map(lambda word: [word]),
        ),
        max_size=4,
    ),
)
def test_flags__any_words_are_taken_or_told(command, flags):
    is_told([command, *(word for words in flags for word in words if word != "--traceback")])
