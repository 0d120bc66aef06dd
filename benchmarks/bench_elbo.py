"""Variance of ELBOs by themselves under the mask designs, on models of benchmarks/variance_models.py.

    python benchmarks/variance_models.py gsm8k --stage sft --seed 1 --out runs/elbo/gsm8k-1
    python -m benchmarks elbo measure runs/elbo/gsm8k-1 --stages random sft-early reference
    python -m benchmarks elbo gradient runs/elbo/gsm8k-1 --stages sft-early reference
    python -m benchmarks elbo report

A score is a difference of two models on the same masks. The ELBO of one model has no such partner and noise
of another kind: at which levels it is masked. `measure` draws fresh masks for every response of held-out
pairs and appends, for every design and K, the variance over draws of each response's ELBO and of each pair's
difference (chosen - rejected, sides sharing positions) to benchmarks/results/elbo.jsonl. Designs that differ
in row weights alone are weighed on the same forward passes. `report` turns that file into
benchmarks/results/elbo.csv: nats squared per response, and ratios to `paper` at equal forwards with 95 %
intervals from resampled responses. `gradient` appends the trace of the variance of the SFT loss gradient,
-B / L at the up-projection of block 0, to benchmarks/results/elbo_gradient.jsonl, which `report` prints.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor

from benchmarks.record import RESULTS, provenance
from vrpo import data
from vrpo.batch import ResponseBatch
from vrpo.estimator import masking
from vrpo.estimator.elbo import elbo
from vrpo.estimator.packing import pack
from vrpo.estimator.row_weights import RowWeights, balanced, leave_one_couple_out
from vrpo.evaluation import variance
from vrpo.models import load_model, load_tokenizer
from vrpo.objectives.preference import denoising_loss
from vrpo.step import split_by_tokens
from vrpo_kernels import segment_sum

VARIANCES = RESULTS / "elbo.jsonl"
GRADIENTS = RESULTS / "elbo_gradient.jsonl"

WEIGHTINGS: dict[str, dict[str, RowWeights | None]] = {
    "paper": {"paper": None},
    "stratified": {"stratified": None},
    "cyclic": {"cyclic": None},
    "tiled": {"tiled": None, "tiled, balanced": balanced},
    "mirrored": {"mirrored": None, "mirrored-balanced": balanced},
    "spaced": {"spaced": None, "balanced": balanced},
    "folded": {"folded": None, "folded-loo": leave_one_couple_out, "folded-balanced": balanced},
    "coupled": {"coupled": None},
    "inverse-root": {"inverse-root": None},
    "time-free": {"time-free": None},
    "arcsine": {"arcsine": None},
}
"""Drawn design -> designs that have its masks, and their row weights. Only exactly unbiased ones."""


def load_responses(models: Path, num_pairs: int) -> tuple[ResponseBatch, int]:
    """The first held-out pairs, and the id of the mask token."""
    tokenizer = load_tokenizer(str(models / "reference"))
    config = load_model(str(models / "reference")).config
    max_length = json.loads((models / "training.json").read_text())["max_length"]
    rows = load_dataset("json", data_files=str(models / "pairs.jsonl"), split="train")
    prepared, _ = data.prepare_pairs(
        rows.select(range(min(num_pairs, len(rows)))),
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_length // 4,
        vocab_size=config.vocab_size,
    )
    return data.PairCollator()(list(prepared))["responses"], config.mask_token_id


@torch.no_grad()
def elbos(
    model: torch.nn.Module,
    batch: ResponseBatch,
    design: str,
    num_samples: int,
    *,
    mask_token_id: int,
    num_repeats: int,
    seed: int,
) -> dict[str, Tensor]:
    """ELBO samples of every response under every weighting of a drawn design: name -> (Q, R, K), nats."""
    found: dict[str, list[Tensor]] = {name: [] for name in WEIGHTINGS[design]}
    for repeat in range(num_repeats):
        parts: dict[str, list[Tensor]] = {name: [] for name in found}
        for part in split_by_tokens(batch, num_samples, 16_384):
            drawn = masking.draw(
                part,
                design=design,
                num_samples=num_samples,
                pair_masks="positions",
                seed=seed,
                epoch=repeat,
            )
            packed = pack(part, drawn, mask_token_id)
            log_p_N = -model(**packed.model_inputs()).nll.double()
            for name, reweight in WEIGHTINGS[design].items():
                weight_N = drawn.weight_N
                if reweight is not None and num_samples > 1:
                    weight_N = reweight(drawn, part.response_length_R)
                elbo_S = segment_sum(weight_N.double() * log_p_N, drawn.offsets_S1)
                parts[name].append(elbo_S.view(-1, num_samples))
        for name, values in parts.items():
            found[name].append(torch.cat(values))
    return {name: torch.stack(values) for name, values in found.items()}


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    facts = provenance("cpu")
    batch, mask_token_id = load_responses(args.models, args.pairs)
    trained = json.loads((args.models / "training.json").read_text())
    for stage in args.stages:
        model = load_model(str(args.models / stage)).eval()
        for num_samples in args.num_samples:
            for design in args.designs or WEIGHTINGS:
                if design == "paper" and num_samples != max(args.num_samples):
                    continue  # its samples are independent: the variance of the mean is that of one, over K
                started = time.perf_counter()
                found = elbos(
                    model,
                    batch,
                    design,
                    num_samples,
                    mask_token_id=mask_token_id,
                    num_repeats=args.repeats,
                    seed=args.seed,
                )
                row = facts | {
                    "model": args.models.name,
                    "model_seed": trained["seed"],
                    "stage": stage,
                    "seed": args.seed,
                    "num_samples": num_samples,
                    "repeats": args.repeats,
                    "tokens": batch.response_length_R.tolist(),
                    "seconds": round(time.perf_counter() - started, 1),
                    "designs": {name: moments(elbo_QRK, name) for name, elbo_QRK in found.items()},
                }
                RESULTS.mkdir(exist_ok=True)
                with VARIANCES.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                for name, told in row["designs"].items():
                    mean = sum(told["variance"]) / len(told["variance"])
                    print(
                        f"{args.models.name} {stage} K={num_samples} {name:<26}"
                        f"{mean:10.2f} {told['mean']:10.2f} {row['seconds']:6.1f} s",
                        flush=True,
                    )


def gradient(args: argparse.Namespace) -> None:
    """Trace of the variance of the gradient of -B / L (nats per token), for the chosen responses."""
    torch.set_num_threads(1)
    facts = provenance("cpu")
    pairs, mask_token_id = load_responses(args.models, args.pairs)
    batch = completions(pairs)
    trained = json.loads((args.models / "training.json").read_text())
    for stage in args.stages:
        model = load_model(str(args.models / stage)).eval().requires_grad_(False)
        probe = variance.Probe(model.model.layers[0].mlp.up_proj)
        for num_samples in args.num_samples:
            for design in args.designs:
                started = time.perf_counter()
                scheme = variance.Scheme(design, num_samples)
                total, square_R = 0.0, 0.0
                for repeat in range(args.repeats):
                    found = []
                    for part in split_by_tokens(batch, num_samples, 16_384):
                        packed = pack(part, scheme.draw(part, args.seed, repeat), mask_token_id)
                        with probe.attached():
                            nll_N = model(**packed.model_inputs()).nll
                        loss_R = denoising_loss(elbo(nll_N, packed), part.response_length_R)
                        bounds = packed.cu_seqlens_S1[::num_samples].tolist()
                        found += probe.gradients(loss_R.sum(), bounds)
                    gradient_RG = torch.stack(found).double()
                    total = total + gradient_RG
                    square_R = square_R + gradient_RG.square().sum(1)
                mean_RG = total / args.repeats
                value_R = (square_R - args.repeats * mean_RG.square().sum(1)) / (args.repeats - 1)
                row = facts | {
                    "model": args.models.name,
                    "model_seed": trained["seed"],
                    "stage": stage,
                    "seed": args.seed,
                    "design": design,
                    "num_samples": num_samples,
                    "repeats": args.repeats,
                    "seconds": round(time.perf_counter() - started, 1),
                    "variance": short(value_R),
                }
                with GRADIENTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['model']} {stage} K={num_samples} {design:<14}{value_R.mean():.4g}", flush=True)


def completions(pairs: ResponseBatch) -> ResponseBatch:
    """The chosen responses as a batch of their own."""
    ends = pairs.length_R.cumsum(0)
    starts = ends - pairs.length_R
    kept = [pairs.tokens_U[a:b] for a, b in zip(starts[0::2].tolist(), ends[0::2].tolist(), strict=True)]
    return ResponseBatch(
        tokens_U=torch.cat(kept),
        prompt_length_R=pairs.prompt_length_R[0::2],
        response_length_R=pairs.response_length_R[0::2],
        example_R=pairs.example_R[0::2],
        side_R=pairs.side_R[0::2],
        num_sides=1,
    )


def moments(elbo_QRK: Tensor, name: str) -> dict:
    """Variances over draws, unbiased: of each response, and of each pair's chosen - rejected.

    Of "paper" they are those of one sample over K, from all Q K samples.
    """
    num_samples = elbo_QRK.shape[2]
    value_QR = elbo_QRK.transpose(1, 2).flatten(0, 1) if name == "paper" else elbo_QRK.mean(2)
    count = num_samples if name == "paper" else 1
    difference_QB = value_QR[:, 0::2] - value_QR[:, 1::2]
    return {
        "mean": round(float(value_QR.mean()), 3),
        "variance": short(value_QR.var(0) / count),
        "difference": short(difference_QB.var(0) / count),
    }


def short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def load() -> dict[tuple[str, str], dict[tuple[str, int, int], dict]]:
    """(model, stage) -> (design, K, replicates) -> variances; runs with other seeds are averaged by repeats.

    n independent replicates of K / n samples have 1 / n of the variance of one, so they are not drawn anew.
    """
    runs: dict = {}
    for line in VARIANCES.read_text().splitlines():
        row = json.loads(line)
        for name, told in row["designs"].items():
            group = runs.setdefault((row["model"], row["stage"]), {})
            by_seed = group.setdefault((name, row["num_samples"]), {})
            by_seed[row["seed"]] = (row["repeats"], row["tokens"], told)
    found: dict = {}
    for key, group in runs.items():
        out = found[key] = {}
        sizes = sorted({num_samples for _, num_samples in group})
        for (name, num_samples), by_seed in group.items():
            merged = merge(list(by_seed.values()))
            if name == "paper":
                for size in (1, *sizes):
                    out[name, size, 1] = scaled(merged, num_samples / size)
                continue
            out[name, num_samples, 1] = merged
            out[name, 2 * num_samples, 2] = scaled(merged, 0.5)
        for name, num_samples, replicates in list(out):
            if num_samples not in (1, *sizes):
                del out[name, num_samples, replicates]
    return found


def merge(runs: list[tuple[int, list[int], dict]]) -> dict:
    total = sum(repeats for repeats, _, _ in runs)

    def average(name: str) -> Tensor:
        return sum(torch.tensor(told[name]).double() * repeats for repeats, _, told in runs) / total

    return {
        "repeats": total,
        "tokens": torch.tensor(runs[0][1]),
        "mean": sum(told["mean"] * repeats for repeats, _, told in runs) / total,
        "variance": average("variance"),
        "difference": average("difference"),
    }


def scaled(told: Mapping, factor: float) -> dict:
    return dict(told) | {name: told[name] * factor for name in ("variance", "difference")}


def summaries() -> Iterator[dict]:
    """One row per (model, stage, lengths, design, K, replicates); ratios are to `paper` at equal K."""
    for (model, stage), group in sorted(load().items()):
        for lengths in ("all", "short", "long"):
            for (name, num_samples, replicates), told in sorted(group.items(), key=lambda item: item[0][1:]):
                paper = group.get(("paper", num_samples, 1))
                if paper is None:
                    continue
                pick = half(told["tokens"], lengths)
                pairs = half(told["tokens"].view(-1, 2).sum(1), lengths)
                row = {
                    "model": model,
                    "stage": stage,
                    "lengths": lengths,
                    "design": name,
                    "num_samples": num_samples,
                    "num_replicates": replicates,
                    "responses": int(pick.sum()),
                    "repeats": told["repeats"],
                    "mean_tokens": f"{told['tokens'][pick].double().mean():.4g}",
                    "elbo": f"{told['mean']:.4g}",
                }
                value_R, paper_R = told["variance"][pick], paper["variance"][pick]
                put(row, "variance", variance.mean_over_pairs(value_R))
                row["std"] = f"{value_R.mean().sqrt():.4g}"
                put(row, "ratio", variance.mean_over_pairs(value_R, paper_R))
                value_B = told["difference"][pairs]
                apart_B = paper["variance"].view(-1, 2).sum(1)[pairs]
                put(row, "difference_variance", variance.mean_over_pairs(value_B))
                put(row, "difference_ratio", variance.mean_over_pairs(value_B, apart_B))
                yield row


def half(tokens: Tensor, lengths: str) -> Tensor:
    """Which are at most as long as the median, which are longer, or all of them."""
    if lengths == "all":
        return torch.ones_like(tokens, dtype=torch.bool)
    return (tokens <= tokens.median()) == (lengths == "short")


def put(row: dict, name: str, estimate: variance.Estimate) -> None:
    row[name] = f"{estimate.value:.4g}"
    row[f"{name}_low"], row[f"{name}_high"] = f"{estimate.low:.4g}", f"{estimate.high:.4g}"


def report(args: argparse.Namespace) -> None:
    rows = list(summaries())
    with (RESULTS / "elbo.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        if row["lengths"] != args.lengths or row["num_samples"] not in args.num_samples:
            continue
        print(
            f"{row['model']:<10}{row['stage']:<11}K={row['num_samples']:<3}{row['design']:<26}"
            f"x{row['num_replicates']}  std {row['std']:>7}  ratio {row['ratio']:>7} "
            f"[{row['ratio_low']}, {row['ratio_high']}]  difference {row['difference_ratio']} "
            f"[{row['difference_ratio_low']}, {row['difference_ratio_high']}]"
        )

    say_gradients()


def say_gradients() -> None:
    """Ratio of the gradient's variance to that of `paper` at equal K, per model and stage."""
    rows = [json.loads(line) for line in GRADIENTS.read_text().splitlines()] if GRADIENTS.exists() else []
    found = {
        (row["model"], row["stage"], row["num_samples"], row["design"]): torch.tensor(row["variance"])
        for row in rows
    }
    for (model, stage, num_samples, design), value_R in found.items():
        paper_R = found[model, stage, num_samples, "paper"]
        told = variance.mean_over_pairs(value_R, paper_R)
        print(
            f"SFT gradient  {model:<10}{stage:<11}K={num_samples:<3}{design:<19}"
            f"{told.value:.2f} [{told.low:.2f}, {told.high:.2f}]"
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure")
    command.add_argument("models", type=Path)
    command.add_argument("--stages", nargs="+", default=["random", "sft-early", "reference"])
    command.add_argument("--designs", nargs="*", choices=sorted(WEIGHTINGS), help="unset: all")
    command.add_argument("--num-samples", nargs="+", type=int, default=[8, 4, 2, 16])
    command.add_argument("--pairs", type=int, default=32)
    command.add_argument("--repeats", type=int, default=16)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=measure)
    command = commands.add_parser("gradient")
    command.add_argument("models", type=Path)
    command.add_argument("--stages", nargs="+", default=["sft-early", "reference"])
    command.add_argument("--designs", nargs="*", default=["paper", "mirrored-balanced", "coupled"])
    command.add_argument("--num-samples", nargs="+", type=int, default=[4, 2])
    command.add_argument("--pairs", type=int, default=32)
    command.add_argument("--repeats", type=int, default=8)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=gradient)
    command = commands.add_parser("report")
    command.add_argument("--lengths", choices=("all", "short", "long"), default="all")
    command.add_argument("--num-samples", nargs="+", type=int, default=[4, 8], help="which to print")
    command.set_defaults(run=report)
    args = parser.parse_args(arguments)
    args.run(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
