"""`make gpu-rivals WHEELS=DIR`: packages from wheels reach the stage, and only it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_rivals

ROOT = Path(__file__).resolve().parents[2]


def make_wheel(folder, name, tag="py3-none-any"):
    """A wheel with one module that says where it is."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": "WHERE = __file__\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


def test_main__installs_what_fits_for_this_run_only(tmp_path, monkeypatch, capsys):
    make_wheel(tmp_path, "one_rival")
    make_wheel(tmp_path, "old_rival", "cp27-cp27m-win32")
    seen = {}

    def run(arguments):
        seen["arguments"] = arguments
        seen["folder"] = Path(arguments[arguments.index("--rivals") + 1])
        command = [sys.executable, "-c", "import one_rival; print(one_rival.WHERE)"]
        environment = {**os.environ, "PYTHONPATH": str(seen["folder"])}
        seen["where"] = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout
        return 7

    monkeypatch.setattr(gpu, "main", run)
    assert gpu_rivals.main(["--wheels", str(tmp_path), "--seconds", "60", "--tiny"]) == 7
    assert seen["arguments"][:-2] == ["--stages", "rivals", "--seconds", "60", "--tiny"]
    assert seen["where"].startswith(str(seen["folder"])) and not seen["folder"].exists()
    text = capsys.readouterr().out
    assert "installed for this run: one_rival-1.0-py3-none-any.whl\n" in text
    assert "left out: old_rival-1.0-cp27-cp27m-win32.whl: " in text and "not a supported wheel" in text


def test_main__needs_a_wheel_that_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "main", lambda arguments: pytest.fail("nothing to compare with"))
    assert gpu_rivals.main(["--wheels", str(tmp_path)]) == 2
    assert "has none" in capsys.readouterr().out
    make_wheel(tmp_path, "old_rival", "cp27-cp27m-win32")
    assert gpu_rivals.main(["--wheels", str(tmp_path)]) == 2
    assert "none of the 1 wheels" in capsys.readouterr().out


def test_make__says_what_it_needs():
    done = subprocess.run(["make", "gpu-rivals"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode and "make gpu-rivals WHEELS=DIR" in done.stdout


def test_output__is_the_environments_folder_where_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu._options([]).output == tmp_path
    assert gpu._options(["--output", str(tmp_path / "b")]).output == tmp_path / "b"
    monkeypatch.setenv("OUT", "")
    assert gpu._options([]).output == ROOT / "benchmarks" / "results" / "gpu"
