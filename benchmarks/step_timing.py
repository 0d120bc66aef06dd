"""Timing one VRPO step part by part, its peak memory, and a profile of its kernels by class."""

import gc
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.step import NLL, Estimator, preference_step


@dataclass(frozen=True)
class DrawnOnce(Estimator):
    """Draws and packs at its first call, and hands the same pack out from then on.

    Draw and pack run on the CPU, many times slower without the C++ extension; a step is timed without them,
    and they by themselves.
    """

    kept: list[PackedBatch] = field(default_factory=list)

    def pack(self, batch: ResponseBatch, epoch: int, device: torch.device | str) -> PackedBatch:
        """The pack of the first call."""
        if not self.kept:
            self.kept.append(super().pack(batch, epoch, device))
        return self.kept[0]


class Stopwatch:
    """Named instants on the device's own clock (CUDA events), or on the wall for a CPU."""

    def __init__(self, device: str):
        self.on_cuda = device == "cuda"
        self._instants: dict[str, object] = {}

    def mark(self, name: str) -> None:
        """The instant at which everything issued so far is done."""
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._instants[name] = event
        else:
            self._instants[name] = time.perf_counter()

    def ms(self, first: str, last: str) -> float:
        """Milliseconds between two instants; waits for the later one."""
        start, end = self._instants[first], self._instants[last]
        if self.on_cuda:
            end.synchronize()
            return start.elapsed_time(end)
        return 1e3 * (end - start)


@dataclass(frozen=True)
class Step:
    """One step: times in ms, means over its pairs of score and loss, and the sizes of its pack."""

    ms: float
    ms_reference: float
    ms_forward: float
    ms_backward: float
    score: float
    loss: float
    length_S: Tensor
    num_rows: int


def run_step(
    batch: ResponseBatch,
    policy: NLL,
    reference: NLL,
    estimator: Estimator,
    device: str,
) -> Step:
    """`preference_step` and its backward pass, with the trainer's defaults but for the SFT term (0 here)."""
    watch = Stopwatch(device)
    seen: list[PackedBatch] = []

    def watched(nll: NLL, name: str) -> NLL:
        def run(pack: PackedBatch) -> Tensor:
            seen.append(pack)
            watch.mark(f"{name} starts")
            result = nll(pack)
            watch.mark(f"{name} ends")
            return result

        return run

    watch.mark("start")
    result = preference_step(
        batch,
        watched(policy, "policy"),
        watched(reference, "reference"),
        estimator=estimator,
        beta=0.2,
        sft_weight=0.0,
        epoch=0,
        device=device,
    )
    watch.mark("backward starts")
    result.loss_B.sum().backward()
    watch.mark("end")
    return Step(
        ms=watch.ms("start", "end"),
        ms_reference=watch.ms("reference starts", "reference ends"),
        ms_forward=watch.ms("policy starts", "policy ends"),
        ms_backward=watch.ms("backward starts", "end"),
        score=result.score_B.mean().item(),
        loss=result.loss_B.detach().mean().item(),
        length_S=seen[0].cu_seqlens_S1.diff().long().cpu(),
        num_rows=len(seen[0].row_N),
    )


def forget_gradients(model: nn.Module) -> None:
    """Every gradient freed, so that each step allocates its own."""
    for parameter in model.parameters():
        parameter.grad = None


def free_memory(device: str) -> None:
    """Returns what nothing refers to, so that one case's leftovers are not another's lack of memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def timed_steps(
    step: Callable[[], Step], model: nn.Module, device: str, *, at_most: int = 3, seconds: float = 3.5
) -> tuple[Step, int, float | None]:
    """(the median step, how many were timed, peak GiB of them) after one that is not counted.

    At least one is timed, and no further one after `seconds` of them.
    """
    forget_gradients(model)
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps: list[Step] = []
    while not steps or (len(steps) < at_most and sum(s.ms for s in steps) < 1e3 * seconds):
        forget_gradients(model)
        steps.append(step())
    forget_gradients(model)
    middle = statistics.median_low(s.ms for s in steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return next(s for s in steps if s.ms == middle), len(steps), peak


def matmul_rate(shape: tuple[int, int, int], device: str, dtype: torch.dtype, repeats: int = 10) -> float:
    """TF/s of (M, K) @ (K, N) on random data, K contiguous in both factors as in a linear layer."""
    rows, inner, columns = shape
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": dtype}
    left, right = torch.randn(rows, inner, **options), torch.randn(columns, inner, **options)
    out = left.new_empty(rows, columns)
    watch = Stopwatch(device)
    for _ in range(3):
        torch.mm(left, right.t(), out=out)
    watch.mark("start")
    for _ in range(repeats):
        torch.mm(left, right.t(), out=out)
    watch.mark("end")
    return repeats * 2e-9 * rows * inner * columns / watch.ms("start", "end")


_BF16_PRODUCT = r"BinaryFunctor<c10::BFloat16, c10::BFloat16, c10::BFloat16, at::native::binary_internal::Mul"
# Class of a kernel -> words of its name; the first that matches counts. The head's matmuls are the
# library's, like all others, and count as "matmul". Of products of two bf16 tensors, those that broadcast are
# the norms' with their weights, and those that do not are SwiGLU's; those with a number are LoRA's scaling.
CLASSES = {
    "attention": r"flash|fmha|attention|sdpa|mha_",
    "head (Triton)": r"_fold|_finish_|_target_logits|_probabilities|_scale_rows|_dhidden|_logits_fold",
    "rotary": r"_rotary",
    "norm": r"layer_?norm|rms_?norm",
    "norm, product with weights": r"::elementwise_kernel<.*" + _BF16_PRODUCT,
    "SwiGLU": r"silu|::vectorized_elementwise_kernel<\d+, at::native::" + _BF16_PRODUCT,
    "LoRA, scaling": r"[AB]UnaryFunctor<c10::BFloat16, .*::Mul",
    "sums (residual, LoRA, gradients)": r"CUDAFunctor_add<c10::BFloat16>",
    "matmul": r"gemm|nvjet|cutlass|cublas|xmma|splitk|mm\b",
    "softmax and cross entropy": r"softmax|nll_loss",
    "copy and cast": r"copy|memcpy|memset|fill|catarray|cat_",
    "elementwise": r"elementwise|vectorized|triton_|add|mul|silu",
    "reduction and indexing": r"reduce|index|gather|scatter|sort|scan|embedding",
}


def kernel_class(name: str) -> str:
    """The class of a kernel by its name; "other" if none matches."""
    return next((kind for kind, words in CLASSES.items() if re.search(words, name, re.IGNORECASE)), "other")


def profile(run: Callable[[], object], device: str) -> str:
    """Which kernels a call spends its time in: the share of each class, and the 40 longest."""
    activity = (
        torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    )
    started = time.perf_counter()
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    wall_ms = 1e3 * (time.perf_counter() - started)
    which = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [(getattr(event, which) / 1e3, event.count, event.key) for event in profiler.key_averages()]
    events = sorted((event for event in events if event[0] > 0), reverse=True)
    total = sum(ms for ms, _, _ in events)
    by_class: dict[str, float] = defaultdict(float)
    for ms, _, name in events:
        by_class[kernel_class(name)] += ms
    lines = [f"kernels {total:.1f} ms in {wall_ms:.1f} ms of wall time (profiler running)", ""]
    lines += ["share   ms        class"]
    for kind, ms in sorted(by_class.items(), key=lambda item: -item[1]):
        lines.append(f"{ms / total:6.1%}  {ms:8.2f}  {kind}")
    lines += ["", "share   ms        calls  class                             kernel"]
    for ms, count, name in events[:40]:
        lines.append(f"{ms / total:6.1%}  {ms:8.2f}  {count:5d}  {kernel_class(name):32s}  {name[:240]}")
    return "\n".join(lines) + "\n"
