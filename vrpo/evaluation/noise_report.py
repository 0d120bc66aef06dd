"""What `vrpo variance` says of the noise of a model pair: what it is made of, and what would lower it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from vrpo.estimator.designs import DESIGNS
from vrpo.evaluation.noise import PARTS, Noise, predict
from vrpo.evaluation.variance import Scheme

_COUPLINGS = ("positions", "independent")

_LITTLE = 0.1
"""A ratio this near to 1 is no finding: predicted ratios err by .03 to .11 in the mean, single ones by more,
on the twenty models of docs/mask-designs.md."""

_WILD = -0.1
"""No part of a variance is negative by much, but as noise of its own: moments of too few draws."""

Predictions = Mapping[Scheme, Mapping[str, float]]


def predictions(noise: Noise, num_samples: Sequence[int], *, beta: float) -> Predictions:
    """Of every exactly unbiased design, with shared positions and without, at every K."""
    names = [name for name, design in DESIGNS.items() if design.unbiased]
    kinds = itertools.product(sorted(set(num_samples)), names, _COUPLINGS)
    schemes = [Scheme(name, number, pair_masks=pair_masks) for number, name, pair_masks in kinds]
    return {scheme: predict(noise, scheme, beta=beta) for scheme in schemes}


def content(predicted: Predictions) -> dict[str, Any] | None:
    """All figures, as they go into the JSON file; None where the paper's score shows no noise.

    paper: shares of PARTS in the variance of the paper's score, which K does not change, and the correlation
        of the two responses' noise under shared positions, 2 Cov / (Var + Var).
    predicted: score_variance and score_ratio, to the paper's design with independent sides at equal K.
    best: the least of them at every K. findings: at the largest K, ratios of what was added to what it was
        added to, and a verdict.
    """
    numbers = sorted({scheme.num_samples for scheme in predicted})
    papers = {number: predicted[Scheme("paper", number)] for number in numbers}
    if not all(paper["total"] > 0 for paper in papers.values()):
        return None
    paper = papers[numbers[-1]]
    together = predicted[Scheme("paper", numbers[-1], pair_masks="positions")]
    rows = [
        {
            "design": scheme.design,
            "pair_masks": scheme.pair_masks,
            "num_samples": scheme.num_samples,
            "score_variance": told["total"],
            "score_ratio": told["total"] / papers[scheme.num_samples]["total"],
        }
        for scheme, told in predicted.items()
    ]
    best = [
        # The paper's is above 0. What is below is no variance: moments of too few draws.
        min(
            (row for row in rows if row["num_samples"] == number and row["score_variance"] >= 0),
            key=lambda row: row["score_variance"],
        )
        for number in numbers
    ]
    return {
        "paper": {part: paper[part] / paper["total"] for part in PARTS}
        | {"correlation": 1 - together["total"] / paper["total"]},
        "predicted": rows,
        "best": best,
        "findings": _findings(predicted, best[-1]),
    }


def _findings(predicted: Predictions, best: Mapping[str, Any]) -> list[dict[str, Any]]:
    number, coupling, winner = best["num_samples"], best["pair_masks"], best["design"]
    compared = [
        ("sharing positions", (winner, "positions"), (winner, "independent")),
        ("balancing row weights", ("graded-balanced", coupling), ("graded", coupling)),
        ("masking few tokens more often", ("graded", coupling), ("tiled", coupling)),
    ]
    findings = []
    for what, *kinds in compared:
        after, before = (predicted[Scheme(name, number, pair_masks=masks)]["total"] for name, masks in kinds)
        if before > 0 and after >= 0:
            findings.append(
                {
                    "what": what,
                    "verdict": _verdict(after / before),
                    "ratio": after / before,
                    "with": kinds[0],
                    "without": kinds[1],
                    "num_samples": number,
                }
            )
    return findings


def _verdict(ratio: float) -> str:
    if abs(ratio - 1) <= _LITTLE:
        return "makes little difference"
    return "pays" if ratio < 1 else "costs"


def lines(told: Mapping[str, Any]) -> list[str]:
    """`content` as text: shares, ratios by design and K, the best, and a sentence per finding."""
    paper, rows = told["paper"], told["predicted"]
    shares = ", ".join(f"{part} {100 * paper[part]:.0f} %" for part in PARTS)
    numbers = [best["num_samples"] for best in told["best"]]
    text = [
        f"noise of the paper's score: {shares}",
        f"correlation of the two responses' noise where they share positions: {paper['correlation']:.2f}",
    ]
    lowest = min(PARTS, key=lambda part: paper[part])
    if paper[lowest] < _WILD:
        text.append(
            f"too few draws to tell these shares ({lowest} cannot be negative): "
            "take more num_pairs or noise_repeats"
        )
    text += [
        "",
        "predicted score variance, as a ratio to the paper's with independent sides:",
        f"{'':<17}" + "".join(f"{f'K={number}':>24}" for number in numbers),
        f"{'design':<17}" + "".join(f"{masks:>12}" for masks in _COUPLINGS) * len(numbers),
    ]
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["design"], []).append(row["score_ratio"])
    text += [f"{name:<17}" + "".join(f"{x:>12.3f}" for x in values) for name, values in ratios.items()]
    text.append("")
    for best in told["best"]:
        text.append(
            f"best predicted, K={best['num_samples']}: mask_design={best['design']} "
            f"pair_masks={best['pair_masks']} (ratio {best['score_ratio']:.3f})"
        )
    for found in told["findings"]:
        text.append(
            f"{found['what']} {found['verdict']}: at K={found['num_samples']}, {', '.join(found['with'])}, "
            f"has {found['ratio']:.2f} times the variance of {', '.join(found['without'])}"
        )
    return text
