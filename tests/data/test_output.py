"""Results never land on an input, and a file is whole or absent."""

import errno
import json
import os

import pytest

from vrpo.data.output import check_output, check_output_dir, to_json, write


@pytest.fixture
def place(tmp_path, monkeypatch):
    """data.jsonl, other names of it, a data folder and a model folder; the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "sub").mkdir()
    os.symlink("data.jsonl", tmp_path / "link.jsonl")
    os.symlink("sub", tmp_path / "linked_folder")
    os.link(tmp_path / "data.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}\n")
    (tmp_path / "rows" / "deeper").mkdir()
    os.link(tmp_path / "rows" / "a.jsonl", tmp_path / "hard_row.jsonl")
    (tmp_path / "model").mkdir()
    (tmp_path / "weights").write_text("w")
    os.symlink(tmp_path / "weights", tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


INPUTS = {
    "data": {"dataset_name": ["other.jsonl", "data.jsonl", "rows"]},
    "models": {"model_name_or_path": "model", "ref_model_name_or_path": "hub/name"},
}

ONTO_INPUTS = {
    "itself": "data.jsonl",
    "dot": "./data.jsonl",
    "through ..": "sub/../data.jsonl",
    "link": "link.jsonl",
    "hard link": "hard.jsonl",
    "through a linked folder": "linked_folder/../data.jsonl",
    "file of a data folder": "rows/a.jsonl",
    "hard link to a file of a data folder": "hard_row.jsonl",
    "new file in a data folder": "rows/deeper/new.jsonl",
    "weights": "model/model.safetensors",
    "what the weights link to": "weights",
    "config": "model/config.json",
    "new file that the model would read": "model/generation_config.json",
}


@pytest.mark.parametrize("case", ONTO_INPUTS)
def test_check_output__never_onto_an_input(place, case):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for path in (ONTO_INPUTS[case], os.path.abspath(ONTO_INPUTS[case])):
        with pytest.raises(ValueError, match=r"output_file .* must not"):
            check_output(path, **INPUTS)
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_check_output__a_second_file_is_no_input_either(place):
    (place / "x.png").write_text("")
    with pytest.raises(ValueError, match=r"must not overwrite dataset_name 'x\.png'"):
        check_output("x.json", beside=(".png",), data={"dataset_name": "x.png"})
    for same in ("x.png", "x.PNG"):
        with pytest.raises(ValueError, match="must have another suffix"):
            check_output(same, beside=(".png",))


@pytest.mark.parametrize("path", ["new.jsonl", "a/b/c.jsonl", "model/scores.jsonl", "data2.jsonl"])
def test_check_output__free_places_are_accepted_and_left_as_they_were(place, path):
    before = sorted(place.rglob("*"))
    assert check_output(path, **INPUTS) == [place / path]
    assert sorted(place.rglob("*")) == before


def test_check_output__bad_places_are_told(place):
    os.mkfifo("fifo")
    for path in ("sub", "new/", "", ".", "data.jsonl/x", "fifo", "x" * 300, "a\0b"):
        with pytest.raises(ValueError, match=r"output_file|null byte") as error:
            check_output(path)
        assert "\n" not in str(error.value)


def test_check_output__a_link_keeps_leading_to_its_file(place):
    os.symlink(place / "sub" / "real.jsonl", "out.jsonl")
    write({check_output("out.jsonl")[0]: "1"})
    assert os.path.islink("out.jsonl")
    assert (place / "sub" / "real.jsonl").read_text() == "1"


def test_write__all_files_or_none(place):
    (place / "first").write_text("old")
    before = sorted(place.rglob("*"))
    with pytest.raises(OSError, match="File name too long"):
        write({place / "first": "new", place / ("x" * 300): "new"})
    with pytest.raises(TypeError):
        write({place / "first": "new", place / "second": None})
    assert (place / "first").read_text() == "old"
    assert sorted(place.rglob("*")) == before


def test_write__a_full_disk_is_told_with_the_file(place, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(place.rglob("*"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        write({place / "weights": "text"})
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(place / "weights"))
    assert (place / "weights").read_text() == "w" and sorted(place.rglob("*")) == before


def test_write__keeps_permissions_and_gives_new_files_the_usual_ones(place):
    (place / "private").write_text("")
    (place / "private").chmod(0o600)
    (place / "usual").write_text("")
    write({place / "private": "1", place / "deep" / "new": b"2"})
    assert (place / "private").stat().st_mode & 0o777 == 0o600
    assert (place / "deep" / "new").stat().st_mode == (place / "usual").stat().st_mode
    assert (place / "deep" / "new").read_bytes() == b"2"


def test_to_json__is_json_for_every_reader():
    value = {"a": float("nan"), "b": [float("inf"), 1.5, "\u00e9", None], "c": "\udc80"}
    text = to_json(value)
    text.encode("utf-8")

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(text, parse_constant=refuse) == {
        "a": None,
        "b": [None, 1.5, "\u00e9", None],
        "c": "\udc80",
    }
    assert "\u00e9" in to_json({"b": "\u00e9"})


@pytest.mark.parametrize("output", ["model", "./sub/../model/", "model/new", "rows", "rows/deeper", "linked"])
def test_check_output_dir__apart_from_model_and_data(place, output):
    os.symlink("model", "linked")
    with pytest.raises(ValueError, match=r"output_dir .* must be apart from (model|dataset)_name"):
        check_output_dir(output, **INPUTS)


def test_check_output_dir__no_checkpoint_of_its_own(place):
    (place / "run" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(ValueError, match="must be apart from model_name_or_path 'run/checkpoint-5'"):
        check_output_dir("run", models={"model_name_or_path": "run/checkpoint-5"}, data={})
    check_output_dir("run2", models={"model_name_or_path": "run/checkpoint-5"}, data=INPUTS["data"])
    check_output_dir(".", **INPUTS)
