"""Runs `bad_values.py` in a child process, as `test_triton_interpreter.py` runs the others."""

import pytest
from test_triton_interpreter import reason_to_skip, run_interpreted


@pytest.mark.slow
@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "it runs")
def test_triton_kernels__make_nan_of_bad_values_in_the_interpreter():
    run_interpreted("bad_values.py")
