"""`vrpo variance`: how noisy score, loss and gradient of a model pair are, by design and forwards."""

import importlib.util
import io
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from vrpo import data
from vrpo.batch import ResponseBatch
from vrpo.data.output import check_output, to_json, write
from vrpo.estimator.designs import DESIGNS
from vrpo.estimator.masking import PAIR_MASKS, check_design
from vrpo.evaluation import noise, noise_report, variance
from vrpo.evaluation.inputs import Models, check_numbers, check_positive, load_models
from vrpo.evaluation.variance import Estimate, Sampled, Scheme
from vrpo.training.config import VRPOConfig

_MAX_SAMPLES = 2**20

Figures = Mapping[Scheme, Mapping[str, Estimate]]


@dataclass
class VarianceArguments:
    """Which models and pairs, which designs, how many forwards."""

    model_name_or_path: str = field(metadata={"help": "The policy: a folder or a hub name."})
    ref_model_name_or_path: str = field(metadata={"help": "The reference: a folder or a hub name."})
    dataset_name: str | list[str] = field(metadata={"help": "Preference pairs: files, folder or hub name."})
    output_file: str = field(metadata={"help": "JSON file of all figures; the plot goes beside it, .png."})
    designs: list[str] = field(
        default_factory=lambda: ["paper", "balanced", "graded-balanced", "ratio"],
        metadata={"help": f"Mask designs to compare: {', '.join(DESIGNS)}."},
    )
    num_samples: list[int] = field(
        default_factory=lambda: [2, 4, 8], metadata={"help": "Forwards per response and model, several."}
    )
    pair_masks: list[str] = field(
        default_factory=lambda: ["positions"],
        metadata={
            "help": f"What the masks of a pair share, one or more of {', '.join(PAIR_MASKS)}. The paper's "
            "design is always measured with independent ones too, as the baseline."
        },
    )
    num_pairs: int = field(default=32, metadata={"help": "Pairs to measure on, the first of the data."})
    num_repeats: int = field(default=8, metadata={"help": "Fresh draws per pair and design, at least 2."})
    noise_repeats: int = field(
        default=4,
        metadata={
            "help": "Draws of 8 masks that measure what the noise is made of and predict every unbiased "
            "design; 0 for none."
        },
    )
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
    dataset_split: str = field(default="train", metadata={"help": "Split to use; a file has none but train."})
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
    pair_masks: str
    num_samples: int
    variance: float
    extrapolated: bool


def schemes_of(designs: list[str], num_samples: list[int], pair_masks: list[str]) -> list[Scheme]:
    """All combinations, and always the paper's design, which the others are compared with."""
    if not num_samples:
        raise ValueError("num_samples must name at least one number of forwards, got none")
    for design in ["paper", *designs]:
        for number in num_samples:
            for coupling in pair_masks:
                check_design(design, number, 1, pair_masks=coupling)
    kinds = dict.fromkeys([("paper", "independent"), *itertools.product(designs, pair_masks)])
    return [
        Scheme(design, number, pair_masks=coupling)
        for number in sorted(set(num_samples))
        for design, coupling in kinds
    ]


def advise(figures: Figures, target: float, *, unbiased: bool) -> Advice | None:
    """The design and the fewest forwards whose score variance is at most the target.

    Measured forwards are preferred. Beyond them variance is taken to fall as 1 / K from the largest K
    measured, which is exact for the paper's design and cautious for stratified ones; K is rounded up to even.
    Returns: None if no design qualifies: none measured is unbiased, or none reaches the target.
    """
    best: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for scheme, told in figures.items():
        if DESIGNS[scheme.design].unbiased or not unbiased:
            point = (scheme.num_samples, told["score_variance"].value)
            best.setdefault((scheme.design, scheme.pair_masks), []).append(point)
    options = []
    for kind, points in best.items():
        points.sort()
        enough = [(number, value) for number, value in points if value <= target]
        if enough:
            options.append(Advice(*kind, *enough[0], extrapolated=False))
            continue
        number, value = points[-1]
        if number * value / target > _MAX_SAMPLES:
            continue
        needed = 2 * math.ceil(number * value / target / 2)
        options.append(Advice(*kind, needed, number * value / needed, extrapolated=True))
    return min(options, key=lambda advice: (advice.num_samples, advice.variance), default=None)


def check_arguments(args: VarianceArguments) -> list[Scheme]:
    """The schemes to measure. ValueError naming the first argument that is out of range."""
    schemes = schemes_of(args.designs, args.num_samples, args.pair_masks)
    check_numbers(args)
    for name, smallest in (("num_pairs", 1), ("num_repeats", 2), ("noise_repeats", 0)):
        value = getattr(args, name)
        if not smallest <= value < 2**31:
            raise ValueError(f"{name} must be at least {smallest} and below 2**31, got {value}")
    if args.target_variance is not None:
        check_positive("target_variance", args.target_variance)
    return schemes


def measure(args: VarianceArguments, models: Models, batch: ResponseBatch) -> dict[Scheme, Sampled]:
    """Sample every scheme with a progress bar."""
    schemes = check_arguments(args)
    probe = models.model.model.layers[0].mlp.up_proj if args.gradient else None
    found = {}
    for scheme in (bar := tqdm(schemes, desc="Designs", unit="design")):
        bar.set_postfix_str(f"{scheme.design}, {scheme.num_samples} forwards")
        found[scheme] = variance.sample(
            models.model,
            models.reference,
            batch,
            scheme,
            mask_token_id=models.mask_token_id,
            beta=args.beta,
            num_repeats=args.num_repeats,
            seed=args.seed,
            max_tokens_per_pack=args.max_tokens_per_pack,
            device=models.device,
            probe=probe,
        )
        if not found[scheme].score_BQ.isfinite().all():
            raise FloatingPointError(
                f"{scheme.design} gives scores that are not finite: the weights hold NaN or infinity, or "
                "overflow in their dtype; look at the checkpoints, or give dtype=float32"
            )
    return found


def measure_noise(args: VarianceArguments, models: Models, batch: ResponseBatch) -> dict[str, Any] | None:
    """The figures of noise_report; None where they are not asked for, or where nothing is noisy."""
    if args.noise_repeats == 0:
        return None
    found = noise.measure(
        models.model,
        models.reference,
        batch,
        mask_token_id=models.mask_token_id,
        num_repeats=args.noise_repeats,
        seed=args.seed,
        max_tokens_per_pack=args.max_tokens_per_pack,
        device=models.device,
    )
    return noise_report.content(noise_report.predictions(found, args.num_samples, beta=args.beta))


def _pairs(args: VarianceArguments, models: Models) -> ResponseBatch:
    rows = data.load_rows(args.dataset_name, config=args.dataset_config, split=args.dataset_split)
    rows = rows.select(range(min(args.num_pairs, len(rows))))
    prepared, told = data.prepare_pairs(
        rows,
        models.tokenizer,
        max_length=args.max_length,
        vocab_size=models.vocab_size,
        mask_token_id=models.mask_token_id,
    )
    models.check_length(told.longest)
    data.check_token_budget(prepared, max(args.num_samples), args.max_tokens_per_pack)
    return data.PairCollator()(list(prepared))["responses"]


def report(args: VarianceArguments) -> str:
    """Measure, write the JSON file and the plot, and return the table with the advice below it."""
    check_arguments(args)
    output, plot_output = check_output(
        args.output_file,
        models={
            "model_name_or_path": args.model_name_or_path,
            "ref_model_name_or_path": args.ref_model_name_or_path,
        },
        data={"dataset_name": args.dataset_name},
        beside=(".png",),
    )
    models = load_models(args)
    batch = _pairs(args, models)
    found = measure(args, models, batch)
    made_of = measure_noise(args, models, batch)
    true_B = variance.true_scores(found)
    figures = {scheme: variance.summarise(scheme, found, true_B) for scheme in found}
    target = args.target_variance
    if target is None:
        number, value = max(
            (scheme.num_samples, told["score_variance"].value)
            for scheme, told in figures.items()
            if (scheme.design, scheme.pair_masks) == ("paper", "independent")
        )
        target = value * number / 8
    lines = [table(figures), "", f"target: score variance {target:.4g}"]
    if target == 0:
        lines.append("every score is 0: model and reference are the same, and any design will do")
    for unbiased, label in ((True, "exactly unbiased"), (False, "any")) if target > 0 else ():
        advice = advise(figures, target, unbiased=unbiased)
        if advice is not None:
            how = "extrapolated from fewer" if advice.extrapolated else "measured"
            lines.append(
                f"recommended, {label}: mask_design={advice.design} pair_masks={advice.pair_masks} "
                f"num_samples={advice.num_samples} num_replicates=1 (variance {advice.variance:.4g}, {how})"
            )
    if made_of is not None:
        lines += ["", *noise_report.lines(made_of), ""]
    elif args.noise_repeats > 0 and target > 0:
        lines.append(
            "noise of the paper's score: none that the draws of noise_repeats show; more of them, or more "
            "pairs, would tell what it is made of"
        )
    write({output: _content(args, figures, target, made_of)})
    if _can_plot():
        write({plot_output: plot(figures)})
        lines.append(f"saved {args.output_file} and {Path(args.output_file).with_suffix('.png')}")
    else:
        lines.append(f"saved {args.output_file}; no plot, which needs matplotlib: pip install 'vrpo[plot]'")
    return "\n".join(lines) + "\n"


VARIANCES = (
    "score_variance",
    "score_ratio",
    "loss_variance",
    "loss_ratio",
    "gradient_variance",
    "gradient_ratio",
)
BIASES = ("score_bias", "loss_bias", "jackknife_bias", "sign_flips")


def table(figures: Figures) -> str:
    """Variances, then biases: one line per scheme, with 95 % intervals from resampled pairs.

    Ratios are to the paper's design with independent sides at equal forwards. score_bias and loss_bias are in
    nats x beta and nats; of a design that is exactly unbiased, score_bias shows noise alone.
    """
    lines = []
    for columns in (VARIANCES, BIASES):
        shown = [name for name in columns if any(name in told for told in figures.values())]
        if not shown:
            continue
        if lines:
            lines.append("")
        lines.append(f"{'design':<17}{'pair masks':<12}{'K':>3}  " + "".join(f"{name:>25}" for name in shown))
        for scheme, told in figures.items():
            label = scheme.design + ("" if DESIGNS[scheme.design].unbiased else "*")
            lines.append(
                f"{label:<17}{scheme.pair_masks:<12}{scheme.num_samples:>3}  "
                + "".join(f"{_cell(told.get(name)):>25}" for name in shown)
            )
    if not all(DESIGNS[scheme.design].unbiased for scheme in figures):
        lines.append("* biased design")
    return "\n".join(lines)


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _content(
    args: VarianceArguments, figures: Figures, target: float, made_of: Mapping[str, Any] | None
) -> str:
    rows = [
        asdict(scheme) | {name: asdict(estimate) for name, estimate in told.items()}
        for scheme, told in figures.items()
    ]
    content = {
        "arguments": asdict(args),
        "torch": torch.__version__,
        "target": target,
        "figures": rows,
        "noise": made_of,
    }
    return to_json(content, indent=1) + "\n"


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(figures: Figures) -> bytes:
    """A PNG: every figure of the table against forwards, a panel each; one line per design and coupling."""
    from matplotlib.figure import Figure

    names = ("score_variance", "loss_variance", "gradient_variance", *BIASES)
    names = [name for name in names if any(name in told for told in figures.values())]
    columns = math.ceil(len(names) / 2)
    figure = Figure(figsize=(4.2 * columns, 7), layout="constrained")
    numbers = sorted({scheme.num_samples for scheme in figures})
    for name, axis in zip(names, figure.subplots(2, columns, squeeze=False).flat, strict=False):
        for kind in dict.fromkeys((scheme.design, scheme.pair_masks) for scheme in figures):
            points = sorted(
                (scheme.num_samples, told[name].value, told[name].low, told[name].high)
                for scheme, told in figures.items()
                if (scheme.design, scheme.pair_masks) == kind and name in told
            )
            if not points:
                continue
            number, value, low, high = zip(*points, strict=True)
            below = [max(v - edge, 0.0) for v, edge in zip(value, low, strict=True)]
            above = [max(edge - v, 0.0) for v, edge in zip(value, high, strict=True)]
            axis.errorbar(
                number, value, [below, above], marker="o", ms=3, lw=1, capsize=2, label=", ".join(kind)
            )
        axis.set(xscale="log", xlabel="forwards per response and model", title=name.replace("_", " "))
        if name.endswith("variance") and any(
            told[name].value > 0 for told in figures.values() if name in told
        ):
            axis.set_yscale("log")
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in figure.axes[len(names) :]:
        axis.remove()
    figure.axes[0].legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()
