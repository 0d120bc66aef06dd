"""python -m benchmarks masking

Time of the mask draw and of the packing of one batch, per backend, beside the usual loop over sequences with
torch.randperm. Each backend must first give the reference's bits. Times in ms.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.record import RESULTS, append, provenance
from benchmarks.timing import interleaved
from vrpo_kernels import mask_select, pack_masked
from vrpo_kernels.backend import availability
from vrpo_kernels.testing import assert_bitwise_equal

MASK_TOKEN = 0
LOOP = "torch.randperm loop"
FILE = RESULTS / "masking.csv"
SHAPES = ((32, 8, 94), (32, 8, 512), (16, 8, 4096))
"""(responses R, samples K, mean response length)"""


def make_batch(num_responses: int, num_samples: int, mean_length: int, device: str) -> dict[str, Tensor]:
    """Responses of half to one and a half times the mean length, prompts of 64 tokens, l uniform on 1..L."""
    generator = torch.Generator().manual_seed(0)
    response = torch.randint(mean_length // 2, 3 * mean_length // 2, (num_responses,), generator=generator)
    prompt = torch.full_like(response, 64)
    tokens = torch.randint(1, 30_000, (int((prompt + response).sum()),), generator=generator)
    length = response.repeat_interleave(num_samples)
    uniform = torch.rand(length.shape, generator=generator, dtype=torch.float64)
    counter = torch.stack([torch.arange(len(length))] * 3, dim=1)
    batch = {
        "tokens": tokens,
        "prompt": prompt,
        "response": response,
        "length": length,
        "counter": counter,
        "first": torch.zeros_like(length),
        "count": 1 + (uniform * length).long(),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def draw_and_pack(batch: dict[str, Tensor], num_samples: int, num_rows: int, backend: str) -> tuple:
    position, offsets = mask_select(
        batch["length"],
        batch["counter"],
        batch["first"],
        batch["count"],
        seed=1,
        by_rank=True,
        num_rows=num_rows,
        backend=backend,
    )
    pack = pack_masked(
        batch["tokens"],
        batch["prompt"],
        batch["response"],
        position,
        offsets,
        num_samples=num_samples,
        mask_token_id=MASK_TOKEN,
        backend="auto" if backend == "triton" else backend,  # on a device the packing is PyTorch's
    )
    return position, offsets, *pack


def randperm_loop(batch: dict[str, Tensor], num_samples: int) -> tuple[Tensor, Tensor]:
    """The rival: one torch.randperm per masked copy, sequences concatenated; not reproducible elsewhere."""
    device = batch["tokens"].device
    lengths = zip(batch["prompt"].tolist(), batch["response"].tolist(), strict=True)
    counts = batch["count"].tolist()
    tokens, rows, clean_start, start = [], [], 0, 0
    for response, (prompt_length, response_length) in enumerate(lengths):
        end = clean_start + prompt_length + response_length
        for sample in range(num_samples):
            count = counts[response * num_samples + sample]
            chosen = torch.randperm(response_length, device=device)[:count].sort().values + prompt_length
            copy = batch["tokens"][clean_start:end].clone()
            copy[chosen] = MASK_TOKEN
            tokens.append(copy)
            rows.append(chosen + start)
            start += prompt_length + response_length
        clean_start = end
    return torch.cat(tokens), torch.cat(rows)


def run(device: str = "cpu", shapes: tuple = SHAPES, *, threads: int = 1, repeats: int = 15) -> list[dict]:
    """One row per shape and provider: sizes, time of draw + pack, speed relative to the loop.

    Args: device "cpu" or "cuda"; shapes as SHAPES; threads of the CPU; repeats per row.
    Raises AssertionError if a backend's result differs from the reference's in any bit.
    """
    torch.set_num_threads(threads)
    backends = ["reference", "triton"] if device == "cuda" else ["reference"]
    if device == "cpu" and availability().cpu is None:
        backends.append("cpu")
    rows = []
    for num_responses, num_samples, mean_length in shapes:
        batch = make_batch(num_responses, num_samples, mean_length, device)
        num_rows = int(batch["count"].sum())
        runs = {LOOP: lambda b=batch, k=num_samples: randperm_loop(b, k)}
        want = draw_and_pack(batch, num_samples, num_rows, "reference")
        for backend in backends:
            args = (batch, num_samples, num_rows, backend)
            for got, expected in zip(draw_and_pack(*args), want, strict=True):
                assert_bitwise_equal(got, expected)
            runs[backend] = lambda a=args: draw_and_pack(*a)
        timings = interleaved(runs, device=device, threads=threads, repeats=repeats)
        for provider, timing in timings.items():
            rows.append(
                {
                    "R": num_responses,
                    "K": num_samples,
                    "tokens": num_samples * len(batch["tokens"]),
                    "rows": num_rows,
                    "provider": provider,
                    "ms_p20": round(timing.quantile(0.2), 4),
                    "ms_p50": round(timing.quantile(0.5), 4),
                    "ms_p80": round(timing.quantile(0.8), 4),
                    "reps": repeats,
                    "speedup": round(timings[LOOP].quantile(0.5) / timing.quantile(0.5), 2),
                }
            )
    return rows


def main(arguments: list[str]) -> int:
    """Print the table, and append it to results/masking.csv with --save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks masking", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1: CPU time is measured)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/masking.csv")
    options = parser.parse_args(arguments)
    rows = run(options.device, threads=options.threads, repeats=options.repeats)
    for row in rows:
        print(
            f"R={row['R']:<3} K={row['K']} tokens={row['tokens']:<7} rows={row['rows']:<7} "
            f"{row['provider']:20} {row['ms_p50']:9.3f} ms {row['speedup']:6.1f}x"
        )
    if options.save:
        facts = {**provenance(options.device), "threads": options.threads}
        append([facts | row for row in rows], FILE, [*facts, *rows[0]])
    return 0
