"""What a stage of `make gpu` had set out to do and did not reach, read from what it said.

A stage prints `plan: NAME | NAME | ...` before it begins, and `done: NAME` when the rows of NAME, or the
reason why there are none, are on disk.
"""

import re
from collections.abc import Iterable

PLAN, DONE, BETWEEN = "plan: ", "done: ", " | "
SHOWN = 12  # names in the summary; log.txt has all


def print_plan(names: Iterable[str]) -> None:
    """Announces the work list."""
    print(PLAN + BETWEEN.join(names), flush=True)


def print_done(name: str) -> None:
    """Announces that an entry of the list has its rows."""
    print(DONE + name, flush=True)


def not_reached(lines: Iterable[str]) -> list[str]:
    """A line with the entries that were planned and not done; none if all were."""
    lines = list(lines)
    plans = [line[len(PLAN) :] for line in lines if line.startswith(PLAN)]
    if not plans:
        return ["nothing reached: it ended before it had a work list"]
    planned = [name for plan in plans if plan for name in plan.split(BETWEEN)]
    done = {line[len(DONE) :] for line in lines if line.startswith(DONE)}
    missing = [name for name in planned if name not in done]
    if not missing:
        return []
    more = [f"and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else []
    return [f"not reached, {len(missing)} of {len(planned)}: {'; '.join((*missing[:SHOWN], *more))}"]


_ENDED = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] )?(?:(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (tests/\S.*)"
    r"|(tests/\S.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: .*)?\[ *\d+%\])$"
)
_SELECTED = re.compile(
    r"\d+ workers? \[(\d+) items?\]|collected (?:\d+ items? / .*?)?(\d+) (?:selected|items?)"
)
_LAST = re.compile(r"=+ .*\d+ (passed|failed|error|skipped).* in ")


def counts_of_tests(lines: list[str]) -> list[str]:
    """pytest's last line, or what had ended when it was stopped; then what failed, without messages."""
    counts = [line.strip("= ") for line in lines if _LAST.match(line)]
    named = {match[1] for line in lines if (match := re.match(r"(?:FAILED|ERROR) (\S+)", line))}
    if not counts:
        found = [match for line in lines if (match := _ENDED.match(line.strip()))]
        ends = {(match[2] or match[3]).strip(): (match[1] or match[4]) for match in found}
        named |= {name.split(" - ")[0] for name, end in ends.items() if end in ("FAILED", "ERROR")}
        totals = [int(match[1] or match[2]) for line in lines if (match := _SELECTED.match(line))]
        if totals:
            kinds = [f"{list(ends.values()).count(end)} {end.lower()}" for end in sorted(set(ends.values()))]
            counts = [
                f"{', '.join(kinds) or 'none ended'}; {totals[-1] - len(ends)} of {totals[-1]} not reached"
            ]
    return [*counts[-1:], *(f"failed: {name}" for name in sorted(named))]
