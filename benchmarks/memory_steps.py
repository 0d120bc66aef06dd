"""What `python -m benchmarks memory` runs: one pair, its packs, one step in each gradient mode, its memory.

The step is the trainer's (`vrpo.gradient`) without the optimizer; models, pairs and LoRA are those of
`python -m benchmarks gpu-step`.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from benchmarks.step_setup import (
    LLADA_8B,
    TINY,
    Scorer,
    Size,
    build_model,
    checkpoint_activations,
    make_batch,
    with_lora,
)
from benchmarks.step_timing import forget_gradients, free_memory
from vrpo.batch import PackedBatch
from vrpo.gradient import JointStep, Parts, ReplayStep, StepResult
from vrpo.objectives import preference
from vrpo.step import Estimator, split_segments
from vrpo.training.packed_trainer import ModelNLL

BETA, MASK_SEED = 0.2, 1
SEGMENTS_PER_PACK = 2  # so that a pair is cut from K = 2 on
MODES = ("joint", "replay", "replay, head anew")
WEIGHTS = ("full", "LoRA")

# A CPU's size: activations of a pack outweigh what else a step needs.
SMALL = Size(4, 256, 8, 768, 4096, 4095, 64, 64, (16, 112, 80, 48), gemm=256)
# The head has 60 % of the body's arithmetic, where LLaDA-8B's has 2 %: what the known log-sum-exps save.
WIDE = replace(SMALL, classes=32768, mask_token_id=32767)
SIZES = {"small": SMALL, "small, wide head": WIDE, "LLaDA-8B": LLADA_8B, "tiny": TINY}


class HeadAnew(ModelNLL):
    """A policy whose second pass forgets the log-sum-exps of the first and computes the logits again."""

    def again(self, pack: PackedBatch, nll_N: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """(nll_N with gradient, 0)."""
        return self(pack), nll_N.new_zeros(())


@dataclass(frozen=True)
class Packs:
    """The masked copies of one pair, on the CPU: whole, and cut for a replay."""

    whole: PackedBatch
    cut: list[PackedBatch]

    @property
    def nbytes(self) -> int:
        """Of all their tensors, those that the cuts share with the whole counted once."""
        storages = {}
        for pack in (self.whole, *self.cut):
            for field in fields(pack):
                if isinstance(value := getattr(pack, field.name), Tensor):
                    storage = value.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def make_packs(size: Size, num_samples: int, segments_per_pack: int = SEGMENTS_PER_PACK) -> Packs:
    """One pair at K = num_samples, cut into packs of so many masked copies."""
    estimator = Estimator(size.mask_token_id, num_samples, "paper", 1, seed=MASK_SEED)
    whole = estimator.pack(make_batch(size), 0, "cpu")
    return Packs(whole, split_segments(whole, segments_per_pack * (size.prompt + size.response)))


class Training:
    """A policy that has moved a little from its reference, and the steps it takes.

    The reference is the model with its adapter off (LoRA) or a frozen copy (full).
    """

    def __init__(self, size: Size, device: str, dtype: torch.dtype, *, weights: str, checkpointing: bool):
        self.size, self.device = size, device
        self.autocast = dtype if dtype is torch.bfloat16 else None
        base = build_model(size, device, dtype)
        if weights == "full":
            self.reference = Scorer(copy.deepcopy(base).eval())
            self.model = base.requires_grad_(True)
        else:
            self.model = with_lora(base)
            self.reference = Scorer(self.model, adapter=False)
        self._move()
        checkpoint_activations(self.model, checkpointing)
        self.model.train()

    def trained(self) -> list[nn.Parameter]:
        """The weights that get a gradient."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _move(self) -> None:
        generator = torch.Generator(self.device).manual_seed(1)
        for parameter in self.trained():
            noise = torch.empty_like(parameter).normal_(std=0.002, generator=generator)
            parameter.add_(noise)

    def step(self, mode: str, packs: Packs) -> StepResult:
        """Forward and backward in one of MODES; the gradients lie in the parameters afterwards."""
        forget_gradients(self.model)
        policy = (HeadAnew if mode == "replay, head anew" else ModelNLL)(self.model)

        def objective(policy_RK: Tensor, reference_RK: Tensor | None) -> Tensor:
            return preference.dpo_loss(preference.preference_score(policy_RK, reference_RK, BETA))

        parts = Parts(policy, self.reference, objective, lambda pack: pack.to(self.device))
        step = JointStep(parts, packs.whole) if mode == "joint" else ReplayStep(parts, packs.cut)
        for index in range(step.num_shares):
            with self._precision():
                share = step.share(index)
            share.backward()
        return step.result

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.autocast)

    def gradient_error(self, mode: str, packs: Packs) -> float:
        """|gradient in this mode - joint gradient| / |joint gradient|, over all trained weights."""
        self.step("joint", packs)
        want = [parameter.grad for parameter in self.trained()]
        self.step(mode, packs)
        got = [parameter.grad for parameter in self.trained()]
        forget_gradients(self.model)
        if any(gradient is None for gradient in (*want, *got)):
            return math.inf
        squares = [(a - b).double().square().sum() for a, b in zip(got, want, strict=True)]
        norm = torch.stack([gradient.double().square().sum() for gradient in want]).sum()
        return (torch.stack(squares).sum() / norm).sqrt().item()


def size_of(tensors: list[Tensor]) -> int:
    """Bytes of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_of_tensors(run: Callable[[], object], device: str) -> int:
    """Bytes by which memory grew at most during a call, of tensors alone.

    CUDA: the allocator's own peak. CPU: the running sum over all allocations and releases that the profiler
    saw, buffers inside operators included; what lived before the call counts as 0 even if it is released.
    """
    free_memory(device)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
