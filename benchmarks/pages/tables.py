"""The tables that a page can name, made from the committed result files, by the module that makes them."""

import importlib
from functools import cache

GROUPS = {
    "variance": "benchmarks.variance.report",
    "gpu": "benchmarks.pages.gpu",
    "scaling": "benchmarks.scaling_page",
    "cpu": "benchmarks.pages.cpu",
    "step": "benchmarks.step.page",
    "quickstart": "benchmarks.pages.quickstart",
}
"""Each module has `page_tables()`: name -> Markdown."""


@cache
def tables_of(name: str) -> dict[str, str]:
    """All tables of a group."""
    return importlib.import_module(GROUPS[name]).page_tables()


def table_of(name: str) -> str:
    """The table called GROUP.NAME. Errors: ValueError for a name that no table has."""
    group, _, own = name.partition(".")
    if group not in GROUPS:
        raise ValueError(
            f"no table is called {name!r}; names are GROUP.NAME, with a group of {', '.join(GROUPS)}"
        )
    if own not in tables_of(group):
        raise ValueError(f"no table is called {name!r}; {group} has {', '.join(tables_of(group))}")
    return tables_of(group)[own]
