"""A training's plan: arithmetic, memory and time on one machine, and what to change where it does not fit."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from vrpo.planning.memory import memory_parts, packs_per_step, trained_parameters
from vrpo.planning.setup import Machine, TrainingSetup
from vrpo.planning.shape import ModelShape
from vrpo.planning.step_time import compute_seconds, flops_parts, passes_of, step_seconds

GIB = 2**30
# What is not tensors (CUDA context, NCCL) in GiB, and what the allocator cannot use of the rest.
CONTEXT, FRAGMENTED = 1.5, 0.05
SMALLEST_PACK = 8192  # tokens; with smaller packs a GPU waits for launches


@dataclass(frozen=True)
class Plan:
    """memory: bytes of one GPU by part. flops: of one GPU in one optimizer step. seconds: least and most."""

    shape: ModelShape
    setup: TrainingSetup
    machine: Machine
    memory: dict[str, float]
    flops: dict[str, float]
    seconds: tuple[float, float]

    @property
    def peak_gib(self) -> float:
        """Memory of tensors at the worst moment."""
        return sum(self.memory.values()) / GIB

    @property
    def usable_gib(self) -> float:
        """What tensors may take of one GPU."""
        return (self.machine.gpu_memory - CONTEXT) * (1 - FRAGMENTED)

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.usable_gib

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; every number but the inputs is modelled."""
        return {
            "label": "modelled",
            "shape": asdict(self.shape),
            "setup": asdict(self.setup),
            "machine": asdict(self.machine),
            "total_parameters": self.shape.total_parameters,
            "active_parameters": self.shape.active_parameters,
            "trained_parameters": trained_parameters(self.shape, self.setup),
            "pack_tokens": self.setup.pack_tokens,
            "replays": self.setup.replays,
            "packs_per_step": packs_per_step(self.shape, self.setup, self.machine),
            "passes": asdict(passes_of(self.setup)),
            "memory_bytes": self.memory,
            "peak_gib": self.peak_gib,
            "usable_gib": self.usable_gib,
            "fits": self.fits,
            "flops": self.flops,
            "compute_seconds": compute_seconds(self.shape, self.setup, self.machine),
            "seconds": list(self.seconds),
        }


def make_plan(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> Plan:
    """The plan of one training. Errors: ValueError for sizes that do not go together."""
    return Plan(
        shape,
        setup,
        machine,
        memory_parts(shape, setup, machine),
        flops_parts(shape, setup, machine),
        step_seconds(shape, setup, machine),
    )


def advice(plan: Plan) -> list[tuple[str, Plan]]:
    """What to change where a plan does not fit: each change alone, then changes one on top of the other.

    Returns: (change, the plan with it) of the single changes that fit; if there are none, the shortest run of
        changes that fits, or all of them where even that does not.
    """
    single = [(name, changed) for name, changed in _changes(plan)]
    fitting = [(name, changed) for name, changed in single if changed.fits]
    if fitting or not single:
        return fitting
    names: list[str] = []
    current = plan
    while not current.fits:
        following = next((pair for pair in _changes(current) if pair[1].peak_gib < current.peak_gib), None)
        if following is None:
            break
        knob = following[0].partition(" ")[0]
        names = [name for name in names if name.partition(" ")[0] != knob] + [following[0]]
        current = following[1]
    return [(", ".join(names), current)]


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The knobs that are left to turn, the cheapest in time first."""
    setup, machine = plan.setup, plan.machine

    def turned(name: str, *, machine: Machine = machine, **fields: Any) -> tuple[str, Plan]:
        return name, make_plan(plan.shape, replace(setup, **fields), machine)

    if setup.reference == "model":
        yield turned("precomputed reference", reference="precomputed")
    if not setup.gradient_checkpointing:
        yield turned("gradient_checkpointing", gradient_checkpointing=True)
    least = max(setup.segment_length, SMALLEST_PACK)
    if setup.gradient_mode != "joint" and setup.max_tokens_per_pack > least:
        budget = max(least, min(setup.max_tokens_per_pack, setup.pack_tokens) // 4)
        yield turned(f"max_tokens_per_pack {budget}", max_tokens_per_pack=budget)
    if machine.num_gpus > 1 and machine.engine in ("ddp", "zero2"):
        yield turned("engine fsdp2", machine=replace(machine, engine="fsdp2"))
    if not setup.lora_rank and setup.reference != "synced":  # which needs a second model
        without = "adapter" if setup.reference == "model" else setup.reference
        yield turned("LoRA of rank 16, bfloat16 base", lora_rank=16, weight_bytes=2, reference=without)
    if machine.num_gpus < 512:
        more = 8 if machine.num_gpus == 1 else 2 * machine.num_gpus
        engine = machine.engine if machine.shards_weights else "fsdp2"
        yield turned(f"{more} GPUs, {engine}", machine=replace(machine, num_gpus=more, engine=engine))
