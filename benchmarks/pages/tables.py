"""The tables that a page can name, made from the committed result files, by the module that makes them."""

import importlib
from functools import cache

GROUPS = {
    "variance": "benchmarks.variance.report",
    "gpu": "benchmarks.gpu_table",
    "scaling": "benchmarks.scaling_page",
}
"""Each module has `page_tables()`: name -> Markdown."""


@cache
def _group(name: str) -> dict[str, str]:
    return importlib.import_module(GROUPS[name]).page_tables()


def table_of(name: str) -> str:
    """The table called GROUP.NAME. Errors: ValueError for a name that no table has."""
    group, _, own = name.partition(".")
    if group not in GROUPS:
        raise ValueError(
            f"no table is called {name!r}; names are GROUP.NAME, with a group of {', '.join(GROUPS)}"
        )
    if own not in _group(group):
        raise ValueError(f"no table is called {name!r}; {group} has {', '.join(_group(group))}")
    return _group(group)[own]
