"""What compute-sanitizer said: findings in our kernels, and those inside NVIDIA's libraries, set aside.

racecheck reports shared-memory hazards, which are internal to the kernel they are in: those of a cuBLAS
kernel are cuBLAS's to answer for, whatever we pass to it. Whose a kernel is, its name says.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LIBRARY = re.compile(r"(void )?(nvjet|cutlass|cublas)", re.I)
_MARK = re.compile(r"^=========( |$)")
_KERNEL = re.compile(r"\bat (?:0x[0-9a-f]+ in )?(?!0x)(.+?)\+0x[0-9a-f]+")
_NOISE = re.compile(
    r"^(COMPUTE-SANITIZER|(ERROR|RACECHECK) SUMMARY|Target application returned|Saved host backtrace)"
)
_SUMMARY = re.compile(r"^(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)")
_PART = re.compile(r"^([\w-]+): (ok|WRONG);")


@dataclass(frozen=True)
class Findings:
    """What one run of the tool reported.

    Attributes:
        ours: first lines of findings in any kernel that is not a library's, and of those without a kernel.
        aside: library kernel -> findings in it.
        counted: how many the tool's own summary counts, None without a summary.
        parts: part of `gpu_sanitize` -> whether its values were right.
    """

    ours: list[str]
    aside: dict[str, int]
    counted: int | None
    parts: dict[str, bool]

    def verdict(self, code: int, expected_parts: Iterable[str]) -> tuple[str, bool]:
        """(words, whether the run failed). code: exit status of the tool, which is 9 if it found anything."""
        wrong = [part for part in expected_parts if not self.parts.get(part)]
        total = len(self.ours) + sum(self.aside.values())
        if wrong:
            return f"exit status {code}; not right or not reached: {', '.join(wrong)}", True
        if self.ours:
            return f"{len(self.ours)} findings outside library kernels", True
        if self.counted is None or self.counted != total or code not in (0, 9) or (code == 9 and not total):
            return f"exit status {code}; {total} findings read, its summary counts {self.counted}", True
        if not total:
            return "ok, no finding", False
        kernels = ", ".join(f"{count} in {name}" for name, count in sorted(self.aside.items()))
        return f"ok, no finding in our kernels; set aside inside cuBLAS: {kernels}", False

    def cut(self, why: str, expected_parts: Iterable[str]) -> tuple[str, bool]:
        """(words, True) of a run that `why` ended, whose findings are only those so far."""
        aside = [f"{count} in {name}" for name, count in sorted(self.aside.items())]
        own = f"{len(self.ours)} in our kernels" + (f" ({self.ours[0]})" if self.ours else "")
        expected = list(expected_parts)
        reached = ", ".join(part for part in expected if part in self.parts) or "none"
        wrong = [f"WRONG: {part}" for part in expected if self.parts.get(part) is False]
        counts = ", ".join((own, *aside))
        return "; ".join((why, f"findings so far: {counts}", f"parts reached: {reached}", *wrong)), True


def _blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    """The tool's lines in the groups that it separates by empty ones."""
    block: list[str] = []
    for line in lines:
        if not _MARK.match(line):
            continue
        text = line[len("=========") :].strip()
        if text and not _NOISE.match(text):
            block.append(text)
        elif block:
            yield block
            block = []
    if block:
        yield block


def read_findings(lines: list[str], *, set_aside: bool) -> Findings:
    """Findings of what one run printed; the program's own lines may stand between the tool's.

    set_aside: False counts those in a library's kernel as ours, which a wrong address that we passed may be.
    """
    ours, aside = [], {}
    for block in _blocks(lines):
        # Host frames name libraries, not kernels.
        device = [text for text in block if not text.startswith(("Host Frame", "Saved host"))]
        kernels = [match[1] for text in device for match in _KERNEL.finditer(text)]
        if set_aside and kernels and all(LIBRARY.match(kernel) for kernel in kernels):
            aside[kernels[0]] = aside.get(kernels[0], 0) + 1
        else:
            ours.append(block[0])
    marked = [line[len("=========") :].strip() for line in lines if _MARK.match(line)]
    counts = [int(match[1] or match[2]) for text in marked if (match := _SUMMARY.match(text))]
    parts = {match[1]: match[2] == "ok" for line in lines if (match := _PART.match(line))}
    return Findings(ours, aside, counts[-1] if counts else None, parts)
