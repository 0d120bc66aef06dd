"""Files on the disk: whole or not there, and known again by a checksum of every byte."""

import errno
import os

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from vrpo import disk


@given(st.data())
def test_checksum__changes_with_any_bit(tmp_path_factory, data):
    content = bytearray(data.draw(st.binary(min_size=1, max_size=3000)))
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(content)
    before = disk.checksum(path)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert disk.checksum(path) != before


def test_checksum__is_xxh3_of_files_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_BLOCK", 100)
    for size in (0, 1, 99, 100, 101, 350):
        content = bytes(n % 251 for n in range(size))
        (tmp_path / "file").write_bytes(content)
        assert disk.checksum(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)


def test_write_whole__leaves_the_old_file_where_the_disk_refuses(tmp_path, monkeypatch):
    path = tmp_path / "file"
    disk.write_whole(path, b"old")

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"No space left on device: .*file'$"):
        disk.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def _folder(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f"{folder.name} {name}")
    return folder


def test_replace_folder__takes_the_place_of_an_old_one(tmp_path):
    old, aside = _folder(tmp_path / "base", "a", "b"), _folder(tmp_path / "aside", "b", "c")
    _folder(tmp_path / "base.old", "d")  # of a process that died
    disk.replace_folder(aside, old)
    assert os.listdir(tmp_path) == ["base"] and sorted(os.listdir(old)) == ["b", "c"]
    assert (old / "b").read_text() == "aside b"


def test_move_files__deletes_the_weights_that_a_reader_would_take_instead(tmp_path):
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    kept = ["model_of_mine.safetensors", "notes.md"]
    folder = _folder(tmp_path / "out", *shards, "model.safetensors.index.json", *kept)
    disk.move_files(_folder(tmp_path / "one", "model.safetensors", "config.json"), folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", *kept]
    disk.move_files(_folder(tmp_path / "two", *shards[:2], "model.safetensors.index.json"), folder)
    assert "model.safetensors" not in os.listdir(folder) and (folder / shards[1]).is_file()
    disk.move_files(_folder(tmp_path / "adapter", "adapter_model.safetensors"), folder)  # beside its base
    assert (folder / shards[0]).is_file() and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SafetensorError("I/O error:\n no room"), r"^no model: I/O error: no room$"),
        (RuntimeError("PytorchStreamWriter failed writing file"), r"^no model: PytorchStreamWriter"),
        (OSError(errno.ENOSPC, "No space left on device", "x/file"), r"^no model: x/file: No space left"),
    ],
)
def test_writing__tells_in_one_line_and_makes_room(tmp_path, error, told):
    aside = _folder(tmp_path / "aside", "stale")
    with pytest.raises(OSError, match=told) as found, disk.writing(aside, "no model"):
        assert not aside.exists()
        _folder(aside, "half")
        raise error
    assert "\n" not in str(found.value) and not aside.exists()
    with pytest.raises(RuntimeError, match="shape"), disk.writing(aside, "no model"):
        raise RuntimeError("shape")
