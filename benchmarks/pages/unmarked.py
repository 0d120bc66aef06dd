"""Measured figures that no mark holds to a file.

A figure is a number with a unit of measurement ("2037 ms", "1.4 to 1.9 times", "94, 95 and 98 %"), a count
("38 of 40"), or a number with decimals unless it is a version or the value of a setting ("torch 2.11",
"beta = 0.2"), anywhere but in code, marks and marked tables; and a whole cell of numbers in any other table.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.pages.figures import NUMBER
from benchmarks.pages.fill import Finding
from benchmarks.pages.markdown import COMMENT, FIGURE, TABLE, blanked, line_of, spans, without_code

UNITS = (
    r"%|percent\b|points?\b|x\b(?! [\dKNDV(])|times\b|fold\b|units?\b|nats?\b|standard errors?"
    r"|(?:[mnu]|µ|micro|milli|nano)?s(?:econds?)?\b|min(?:utes?)?\b|hours?\b|tokens(?:/s| per second)"
    r"|[kKMGT]i?B(?:/s)?\b|[MGT] ?positions/s|[MGT]?(?:FLOPS?|FLOP/s|F/s)|W\b|J\b|[MG]Hz\b"
)
_ONE = rf"(?<![\w.§]){NUMBER}(?!\d|[.,]\d)"
_LINK = r"(?:,?\s+(?:to|and|or|against|of|by|beside|instead\s+of)\s+|,\s+|\s*[-/]\s*)"
CHAIN = re.compile(rf"(?P<numbers>(?:{_ONE}|§)(?:{_LINK}(?:{_ONE}|§))*)(?:-|\s{{0,3}})(?:{UNITS})")
NAMED = (
    r"(?:(?:torch|triton|transformers|peft|TRL|trl|Liger|python|CUDA|vrpo|LLaDA2?|arXiv)|>=|\^"
    r"|(?:beta|decay|betas|temperature)(?: =)?)\s*$"
)
DECIMAL = re.compile(r"(?<![\w.§])[+-]?\d*\.\d+(?:e[+-]?\d+)?(?![\w]|[.,]\d)")
COUNT = re.compile(rf"(?P<numbers>(?:{_ONE}|§)\s+of\s+(?:the\s+)?(?:{_ONE}|§))(?!\w)")
LINK = re.compile(r"(?<=\])\([^)\s]*\)")
CELL = re.compile(r"^[\s*~<>=]*(?:" + NUMBER + r"|§)[\s\d.,;()\[\]%+*/x§e-]*(?: to [\d.§]+)?\s*$")


@dataclass(frozen=True)
class Allowed:
    """A phrase of one page whose numbers come from no result file, and why. Code in it cannot be matched."""

    page: str
    phrase: str
    why: str


def unmarked(text: str, allowed: Sequence[Allowed]) -> list[Finding]:
    """Figures of a page that have no mark and are in no allowed phrase, and phrases that allow nothing."""
    rest = without_code(text)
    rest = blanked(rest, [span for span in spans(TABLE, text) if rest[span[0]] == "<"])
    rest = blanked(rest, spans(LINK, rest))
    rest = FIGURE.sub(lambda match: "§" * bool(match["number"]) + _newlines(match[0]), rest)
    rest = COMMENT.sub(lambda match: _newlines(match[0]), rest)
    places = {known: list(re.finditer(_loose(known.phrase), rest)) for known in allowed}
    found, used = [], set()
    for start, stop in sorted(_figures(rest)):
        covering = [
            known
            for known, matches in places.items()
            if any(match.start() <= start and stop <= match.end() for match in matches)
        ]
        used.update(covering)
        if not covering:
            said = " ".join(rest[max(start - 30, 0) : stop + 20].split())
            found.append(Finding(line_of(rest, start), f"no mark for {rest[start:stop]!r} in {said!r}"))
    found += [
        Finding(1, f"nothing needs the allowance {known.phrase!r}") for known in allowed if known not in used
    ]
    return found


def _newlines(text: str) -> str:
    return "\n" * text.count("\n")


def _loose(phrase: str) -> str:
    """The phrase over any line breaks."""
    return r"\s+".join(map(re.escape, phrase.split()))


def _figures(rest: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of every number without a mark that is a figure."""
    seen = set()
    for phrase in (*CHAIN.finditer(rest), *COUNT.finditer(rest)):
        for number in re.finditer(_ONE, phrase["numbers"]):
            seen.add((phrase.start() + number.start(), phrase.start() + number.end()))
    for match in DECIMAL.finditer(rest):
        if not re.search(NAMED, rest[max(match.start() - 20, 0) : match.start()]):
            seen.add(match.span())
    for line in re.finditer(r"^\|.*\|[ ]*$", rest, re.MULTILINE):
        place = line.start() + 1
        for cell in line[0][1:].split("|")[:-1]:
            if CELL.match(cell):
                for number in re.finditer(_ONE, cell):
                    seen.add((place + number.start(), place + number.end()))
            place += len(cell) + 1
    yield from seen
