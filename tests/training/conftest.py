"""What several test files of this folder share: the runs of the engine tests, made once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def out(tmp_path_factory) -> Path:
    """The folders of all runs of engine_plan.py."""
    import engine_plan  # what it imports takes a while, and most tests need none of it

    folder = tmp_path_factory.mktemp("engines")
    engine_plan.run_all(folder)
    return folder
