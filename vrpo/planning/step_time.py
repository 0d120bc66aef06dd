"""Arithmetic and time of one optimizer step, part by part.

With P the weights of the matmuls of a layer that one token meets, T tokens, L the length of a masked copy and
N masked rows, a forward pass takes

    2 P T (projections) + 4 D L T (attention) per layer, and 2 N D V (head)

but for the last layer, whose projection o and MLP meet the N rows alone; and a backward pass as much again
for the gradients of the inputs (attention twice), and 2 P T more where the weights train. Elementwise kernels
move bytes: two constants, one for all layers and one for adapters, are set by the steps measured at K = 8 on
one H100 (benchmarks/results/gpu/h100-2026-11-27-first/step.csv).
"""

from dataclasses import dataclass

from vrpo.planning.memory import (
    packs_per_step,
    trained_head,
    trained_layers,
    trained_parameters,
    weight_bytes_of,
)
from vrpo.planning.setup import Machine, TrainingSetup
from vrpo.planning.shape import ModelShape

# Features that the elementwise kernels of a layer move per token and pass: multiples of D, of I.
LAYER_TRAFFIC = (34.0, 7.8)
ADAPTER_TRAFFIC = (27.0, 10.8)
UPPER_TRAFFIC = (0.5, 1.0)  # the shares of it that lie above the attention
ATTENTION_SHARE = 0.5  # of the GEMM rate
# Milliseconds that the host needs to launch one layer's kernels: small packs cannot be faster.
LAYER_LAUNCH, ADAPTER_LAUNCH = 1.5, 1.8
OPTIMIZER_TRAFFIC = 28  # bytes of AdamW per trained weight
LEAST, MOST = 0.9, 1.2  # what a single GPU may take, as shares of the modelled time


@dataclass(frozen=True)
class Passes:
    """How often the layers run for each token: below what trains, and where it trains.

    frozen: layers of the trunk. reference, first (of a replay), forward, recomputed: as counts.
    """

    frozen: float
    reference: int
    first: int
    recomputed: int

    @property
    def forwards(self) -> int:
        """Passes of a layer that trains, but for the backward pass."""
        return self.reference + self.first + 1 + self.recomputed


def passes_of(setup: TrainingSetup) -> Passes:
    """The passes that a setup makes."""
    replay, reference = int(setup.replays), int(setup.runs_reference)
    apart = reference * (not setup.share_trunk)  # the reference then runs the frozen layers by itself
    return Passes(1 + replay + apart, reference, replay, int(setup.gradient_checkpointing))


def flops_parts(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> dict[str, float]:
    """Floating-point operations of one GPU in one optimizer step."""
    tokens = setup.pairs_per_step * setup.pair_tokens / machine.num_gpus
    rows = setup.masked_share * tokens
    top = trained_layers(shape, setup) / shape.num_layers
    body = 2.0 * shape.body_parameters(active=True) * tokens
    attention = 4.0 * shape.query_size * shape.num_layers * setup.segment_length * tokens
    head = 2.0 * rows * shape.head_parameters
    passes, trains = passes_of(setup), int(not setup.lora_rank)
    trains_head = int(trained_head(shape, setup) > 0)
    shared = (1 - top) * passes.frozen
    # Of the last layer, which is always one of the top.
    left_out = 2.0 * shape.upper_parameters * (1 - setup.last_layer_share) * tokens
    projections = top * body - left_out
    forward = projections + top * attention
    return {
        "trunk": shared * (body + attention),
        "reference": passes.reference * (forward + head),
        "first pass": passes.first * (forward + head),
        "forward": forward + head,
        "recomputation": passes.recomputed * forward,
        "backward": projections * (1 + trains) + 2 * top * attention + head * (1 + trains_head),
        "attention": (shared + top * (passes.forwards + 2)) * attention,
    }


def compute_seconds(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> float:
    """Seconds that one GPU computes in one optimizer step."""
    parts = flops_parts(shape, setup, machine)
    attention = parts.pop("attention")
    scale = 2 / setup.compute_bytes if setup.compute_bytes > 2 else 1.0
    rate = 1e12 * machine.matmul_tflops * scale
    products = (sum(parts.values()) - attention + attention / ATTENTION_SHARE) / rate
    tokens = setup.pairs_per_step * setup.pair_tokens / machine.num_gpus
    layers, passes = trained_layers(shape, setup), passes_of(setup)
    of_top = passes.forwards + 2
    of_adapted = of_top - passes.reference if setup.lora_rank else 0
    plain, adapted = (shape.num_layers - layers) * passes.frozen + layers * of_top, layers * of_adapted
    sizes = (shape.hidden_size, shape.active_mlp_size)
    moved = plain * _traffic(LAYER_TRAFFIC, sizes) + adapted * _traffic(ADAPTER_TRAFFIC, sizes)
    upper = (UPPER_TRAFFIC[0] * shape.hidden_size, UPPER_TRAFFIC[1] * shape.last_mlp_size)
    left_out = of_top * _traffic(LAYER_TRAFFIC, upper) + of_adapted * _traffic(ADAPTER_TRAFFIC, upper)
    moved -= (1 - setup.last_layer_share) * left_out
    packs = packs_per_step(shape, setup, machine)
    moving = tokens * moved * setup.compute_bytes / (1e9 * machine.copy_bandwidth)
    if setup.quantized_bytes:  # unpacked in every pass: read, written, and read again by the product
        unpacked = shape.body_parameters() * (setup.quantized_bytes + 2 * setup.compute_bytes)
        moving += packs * plain / shape.num_layers * unpacked / (1e9 * machine.copy_bandwidth)
    launches = 1e-3 * packs
    launches *= plain * LAYER_LAUNCH + adapted * ADAPTER_LAUNCH
    shards = machine.num_gpus if machine.shards_weights or machine.is_deepspeed else 1
    updated = trained_parameters(shape, setup) / shards
    return max(products + moving, launches) + updated * OPTIMIZER_TRAFFIC / (1e9 * machine.copy_bandwidth)


def _traffic(features: tuple[float, float], sizes: tuple[float, float]) -> float:
    return features[0] * sizes[0] + features[1] * sizes[1]


def communication_seconds(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> float:
    """Seconds of collectives in one optimizer step, by their bytes alone."""
    count = machine.num_gpus
    if count == 1:
        return 0.0
    trained = trained_parameters(shape, setup)
    size = 4 if setup.lora_rank else setup.weight_bytes
    share = (count - 1) / count
    if machine.engine == "ddp":
        moved = 2.0 * trained * size
    elif machine.engine == "zero2":
        packs = packs_per_step(shape, setup, machine)
        moved = trained * setup.compute_bytes * (packs + 1)
    else:
        packs, passes = packs_per_step(shape, setup, machine), passes_of(setup)
        # Weights are gathered for every forward pass and once more for the backward pass, and gradients
        # reduced after it.
        gathers = passes.reference + passes.first + 2
        gathered = shape.total_parameters * (
            setup.compute_bytes if not setup.lora_rank else weight_bytes_of(setup, machine)
        )
        moved = packs * (gathers * gathered + trained * setup.compute_bytes)
    return moved * share / machine.collective_bandwidth


def step_seconds(shape: ModelShape, setup: TrainingSetup, machine: Machine) -> tuple[float, float]:
    """(least, most) seconds of an optimizer step: communication hidden behind compute, or not at all."""
    compute = compute_seconds(shape, setup, machine)
    waiting = communication_seconds(shape, setup, machine)
    return max(LEAST * compute, waiting), MOST * compute + waiting
