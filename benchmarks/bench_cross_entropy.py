"""python -m benchmarks cross-entropy: nll of selected rows of logits, against every rival, in one run.

M positions of V logits, every second one scored, an arbitrary gradient per row. One unit is a copy of the
scored rows into memory that exists (one read and one write of them). Ours is checked by the tolerance policy
before it is timed and has no figure if it fails; rivals are held to the same policy and marked. "in place"
writes the gradient over the logits (ours only). Rows are appended to results/cross_entropy.csv.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import vrpo_kernels
from benchmarks.cases import DTYPES
from benchmarks.record import RESULTS, append, provenance
from benchmarks.timing import clock_name, interleaved
from vrpo_kernels import testing
from vrpo_kernels.cross_entropy import reference

FILE = RESULTS / "cross_entropy.csv"
FIELDS = (
    *("date", "git", "dirty", "device", "torch", "triton", "threads", "clock"),
    *("provider", "column", "dtype", "M", "N", "V"),
    *("ms_p20", "ms_p50", "ms_p80", "reps", "units_p50", "unit_ms_p50", "peak_MiB", "policy_ratio", "note"),
)
GATE_ROWS = 64

Op = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (M, V), targets (N,), rows (N,)) -> nll (N,)"""


@dataclass(frozen=True)
class Inputs:
    """logits (M, V), targets (N,), rows (N,), upstream (N,) fp32."""

    logits: Tensor
    targets: Tensor
    rows: Tensor
    upstream: Tensor


def make_inputs(positions: int, num_classes: int, dtype: torch.dtype, device: str) -> Inputs:
    """Logits of standard deviation 2, every second position scored."""
    generator = torch.Generator(device).manual_seed(0)
    logits = (2 * torch.randn(positions, num_classes, generator=generator, device=device)).to(dtype)
    rows = torch.arange(0, positions, 2, device=device)
    targets = torch.randint(num_classes, rows.shape, generator=generator, device=device)
    upstream = testing.wide_range_upstream(len(rows), torch.Generator().manual_seed(0)).to(device)
    return Inputs(logits, targets, rows, upstream)


def _eager(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[rows].float(), targets, reduction="none")


def _eager_in_dtype(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[rows], targets, reduction="none")


def _trl(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    if not logits.is_cuda:
        return -selective_log_softmax(logits[rows], targets)
    index = targets.new_zeros(len(logits)).index_copy_(0, rows, targets)  # its kernel skips masked rows
    mask = torch.zeros_like(index).index_fill_(0, rows, 1)
    return -selective_log_softmax(logits, index, row_mask=mask)[rows]


def _liger(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits[rows], targets, reduction="none")


class _Model(torch.autograd.Function):
    """Stands for the model that computed the logits: they are no leaf, so backward may write over them."""

    @staticmethod
    def forward(ctx, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.new_empty(0).set_(logits)  # the same memory, but no view of a leaf

    @staticmethod
    def backward(ctx, dlogits: Tensor) -> tuple[Tensor, None]:
        return dlogits.new_zeros(()), None


def in_place(inputs: Inputs, logits: Tensor) -> None:
    """Forward and backward; the logits are gradients afterwards, which changes no time."""
    parameter = torch.zeros((), device=logits.device, requires_grad=True)
    nll = vrpo_kernels.cross_entropy(
        _Model.apply(parameter, logits), inputs.targets, inputs.rows, in_place=True
    )
    nll.backward(inputs.upstream)


def providers(device: str) -> dict[str, Op | str]:
    """Name -> op, or the reason why it cannot run here."""

    def if_installed(module: str, op: Op) -> Op | str:
        return op if importlib.util.find_spec(module) else f"package {module} is not installed"

    return {
        "vrpo": vrpo_kernels.cross_entropy,
        "torch eager, .float()": _eager,
        "torch eager, in its dtype": _eager_in_dtype,
        "torch.compile, .float()": torch.compile(_eager, dynamic=False),
        "TRL selective_log_softmax": if_installed("trl", _trl),
        "Liger": if_installed("liger_kernel", _liger) if device == "cuda" else "CUDA only",
    }


def differentiate(op: Op, inputs: Inputs, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(nll, dlogits) for a leaf with these logits."""
    leaf = logits.detach().requires_grad_()
    nll = op(leaf, inputs.targets, inputs.rows)
    nll.backward(inputs.upstream.to(nll.dtype))
    return nll.detach(), leaf.grad


def gate(op: Op, inputs: Inputs) -> float:
    """Worst ratio of the tolerance policy on the first rows; above 1 fails."""
    rows = inputs.rows[:GATE_ROWS]
    logits = inputs.logits[: int(rows[-1]) + 1]
    part = Inputs(logits, inputs.targets[: len(rows)], rows, inputs.upstream[: len(rows)])

    def formula(z: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return reference.cross_entropy(z[index], y)

    nll, dlogits = differentiate(op, part, logits.clone())
    true_nll, true_dlogits = differentiate(formula, part, logits.double())
    base_nll, base_dlogits = differentiate(formula, part, logits.float())
    return max(
        testing.fp32_error_ratio(nll.float(), true_nll, base_nll),
        testing.matrix_error_ratio(dlogits, true_dlogits, base_dlogits.to(logits.dtype)),
    )


def bench(inputs: Inputs, *, threads: int, repeats: int) -> list[dict]:
    """One row per provider and column."""
    device = inputs.logits.device.type
    torch.compiler.reset()  # else many cases in one process end in torch.compile's limit, and in eager
    if device == "cpu":
        torch.set_num_threads(threads)
    scored = inputs.logits[: len(inputs.rows)]
    target = torch.empty_like(scored)
    runs: dict[str, Callable[[], object]] = {"copy of the scored rows": lambda: target.copy_(scored)}
    rows = []
    for name, op in providers(device).items():
        row = {"provider": name}
        if isinstance(op, str):
            rows.append({**row, "note": op})
            continue
        ratio = gate(op, inputs)
        row |= {"policy_ratio": f"{ratio:.3g}", "note": "outside the tolerance policy" if ratio > 1 else ""}
        if name == "vrpo" and ratio > 1:
            rows.append(row)
            continue
        columns: dict[str, Callable[[], object]] = {
            "no gradient": lambda op=op: op(inputs.logits, inputs.targets, inputs.rows),
            "forward and backward": lambda op=op: differentiate(op, inputs, inputs.logits),
        }
        if name == "vrpo":
            scratch = inputs.logits.clone()
            columns["in place"] = lambda scratch=scratch: in_place(inputs, scratch)
        for column, run in columns.items():
            runs[f"{name}|{column}"] = run
            rows.append({**row, "column": column})
    rows.append({"provider": "copy of the scored rows", "column": "unit"})
    timings = interleaved(runs, device=device, threads=threads, repeats=repeats)
    unit = timings["copy of the scored rows"]
    for row in rows:
        if "column" not in row:
            continue
        timing = unit if row["column"] == "unit" else timings[f"{row['provider']}|{row['column']}"]
        row |= {f"ms_p{share}": f"{timing.quantile(share / 100):.3f}" for share in (20, 50, 80)}
        row |= {
            "reps": repeats,
            "units_p50": f"{timing.quantile(0.5) / unit.quantile(0.5):.2f}",
            "unit_ms_p50": f"{unit.quantile(0.5):.3f}",
            "peak_MiB": "" if timing.peak_mib is None else f"{timing.peak_mib:.0f}",
        }
    return rows


def main(arguments: list[str]) -> int:
    """Parse, run every case, print and save."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    laptop = device == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--positions", type=int, default=1024 if laptop else 8192, help="M; half are scored")
    parser.add_argument("--classes", type=int, default=32768 if laptop else 126464, help="V")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"] if laptop else ["bf16"]
    )
    threads = sorted({1, torch.get_num_threads()}) if laptop else [torch.get_num_threads()]
    parser.add_argument("--threads", type=int, nargs="+", default=threads)
    parser.add_argument("--repeats", type=int, default=7 if laptop else 20)
    parser.add_argument("--output", type=Path, default=FILE, help="CSV file to append to")
    options = parser.parse_args(arguments)
    facts = provenance(device)
    for dtype in options.dtypes:
        inputs = make_inputs(options.positions, options.classes, DTYPES[dtype], device)
        sizes = {"dtype": dtype, "M": options.positions, "N": len(inputs.rows), "V": options.classes}
        for count in options.threads:
            rows = bench(inputs, threads=count, repeats=options.repeats)
            common = {**facts, "threads": count, "clock": clock_name(device, count), **sizes}
            print("\n" + " ".join(f"{key}={value}" for key, value in common.items()))
            for row in rows:
                figures = ""
                if "column" in row:
                    figures = f"{row['column']:20s} {row['units_p50']:>6s} units {row['ms_p50']:>10s} ms "
                    figures += f"{row['peak_MiB']:>5s} MiB"
                print(f"  {row['provider']:26s} {figures} {row.get('note', '')}")
            append([common | row for row in rows], options.output, FIELDS)
    return 0
