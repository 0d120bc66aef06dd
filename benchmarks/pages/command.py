"""python -m benchmarks pages [--check] [PAGE ...]: the marked tables and figures of README.md and docs/*.md.

Without --check the pages are written anew. With it nothing is written: exit status 1 names page and line of
everything that differs from its result file, and of every measured figure that has no mark.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages.allowed import ALLOWED
from benchmarks.pages.fill import Filled, Finding, filled
from benchmarks.pages.sources import ROOT
from benchmarks.pages.tables import table_of
from benchmarks.pages.unmarked import unmarked

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def name_of(page: Path) -> str:
    """The path of a page in the repository, as in allowed.py."""
    page = page.resolve()
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else str(page)


def looked_at(page: Path) -> tuple[Filled, list[Finding]]:
    """(the page as it should be, its figures without a mark)."""
    made = filled(page.read_text(encoding="utf-8"), table_of)
    name = name_of(page)
    return made, unmarked(made.text, [known for known in ALLOWED if known.page == name])


def main(arguments: Sequence[str]) -> int:
    """Writes or checks the pages."""
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks pages", description=summary.partition(": ")[2], epilog=details
    )
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, metavar="PAGE")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 if something would change"
    )
    args = parser.parse_args(arguments)
    is_right = True
    for page in args.pages:
        made, bare = looked_at(page)
        found = made.errors + bare + (made.changes if args.check else [])
        for finding in sorted(found, key=lambda finding: finding.line):
            print(f"{name_of(page)}:{finding.line}: {finding.text}")
        is_right = is_right and not found
        if not args.check and made.changes:
            page.write_text(made.text, encoding="utf-8")
            print(f"{name_of(page)}: {len(made.changes)} tables and figures made anew")
    return 0 if is_right else 1
