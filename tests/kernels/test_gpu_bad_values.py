"""`bad_values.py` on a GPU, where nobody looks at values unless `set_debug` says so."""

import pytest
from gpu_support import MARKS

pytest.register_assert_rewrite("bad_values")
from bad_values import *  # noqa: E402, F403 - its tests, collected here

pytestmark = MARKS
