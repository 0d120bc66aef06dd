"""Where the time of a step goes on a CPU: its operators by kind."""

import re
from collections import defaultdict

import torch

from benchmarks.step.variants import Stepper

# Kind -> words of an operator's name; the first that matches counts.
KINDS = {
    "matmul": r"^aten::(mm|addmm|bmm)$",
    "attention": r"attention",
    "head": r"linear_cross_entropy",
    "rotary": r"rotary",
    "elementwise": r"^aten::(mul|add_?|sub|div|neg|silu(_backward)?|pow|rsqrt|exp|_fused_rms_norm)$",
    "sums, copies, gathers": r"^aten::(sum|mean|cat|copy_|fill_|zero_|index|gather)|gather_rows|segment_sum",
    "everything else": r"",
}


def shares(stepper: Stepper) -> dict[str, float]:
    """Kind -> share of the step's CPU time, which the profiler lengthens where operators are short."""
    stepper()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profiler:
        stepper()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next(kind for kind, words in KINDS.items() if re.search(words, event.key))
        found[kind] += event.self_cpu_time_total
    total = sum(found.values())
    return {kind: found[kind] / total for kind in KINDS}
