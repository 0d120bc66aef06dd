"""What the quickstart prints and draws. Nothing is computed here but percentages."""

import importlib.util
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from examples.arithmetic import CARELESS, CORRECT, OTHER

TITLES = {"sft": "SFT (start)", "sft_on_chosen": "SFT on chosen", "vrpo": "VRPO"}
COLORS = {"sft": "#8c8c8c", "sft_on_chosen": "#4c72b0", "vrpo": "#c44e52"}
OUTCOME_COLORS = {CORRECT: "#55a868", CARELESS: "#dd8452", OTHER: "#c9c9c9"}

Metrics = dict[str, Any]


def say(text: str) -> None:
    """Print above any progress bar."""
    tqdm.write(text)


def pairs_text(pairs: Metrics) -> str:
    """How many pairs there are, and what three of them look like."""
    lines = [f"{pairs['train']} pairs to train on, {pairs['held_out']} on problems held out; for example"]
    for pair in pairs["examples"]:
        lines.append(f"   {pair['prompt']}   chosen {pair['chosen']!r}   rejected {pair['rejected']!r}")
    return "\n".join(lines)


def table(metrics: Metrics) -> str:
    """One line per measurement, one column per model."""
    models = metrics["held_out"]

    def line(name: str, values: list[str]) -> str:
        return f"{name:<44}" + "".join(f"{value:>16}" for value in values)

    def shares(mode: str, kind: str) -> list[str]:
        return [f"{100 * models[name]['outcomes'][mode][kind]:.1f} %" for name in TITLES]

    def lengths(name: str) -> list[str]:
        return [f"{100 * models[model]['lengths'][name]:.1f} %" for model in TITLES]

    def percent(key: str) -> list[str]:
        return [f"{100 * models[name][key]:.1f} %" for name in TITLES]

    def rewards(key: str, form: str) -> list[str]:
        # The start is its own reference: its rewards are exactly 0 and say nothing.
        return ["-"] + [form.format(models[name][key]) for name in list(TITLES)[1:]]

    return "\n".join(
        [
            line("held-out problems and pairs", list(TITLES.values())),
            line("exact match, most likely answer", shares("greedy", CORRECT)),
            *(line(f"   into {name} its tokens", lengths(name)) for name in models["sft"]["lengths"]),
            line("exact match, sampled at temperature 1", shares("sampled", CORRECT)),
            line("   forgot to carry", shares("sampled", CARELESS)),
            line("   other mistakes", shares("sampled", OTHER)),
            line("chosen more probable than rejected (ELBO)", percent("elbo/accuracies")),
            line("reward accuracy", rewards("rewards/accuracies", "{:.3f}")),
            line("reward margin (nats x beta)", rewards("rewards/margins", "{:.2f}")),
            line("change of logps/chosen (nats per answer)", rewards("chosen_change", "{:+.2f}")),
        ]
    )


def first_step_text(metrics: Metrics) -> str:
    """The loss of the first step, which is known before."""
    first = metrics["first_step"]
    return (
        f"step 1 of VRPO: loss {first['loss']:.4f} (ln 2 = 0.6931) + SFT term {first['sft_loss']:.4f}, "
        f"margin {first['margin']:.4f}: policy and reference start as one"
    )


def variance_text(metrics: Metrics) -> str:
    """How noisy the score is, with the masks shared between the models and without."""
    variance = metrics["score_variance"]
    ratio = variance["separate"] / variance["shared"]
    return (
        f"variance of the score at K={metrics['settings']['num_samples']}: {variance['shared']:.3f} (std "
        f"{variance['shared'] ** 0.5:.2f}) with masks shared by policy and reference, as in VRPO; "
        f"{variance['separate']:.2f} with masks of their own ({ratio:.1f} x)"
    )


def say_results(metrics: Metrics) -> None:
    """The table, the estimator's variance, throughput, and the warning about displaced likelihood."""
    seconds = metrics["seconds"]
    say(f"\n{table(metrics)}\n")
    say(first_step_text(metrics))
    say(variance_text(metrics))
    rates = ", ".join(f"{TITLES[name]} {metrics[name]['tokens_per_second']:.0f}" for name in TITLES)
    say(f"tokens per second of training: {rates} ({metrics['parameters']:,} parameters)")
    say("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    change = metrics["held_out"]["vrpo"]["chosen_change"]
    if change < 0:
        say(
            f"WARNING: likelihood displacement. VRPO made the chosen answers less probable (logps/chosen "
            f"{change:+.2f} nats): margins may grow while answers get worse. Raise sft_weight or lower the "
            "learning rate."
        )


def say_files(output_dir: Path, figure: Path | None) -> None:
    """What was written, and where."""
    say(f"\nwrote {output_dir}/metrics.json and the checkpoints {', '.join(TITLES)} beside it")
    say(f"wrote {figure}" if figure else "no figure: matplotlib is missing (pip install 'vrpo[plot]')")


def draw(metrics: Metrics, path: Path) -> Path | None:
    """The figure: outcomes of the three models, accuracy over training, ELBO gaps of held-out pairs.

    Returns: path, or None where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _draw_outcomes(left, metrics)
    _draw_curves(middle, metrics)
    _draw_gaps(right, metrics)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _draw_outcomes(axis, metrics: Metrics) -> None:
    bottom = [0.0] * len(TITLES)
    for kind, color in OUTCOME_COLORS.items():
        heights = [100 * metrics["held_out"][name]["outcomes"]["sampled"][kind] for name in TITLES]
        bars = axis.bar(list(TITLES.values()), heights, bottom=bottom, color=color, label=kind, width=0.65)
        labels = [f"{height:.0f} %" if height >= 4 else "" for height in heights]
        axis.bar_label(bars, labels, label_type="center", fontsize=10)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.set_ylabel("% of sampled answers")
    axis.set_title("What the models answer (held-out problems)", fontsize=11)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)


def _draw_curves(axis, metrics: Metrics) -> None:
    for name in ("sft_on_chosen", "vrpo"):
        steps, accuracies = zip(*metrics[name]["curve"], strict=True)
        values = [100 * value for value in accuracies]
        axis.plot(steps, values, marker="o", color=COLORS[name], label=TITLES[name])
    axis.set_ylim(-2, 102)
    axis.set_xlabel("steps after SFT")
    axis.set_ylabel("exact match, sampled answers (%)")
    axis.set_title("Accuracy on 200 held-out problems", fontsize=11)
    axis.legend(loc="lower right", frameon=False)


def _draw_gaps(axis, metrics: Metrics) -> None:
    gaps = {name: metrics["held_out"][name]["elbo_gaps"] for name in TITLES}
    everything = [gap for values in gaps.values() for gap in values]
    low, high = min(everything), max(everything)
    edges = [low + (high - low) * i / 40 for i in range(41)]
    for name, values in gaps.items():
        axis.hist(values, edges, color=COLORS[name], alpha=0.55, label=TITLES[name])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("ELBO(chosen) - ELBO(rejected), nats")
    axis.set_ylabel("held-out pairs")
    axis.set_title("How clearly chosen beats rejected", fontsize=11)
    axis.legend(frameon=False)
