"""What an import must not need, each in a fresh process."""

import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import vrpo.step", "from vrpo.models import load_model", "import vrpo"]
)
def test_import__needs_neither_datasets_nor_the_trainers(statement):
    loaded = modules_after(statement)
    assert not {"datasets", "pyarrow", "transformers.trainer", "vrpo.training.trainer"} & loaded


def test_import__the_pipeline_needs_no_transformers():
    assert "transformers" not in modules_after("import vrpo.step")


def test_vrpo__public_names_resolve_and_others_do_not():
    import vrpo

    for name in vrpo.__all__:
        assert getattr(vrpo, name).__name__ == name
        assert name in dir(vrpo)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        vrpo.Trainer  # noqa: B018 -- the access is the test


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["trian"]])
def test_vrpo_command__answers_without_torch_or_transformers(words):
    loaded = modules_after(f"from vrpo.commands.main import main\nmain({words})")
    assert not {"torch", "transformers", "datasets", "vrpo.training.config"} & loaded
