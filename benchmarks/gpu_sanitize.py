"""The Triton kernels once, at a small size, checked against fp64: what compute-sanitizer is to watch.

    compute-sanitizer --tool memcheck python3 -m benchmarks.gpu_sanitize [PART ...]

Parts. fused: forward with the fused GEMM, tiles kept, both gradients. fold: the same with cuBLAS. sweep and
fused-sweep: both gradients from known statistics in either form. masks: mask_select, pack_masked,
token_weight_sums. Without names, all of them. Logits rise and fall over five tiles of 2048 classes, so that
everything written under a lower maximum is corrected. More steps along D than stages, so that buffers are
used again; the fused GEMM with the depth of few rows, in fused-sweep with that of many. Exit status 1 if a
value is wrong. Without a GPU: TRITON_INTERPRET=1, fp16, smaller.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vrpo_kernels import PackedTokens, mask_select, pack_masked, testing, token_weight_sums
from vrpo_kernels.linear_cross_entropy import kernel
from vrpo_kernels.linear_cross_entropy.tiles import Tiles, tiles_for
from vrpo_kernels.mask_select import reference as mask_select_reference
from vrpo_kernels.pack_masked import reference as pack_masked_reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # Triton's interpreter multiplies bf16 wrongly
ROWS, CLASSES, HIDDEN, TILE = (200, 9000, 384, 2048) if ON_GPU else (20, 300, 32, 64)


def _tiles(gemm: str, *, many_rows: bool) -> Tiles:
    """Several tiles and row chunks even at this size; on a GPU the blocks of the real ones."""
    shapes = {"cols": TILE, "max_cols": TILE, "sweep_cols": TILE, "rows": 128, "sweep_rows": 128}
    if not ON_GPU:
        shapes |= {"fold_cols": 32, "block_rows": 32, "block_cols": 32, "block_hidden": 16}
    capability = torch.cuda.get_device_capability() if ON_GPU else (9, 0)
    tiles = replace(tiles_for(capability, 2, gemm), **shapes)
    return replace(tiles, num_stages_few_rows=tiles.num_stages) if many_rows else tiles


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, targets, upstream) on the CPU; every tile's logits are 12 nats off the one before."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).mul_(HIDDEN**-0.5)
    weight = torch.randn(CLASSES, HIDDEN, generator=generator)
    weight[:, 0] = (torch.arange(CLASSES) // TILE) * 12.0
    hidden[:, 0] = torch.tensor([-1.0, 1.0]).repeat(ROWS // 2)
    targets = torch.randint(CLASSES, (ROWS,), generator=generator)
    return hidden.to(DTYPE), weight.to(DTYPE), targets, testing.wide_range_upstream(ROWS, generator)


def _head(gemm: str, *, sweep: bool) -> dict[str, float]:
    """Errors over what the policy allows of nll and both gradients, formed by the backend's functions."""
    inputs = _inputs()
    hidden, weight, targets, upstream = (tensor.to(DEVICE) for tensor in inputs)
    tiles = _tiles(gemm, many_rows=sweep)
    keep = not sweep
    nll, statistics, expected, kept, shift, _ = kernel.forward(
        hidden, weight, targets, gemm=gemm, want_dhidden=keep, keep_tiles=keep, tiles=tiles
    )
    if sweep:
        wanted = {"want_dhidden": True, "want_dweight": True}
        known = (upstream, hidden, weight, targets, statistics)
        dhidden, dweight, _ = kernel.sweep(*known, gemm=gemm, tiles=tiles, **wanted)
    else:
        dhidden = kernel.dhidden(upstream, expected, statistics, weight, targets)
        dweight, _ = kernel.dweight(upstream, hidden, weight, targets, statistics, kept, shift, gemm=gemm)
    found = (tensor.cpu() for tensor in (nll, dhidden, dweight))
    return testing.linear_cross_entropy_ratios(*found, *inputs)  # on the CPU: few kernels of others to watch


def _masks() -> dict[str, float]:
    """0 per output that equals the reference bit for bit, else infinity."""
    generator = torch.Generator().manual_seed(2)
    prompt, response, num_samples = torch.tensor([3, 0, 40, 7]), torch.tensor([1, 70, 513, 2]), 3
    length_S = response.repeat_interleave(num_samples)
    counter_S3 = torch.randint(2**32, (len(length_S), 3), generator=generator)
    count_S = (length_S * torch.rand(len(length_S), generator=generator)).long()
    draw = (length_S, counter_S3, length_S // 3, count_S)
    expected = mask_select_reference.mask_select(*draw, 7, True)
    ratios = {}

    def compare(names, found: Callable, wanted) -> None:
        with testing.poisoned_empty():
            outputs = found()
        for name, output, value in zip(names, outputs, wanted, strict=True):
            ratios[name] = 0.0 if torch.equal(output.cpu(), value) else float("inf")

    on_device = [tensor.to(DEVICE) for tensor in draw]
    names = ("position_N", "offsets_S1")
    compare(names, lambda: mask_select(*on_device, seed=7, by_rank=True, backend="triton"), expected)
    tokens_U = torch.randint(5, (int((prompt + response).sum()),), generator=generator)
    batch = (tokens_U, prompt, response, *expected)
    batch_on_device = [tensor.to(DEVICE) for tensor in batch]
    options = {"num_samples": num_samples, "backend": "triton"}
    packed = pack_masked_reference.pack_masked(*batch, num_samples, 4)
    compare(PackedTokens._fields, lambda: pack_masked(*batch_on_device, mask_token_id=4, **options), packed)
    weight_N = testing.wide_range_upstream(len(expected[0]), generator)
    rows = (weight_N, *expected, response)
    rows_on_device = [tensor.to(DEVICE) for tensor in rows]
    num_tokens = int(response.sum())
    sums = pack_masked_reference.token_weight_sums(*rows, num_samples, num_tokens)
    found = lambda: token_weight_sums(*rows_on_device, num_tokens=num_tokens, **options)  # noqa: E731
    compare(("sum_M", "sum_N"), found, sums)
    return ratios


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "fused": lambda: _head("fused", sweep=False),
    "fused-sweep": lambda: _head("fused", sweep=True),
    "sweep": lambda: _head("cublas", sweep=True),
    "fold": lambda: _head("cublas", sweep=False),
    "masks": _masks,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts, prints every ratio; 0 only if all are at most 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=" ".join(PARTS))
    parts = parser.parse_args(arguments).parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    passed = True
    for part in parts:
        ratios = PARTS[part]()
        right = all(ratio <= 1 for ratio in ratios.values())  # NaN fails
        passed &= right
        listed = ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items())
        print(f"{part}: {'ok' if right else 'WRONG'}; error over what is allowed: {listed}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
