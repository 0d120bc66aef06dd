"""Figures of the pages that come from no result file, each with the reason."""

from benchmarks.pages.unmarked import Allowed

NOT_YET = frozenset({"README.md", "docs/gpu.md", "docs/mask-designs.md"})
"""Pages whose figures are not all marked. What is marked in them is held to its files all the same."""

INTERVAL = "a confidence level"
SETTING = "a setting or an assumption, not a measurement"

ALLOWED = (
    Allowed("docs/benchmarks.md", "(1.10)", "the default of --threshold"),
    Allowed("docs/benchmarks.md", "the 95 % interval", INTERVAL),
    Allowed("docs/training.md", "(1.16) reads it", "a version of TRL"),
    Allowed("docs/training.md", "(the default is 0.05)", SETTING),
    Allowed("docs/scaling.md", "One 80 GB GPU", SETTING),
    Allowed("docs/scaling.md", "2 to 8 x 80 GB", SETTING),
    Allowed("docs/scaling.md", "H100s with 79.1 GiB, of which tensors may take 73.7", SETTING),
    Allowed("docs/scaling.md", "collectives at 300 GB/s inside a node of 8 and 40 GB/s", SETTING),
    Allowed("docs/scaling.md", "0.9 of the arithmetic with collectives hidden, to 1.2 of it", SETTING),
    Allowed(
        "docs/scaling.md", "in 16 bits, until it may reduce them: 16 GB", "2 bytes of each of 8 B weights"
    ),
)
