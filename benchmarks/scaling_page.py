"""The tables of docs/scaling.md, from the cost model and measured files.

Needs neither torch nor a GPU. Every column says whether it was measured or is modelled.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from vrpo.planning import Machine, ModelShape, Plan, TrainingSetup, make_plan, memory_parts
from vrpo.planning.memory import trained_parameters
from vrpo.planning.plan import GIB
from vrpo.planning.step_time import LEAST, MOST, OPTIMIZER_TRAFFIC, compute_seconds

RESULTS = Path(__file__).parent / "results"
STEPS = RESULTS / "gpu" / "h100-2026-11-27-first" / "step.csv"
MEMORY = RESULTS / "step_memory.csv"

# config.json of GSAI-ML/LLaDA-8B-Instruct.
LLADA_8B = ModelShape(32, 4096, 32, 32, 128, 12288, 126464)
# inclusionAI/LLaDA2.0-flash by its published sizes: they make 103 B weights, of which a token meets 6.1 B.
LLADA2_FLASH = ModelShape(
    *(32, 4096, 32, 4, 128, 9216, 157184),
    num_experts=256,
    experts_per_token=8,
    shared_experts=1,
    expert_size=1024,
    dense_layers=1,
)
# 64 pairs of 512 + 512 tokens, K = 8, packs of one pair.
PLAIN = TrainingSetup(per_device_train_batch_size=1, max_tokens_per_pack=16384, gradient_checkpointing=True)
LORA = replace(PLAIN, lora_rank=16, reference="adapter", weight_bytes=2)
FULL = replace(PLAIN, reference="precomputed")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _seconds(plan: Plan) -> str:
    return f"{plan.seconds[0]:.3g} - {plan.seconds[1]:.3g}"


def _cells(plan: Plan) -> list[str]:
    """Memory of one GPU and seconds of a step; no time where it does not fit."""
    peak = f"{plan.peak_gib:.0f}"
    return [peak, _seconds(plan)] if plan.fits else [f"{peak}, too much", "-"]


def measured_steps() -> str:
    """The model against the steps of an H100."""
    rows = []
    for row in _read(STEPS):
        if row["case"] not in ("LoRA", "full", "LoRA, no checkpointing") or not row["ms"]:
            continue
        full = row["case"] == "full"
        setup = replace(
            PLAIN if full else LORA,
            num_samples=int(row["K"]),
            pairs_per_step=1,
            max_tokens_per_pack=65536,
            weight_bytes=2,
            gradient_checkpointing="no checkpointing" not in row["case"],
            trims_last_layer=False,  # they ran before it was
        )
        parts = memory_parts(LLADA_8B, setup, Machine())
        update = trained_parameters(LLADA_8B, setup) * OPTIMIZER_TRAFFIC / (1e9 * Machine().copy_bandwidth)
        seconds = compute_seconds(LLADA_8B, setup, Machine()) - update
        peak = (sum(parts.values()) - parts["optimizer"]) / GIB
        gib = [f"{float(row['peak_GiB']):.1f}", f"{peak:.1f}"]
        times = [f"{float(row['ms']) / 1e3:.2f}", f"{LEAST * seconds:.2f} - {MOST * seconds:.2f}"]
        rows.append([row["case"], row["K"], *gib, *times])
    header = ("step of one pair", "K", "GiB measured", "GiB modelled", "s measured", "s modelled")
    return table(header, rows)


def measured_replay() -> str:
    """Peak memory against K and the cost of a replay, on a CPU."""
    rows = _read(MEMORY)
    found = []
    for weights in ("full", "LoRA"):
        for checkpointing in ("False", "True"):
            case = {"weights": weights, "checkpointing": checkpointing, "size": "small"}
            own = [row for row in rows if case.items() <= row.items()]
            peak = {(row["mode"], row["K"]): float(row["peak_MiB"]) for row in own if row["what"] == "memory"}
            cost = {row["mode"]: float(row["cost_pct"]) for row in own if row["what"] == "time"}
            peaks = [f"{peak[mode, K]:.1f}" for mode in ("joint", "replay") for K in ("2", "64")]
            costs = [f"{cost[mode]:.0f} %" for mode in ("replay", "replay, head anew")]
            found.append([weights, "yes" if checkpointing == "True" else "no", *peaks, *costs])
    header = ("weights", "checkpointing", "joint K = 2", "joint K = 64", "replay K = 2", "replay K = 64")
    return table((*header, "replay takes longer by", "with its head anew"), found)


def machine(num_gpus: int, engine: str = "fsdp2") -> Machine:
    """So many H100s, eight to a node."""
    return Machine(num_gpus=num_gpus, engine=engine if num_gpus > 1 else "single")


def by_gpus(shape: ModelShape, counts: Sequence[int], setups: dict[str, tuple[TrainingSetup, str]]) -> str:
    """Memory and time of each setup for each number of GPUs."""
    header = ["GPUs", *(f"{name}: {what}" for name in setups for what in ("GiB", "s"))]
    rows = []
    for count in counts:
        plans = [make_plan(shape, setup, machine(count, engine)) for setup, engine in setups.values()]
        rows.append([count, *(cell for plan in plans for cell in _cells(plan))])
    return table(header, rows)


def knobs() -> str:
    """What each knob changes, from all weights of LLaDA-8B on 8 GPUs."""
    turned = {
        "full, as above": {},
        "frozen copy as reference": {"reference": "model"},
        "K = 64, replayed": {"num_samples": 64},
        "K = 8, replayed, packs of 8192": {"max_tokens_per_pack": 8192},
        "without checkpointing": {"gradient_checkpointing": False},
        "without, replayed, packs of 2048": {"gradient_checkpointing": False, "max_tokens_per_pack": 2048},
        "upper half, frozen copy, shared trunk": {"reference": "model", "train_top_layers": 16},
        "LoRA r = 16, adapter off": {"lora_rank": 16, "reference": "adapter", "weight_bytes": 2},
        "LoRA r = 16, precomputed": {"lora_rank": 16, "weight_bytes": 2},
    }
    rows = []
    for name, fields in turned.items():
        plan = make_plan(LLADA_8B, replace(FULL, **fields), machine(8))
        rows.append([name, "replay" if plan.setup.replays else "joint", *_cells(plan)])
    return table(("8 GPUs, FSDP2", "gradient", "GiB a GPU, modelled", "s a step, modelled"), rows)


def page_tables() -> dict[str, str]:
    """The tables of docs/scaling.md, for `python -m benchmarks pages`."""
    dense = {"LoRA, DDP": (LORA, "ddp"), "LoRA, FSDP2": (LORA, "fsdp2"), "full, FSDP2": (FULL, "fsdp2")}
    moe = {"LoRA, FSDP2": (LORA, "fsdp2"), "full, FSDP2": (FULL, "fsdp2"), "full, ZeRO-3": (FULL, "zero3")}
    total, active = LLADA2_FLASH.total_parameters / 1e9, LLADA2_FLASH.active_parameters / 1e9
    experts = by_gpus(LLADA2_FLASH, (8, 16, 32, 64), moe)
    return {
        "steps": measured_steps(),
        "replay": measured_replay(),
        "gpus": by_gpus(LLADA_8B, (1, 2, 4, 8, 16, 32), dense),
        "knobs": knobs(),
        "experts": f"{total:.0f} B weights, {active:.1f} B met by a token:\n\n{experts}",
    }
