"""Exit codes and the one line: what a user can cause, and what stays a traceback."""

import builtins
import sys

import pytest
import torch

from vrpo.commands.main import main


def failing(monkeypatch, error):
    def env():
        raise error

    monkeypatch.setattr("vrpo.commands.environment.env", env)


TOLD = {
    "value": (ValueError("beta must be positive,\n  got 0"), "beta must be positive, got 0"),
    "file": (
        FileNotFoundError(2, "No such file or directory", "a.json"),
        "'a.json': No such file or directory",
    ),
    "nan": (FloatingPointError("loss is nan"), "loss is nan"),
    "package": (ImportError("TensorBoardCallback requires tensorboard"), "requires tensorboard"),
    "memory": (MemoryError(), "out of memory: lower max_tokens_per_pack"),
    "GPU memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. x"),
        "lower max_tokens",
    ),
    "empty": (OSError(), "OSError"),
}


@pytest.mark.parametrize("case", TOLD)
def test_main__what_a_user_can_cause_is_one_line(monkeypatch, capsys, case):
    error, message = TOLD[case]
    failing(monkeypatch, error)
    assert main(["env"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("vrpo: error: ")
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError("x")])
def test_main__faults_of_its_own_stay_tracebacks(monkeypatch, error):
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["env"])


def test_main__control_c_is_130(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "vrpo: interrupted\n"


class ClosedPipe:
    """A standard output whose reader has left."""

    encoding = "ascii"

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")

    def fileno(self):
        raise OSError("no descriptor")


@pytest.mark.parametrize("words", [["--help"], ["env", "--help"], ["env"]])
def test_main__a_closed_pipe_is_quiet(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    assert main(words) == 141
    assert capsys.readouterr().err == ""


def test_main__a_broken_pipe_elsewhere_is_told(monkeypatch, capsys):
    failing(monkeypatch, BrokenPipeError(32, "Broken pipe", "logger"))
    assert main(["env"]) == 2
    assert "'logger': Broken pipe" in capsys.readouterr().err


def test_main__output_that_the_encoding_lacks_is_escaped(monkeypatch):
    written = []

    class Latin:
        encoding = "latin-1"

        def write(self, text):
            text.encode("latin-1")
            written.append(text)

        def flush(self):
            pass

    def env():
        from vrpo.commands.console import say

        say("caf\u00e9 \u4e2d \udc80\n")

    monkeypatch.setattr("vrpo.commands.environment.env", env)
    monkeypatch.setattr(sys, "stdout", Latin())
    assert main(["env"]) == 0
    assert written == ["caf\u00e9 \\u4e2d \\udc80\n"]


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["nope"], 2)])
def test_main__closed_streams_are_no_fault(monkeypatch, words, code):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    try:
        assert main(words) == code
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.close()


def test_main__version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vrpo 0.")


def test_main__help_says_where_defaults_come_from(capsys):
    for command in ("train", "sft", "score", "generate"):
        assert main([command, "--help"]) == 0
        assert "\n  Defaults\n" in capsys.readouterr().out


def test_sft__a_missing_package_is_one_line(monkeypatch, capsys, files, tmp_path):
    """DeepSpeed is not installed here; what transformers raises then is no traceback."""
    real = builtins.__import__

    def without_deepspeed(name, *args, **kwargs):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_deepspeed)
    flags = ["sft", f"--config={files / 'sft.yaml'}", f"--output_dir={tmp_path}", '--deepspeed={"a": 1}']
    assert main(flags) == 2
    assert "deepspeed" in capsys.readouterr().err
