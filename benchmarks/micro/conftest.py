"""Options of the suite, and what is saved with its figures."""

import importlib
import time
import warnings

import pytest
import torch

from benchmarks.cases import DTYPES
from benchmarks.micro.micro import SIZES
from benchmarks.record import provenance
from benchmarks.timing import clock_name


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where and on what sizes to run."""
    group = parser.getgroup("micro", "micro benchmarks of vrpo_kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=("cpu", "cuda"), default=device, help="default: what is there")
    group.addoption("--threads", type=int, default=1, help="of a CPU; with 1, CPU time is taken (default)")
    group.addoption("--sizes", choices=list(SIZES), default=None, help="default: those of the device")
    group.addoption("--dtypes", nargs="+", choices=list(DTYPES), default=None, help="default: all it has")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One CPU thread is timed by its CPU time, which other processes disturb less than the wall clock."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("these benchmarks need the package pytest-benchmark: pip install vrpo[test]")
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a GPU and a torch built for it; torch sees none here")
    # Saved figures of another machine are a reason to look, not to end in a traceback.
    warning = "pytest_benchmark.logger.PytestBenchmarkWarning"
    config.addinivalue_line("filterwarnings", f"default::{warning}")
    module, _, name = warning.rpartition(".")
    category = getattr(importlib.import_module(module), name)
    warnings.filterwarnings("default", category=category)  # while baselines are loaded, which is before tests
    if config.getoption("device") == "cpu":
        torch.set_num_threads(config.getoption("threads"))
        if clock_name("cpu", config.getoption("threads")) == "cpu time":
            config.option.benchmark_timer = f"{time.__name__}.{time.process_time.__name__}"


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, str]:
    """Only what stays the same from run to run on one machine, so that a difference means something."""
    device, threads = config.getoption("device"), config.getoption("threads")
    facts = provenance(device)
    return {
        "device": facts["device"],
        "torch": facts["torch"],
        "triton": facts["triton"],
        "threads": str(threads) if device == "cpu" else "",
        "clock": clock_name(device, threads),
    }


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """The revision as in our CSV files, also where there is no repository."""
    facts = provenance(config.getoption("device"))
    commit_info.update({"git": facts["git"], "git_dirty": facts["dirty"], "date": facts["date"]})
