"""Attention inside the segments of a pack on a CPU: ours against each layout of scaled_dot_product_attention.

    python -m benchmarks attention [--threads 2] [--quick]

On the segments that a step has: lengths like the quickstart's, GSM8K's, an UltraFeedback-like mix, and
one long sequence. In float32, forward and backward, all in turns; first each has to give our gradient, to
1e-4 of its norm. Rivals: a call for each run of equally long segments (vrpo.models in other dtypes), all
segments padded to the longest with a mask, and torch's jagged nested tensors. Rows of
benchmarks/results/attention.csv: ms the least of the rounds; gflops what it makes of 4 d sum L^2 per head
forward and twice that backward; slower, ms over ours.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.flags import positive
from benchmarks.record import RESULTS, append, provenance
from benchmarks.step.lengths import gsm8k, ultrafeedback_like
from benchmarks.timing import clock_name, describe, interleaved
from vrpo.models.attention import Segments, attend_packed

OUTPUT, QUICK_OUTPUT = RESULTS / "attention.csv", Path("runs/attention_quick.csv")
FIELDS = (
    *("date", "git", "dirty", "device", "torch", "triton", "threads", "clock"),
    *("case", "segments", "tokens", "longest", "heads", "head_size"),
    *("provider", "gradient_error", "ms", "ms_median", "rounds", "gflops", "slower", "note"),
)
OURS = "segment_attention"
COPIES = 4  # of each sequence of a pair


def _pairs(lengths: list[tuple[int, int, int]]) -> list[int]:
    return [prompt + response for prompt, *both in lengths for response in both for _ in range(COPIES)]


# Name -> (lengths of the segments, heads, head size).
CASES: dict[str, tuple[list[int], int, int]] = {
    "like the quickstart's SFT": ([12 + 37 * index % 29 for index in range(64)], 4, 16),
    "GSM8K": (_pairs(gsm8k(4)), 4, 64),
    "UltraFeedback-like": (_pairs(ultrafeedback_like(4)), 4, 64),
    "one of 2048": ([2048], 4, 64),
}
QUICK = ("like the quickstart's SFT", "GSM8K")

Attend = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
"""(T, heads, d) x 3 -> the same."""


def _packed(requested: str) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        return attend_packed(query, key, value, segments, scale=query.shape[-1] ** -0.5, requested=requested)

    return attend


def padded(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """All segments in one batch, padded to the longest, with a mask."""
    length_S = segments.cu_seqlens_S1.diff().long()
    place = torch.arange(segments.max_seqlen)
    inside_SL = place < length_S[:, None]

    def laid_out(heads_THd: Tensor) -> Tensor:
        batch = heads_THd.new_zeros(*inside_SL.shape, *heads_THd.shape[1:])
        return batch.masked_scatter(inside_SL[..., None, None], heads_THd).transpose(1, 2)

    mask = None if inside_SL.all() else inside_SL[:, None, None, :]
    out = F.scaled_dot_product_attention(*map(laid_out, (query, key, value)), attn_mask=mask)
    return out.transpose(1, 2)[inside_SL]


def jagged(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """torch.nested with the jagged layout."""

    def laid_out(heads_THd: Tensor) -> Tensor:
        offsets = segments.cu_seqlens_S1.long()
        return torch.nested.nested_tensor_from_jagged(heads_THd, offsets).transpose(1, 2)

    return F.scaled_dot_product_attention(*map(laid_out, (query, key, value))).transpose(1, 2).values()


PROVIDERS: dict[str, Attend] = {
    OURS: _packed("segments"),
    "SDPA by runs of equal lengths": _packed("sdpa"),
    "SDPA, padded with a mask": padded,
    "SDPA, jagged nested tensors": jagged,
}


class Problem:
    """Inputs of one case, and what each provider makes of them."""

    def __init__(self, lengths: list[int], heads: int, size: int):
        generator = torch.Generator().manual_seed(0)
        self.lengths, shape = lengths, (sum(lengths), heads, size)
        self.inputs = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]
        self.upstream = torch.randn(shape, generator=generator)
        boundaries = torch.tensor([0, *lengths]).cumsum(0)
        self.cu_seqlens = boundaries.to(torch.int32)

    def gradients(self, attend: Attend) -> list[Tensor]:
        """Of query, key and value, for the upstream gradient."""
        segments = Segments(self.cu_seqlens, max(self.lengths))
        out = attend(*self.inputs, segments)
        return list(torch.autograd.grad(out, self.inputs, self.upstream))

    @property
    def gflop(self) -> float:
        """Two products forward, four backward."""
        _, heads, size = self.inputs[0].shape
        return 12e-9 * heads * size * sum(length**2 for length in self.lengths)


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    squares = sum((a - b).double().square().sum() for a, b in zip(got, want, strict=True))
    return (squares / sum(b.double().square().sum() for b in want)).sqrt().item()


def measure(name: str, args: argparse.Namespace) -> None:
    """The rows of one case. Errors: RuntimeError if a provider gives another gradient."""
    lengths, heads, size = CASES[name]
    problem = Problem(lengths, heads, size)
    want, errors, runs, notes = problem.gradients(PROVIDERS[OURS]), {}, {}, {}
    for provider, attend in PROVIDERS.items():
        try:
            errors[provider] = _error(problem.gradients(attend), want)
        except (RuntimeError, NotImplementedError) as failure:  # a layout that this torch does not have
            if provider == OURS:
                raise
            notes[provider] = describe(failure)
            continue
        if not errors[provider] <= 1e-4:
            raise RuntimeError(
                f"{name}: the gradient of {provider!r} differs from ours by {errors[provider]:.2g} of its "
                "norm, allowed are 1e-4; nothing of this case was timed"
            )
        runs[provider] = lambda attend=attend: problem.gradients(attend)
    threads = torch.get_num_threads()
    timings = interleaved(runs, device="cpu", threads=threads, repeats=args.rounds)
    known = provenance("cpu") | {"threads": threads, "clock": clock_name("cpu", threads)}
    shape = {"segments": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}
    known |= {"case": name, **shape, "heads": heads, "head_size": size}
    ours = min(timings[OURS].samples)
    for provider in PROVIDERS:
        values: dict[str, object] = {"provider": provider, "note": notes.get(provider, "")}
        if provider in timings:
            timing = timings[provider]
            least = min(timing.samples)
            values |= {"gradient_error": f"{errors[provider]:.1e}", "rounds": len(timing.samples)}
            values |= {"ms": f"{least:.4g}", "ms_median": f"{timing.quantile(0.5):.4g}"}
            values |= {"gflops": f"{1e3 * problem.gflop / least:.4g}", "slower": f"{least / ours:.3g}"}
        append([known | values], args.output, FIELDS)
        shown = ", ".join(f"{key} {values[key]}" for key in ("ms", "slower", "note") if values.get(key))
        print(f"[attention] {name}, {provider}: {shown}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Entry point of `python -m benchmarks attention`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help=f"two cases, three rounds; {QUICK_OUTPUT}")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--output", type=Path, help=f"CSV file, appended to; {OUTPUT.name} of the results")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.cases = 3, [name for name in args.cases if name in QUICK]
    args.output = args.output or (QUICK_OUTPUT if args.quick else OUTPUT)
    torch.set_num_threads(args.threads)
    for name in args.cases:
        measure(name, args)
    return 0
