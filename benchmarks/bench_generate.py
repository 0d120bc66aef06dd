"""Decoding throughput: vrpo.generation.generate against the loop of public code (plain_generate.py).

    python -m benchmarks generate --threads 1
    python -m benchmarks generate --quick
    python -m benchmarks generate --device cuda

Prompts of mixed lengths, temperature 0, low-confidence remasking, blocks from left to right, random weights;
float32 on a CPU, bfloat16 and LLaDA-8B's shape on CUDA. Before anything is timed, each way of decoding gives
the tokens of the others, all of them, in float32 (on CUDA of a short response). Then rounds in turns, of
which the fastest counts; one row per way goes to benchmarks/results/generate.csv:

    gflop_per_step  what a denoising step needs, mean over the steps: all layers on the real tokens, the last
                    one only where masked positions of the block read it, the head for those alone
    gemm_gflops     rate of the bare products of a step's sizes, torch.mm, in the same rounds
    pct_of_gemm     gflop_per_step in the time of a step, of that rate
    peak_MiB        growth during a call above the weights, of tensors alone
    same_tokens     share of its tokens that are those of vrpo, in the precision that is timed
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.bare_products import BareProducts
from benchmarks.flags import check_device, positive
from benchmarks.memory_steps import peak_of_tensors
from benchmarks.plain_generate import decode_one_by_one, decode_padded
from benchmarks.record import RESULTS, append, check_columns, provenance
from benchmarks.step_setup import LLADA_8B, Size, build_model
from benchmarks.step_timing import free_memory
from benchmarks.timing import Timing, clock_name, interleaved
from vrpo.generation import SamplerConfig, generate
from vrpo.generation.sampler import split_evenly

OUTPUT, QUICK_OUTPUT = RESULTS / "generate.csv", Path("runs/generate_quick.csv")
FIELDS = (
    *("date", "git", "dirty", "device", "torch", "triton", "threads", "dtype"),
    *("case", "parameters", "layers", "hidden", "vocabulary"),
    *("prompts", "prompt_lengths", "new_tokens", "block_length", "steps"),
    *("way", "tokens_per_s", "speedup", "ms", "ms_median", "rounds", "clock", "passes", "ms_per_pass"),
    *("gflop_per_step", "gemm_gflops", "pct_of_gemm", "peak_MiB", "same_tokens", "note"),
)

Decode = Callable[[nn.Module, Sequence[Tensor], SamplerConfig, int], Tensor]


def decode_vrpo(
    model: nn.Module, prompts: Sequence[Tensor], config: SamplerConfig, mask_token_id: int
) -> Tensor:
    """`generate` in the form of the other ways."""
    return generate(model, prompts, config, mask_token_id=mask_token_id, progress=False)


OURS = "vrpo"
WAYS: dict[str, Decode] = {
    OURS: decode_vrpo,
    "padded batch, full logits": decode_padded,
    "one by one, full logits": decode_one_by_one,
}


@dataclass(frozen=True)
class Case:
    """A model and what it decodes: lengths of the prompts, and how."""

    size: Size
    prompts: tuple[int, ...]
    config: SamplerConfig

    def passes(self, way: str) -> int:
        """Calls of the model."""
        return self.config.steps * (len(self.prompts) if way.startswith("one by one") else 1)

    def rows_per_step(self) -> float:
        """Masked positions of the current block, of all prompts, mean over the steps."""
        config, rows = self.config, []
        for steps in split_evenly(config.steps, config.num_blocks):
            masked = config.block_length
            for revealed in split_evenly(config.block_length, steps):
                rows.append(masked)
                masked -= revealed
        return len(self.prompts) * sum(rows) / len(rows)

    def gflop_per_step(self) -> float:
        """Of all prompts together, mean over the steps.

            layers below the last:  2 P T + 4 D sum of L^2
            last layer:             keys and values of T tokens, 2 * 2 D^2; the rest for M rows, 4 D M mean L
            head:                   2 M D V

        Tokens of later blocks count: a masked position attends to all of them.
        """
        size, masked = self.size, self.rows_per_step()
        lengths = [length + self.config.max_new_tokens for length in self.prompts]
        tokens, hidden = sum(lengths), size.hidden
        layer = size.body_parameters / size.layers
        below = (size.layers - 1) * (2 * layer * tokens + 4 * hidden * sum(n * n for n in lengths))
        keys_values = 2 * hidden**2
        attention = 4 * hidden * masked * tokens / len(lengths)
        last = 2 * (keys_values * tokens + (layer - keys_values) * masked) + attention
        return 1e-9 * (below + last + 2 * masked * hidden * size.classes)


def _size(layers: int, hidden: int, heads: int, mlp: int, classes: int) -> Size:
    return Size(layers, hidden, heads, mlp, classes, classes - 1, 0, 0, (0, 0, 0, 0), gemm=0)


MIXED = (16, 32, 48, 64, 96, 128, 192, 256)
CASES = {
    "1 M": Case(_size(4, 128, 4, 384, 1024), MIXED, SamplerConfig(64, 32, 32)),
    "1 M, one short prompt": Case(_size(4, 128, 4, 384, 1024), (16,), SamplerConfig(32, 32, 32)),
    "9 M, wide head": Case(_size(4, 128, 4, 384, 32768), MIXED, SamplerConfig(64, 32, 16)),
    "10 M": Case(_size(6, 256, 4, 1024, 8192), MIXED, SamplerConfig(64, 32, 16)),
}
QUICK = {
    "1 M": Case(_size(4, 128, 4, 384, 1024), MIXED[:5], SamplerConfig(32, 16, 8)),
    "9 M, wide head": Case(_size(4, 128, 4, 384, 32768), MIXED[:5], SamplerConfig(32, 16, 8)),
}
CUDA_CASES = {
    "LLaDA-8B": Case(LLADA_8B, tuple(4 * length for length in MIXED), SamplerConfig(128, 32, 32)),
    "LLaDA-8B, one prompt": Case(LLADA_8B, (128,), SamplerConfig(128, 32, 32)),
}
CUDA_QUICK = {"LLaDA-8B": Case(LLADA_8B, (64, 128, 256, 512), SamplerConfig(32, 16, 8))}
GATE_ON_CUDA = SamplerConfig(16, 8, 4)


def make_prompts(case: Case) -> list[Tensor]:
    """Random tokens but the mask token, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(case.size.mask_token_id, (n,), generator=generator) for n in case.prompts]


@torch.no_grad()
def make_model(size: Size, device: str) -> nn.Module:
    """Random float32 weights of deviation 2 / sqrt(inputs): hidden states then differ from place to place.

    With the 0.02 of training's start nearly all masks would predict one token with one confidence, and any
    order of revealing them would do.
    """
    model = build_model(size, device, torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(2 * parameter.shape[1] ** -0.5 / 0.02)
    return model.eval()


def check(name: str, case: Case, model: nn.Module, prompts: list[Tensor]) -> None:
    """RuntimeError where a way gives other tokens than vrpo."""
    mask = case.size.mask_token_id
    want_BG = WAYS[OURS](model, prompts, case.config, mask)
    for way, decode in WAYS.items():
        wrong = int((decode(model, prompts, case.config, mask) != want_BG).sum())
        if wrong:
            tokens = f"{wrong} of {want_BG.numel()} tokens are not those of {OURS}"
            raise RuntimeError(f"{name}, {way}: {tokens}; nothing is timed")


def measure(name: str, case: Case, args: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one case. Errors: RuntimeError if the ways do not agree."""
    device, mask = args.device, case.size.mask_token_id
    deadline = time.monotonic() + args.seconds
    prompts, model = make_prompts(case), make_model(case.size, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    check(name, case if device == "cpu" else replace(case, config=GATE_ON_CUDA), model, prompts)
    model.to(dtype)
    free_memory(device)
    tokens = sum(case.prompts) + len(prompts) * case.config.max_new_tokens
    bare = BareProducts(case.size, tokens, max(1, round(case.rows_per_step())), device, dtype)
    found: dict[str, Tensor] = {}

    def run(way: str) -> Callable[[], None]:
        def decode() -> None:
            found[way] = WAYS[way](model, prompts, case.config, mask)

        return decode

    peaks = {} if device == "cuda" else {way: _peak(case, way, model, prompts) for way in WAYS}
    timings = interleaved(
        {way: run(way) for way in WAYS} | {"layer": bare.layer, "head": bare.head},
        device=device,
        threads=args.threads,
        repeats=args.rounds,
        deadline=deadline,
        keep_going=True,
        memory=device == "cuda",
    )
    rate = bare.gflops(min(timings["layer"].samples), min(timings["head"].samples))
    shared = provenance(device) | {
        "threads": args.threads,
        "dtype": str(dtype).removeprefix("torch."),
        "case": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": case.size.layers,
        "hidden": case.size.hidden,
        "vocabulary": case.size.classes,
        "prompts": len(prompts),
        "prompt_lengths": " ".join(map(str, case.prompts)),
        "new_tokens": case.config.max_new_tokens,
        "block_length": case.config.block_length,
        "steps": case.config.steps,
        "clock": clock_name(device, args.threads),
        "gflop_per_step": f"{case.gflop_per_step():.4g}",
        "gemm_gflops": f"{rate:.4g}",
    }
    ours = min(timings[OURS].samples, default=None)
    rows = []
    for way in WAYS:
        row: dict[str, object] = {"way": way, "passes": case.passes(way), "note": timings[way].failure}
        if timings[way].samples:
            row |= _figures(case, way, timings[way], rate, ours)
            row["same_tokens"] = f"{(found[way] == found.get(OURS, found[way])).float().mean().item():.4g}"
        peak = peaks.get(way, timings[way].peak_mib)
        row["peak_MiB"] = "" if peak is None else f"{peak:.4g}"
        rows.append(shared | row)
    return rows


def _peak(case: Case, way: str, model: nn.Module, prompts: list[Tensor]) -> float:
    """MiB of tensors on a CPU. The first step of a block needs most, so one of each block will do."""
    config = replace(case.config, steps=case.config.num_blocks)
    decode, mask = WAYS[way], case.size.mask_token_id
    return peak_of_tensors(lambda: decode(model, prompts, config, mask), "cpu") / 2**20


def _figures(case: Case, way: str, timing: Timing, rate: float, ours: float | None) -> dict[str, object]:
    """Columns of a way's time. speedup: vrpo over this way."""
    ms, steps = min(timing.samples), case.config.steps
    tokens = len(case.prompts) * case.config.max_new_tokens
    figures = {
        "tokens_per_s": 1e3 * tokens / ms,
        "speedup": ms / ours if ours else None,
        "ms": ms,
        "ms_median": timing.quantile(0.5),
        "ms_per_pass": ms / case.passes(way),
        "pct_of_gemm": 1e5 * case.gflop_per_step() * steps / ms / rate,
    }
    spelled = {key: "" if value is None else f"{value:.4g}" for key, value in figures.items()}
    return spelled | {"rounds": len(timing.samples)}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; `cases` maps names to what is measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="smaller cases and two rounds, half a minute")
    parser.add_argument("--cases", nargs="+", help="some only")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--seconds", type=positive, default=75, help="of a case; no further round after them")
    parser.add_argument("--output", type=Path, help=f"CSV file; with --quick {QUICK_OUTPUT}")
    args = parser.parse_args(arguments)
    check_device(parser, args.device)
    known = {("cpu", False): CASES, ("cpu", True): QUICK, ("cuda", False): CUDA_CASES}
    known = known.get((args.device, args.quick), CUDA_QUICK)
    for name in args.cases or []:
        if name not in known:
            parser.error(f"--cases must be of {', '.join(known)}, got {name!r}")
    args.cases = {name: case for name, case in known.items() if name in (args.cases or known)}
    args.rounds = min(args.rounds, 2) if args.quick else args.rounds
    args.output = args.output or (QUICK_OUTPUT if args.quick else OUTPUT)
    return args


def main(arguments: Sequence[str]) -> int:
    """Measures case by case; each is in the file as soon as it is measured."""
    args = parse(arguments)
    check_columns(args.output, FIELDS)
    torch.set_num_threads(args.threads)
    for name, case in args.cases.items():
        rows = measure(name, case, args)
        append(rows, args.output, FIELDS)
        for row in rows:
            if row["note"]:
                print(f"{name:22s} {row['way']:26s} {row['note']}", flush=True)
                continue
            print(
                f"{name:22s} {row['way']:26s} {row['tokens_per_s']:>7s} tokens/s {row['ms_per_pass']:>7s} ms "
                f"a pass {row['pct_of_gemm']:>5s} % of the matmul rate {row['peak_MiB']:>6s} MiB",
                flush=True,
            )
        free_memory(args.device)
    return 0
