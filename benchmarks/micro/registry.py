"""All micro benchmarks, and the public names of `vrpo_kernels` that have none."""

from benchmarks.micro import elbos, heads, layers, tokens
from benchmarks.micro.micro import Micro

MICROS: list[Micro] = [*heads.MICROS, *elbos.MICROS, *tokens.MICROS, *layers.MICROS]

NOT_TIMED = {
    "PackedTokens": "a tuple",
    "Plan": "a dataclass",
    "RowMetrics": "a tuple",
    "choose": "decides, computes nothing",
    "describe": "describes, computes nothing",
    "plan_linear_cross_entropy": "decides, computes nothing",
    "set_debug": "a switch",
    "last_hidden": "runs the caller's model; its own work is one hook",
}
"""Public name -> why it has no benchmark."""
