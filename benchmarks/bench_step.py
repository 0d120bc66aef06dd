"""The whole VRPO step at LLaDA-8B's shape on one GPU: time, tokens/s, TF/s and memory.

    python3 -m benchmarks gpu-step [--output FILE.csv] [--seconds 105] [--revision REV] [--tiny]

One step is `vrpo.step.preference_step` and its backward pass, on one pair with a prompt of 512 and responses
of 512 tokens, drawn and packed beforehand: reference, policy, ELBO, score, loss, gradients. Weights are
random bfloat16, 8.0e9 of them. In this order, each row written as soon as it is measured, and skipped if the
time left is too short:

1. the GEMM rate of this run: 8192^3, which percentages refer to, and the step's own shapes; draw and pack
   on the CPU at K = 8, which the times below leave out
2. the first step of LoRA (r = 16 on every linear layer but the head, float32 weights, bfloat16 autocast,
   activation checkpointing: what the trainer does): its score must be exactly 0.0 and its loss ln 2
3. the same at K = 8, 1, 2, 4, 16 samples; then one optimizer step, after which the loss must be lower
4. all weights trained, K = 8, 2, 1: a frozen copy as reference, no optimizer state
5. LoRA: pairs of mixed lengths packed (K = 4), padded, and padded with the logits of masked rows and adapter
   inputs widened to float32 as PEFT does by itself: what a careful user assembles; one forward pass with full
   logits for every sample and side, as public code has it (K = 4); other attention, other heads, no
   checkpointing (K = 2), a deterministic backward pass, widened inputs
6. a profile of one LoRA step at K = 8, into profile_step.txt beside the output; time is kept back for it

Columns: K samples per response, T tokens of the pack, N masked rows, times in ms (median of up to 3 steps
after one that is not counted), peak_GiB allocated. tflops counts the matmuls that the step needs
(`step_setup.step_flops`): with P weights in the layers, 2 P T for each of reference, policy, recomputation
and dX, and for dW where all weights are trained, less what the last layer leaves out of tokens that are not
masked; attention; 2 N D V for each pass of the head.
--tiny runs every line on the CPU, with a model of no use, in float32.
"""

import argparse
import contextlib
import copy
import gc
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu_reached import print_plan
from benchmarks.record import RESULTS
from benchmarks.step_run import Run, label
from benchmarks.step_setup import (
    HEADS,
    LLADA_8B,
    TINY,
    Scorer,
    build_model,
    checkpoint_activations,
    make_batch,
    step_flops,
    with_lora,
)
from benchmarks.step_timing import (
    DrawnOnce,
    Step,
    forget_gradients,
    free_memory,
    matmul_rate,
    profile,
    run_step,
    timed_steps,
)
from vrpo.models import ATTENTION_NAMES, choose_attention
from vrpo.step import Estimator
from vrpo_kernels import choose

MASK_SEED = 1
SWEEP = (8, 1, 2, 4, 16)  # the most important first
FULL_SWEEP = (8, 2, 1)
# Seconds that no item may use up before the profile: for the profile itself, and for the model it needs.
PROFILE_SECONDS, MODEL_SECONDS = 12.0, 5.0


def measure_rates(run: Run) -> None:
    """Rows of the GEMM rate: the roof, and the shapes of the step at K = 8."""
    size, tokens = run.size, 16 * (run.size.prompt + run.size.response)
    rows = 8 * size.response
    shapes = {
        "gemm roof": (size.gemm, size.gemm, size.gemm),
        "gemm q, k, v, o": (tokens, size.hidden, size.hidden),
        "gemm gate, up": (tokens, size.hidden, size.mlp),
        "gemm down": (tokens, size.mlp, size.hidden),
        "gemm head": (rows, size.hidden, size.classes),
    }
    for case, shape in shapes.items():

        def work(case=case, shape=shape):
            rate = matmul_rate(shape, run.device, run.dtype)
            if run.gemm_tflops is None:
                run.gemm_tflops = rate
            spelled = "({} x {}) @ ({} x {})".format(*shape[:2], *shape[1:])
            run.row(case, tflops=rate, pct_of_gemm=100 * rate / run.gemm_tflops, note=spelled)

        run.attempt(case, work)


def measure_draw(run: Run) -> None:
    """The row of draw and pack at K = 8, which the times of the steps leave out."""

    def work() -> None:
        estimator = Estimator(run.size.mask_token_id, 8, "paper", 1, seed=MASK_SEED)
        batch, times = make_batch(run.size), []
        for _ in range(4):
            started = time.perf_counter()
            pack = estimator.pack(batch, 0, run.device)
            times.append(1e3 * (time.perf_counter() - started))
        backend = choose("mask_select", device="cpu", dtype=None)
        sizes = {"K": 8, "T": len(pack.tokens_T), "N": len(pack.row_N)}
        run.row("draw and pack", **sizes, ms=min(times[1:]), note=f"on the CPU, backend {backend}")

    run.attempt("draw and pack", work)


class Training:
    """A policy and its reference: with LoRA the model with its adapter off, else a frozen copy."""

    def __init__(self, run: Run, *, full: bool = False):
        self.run, self.full = run, full
        self.checkpointing = True
        base = build_model(run.size, run.device, run.dtype)
        self.frozen: nn.Module | None = None
        if full:
            self.frozen = copy.deepcopy(base).eval()
            self.model = base.requires_grad_(True)
        else:
            self.model = with_lora(base)
        checkpoint_activations(self.model, True)
        self.model.train()

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def set_checkpointing(self, on: bool) -> None:
        """Activation checkpointing on or off."""
        checkpoint_activations(self.model, on)
        self.checkpointing = on

    def scorers(self, **form: object):
        """(policy, reference) of one form."""
        form = {**form, "autocast": self.run.autocast}
        if self.frozen is not None:
            return Scorer(self.model, **form), Scorer(self.frozen, **form)
        return Scorer(self.model, **form), Scorer(self.model, **form, adapter=False)

    def stepper(self, num_samples: int, *, mixed: bool = False, **form: object) -> Callable[[], Step]:
        """A function that makes one step with its gradients."""
        run = self.run
        batch = make_batch(run.size, mixed=mixed)
        policy, reference = self.scorers(**form)
        estimator = DrawnOnce(run.size.mask_token_id, num_samples, "paper", 1, seed=MASK_SEED)
        estimator.pack(batch, 0, run.device)
        return lambda: run_step(batch, policy, reference, estimator, run.device)


def bench(
    run: Run,
    training: Training,
    case: str,
    num_samples: int,
    *,
    attention: str = "vrpo",
    seconds: float = 1.5,
    at_most: int = 3,
    note: str = "",
    slower: float = 1.0,
    **form: object,
) -> bool:
    """One row of a case: timed for about so many seconds, or with the reason why not.

    slower: how many times as long as the LoRA step it is expected to take.
    """
    head = "full logits" if form.get("alone") else form.get("head", "fused")
    requested = ATTENTION_NAMES[attention]

    def work() -> None:
        base = training.model if training.full else training.model.get_base_model()
        base.set_attn_implementation(attention)
        try:
            name = choose_attention(run.device, run.dtype, requested)[0]
            step, count, peak = timed_steps(
                training.stepper(num_samples, **form),
                training.model,
                run.device,
                seconds=seconds,
                at_most=at_most,
            )
        finally:
            base.set_attn_implementation("vrpo")
        tokens = int(step.length_S.sum())
        run.took(tokens, step.ms)
        flops = step_flops(
            run.size,
            step.length_S,
            step.num_rows,
            full=training.full,
            checkpointing=training.checkpointing,
        )
        rate = 1e-9 * flops / step.ms
        run.row(
            case,
            K=num_samples,
            T=tokens,
            N=step.num_rows,
            attention="sdpa with a mask" if form.get("padded") else name,
            head=head,
            ms=step.ms,
            ms_reference=step.ms_reference,
            ms_forward=step.ms_forward,
            ms_backward=step.ms_backward,
            tokens_per_s=1e3 * tokens / step.ms,
            tflops=rate,
            pct_of_gemm=100 * rate / run.gemm_tflops if run.gemm_tflops else "",
            peak_GiB="" if peak is None else peak,
            score=repr(step.score),
            loss=repr(step.loss),
            note="; ".join(part for part in (note, f"{count} timed") if part),
        )

    tokens = 2 * num_samples * (run.size.prompt + run.size.response) * (2 if form.get("mixed") else 1)
    # The step that is not counted, at least one that is, and something for a slower variant.
    needs = slower * run.expected(tokens, steps=2.5)
    return run.attempt(case, work, needs, K=num_samples, attention=requested, head=head)


def first_step(run: Run, training: Training) -> None:
    """The row that says whether a policy equal to its reference scores exactly 0."""

    def work() -> None:
        forget_gradients(training.model)
        step = training.stepper(2)()
        ln_two = torch.tensor(math.log(2), dtype=torch.float32).item()
        exact = step.score == 0.0 and step.loss == ln_two
        verdict = (
            "score exactly 0.0, loss ln 2 in float32" if exact else f"WRONG: 0.0 and {ln_two!r} expected"
        )
        norms = torch.stack([p.grad.float().norm() for p in training.parameters() if p.grad is not None])
        run.row(
            "LoRA, first step",
            K=2,
            T=int(step.length_S.sum()),
            N=step.num_rows,
            attention=choose_attention(run.device, run.dtype)[0],
            head="fused",
            ms=step.ms,
            score=repr(step.score),
            loss=repr(step.loss),
            note=f"{verdict}; gradient norm {norms.norm():.4g} over {len(norms)} tensors; compiles",
        )

    run.attempt("LoRA, first step", work)


def optimizer_step(run: Run, training: Training) -> None:
    """One AdamW step of the adapter, and the loss of the same pair after it; then the adapter as before."""

    def work() -> None:
        parameters = training.parameters()
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=run.device == "cuda")
        stepper = training.stepper(2)
        forget_gradients(training.model)
        first = stepper()
        started = time.perf_counter()
        optimizer.step()
        if run.device == "cuda":
            torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - started)
        forget_gradients(training.model)
        after = stepper()
        lower = "lower" if after.loss < first.loss else "NOT LOWER"
        count = sum(parameter.numel() for parameter in parameters)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        run.row(
            "LoRA, AdamW",
            K=2,
            ms=ms,
            score=repr(after.score),
            loss=repr(after.loss),
            note=f"first AdamW step of {count:.3g} weights; loss after it {lower}",
        )

    run.attempt("LoRA, AdamW", work, needs=run.expected(4 * (run.size.prompt + run.size.response), 3))
    forget_gradients(training.model)


def variants(run: Run, training: Training) -> None:
    """Rows that change something of the LoRA step, those that decide something first."""
    note = "two pairs of mixed lengths, K = 4"
    bench(run, training, "LoRA, packed", 4, mixed=True, note=note)
    bench(run, training, "LoRA, padded", 4, mixed=True, padded=True, note=note)
    with widened_inputs(training.model):
        note = f"{note}; inputs widened"
        form = {"mixed": True, "padded": True, "head": "masked logits"}
        bench(run, training, "LoRA, hand assembly", 4, note=note, **form)
        note = "one forward a sample and side, inputs widened"
        form = {"alone": True, "attention": "vrpo_sdpa", "slower": 4.5}
        bench(run, training, "LoRA, public code", 4, note=note, **form)
    if run.device == "cuda":
        bench(run, training, "LoRA, sdpa", 8, attention="vrpo_sdpa")
    else:
        run.row("LoRA, sdpa", K=8, note="left out: without CUDA the choice is sdpa already")
    for head in HEADS[1:]:
        bench(run, training, f"LoRA, {head}", 8, head=head)
    training.set_checkpointing(False)
    bench(run, training, "LoRA, no checkpointing", 2)
    training.set_checkpointing(True)
    with deterministic():
        bench(run, training, "LoRA, deterministic", 8, note="torch.use_deterministic_algorithms")
    with widened_inputs(training.model):
        bench(run, training, "LoRA, inputs widened", 8, note="to float32, as PEFT does by itself")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Flash attention adds dquery in one order. What cannot be deterministic only warns."""
    settings = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # else every torch.empty is written to, which is no part of it
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fill


@contextlib.contextmanager
def widened_inputs(model: nn.Module) -> Iterator[None]:
    """LoRA's inputs are cast to float32 again, also where autocast rounds them back."""

    def widen(layer: nn.Module, _: object) -> None:
        layer.cast_input_dtype_enabled = True  # after the hook that left it to autocast

    layers = [layer for layer in model.modules() if hasattr(layer, "cast_input_dtype_enabled")]
    handles = [layer.register_forward_pre_hook(widen) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_profile(run: Run, training: Training) -> None:
    """The kernels of one LoRA step at K = 8."""

    def work() -> None:
        stepper = training.stepper(8)
        forget_gradients(training.model)
        stepper()
        forget_gradients(training.model)
        text = profile(stepper, run.device)
        path = run.output.with_name("profile_step.txt")
        head = ", ".join(f"{key} {value}" for key, value in run.provenance.items())
        path.write_text(f"One LoRA step, K = 8; {head}\n{text}")
        run.row("LoRA, profile", K=8, note=f"written to {path.name}")
        print(text, flush=True)

    run.attempt("LoRA, profile", work)


def lora_model(run: Run) -> Training | None:
    """The model with an adapter; None with a row that says why not."""
    if importlib.util.find_spec("peft") is None:
        run.row("LoRA", note="left out: package peft is not installed")
        return None
    held: list[Training] = []
    return held.pop() if run.attempt("LoRA, model", lambda: held.append(Training(run))) else None


def train_lora(run: Run) -> None:
    """Items 2 and 3."""
    training = lora_model(run)
    if training is None:
        return
    first_step(run, training)
    for num_samples in SWEEP:
        bench(run, training, "LoRA", num_samples, seconds=10 if num_samples == SWEEP[0] else 4)
    optimizer_step(run, training)


def vary_lora(run: Run) -> None:
    """Items 5 and 6, with a model of their own: beside those of item 4 there is no room for it."""
    run.reserved = 0.0
    training = lora_model(run)
    if training is None:
        return
    run.reserved = PROFILE_SECONDS
    variants(run, training)
    run.reserved = 0.0
    write_profile(run, training)


def train_all(run: Run) -> None:
    """Item 4: every weight trained."""
    held: list[Training] = []
    if not run.attempt("full, model", lambda: held.append(Training(run, full=True)), needs=4):
        return
    training = held.pop()
    for num_samples in FULL_SWEEP:
        bench(run, training, "full", num_samples, seconds=6, at_most=2, note="no optimizer state")


def planned() -> list[str]:
    """Names of all rows, in order: what a run that is stopped has not reached."""
    names = [f"gemm {name}" for name in ("roof", "q, k, v, o", "gate, up", "down", "head")]
    names += ["draw and pack", "LoRA, first step", *(label("LoRA", number) for number in SWEEP)]
    names += ["LoRA, AdamW", *(label("full", number) for number in FULL_SWEEP)]
    changes = ("packed", "padded", "hand assembly", "public code", "sdpa", *HEADS[1:])
    changes += ("no checkpointing", "deterministic", "inputs widened", "profile")
    return [*names, *(f"LoRA, {change}" for change in changes)]


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks gpu-step`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu-step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="CSV file, appended to; results/step.csv")
    parser.add_argument("--seconds", type=float, default=105, help="no item starts that would end later")
    parser.add_argument("--until", type=float, default=math.inf, help="the same as epoch seconds")
    parser.add_argument("--tiny", action="store_true", help="every line on the CPU; needs --output")
    parser.add_argument("--revision", default="", help="what stands in the column git, where there is no git")
    options = parser.parse_args(arguments)
    if options.tiny and options.output is None:
        parser.error("--tiny makes no figure: give it an --output of its own")
    if options.output is not None and options.output.is_dir():
        parser.error(f"--output is a CSV file, and {options.output} is a folder")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --tiny runs on the CPU")
    device, size, dtype = ("cpu", TINY, torch.float32) if options.tiny else ("cuda", LLADA_8B, torch.bfloat16)
    output = options.output or RESULTS / "step.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    seconds = options.seconds if math.isinf(options.until) else options.until - time.time()
    run = Run(device, size, dtype, output, seconds, options.revision)
    print_plan(planned())
    gc.freeze()  # what is imported is not looked through again for each of the collections between cases
    run.reserved = PROFILE_SECONDS + MODEL_SECONDS
    try:
        measure_rates(run)
        measure_draw(run)
        for part in (train_lora, train_all, vary_lora):
            part(run)
            free_memory(device)  # the models are gone with the function that held them
    finally:
        gc.unfreeze()
    return 0
