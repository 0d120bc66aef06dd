"""Variance of score, loss and gradient under the mask designs, on models of benchmarks/variance_models.py.

    python benchmarks/bench_variance.py measure runs/variance/gsm8k --set table2 --pairs 128 --repeats 8
    python benchmarks/bench_variance.py measure runs/variance/gsm8k --set goal --pairs 128 --repeats 16
    python benchmarks/bench_variance.py measure runs/variance/gsm8k --set designs k8 --pairs 64 --repeats 6
    python benchmarks/bench_variance.py weights runs/variance/gsm8k --drift late early --pairs 24 --repeats 6
    python benchmarks/bench_variance.py report
    python benchmarks/bench_variance.py allocation

`measure` appends the scores of every pair under every fresh draw, and the trace of the gradient's variance at
the up-projection of block 0 as in the paper, to benchmarks/results/variance_scores.jsonl. `report` turns that
file into benchmarks/results/variance.csv (ratios to the paper's design at equal forwards, 95 % intervals from
resampled pairs) and benchmarks/results/variance.png. `weights` compares re-weightings of the same draws.
"""

import argparse
import csv
import datetime
import functools
import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import load_dataset
from matplotlib import pyplot as plt
from online_covariance import OnlineCovariance

from vrpo import data
from vrpo.batch import MaskDraw, ResponseBatch
from vrpo.estimator.designs import DESIGNS
from vrpo.estimator.packing import pack
from vrpo.estimator.row_weights import balanced, token_ratio
from vrpo.evaluation import variance
from vrpo.evaluation.variance import Sampled, Scheme
from vrpo.models import load_model, load_tokenizer
from vrpo.step import split_by_tokens
from vrpo_kernels import segment_sum

RESULTS = Path(__file__).parent / "results"
SCORES = RESULTS / "variance_scores.jsonl"
WEIGHTS = RESULTS / "variance_weightings.jsonl"
BETA = 0.2

TABLE2 = [
    Scheme("paper", 4),
    Scheme("paper", 1),
    Scheme("paper", 8),
    Scheme("paper", 4, masks_per_level=4),
    Scheme("paper", 4, masks_per_level=2),
    Scheme("paper", 4, shared=False),
]
# "positions": both sides of a pair read the same random words. The default of VRPOConfig is the last of "k8".
GOAL = [
    Scheme(design, 4, pair_masks=pair_masks)
    for pair_masks in ("independent", "positions")
    for design in ("paper", "balanced", "ratio")
]
SETS = {
    "table2": TABLE2,
    "goal": GOAL,
    "designs": [Scheme(name, 4) for name in DESIGNS if name not in ("paper", "balanced", "ratio", "cyclic")]
    + [Scheme(name, 4, pair_masks="levels") for name in ("paper", "balanced")],
    "k2": [Scheme("paper", 2), Scheme("balanced", 2, pair_masks="positions")],
    "k8": [
        Scheme("paper", 8),
        Scheme("balanced", 8),
        Scheme("ratio", 8),
        Scheme("balanced", 8, pair_masks="positions"),
        Scheme("balanced", 8, num_replicates=2, pair_masks="positions"),
    ],
}


def load_pairs(args: argparse.Namespace) -> tuple[torch.nn.Module, ResponseBatch]:
    """The reference model and the first held-out pairs."""
    reference = load_model(str(args.models / "reference"), dtype=args.dtype).eval()
    tokenizer = load_tokenizer(str(args.models / "reference"))
    max_length = json.loads((args.models / "training.json").read_text())["max_length"]
    rows = load_dataset("json", data_files=str(args.models / "pairs.jsonl"), split="train")
    rows = rows.select(range(min(args.pairs, len(rows))))
    prepared, _ = data.prepare_pairs(
        rows,
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_length // 4,
        vocab_size=reference.config.vocab_size,
    )
    return reference, data.PairCollator()(list(prepared))["responses"]


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    reference, batch = load_pairs(args)
    schemes = [scheme for name in args.set for scheme in SETS[name]]
    for drift in args.drift:
        policy = load_model(str(args.models / drift), dtype=args.dtype).eval().requires_grad_(False)
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


def short(values: torch.Tensor) -> list[float]:
    """Six digits of every value: enough for variances, and half the file."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def stamp(args: argparse.Namespace, drift: str) -> dict:
    """Where a row comes from."""
    return {
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
        "model": args.models.name + ("" if args.dtype == "float32" else f"-{args.dtype}"),
        "drift": drift,
        "seed": args.seed,
    }


def write(args: argparse.Namespace, drift: str, scheme: Scheme, sampled: Sampled, seconds: float) -> None:
    row = stamp(args, drift) | {
        "scheme": asdict(scheme),
        "seconds": round(seconds, 1),
        "scores": [short(score_Q) for score_Q in sampled.score_BQ],
        "gradient": None if sampled.gradient_B is None else short(sampled.gradient_B),
        "iid_variance": None if sampled.iid_variance_B is None else short(sampled.iid_variance_B),
        "bias": None if sampled.bias_BQ is None else short(sampled.bias_BQ.mean(1)),
        "jackknife": None if sampled.jackknife_BQ is None else short(sampled.jackknife_BQ.mean(1)),
    }
    RESULTS.mkdir(exist_ok=True)
    with SCORES.open("a") as file:
        file.write(json.dumps(row) + "\n")


WEIGHTINGS = {
    "spaced": None,
    "balanced": balanced,
    "balanced, signal 0.3": functools.partial(balanced, signal=0.3),
    "balanced, signal 3": functools.partial(balanced, signal=3.0),
    "ratio": token_ratio,
}


def weights(args: argparse.Namespace) -> None:
    """Score variance of every weighting on the *same* draws of the design `spaced`, and the paper's design.

    Masks, not weights, cost forwards, so one evaluation serves all weightings and all drifts. The paper's
    variance comes from the same rows: single samples of `spaced`, weighted by their shares, have its law, so
    that second moments over levels are integrated rather than sampled.
    """
    torch.set_num_threads(args.threads)
    reference, batch = load_pairs(args)
    policies = [load_model(str(args.models / drift)).eval() for drift in args.drift]
    scheme = Scheme("spaced", args.num_samples)
    names = [*WEIGHTINGS, "balanced, tables on line"]
    online = [OnlineCovariance() for _ in policies]
    scores = torch.zeros(len(policies), len(names), args.repeats, batch.num_examples).double()
    moments = torch.zeros(len(policies), 2, args.repeats, len(batch.example_R)).double()
    started = time.perf_counter()
    for repeat in range(args.repeats):
        first = 0
        for part in split_by_tokens(batch, args.num_samples, 16_384):
            drawn = scheme.draw(part, args.seed, repeat)
            packed = pack(part, drawn, reference.config.mask_token_id)
            with torch.no_grad():
                base_N = reference(**packed.model_inputs()).nll.double()
                ratio_N = [base_N - p(**packed.model_inputs()).nll.double() for p in policies]
            pairs = slice(first, first + part.num_examples)
            rows = slice(2 * first, 2 * (first + part.num_examples))
            for drift, value_N in enumerate(ratio_N):
                for index, reweight in enumerate([*WEIGHTINGS.values(), online[drift].weights]):
                    weight_N = reweight(drawn, part.response_length_R) if reweight else drawn.weight_N
                    elbo_R = segment_sum(weight_N.double() * value_N, drawn.offsets_S1)
                    elbo_R = elbo_R.view(-1, args.num_samples).mean(1)
                    scores[drift, index, repeat, pairs] = BETA * (elbo_R[0::2] - elbo_R[1::2])
            for drift, value_N in enumerate(ratio_N):
                moments[drift, :, repeat, rows] = paper_moments(drawn, part.response_length_R, value_N)
                online[drift].update(drawn, part.response_length_R, value_N)
            first += part.num_examples
    num_draws = args.repeats
    for drift, name in enumerate(args.drift):
        mean_R, square_R = moments[drift].mean(1)
        # The square of a mean over draws is too high by the variance of that mean.
        square_of_mean_R = mean_R.square() - moments[drift, 0].var(0) / num_draws
        paper_R = square_R - square_of_mean_R
        paper_B = BETA**2 * paper_R.view(-1, 2).sum(1) / args.num_samples
        row = stamp(args, name) | {
            "num_samples": args.num_samples,
            "repeats": args.repeats,
            "seconds": round(time.perf_counter() - started),
            "variance": {"paper": short(paper_B)},
            "mean": {},
        }
        for index, weighting in enumerate(names):
            row["variance"][weighting] = short(scores[drift, index].var(0))
            row["mean"][weighting] = short(scores[drift, index].mean(0))
        RESULTS.mkdir(exist_ok=True)
        with WEIGHTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        say_weights(row)


def paper_moments(drawn: MaskDraw, length_R: torch.Tensor, value_N: torch.Tensor) -> torch.Tensor:
    """(mean, second moment) of one l-form sample, from the samples of a `spaced` draw, (2, R)."""
    num_samples = drawn.num_samples
    count_S = drawn.offsets_S1.diff()
    length_S = length_R.repeat_interleave(num_samples).double()
    # weight = (K / 2) share (L + 1) / count, so a sample stands for share / 2 = weight count / (K (L + 1)).
    total_S = segment_sum(drawn.weight_N.double(), drawn.offsets_S1)
    share_S = total_S / (num_samples * (length_S + 1))
    value_S = segment_sum(value_N, drawn.offsets_S1) * (length_S + 1) / count_S.clamp(min=1)
    mean_R = (share_S * value_S).view(-1, num_samples).sum(1)
    square_R = (share_S * value_S.square()).view(-1, num_samples).sum(1)
    # Couples have levels 0..L and weights (L+1)/l, the l-form 1..L and L/l: same mean, L/(L+1) of the square.
    square_R = square_R * length_R / (length_R + 1)
    return torch.stack([mean_R, square_R])


def say_weights(row: dict) -> None:
    paper_B = torch.tensor(row["variance"]["paper"])
    print(f"{row['model']} {row['drift']} K={row['num_samples']}: paper {paper_B.mean():.4g}")
    for name, values in row["variance"].items():
        told = variance.mean_over_pairs(torch.tensor(values), paper_B)
        print(f"    {name:<22}{told.value:.3f} [{told.low:.3f}, {told.high:.3f}]", flush=True)


def load() -> dict[tuple[str, str], dict[Scheme, Sampled]]:
    """(model, drift) -> scheme -> scores.

    Pairs are always the first of the file, so schemes with fewer are compared on those. Seeds add repeats; of
    one seed the run with the most scores counts.
    """
    found: dict = {}
    for line in SCORES.read_text().splitlines():
        row = json.loads(line)
        row["scores"] = torch.tensor(row["scores"], dtype=torch.float64)
        by_seed = found.setdefault((row["model"], row["drift"]), {}).setdefault(Scheme(**row["scheme"]), {})
        known = by_seed.get(row["seed"])
        if known is None or known["scores"].numel() < row["scores"].numel():
            by_seed[row["seed"]] = row
    return {
        key: {scheme: merge(list(by_seed.values())) for scheme, by_seed in group.items()}
        for key, group in found.items()
    }


def merge(rows: list[dict]) -> Sampled:
    """All repeats of a scheme; variances are averaged over the runs that measured them, by repeats."""
    most = max(len(row["scores"]) for row in rows)
    rows = [row for row in rows if len(row["scores"]) == most]
    scores = torch.cat([row["scores"] for row in rows], dim=1)

    def average(name: str) -> torch.Tensor | None:
        known = [row for row in rows if row.get(name)]
        if not known:
            return None
        repeats = torch.tensor([len(row["scores"][0]) for row in known]).double()
        values = torch.stack([torch.tensor(row[name]).double() for row in known])
        return (values * repeats[:, None]).sum(0) / repeats.sum()

    bias_BQ, jackknife_BQ = (
        None if mean_B is None else mean_B[:, None] for mean_B in (average("bias"), average("jackknife"))
    )
    return Sampled(scores, average("gradient"), average("iid_variance"), bias_BQ, jackknife_BQ)


def report(args: argparse.Namespace) -> None:
    rows = []
    for (model, drift), group in sorted(load().items()):
        true_B = variance.true_scores(group)
        for scheme, sampled in group.items():
            row = {"source": "draws", "model": model, "drift": drift} | asdict(scheme)
            row["pairs"], row["repeats"] = sampled.score_BQ.shape
            for name, estimate in variance.summarise(scheme, group, true_B).items():
                put(row, name, estimate)
            rows.append(row)
    rows += weighting_rows()
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (RESULTS / "variance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        say(row)
    plot(rows)


def put(row: dict, name: str, estimate: variance.Estimate) -> None:
    row[name] = f"{estimate.value:.4g}"
    row[f"{name}_low"], row[f"{name}_high"] = f"{estimate.low:.4g}", f"{estimate.high:.4g}"


def weighting_rows() -> list[dict]:
    """The rows of `weights`; runs with other seeds are averaged by their repeats."""
    runs = [json.loads(line) for line in WEIGHTS.read_text().splitlines()] if WEIGHTS.exists() else []
    groups: dict = {}
    for run in runs:
        groups.setdefault((run["model"], run["drift"], run["num_samples"]), []).append(run)
    rows = []
    for (model, drift, num_samples), group in groups.items():
        repeats = sum(run["repeats"] for run in group)
        mean = {
            name: sum(torch.tensor(run["variance"][name]) * run["repeats"] / repeats for run in group)
            for name in group[0]["variance"]
        }
        paper_B = mean["paper"]
        for name, value_B in mean.items():
            row = {"source": "weights", "model": model, "drift": drift, "design": name}
            row |= asdict(Scheme(name, num_samples))
            row |= {"pairs": len(value_B), "repeats": repeats}
            put(row, "score_variance", variance.mean_over_pairs(value_B))
            if name != "paper":
                put(row, "score_ratio", variance.mean_over_pairs(value_B, paper_B))
            rows.append(row)
    return rows


def say(row: dict) -> None:
    label = (
        f"{row['source']:<8}{row['model']:<11}{row['drift']:<6}{row['design']:<22}K={row['num_samples']:<3}"
    )
    label += "" if row["masks_per_level"] == 1 else f"n_yt={row['masks_per_level']} "
    label += "" if row["shared"] else "unshared "
    label += "" if row["pair_masks"] == "independent" else f"{row['pair_masks']} "
    label += "" if row["num_replicates"] == 1 else f"{row['num_replicates']} replicates "
    names = ("score_variance", "loss_variance", "gradient_variance", "loss_bias", "jackknife_bias")
    names += ("sign_flips", "score_bias")
    told = [f"{name} {row[name]}" for name in names if name in row]
    names = ("score_ratio", "loss_ratio", "gradient_ratio")
    told += [f"{n} {row[n]} [{row[n + '_low']}, {row[n + '_high']}]" for n in names if n in row]
    print(label, "  ".join(told))


_LINES = {
    "paper": "black",
    "balanced": "tab:orange",
    "ratio": "tab:blue",
    "paper, positions": "gray",
    "balanced, positions": "tab:red",
    "ratio, positions": "tab:purple",
}


def plot(rows: list[dict]) -> None:
    """Above: score variance against forwards. Below: ratio to the paper's design at K = 4, every design.

    Of a design that was measured on several sets of pairs the largest set counts.
    """
    shown = [
        row
        for row in sorted(rows, key=lambda row: row["pairs"])
        if row["masks_per_level"] == 1
        and row["shared"]
        and row["source"] == "draws"
        and row["num_replicates"] == 1
        and row["model"] in ("arithmetic", "gsm8k")
    ]
    panels = sorted({(row["model"], row["drift"]) for row in shown})
    figure, axes = plt.subplots(2, len(panels), figsize=(3.6 * len(panels), 7.5), layout="constrained")
    for (above, below), panel in zip(axes.T, panels, strict=True):
        lines: dict = {}
        ratios: dict = {}
        for row in shown:
            if (row["model"], row["drift"]) != panel:
                continue
            name = row["design"]
            name += "" if row["pair_masks"] == "independent" else f", {row['pair_masks']}"
            if name in _LINES:
                lines.setdefault(name, {})[row["num_samples"]] = spread(row, "score_variance")
            if row["num_samples"] == 4 and "score_ratio" in row:
                ratios[name] = spread(row, "score_ratio")
        for name, color in _LINES.items():
            known = sorted(lines.get(name, {}).items())
            if known:
                number, (value, low, high) = [k for k, _ in known], zip(*(v for _, v in known), strict=True)
                above.errorbar(
                    number, value, [low, high], marker="o", ms=3, lw=1, capsize=2, color=color, label=name
                )
        above.set(xscale="log", yscale="log", title=f"{panel[0]}, {panel[1]} drift")
        above.set_xlabel("forwards per response and model")
        above.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        above.minorticks_off()
        above.legend(fontsize=7)
        above.grid(alpha=0.3)
        ordered = sorted(ratios.items(), key=lambda item: -item[1][0])
        for place, (name, (value, low, high)) in enumerate(ordered):
            color = _LINES.get(name, "silver")
            below.errorbar(value, place, xerr=[[low], [high]], marker="o", ms=4, capsize=2, color=color)
        below.axvline(1, color="black", lw=0.8)
        below.axvline(0.5, color="black", lw=0.5, ls=":")
        below.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=7)
        below.set(xlim=(0, 2), xlabel="score variance / the paper's, K = 4")
        below.grid(alpha=0.3, axis="x")
    axes[0][0].set_ylabel("variance of the score")
    figure.savefig(RESULTS / "variance.png", dpi=110)


def spread(row: dict, name: str) -> tuple[float, float, float]:
    """A value and how far its interval reaches below and above."""
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return value, value - low, high - value


def allocation(args: argparse.Namespace) -> None:
    """Variance of the batch gradient at equal forwards if pairs get unequal K, against the same K for all.

    With G_b the gradient variance of pair b per forward and K_b its forwards, the batch has sum_b G_b / K_b;
    K_b ~ sqrt(G_b) is best but needs G_b. Rules a trainer could follow know only a first look at the score.
    It is given for free here, except in the last figure: there 2 of 8 forwards pay for it, since samples that
    chose K_b may not be used again; even so in the rule's favour, as the look is that of 4 forwards.
    """
    for (model, drift), group in sorted(load().items()):
        for scheme, sampled in group.items():
            if (
                scheme.num_samples != 4
                or sampled.gradient_B is None
                or not scheme.shared
                or scheme.masks_per_level > 1
            ):
                continue
            per_forward_B = sampled.gradient_B * scheme.num_samples
            score_BQ = sampled.score_BQ[: len(per_forward_B)]

            def relative(share_B: torch.Tensor, per_forward_B=per_forward_B) -> float:
                return float((per_forward_B / (share_B / share_B.mean())).mean() / per_forward_B.mean())

            looks = [torch.sigmoid(-score_B) for score_B in score_BQ.T]
            rules = {
                "sqrt(G), unknowable": relative(per_forward_B.sqrt()),
                "sigmoid(-s), true s": relative(torch.sigmoid(-score_BQ.mean(1)).clamp(min=0.1)),
                "sigmoid(-s), one look": sum(relative(x.clamp(min=0.1)) for x in looks) / len(looks),
                "sigmoid(-s) + 1/2, one look": sum(relative(x + 0.5) for x in looks) / len(looks),
            }
            rules["the same, look paid for"] = rules["sigmoid(-s) + 1/2, one look"] * 8 / 6
            told = "; ".join(f"{name} {value:.2f}" for name, value in rules.items())
            print(f"{model} {drift} {scheme.design} {scheme.pair_masks}: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure")
    command.add_argument("--set", nargs="+", choices=sorted(SETS), default=["table2"])
    command.add_argument("--gradient", action=argparse.BooleanOptionalAction, default=True)
    command.set_defaults(run=measure)
    add_common(command)
    command = commands.add_parser("weights")
    command.add_argument("--num-samples", type=int, default=4)
    command.set_defaults(run=weights)
    add_common(command)
    command = commands.add_parser("allocation")
    command.set_defaults(run=allocation)
    command = commands.add_parser("report")
    command.set_defaults(run=report)
    args = parser.parse_args()
    args.run(args)


def add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("models", type=Path)
    command.add_argument("--drift", nargs="+", default=["late"])
    command.add_argument("--pairs", type=int, default=128)
    command.add_argument("--repeats", type=int, default=8)
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--dtype", default="float32", help="of weights and activations")


if __name__ == "__main__":
    main()
