"""Variance of score, loss and gradient under the mask designs, on models of benchmarks/variance_models.py.

    python benchmarks/bench_variance.py measure /tmp/models/gsm8k --set table2 --pairs 128 --repeats 8
    python benchmarks/bench_variance.py measure /tmp/models/gsm8k --set designs --drift late early
    python benchmarks/bench_variance.py report

`measure` appends the scores of every pair under every fresh draw, and the trace of the gradient's variance at
the up-projection of block 0 as in the paper, to benchmarks/results/variance_scores.jsonl. `report` turns that
file into benchmarks/results/variance.csv (ratios to the paper's design at equal forwards, 95 % intervals from
resampled pairs) and benchmarks/results/variance.png.
"""

import argparse
import csv
import datetime
import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import load_dataset

from vrpo import data, variance
from vrpo.designs import DESIGNS
from vrpo.models import load_model, load_tokenizer
from vrpo.variance import Sampled, Scheme

RESULTS = Path(__file__).parent / "results"
SCORES = RESULTS / "variance_scores.jsonl"
BETA = 0.2

TABLE2 = [
    Scheme("paper", 4),
    Scheme("paper", 1),
    Scheme("paper", 8),
    Scheme("paper", 4, masks_per_level=4),
    Scheme("paper", 4, masks_per_level=2),
    Scheme("paper", 4, shared=False),
]
SETS = {
    "table2": TABLE2,
    "headline": [Scheme(name, 4) for name in ("paper", "balanced", "ratio", "folded", "spaced")],
    "designs": [
        Scheme(name, 4)
        for name in DESIGNS
        if name not in ("paper", "balanced", "ratio", "folded", "spaced", "cyclic")
    ]
    + [Scheme("paper", 4, share_levels=True)],
    "k2": [Scheme(name, 2) for name in ("paper", "folded")],
    "k8": [Scheme(name, 8) for name in ("paper", "balanced", "ratio", "folded")],
    "k16": [Scheme(name, 16) for name in ("paper", "balanced", "ratio")],
}


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    reference = load_model(str(args.models / "reference")).eval()
    tokenizer = load_tokenizer(str(args.models / "reference"))
    rows = load_dataset("json", data_files=str(args.models / "pairs.jsonl"), split="train")
    rows = rows.select(range(min(args.pairs, len(rows))))
    prepared, _ = data.prepare_pairs(
        rows,
        tokenizer,
        max_length=args.max_length,
        max_prompt_length=args.max_length // 4,
        vocab_size=reference.config.vocab_size,
    )
    batch = data.PairCollator()(list(prepared))["responses"]
    schemes = [scheme for name in args.set for scheme in SETS[name]]
    for drift in args.drift:
        policy = load_model(str(args.models / drift)).eval().requires_grad_(False)
        for scheme in schemes:
            started = time.perf_counter()
            sampled = variance.sample(
                policy,
                reference,
                batch,
                scheme,
                mask_token_id=reference.config.mask_token_id,
                beta=BETA,
                num_repeats=args.repeats,
                seed=args.seed,
                probe=policy.model.layers[0].mlp.up_proj if args.gradient else None,
            )
            seconds = time.perf_counter() - started
            write(args, drift, scheme, sampled, seconds)
            spread = variance.score_variance(sampled).mean()
            print(f"{drift} {scheme}: Var score {spread:.3f}, {seconds:.0f} s", flush=True)


def write(args: argparse.Namespace, drift: str, scheme: Scheme, sampled: Sampled, seconds: float) -> None:
    def short(values: torch.Tensor) -> list:
        return [float(f"{value:.6g}") for value in values.tolist()]

    row = {
        "date": datetime.date.today().isoformat(),
        "git": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        ).stdout.strip(),
        "torch": torch.__version__,
        "device": "cpu",
        "model": args.models.name,
        "drift": drift,
        "scheme": asdict(scheme),
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "scores": [short(score_Q) for score_Q in sampled.score_BQ],
        "gradient": None if sampled.gradient_B is None else short(sampled.gradient_B),
        "iid_variance": None if sampled.iid_variance_B is None else short(sampled.iid_variance_B),
    }
    RESULTS.mkdir(exist_ok=True)
    with SCORES.open("a") as file:
        file.write(json.dumps(row) + "\n")


def load() -> dict[tuple[str, str], dict[Scheme, Sampled]]:
    """(model, drift) -> scheme -> scores; runs with other seeds add repeats, and average gradient traces."""
    found: dict = {}
    for line in SCORES.read_text().splitlines():
        row = json.loads(line)
        group = found.setdefault((row["model"], row["drift"]), {})
        group.setdefault(Scheme(**row["scheme"]), []).append(row)
    return {key: {scheme: merge(rows) for scheme, rows in group.items()} for key, group in found.items()}


def merge(rows: list[dict]) -> Sampled:
    """All repeats of a scheme on the pairs that every run had; variances are averaged over the runs."""
    num_pairs = min(len(row["scores"]) for row in rows)
    scores = torch.cat([torch.tensor(row["scores"][:num_pairs]).double() for row in rows], dim=1)

    def average(name: str) -> torch.Tensor | None:
        known = [row for row in rows if row.get(name)]
        if not known:
            return None
        repeats = torch.tensor([len(row["scores"][0]) for row in known]).double()
        size = min(len(row[name]) for row in known)
        values = torch.stack([torch.tensor(row[name][:size]).double() for row in known])
        return (values * repeats[:, None]).sum(0) / repeats.sum()

    iid_variance_B = average("iid_variance")
    if iid_variance_B is not None:
        iid_variance_B = iid_variance_B[:num_pairs]
    return Sampled(scores, average("gradient"), iid_variance_B)


def report(_: argparse.Namespace) -> None:
    rows = []
    for (model, drift), group in sorted(load().items()):
        true_B = variance.true_scores(group)
        for scheme, sampled in group.items():
            row = {"model": model, "drift": drift} | asdict(scheme)
            row["pairs"], row["repeats"] = sampled.score_BQ.shape
            for name, estimate in variance.summarise(scheme, group, true_B).items():
                row[name] = f"{estimate.value:.4g}"
                row[f"{name}_low"], row[f"{name}_high"] = f"{estimate.low:.4g}", f"{estimate.high:.4g}"
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (RESULTS / "variance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        label = f"{row['model']:<11}{row['drift']:<6}{row['design']:<17}K={row['num_samples']:<3}"
        label += "" if row["masks_per_level"] == 1 else f"n_yt={row['masks_per_level']} "
        label += "" if row["shared"] else "unshared "
        label += "same level " if row["share_levels"] else ""
        shown = [
            f"{name} {row[name]}"
            for name in ("score_variance", "loss_variance", "gradient_variance")
            if name in row
        ]
        shown += [
            f"{n} {row[n]} [{row[n + '_low']}, {row[n + '_high']}]"
            for n in ("score_ratio", "loss_ratio", "gradient_ratio")
            if n in row
        ]
        shown += [f"bias {row['loss_bias']} flips {row['sign_flips']} error {row['score_error']}"]
        print(label, "  ".join(shown))
    plot(rows)


def plot(rows: list[dict]) -> None:
    from matplotlib import pyplot as plt

    panels = sorted({(row["model"], row["drift"]) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, (model, drift) in zip(axes[0], panels, strict=True):
        for design in DESIGNS:
            points = sorted(
                (row["num_samples"], *(float(row[f"score_variance{end}"]) for end in ("", "_low", "_high")))
                for row in rows
                if (row["model"], row["drift"], row["design"]) == (model, drift, design)
                and row["masks_per_level"] == 1
                and row["shared"]
                and not row["share_levels"]
            )
            if not points:
                continue
            num_samples, value, low, high = zip(*points, strict=True)
            error = [
                [v - x for v, x in zip(value, low, strict=True)],
                [x - v for v, x in zip(value, high, strict=True)],
            ]
            axis.errorbar(num_samples, value, error, marker="o", ms=3, lw=1, capsize=2, label=design)
        axis.set(xscale="log", yscale="log", title=f"{model}, {drift} drift", xlabel="forwards per response")
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("variance of the score")
    axes[0][-1].legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(RESULTS / "variance.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure")
    command.add_argument("models", type=Path)
    command.add_argument("--set", nargs="+", choices=sorted(SETS), default=["table2"])
    command.add_argument("--drift", nargs="+", default=["late"])
    command.add_argument("--pairs", type=int, default=128)
    command.add_argument("--repeats", type=int, default=8)
    command.add_argument("--gradient", action=argparse.BooleanOptionalAction, default=True)
    command.add_argument("--max-length", type=int, default=160)
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=measure)
    command = commands.add_parser("report")
    command.set_defaults(run=report)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
