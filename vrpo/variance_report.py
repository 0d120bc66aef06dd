"""`vrpo variance`: how noisy score, loss and gradient of a model pair are, by design and forwards."""

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from vrpo import data, variance
from vrpo.batch import ResponseBatch
from vrpo.checkpoint import check_writable, default_device, load_policy
from vrpo.config import VRPOConfig
from vrpo.designs import DESIGNS
from vrpo.masking import check_design
from vrpo.models import load_tokenizer, special_tokens
from vrpo.variance import Estimate, Sampled, Scheme

Figures = Mapping[Scheme, Mapping[str, Estimate]]


@dataclass
class VarianceArguments:
    """Which models and pairs, which designs, how many forwards."""

    model_name_or_path: str = field(metadata={"help": "The policy: a folder or a hub name."})
    ref_model_name_or_path: str = field(metadata={"help": "The reference: a folder or a hub name."})
    dataset_name: str = field(metadata={"help": "Preference pairs: file, folder or hub name."})
    output_file: str = field(metadata={"help": "JSON file of all figures; the plot goes beside it, .png."})
    designs: list[str] = field(
        default_factory=lambda: ["paper", "folded", "balanced", "ratio"],
        metadata={"help": f"Mask designs to compare: {', '.join(DESIGNS)}."},
    )
    num_samples: list[int] = field(
        default_factory=lambda: [2, 4, 8], metadata={"help": "Forwards per response and model, several."}
    )
    num_pairs: int = field(default=32, metadata={"help": "Pairs to measure on, the first of the data."})
    num_repeats: int = field(default=8, metadata={"help": "Fresh draws per pair and design, at least 2."})
    target_variance: float | None = field(
        default=None,
        metadata={"help": "Score variance to reach. Unset: that of the paper's design with 8 forwards."},
    )
    gradient: bool = field(
        default=False,
        metadata={"help": "Measure the gradient at the up-projection of block 0 too; twice the time."},
    )
    beta: float = field(default=VRPOConfig.beta, metadata={"help": "Weight of the log-ratio, per nat."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to use."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the weights."})
    attn_implementation: str = field(default="vrpo", metadata={"help": "As in training."})
    max_length: int = field(default=VRPOConfig.max_length, metadata={"help": "Longest prompt + response."})
    max_tokens_per_pack: int = field(default=16384, metadata={"help": "Tokens of one forward pass."})
    mask_token_id: int | None = field(default=None, metadata={"help": "Unset: the model's."})
    seed: int = field(default=0, metadata={"help": "Seed of the masks."})
    device: str | None = field(default=None, metadata={"help": "Unset: a GPU where there is one."})


@dataclass(frozen=True)
class Advice:
    """The cheapest measured or extrapolated way to a target variance."""

    design: str
    num_samples: int
    variance: float
    extrapolated: bool


def schemes_of(designs: list[str], num_samples: list[int]) -> list[Scheme]:
    """All pairs, and always the paper's design, which the others are compared with."""
    for design in designs:
        for number in num_samples:
            check_design(design, number, 1)
    names = dict.fromkeys(["paper", *designs])
    return [Scheme(name, number) for number in sorted(set(num_samples)) for name in names]


def advise(figures: Figures, target: float, *, unbiased: bool) -> Advice | None:
    """The design and the fewest forwards whose score variance is at most the target.

    Measured forwards are preferred. Beyond them variance is taken to fall as 1 / K from the largest K
    measured, which is exact for the paper's design and cautious for stratified ones; K is rounded up to even.
    Returns: None if no design qualifies (none measured is unbiased).
    """
    best: dict[str, list[tuple[int, float]]] = {}
    for scheme, told in figures.items():
        if DESIGNS[scheme.design].unbiased or not unbiased:
            point = (scheme.num_samples, told["score_variance"].value)
            best.setdefault(scheme.design, []).append(point)
    options = []
    for design, points in best.items():
        points.sort()
        enough = [(number, value) for number, value in points if value <= target]
        if enough:
            options.append(Advice(design, *enough[0], extrapolated=False))
            continue
        number, value = points[-1]
        needed = 2 * math.ceil(number * value / target / 2)
        options.append(Advice(design, needed, number * value / needed, extrapolated=True))
    return min(options, key=lambda advice: (advice.num_samples, advice.variance), default=None)


def measure(args: VarianceArguments) -> dict[Scheme, Sampled]:
    """Load models and pairs, and sample every scheme with a progress bar."""
    schemes = schemes_of(args.designs, args.num_samples)
    if args.num_repeats < 2:
        raise ValueError(f"num_repeats must be at least 2, got {args.num_repeats}")
    device = default_device(args.device)
    tokenizer = load_tokenizer(args.model_name_or_path)
    policy, reference = (
        load_policy(path, dtype=args.dtype, attn_implementation=args.attn_implementation, revision="main")
        .to(device)
        .eval()
        .requires_grad_(False)
        for path in (args.model_name_or_path, args.ref_model_name_or_path)
    )
    mask_token_id = args.mask_token_id
    if mask_token_id is None:
        mask_token_id = special_tokens(policy.config, tokenizer).mask
    batch = _pairs(args, tokenizer, policy.config.vocab_size)
    found = {}
    for scheme in (bar := tqdm(schemes, desc="Designs", unit="design")):
        bar.set_postfix_str(f"{scheme.design}, {scheme.num_samples} forwards")
        found[scheme] = variance.sample(
            policy,
            reference,
            batch,
            scheme,
            mask_token_id=mask_token_id,
            beta=args.beta,
            num_repeats=args.num_repeats,
            seed=args.seed,
            max_tokens_per_pack=args.max_tokens_per_pack,
            device=device,
            probe=policy.model.layers[0].mlp.up_proj if args.gradient else None,
        )
    return found


def _pairs(args: VarianceArguments, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> ResponseBatch:
    rows = data.load_rows(args.dataset_name, config=args.dataset_config, split=args.dataset_split)
    rows = rows.select(range(min(args.num_pairs, len(rows))))
    prepared, _ = data.prepare_pairs(
        rows,
        tokenizer,
        max_length=args.max_length,
        vocab_size=vocab_size,
    )
    data.check_token_budget(prepared, max(args.num_samples), args.max_tokens_per_pack)
    return data.PairCollator()(list(prepared))["responses"]


def report(args: VarianceArguments) -> str:
    """Measure, write the JSON file and the plot, and return the table with the advice below it."""
    output = check_writable(args.output_file)
    found = measure(args)
    true_B = variance.true_scores(found)
    figures = {scheme: variance.summarise(scheme, found, true_B) for scheme in found}
    target = args.target_variance
    if target is None:
        number, value = max(
            (scheme.num_samples, told["score_variance"].value)
            for scheme, told in figures.items()
            if scheme.design == "paper"
        )
        target = value * number / 8
    lines = [table(figures), "", f"target: score variance {target:.4g}"]
    for unbiased, label in ((True, "exactly unbiased"), (False, "any")):
        advice = advise(figures, target, unbiased=unbiased)
        if advice is not None:
            how = "extrapolated from fewer" if advice.extrapolated else "measured"
            lines.append(
                f"recommended, {label}: mask_design={advice.design} num_samples={advice.num_samples} "
                f"(variance {advice.variance:.4g}, {how})"
            )
    _write_json(output, args, figures, target)
    if _can_plot():
        plot(figures, output.with_suffix(".png"))
        lines.append(f"saved {output} and {output.with_suffix('.png')}")
    else:
        lines.append(f"saved {output}; no plot, which needs matplotlib: pip install 'vrpo[plot]'")
    return "\n".join(lines) + "\n"


def table(figures: Figures) -> str:
    """One line per scheme; intervals are 95 %, from resampled pairs; ratios are to the paper's design."""
    columns = ("score_variance", "score_ratio", "loss_ratio", "gradient_ratio", "loss_bias", "sign_flips")
    shown = [name for name in columns if any(name in told for told in figures.values())]
    lines = [f"{'design':<17}{'K':>3}  {'bias':<5}" + "".join(f"{name:>25}" for name in shown)]
    for scheme, told in figures.items():
        cells = []
        for name in shown:
            estimate = told.get(name)
            text = (
                "" if estimate is None else f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
            )
            cells.append(f"{text:>25}")
        bias = "none" if DESIGNS[scheme.design].unbiased else "small"
        lines.append(f"{scheme.design:<17}{scheme.num_samples:>3}  {bias:<5}" + "".join(cells))
    return "\n".join(lines)


def _write_json(output: Path, args: VarianceArguments, figures: Figures, target: float) -> None:
    rows = [
        asdict(scheme) | {name: asdict(estimate) for name, estimate in told.items()}
        for scheme, told in figures.items()
    ]
    content = {"arguments": asdict(args), "torch": torch.__version__, "target": target, "figures": rows}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(figures: Figures, path: Path) -> None:
    """Score variance against forwards, one line per design, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis = figure.subplots()
    for design in dict.fromkeys(scheme.design for scheme in figures):
        points = [
            (scheme.num_samples, told["score_variance"])
            for scheme, told in figures.items()
            if scheme.design == design
        ]
        points.sort(key=lambda point: point[0])
        value = [estimate.value for _, estimate in points]
        below = [estimate.value - estimate.low for _, estimate in points]
        above = [estimate.high - estimate.value for _, estimate in points]
        number = [number for number, _ in points]
        axis.errorbar(number, value, [below, above], marker="o", ms=3, lw=1, capsize=2, label=design)
    numbers = sorted({scheme.num_samples for scheme in figures})
    axis.set(xscale="log", yscale="log", xlabel="forwards per response and model", ylabel="score variance")
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
