"""The modelled rows of `python -m benchmarks scaling`: LLaDA-8B on H100s, one size changed at a time."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.scaling_page import FULL, LLADA_8B, LORA
from vrpo.planning import Machine, ModelShape, Plan, TrainingSetup, make_plan

SETUPS = {"LoRA": (LORA, Machine()), "full": (FULL, Machine(num_gpus=8, engine="fsdp2"))}
ENGINES = {"LoRA": "ddp", "full": "fsdp2"}
VALUES = {
    "samples": (1, 2, 4, 8, 16, 32, 64),
    "response": (128, 256, 512, 1024, 2048, 4096),
    "pairs": (8, 16, 32, 64, 128, 256),
    "vocabulary": (32768, 65536, 126464, 262144),
    "width": (2048, 4096, 8192),
    "depth": (8, 16, 32, 64, 128),
    "processes": (1, 2, 4, 8, 16, 32, 64),
}


def plans(axis: str) -> Iterator[tuple[str, int, Plan]]:
    """(name of the setup, value, plan) of all points of an axis."""
    for name, (setup, machine) in SETUPS.items():
        for value in VALUES[axis]:
            yield name, value, make_plan(*_changed(axis, value, name, setup, machine))


def _changed(
    axis: str, value: int, name: str, setup: TrainingSetup, machine: Machine
) -> tuple[ModelShape, TrainingSetup, Machine]:
    """One axis changed; with the width the number of heads, of 128 features each, and the MLP."""
    if axis == "processes":
        engine = ENGINES[name] if value > 1 else "single"
        return LLADA_8B, setup, replace(machine, num_gpus=value, engine=engine)
    fields = {"samples": "num_samples", "response": "response_length", "pairs": "pairs_per_step"}
    if axis in fields:
        return LLADA_8B, replace(setup, **{fields[axis]: value}), machine
    heads = value // LLADA_8B.head_dim
    sizes = {"hidden_size": value, "num_heads": heads, "num_kv_heads": heads, "intermediate_size": 3 * value}
    changed = {"vocabulary": {"vocab_size": value}, "depth": {"num_layers": value}, "width": sizes}
    return replace(LLADA_8B, **changed[axis]), setup, machine
