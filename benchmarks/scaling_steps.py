"""What `python -m benchmarks scaling` measures: steps that differ in one size, and the cost model's figures.

A step is that of `python -m benchmarks memory`: reference (a frozen copy), policy, loss and backward pass in
one graph, all weights trained, no optimizer.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory_steps import BETA, MASK_SEED, Packs, Training
from benchmarks.step_setup import Size, make_batch
from benchmarks.step_timing import forget_gradients
from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.planning import Machine, ModelShape, TrainingSetup, memory_parts
from vrpo.planning.memory import trained_parameters
from vrpo.planning.step_time import LEAST, MOST, OPTIMIZER_TRAFFIC, compute_seconds, flops_parts
from vrpo.step import Estimator

AXES = ("samples", "response", "pairs", "vocabulary", "width", "depth", "processes")
HEAD_SIZE = 64  # features of an attention head, on the axis of the width


@dataclass(frozen=True)
class Point:
    """One step. pairs: of all processes together."""

    size: Size
    num_samples: int
    pairs: int
    processes: int = 1

    def at(self, axis: str, value: int) -> "Point":
        """This point with one of AXES changed, and with it what has to follow: heads and MLP the width."""
        size = self.size
        changed = {
            "samples": {"num_samples": value},
            "response": {"size": replace(size, response=value)},
            "pairs": {"pairs": value},
            "vocabulary": {"size": replace(size, classes=value, mask_token_id=value - 1)},
            "width": {"size": _wider(size, value)},
            "depth": {"size": replace(size, layers=value)},
            "processes": {"processes": value},
        }
        return replace(self, **changed[axis])

    def value(self, axis: str) -> int:
        """Its size on an axis."""
        names = {"response": "response", "vocabulary": "classes", "width": "hidden", "depth": "layers"}
        if axis in names:
            return getattr(self.size, names[axis])
        return getattr(self, {"samples": "num_samples"}.get(axis, axis))

    def batch(self) -> ResponseBatch:
        return make_batch(self.size, pairs=self.pairs)

    def pack(self, batch: ResponseBatch) -> PackedBatch:
        """All masked copies, on the CPU; masks are those of the dataset's rows, whatever the batch."""
        estimator = Estimator(self.size.mask_token_id, self.num_samples, "paper", 1, MASK_SEED)
        return estimator.pack(batch, 0, "cpu")


def _wider(size: Size, hidden: int) -> Size:
    ratio = size.mlp // size.hidden
    return replace(size, hidden=hidden, heads=max(1, hidden // HEAD_SIZE), mlp=ratio * hidden)


class Step:
    """The step of one point on one device, ready to be called."""

    def __init__(self, point: Point, device: str, dtype: torch.dtype):
        self.point = point
        self.training = Training(point.size, device, dtype, weights="full", checkpointing=False)
        self.pack = point.pack(point.batch())

    def __call__(self) -> None:
        self.training.step("joint", Packs(self.pack, []))

    def forget(self) -> None:
        forget_gradients(self.training.model)

    def gradient_error(self) -> float:
        """|gradient - that of `plain_gradient`| / |that|, over all weights."""
        wide = torch.float64 if self.training.device == "cpu" else torch.float32
        want = plain_gradient(self.training, self.pack, wide)
        self()
        error = relative_error([parameter.grad for parameter in self.training.trained()], want)
        self.forget()
        return error


def relative_error(got: list[Tensor | None], want: list[Tensor]) -> float:
    """|got - want| / |want|; infinite where a gradient is missing."""
    if any(gradient is None for gradient in got):
        return float("inf")
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(got, want, strict=True)]
    norm = torch.stack([b.double().square().sum() for b in want]).sum()
    return (torch.stack(squares).sum() / norm).sqrt().item()


def plain_gradient(training: Training, pack: PackedBatch, dtype: torch.dtype) -> list[Tensor]:
    """Gradient of the sum over pairs of VRPO's loss, as it is written down: a loop over samples.

        elbo of a response = 1/K sum over its samples of sum over masked tokens of weight * log p(token)
        loss of a pair     = -log sigmoid(beta ((elbo_w - ref_w) - (elbo_l - ref_l)))

    One sequence at a time, logits of all its positions, in this dtype; of the product only the models' layers
    are used.
    """

    policy = copy.deepcopy(training.model).to(dtype)
    reference = copy.deepcopy(training.reference.model).to(dtype)
    policy_R = list(_plain_elbos(policy, pack))
    with torch.no_grad():
        reference_R = list(_plain_elbos(reference, pack))
    loss = 0.0
    for chosen in range(0, len(policy_R), 2):
        ratio = [policy_R[chosen + side] - reference_R[chosen + side] for side in range(2)]
        loss = loss - F.logsigmoid(BETA * (ratio[0] - ratio[1]))
    return list(torch.autograd.grad(loss, list(policy.parameters())))


def _plain_elbos(model: nn.Module, pack: PackedBatch) -> Iterator[Tensor]:
    """The mean over samples of each response."""
    device = next(model.parameters()).device
    ends, offsets = pack.cu_seqlens_S1.tolist(), pack.offsets_S1.tolist()
    for first in range(0, len(ends) - 1, pack.num_samples):
        total = 0.0
        for segment in range(first, first + pack.num_samples):
            tokens_L = pack.tokens_T[ends[segment] : ends[segment + 1]].to(device)
            rows = slice(offsets[segment], offsets[segment + 1])
            place_N = (pack.row_N[rows] - ends[segment]).to(device)
            log_p_LV = model(input_ids=tokens_L[None]).logits[0].log_softmax(dim=-1)
            log_p_N = log_p_LV[place_N, pack.target_N[rows].to(device)]
            total = total + (pack.weight_N[rows].to(log_p_N) * log_p_N).sum()
        yield total / pack.num_samples


def shape_of(size: Size) -> ModelShape:
    """The sizes as the cost model takes them."""
    head_size = size.hidden // size.heads
    return ModelShape(size.layers, size.hidden, size.heads, size.heads, head_size, size.mlp, size.classes)


@dataclass(frozen=True)
class Modelled:
    """The cost model's figures of one process in a step, without the optimizer.

    mib: growth above weights and reference. seconds_on_h100: least and most, of bfloat16.
    """

    gflop: float
    mib: float
    seconds_on_h100: tuple[float, float]


def modelled(point: Point, rows: int, dtype: torch.dtype, device: str) -> Modelled:
    """The cost model of a point. rows: masked tokens of all processes, which the draw has given."""
    size, width = point.size, dtype.itemsize
    setup = TrainingSetup(
        num_samples=point.num_samples,
        prompt_length=size.prompt,
        response_length=size.response,
        pairs_per_step=point.pairs,
        per_device_train_batch_size=point.pairs // point.processes,
        mask_ratio=rows / (2 * point.pairs * point.num_samples * size.response),
        max_tokens_per_pack=2 * point.pairs * point.num_samples * (size.prompt + size.response),
        gradient_mode="joint",
        weight_bytes=width,
        compute_bytes=width,
    )
    machine = Machine(num_gpus=point.processes, engine="ddp" if point.processes > 1 else "single")
    shape = shape_of(size)
    parts = flops_parts(shape, setup, machine)
    arithmetic = sum(parts.values()) - parts["attention"]  # which is in the others
    memory = memory_parts(shape, setup, machine, norm_keeps=0 if device == "cpu" else None)
    growth = sum(memory[name] for name in ("gradients", "activations", "layer", "head"))
    update = trained_parameters(shape, setup) * OPTIMIZER_TRAFFIC / (1e9 * machine.copy_bandwidth)
    seconds = compute_seconds(shape, setup, machine) - update
    return Modelled(1e-9 * arithmetic, growth / 2**20, (LEAST * seconds, MOST * seconds))
