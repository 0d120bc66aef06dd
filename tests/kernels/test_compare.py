"""`python -m benchmarks compare`: two revisions in turns, one of them slowed, wrong, or without an op."""

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import bench_compare
from benchmarks.bench_compare import Ratio
from benchmarks.compare_build import BuildError, build_extension, copy_revision, copy_working_tree

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--device", "cpu", "--sizes", "tiny", "--rounds", "5"]
SLOW = """
_quick_philox4x32 = philox4x32


def philox4x32(*arguments):
    for _ in range(4):
        _quick_philox4x32(*arguments)
    return _quick_philox4x32(*arguments)
"""
WRONG = """
_right_philox4x32 = philox4x32


def philox4x32(*arguments):
    return tuple(word ^ 1 for word in _right_philox4x32(*arguments))
"""


def git(folder, *command):
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
    subprocess.run(["git", "-C", str(folder), *identity, *command], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    """A repository with a copy of the kernels whose only commit has no `segment_sum`."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "vrpo_kernels", folder / "vrpo_kernels", ignore=ignored)
    init = folder / "vrpo_kernels" / "__init__.py"
    whole = init.read_text()
    init.write_text(whole + "\ndel segment_sum\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "base")
    init.write_text(whole)
    return folder


def run(checkout, *options):
    cache = checkout.parent / "cache"
    base = ["--base", "HEAD", "--repository", str(checkout), "--cache", str(cache)]
    return bench_compare.main([*base, *OPTIONS, *options])


def append(checkout, text):
    path = checkout / "vrpo_kernels" / "philox.py"
    path.write_text(path.read_text() + text)


def test_main__finds_a_slowed_op_and_says_what_the_base_lacks(checkout, capsys):
    append(checkout, SLOW)
    assert run(checkout, "--ops", "philox4x32", "segment_sum", "--modes", "forward") == 1
    lines = capsys.readouterr().out.splitlines()
    (philox,) = [line for line in lines if line.startswith("  philox4x32, forward")]
    (missing,) = [line for line in lines if line.startswith("  segment_sum, forward")]
    assert philox.endswith("SLOWER") and 3 < float(philox.split()[4]) < 8
    assert "not in base: AttributeError: module 'vrpo_kernels' has no attribute 'segment_sum'" in missing
    assert "1 compared" in lines[-1] and lines[-1].endswith("1 slower than 1.1")


def test_main__equal_revisions_pass_and_wrong_results_do_not(checkout, capsys):
    assert run(checkout, "--head", "HEAD", "--ops", "philox4x32", "--threshold", "1.8") == 0
    assert "1 compared" in capsys.readouterr().out
    append(checkout, WRONG)
    assert run(checkout, "--ops", "philox4x32") == 1
    assert "philox4x32, forward: wrong in head: output 0: 1 of 1 elements differ" in capsys.readouterr().out


def test_main__an_unknown_revision_is_named(checkout, capsys):
    options = ["--repository", str(checkout), "--cache", str(checkout.parent / "cache"), "--base", "nowhere"]
    assert bench_compare.main([*options, *OPTIONS, "--ops", "philox4x32"]) == 2
    assert "'nowhere' must be a commit of" in capsys.readouterr().err


def test_main__refuses_options_that_compare_nothing(capsys):
    for options, message in (
        (["--rounds", "2"], "--rounds must be at least 3, got 2"),
        (["--threshold", "0.9"], "--threshold must be at least 1, got 0.9"),
        (["--ops", "philox4x32", "--modes", "in place"], "no benchmark has one of these"),
    ):
        with pytest.raises(SystemExit):
            bench_compare.main(["--base", "HEAD", *options])
        assert message in capsys.readouterr().err


def test_slower__only_if_the_whole_spread_lies_beyond():
    def ratio(*head):
        return Ratio.of(list(head), [1.0] * len(head))

    assert ratio(1.2, 1.3, 1.4).slower(1.1)
    assert not ratio(1.0, 1.3, 1.4).slower(1.1)  # its best round is as fast as the base's
    assert not Ratio.of([1.2, 1.2, 1.2], [1.0, 1.19, 1.19]).slower(1.1)  # most rounds say equal
    assert (ratio(1.2, 1.3, 1.4).low, ratio(1.2, 1.3, 1.4).high) == (1.2, 1.4)


def test_build_extension__is_done_once_for_equal_sources(tmp_path):
    """A stand-in for the compiler counts how often it is called."""
    count = tmp_path / "count"
    roots = [tmp_path / name for name in ("one", "two", "three")]
    for number, root in enumerate(roots):
        (root / "vrpo_kernels").mkdir(parents=True)
        (root / "csrc").mkdir()
        (root / "csrc" / "a.cpp").write_text("int a;" if number < 2 else "int b;")
        script = f"open({str(count)!r}, 'a').write('x'); open('vrpo_kernels/_C.so', 'w').write('built')"
        (root / "setup.py").write_text(script)
        build_extension(root, tmp_path / "cache")
        build_extension(root, tmp_path / "cache")
        assert (root / "vrpo_kernels" / "_C.so").read_text() == "built"
    assert count.read_text() == "xx"


def test_build_extension__says_what_the_compiler_said_and_keeps_nothing(tmp_path):
    root = tmp_path / "root"
    (root / "vrpo_kernels").mkdir(parents=True)
    (root / "setup.py").write_text("import sys; sys.stderr.write('a.cpp:1: no such thing')")
    with pytest.raises(BuildError, match=r"of root does not build:\na.cpp:1: no such thing"):
        build_extension(root, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_copies__hold_what_was_committed_and_what_lies_there(checkout, tmp_path):
    init = Path("vrpo_kernels") / "__init__.py"
    committed = copy_revision(checkout, "HEAD", tmp_path / "cache")
    lying = copy_working_tree(checkout, tmp_path / "cache")
    assert (committed / init).read_text().endswith("del segment_sum\n")
    assert (lying / init).read_text() == (checkout / init).read_text()
    append(checkout, "# changed\n")
    assert copy_working_tree(checkout, tmp_path / "cache") != lying
    assert copy_revision(checkout, "HEAD", tmp_path / "cache") == committed
