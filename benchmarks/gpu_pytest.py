"""pytest plugin for pytest-xdist's workers on a GPU: a worker whose device is lost makes way for a new one.

After a fault every CUDA call of the process fails, so all later tests of the worker would be reported as
failed. Ended at once, the worker is replaced and only the test that faulted fails. Its message goes to
standard error.
"""

import os

import pytest
import torch

from benchmarks.gpu_bench import LOST


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Asks the device after every exception."""
    if call.excinfo is None or not hasattr(item.config, "workerinput") or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        message = f"\n{item.nodeid}\n{item.repr_failure(call.excinfo)}\nthe device is lost: {error}\n"
        os.write(2, message.encode())
        os._exit(LOST)  # destructors would only fail again, some without end
