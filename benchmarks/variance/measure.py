"""Fresh draws of every design on one trained model: variances of scores, losses, gradients and ELBOs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vrpo.batch import ResponseBatch
from vrpo.estimator.elbo import elbo
from vrpo.estimator.packing import pack
from vrpo.estimator.row_weights import RowWeights, balanced, token_ratio
from vrpo.evaluation import variance
from vrpo.evaluation.variance import Scheme
from vrpo.objectives.preference import denoising_loss
from vrpo.step import split_by_tokens
from vrpo_kernels import segment_sum

BETA = 0.2
MAX_TOKENS = 16_384


@dataclass(frozen=True)
class Draw:
    """A design to draw, how often, and the row weights to try on the same forward passes, by their names."""

    design: str
    num_samples: int
    repeats: int
    weightings: dict[str, RowWeights | None]


def score_draws(effort: float) -> list[Draw]:
    """What is drawn for scores; effort multiplies the repeats."""

    def draw(design: str, num_samples: int, repeats: int, **weightings: RowWeights | None) -> Draw:
        names = {name.replace("_", "-"): weights for name, weights in weightings.items()}
        return Draw(design, num_samples, max(2, round(repeats * effort)), names)

    spaced = {"spaced": None, "balanced": balanced, "ratio": token_ratio}
    graded = {"graded": None, "graded_balanced": balanced}
    return [
        draw("paper", 8, 8, paper=None),
        draw("graded", 4, 8, **graded),
        draw("spaced", 4, 6, **spaced),
        draw("graded", 8, 5, **graded),
        draw("spaced", 8, 4, **spaced),
        draw("inverse-root", 4, 6, inverse_root=None, inverse_root_balanced=balanced),
    ]


def absolute_draws(effort: float) -> list[Draw]:
    """What is drawn beside for ELBOs by themselves."""
    mirrored = {"mirrored": None, "mirrored-balanced": balanced}
    tiled = {"tiled": None, "tiled-balanced": balanced}
    return [
        Draw("mirrored", 4, max(2, round(6 * effort)), mirrored),
        Draw("mirrored", 8, max(2, round(4 * effort)), mirrored),
        Draw("tiled", 8, max(2, round(4 * effort)), tiled),
    ]


@torch.no_grad()
def elbos(
    models: list[nn.Module],
    batch: ResponseBatch,
    draw: Draw,
    *,
    mask_token_id: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, list[Tensor]]:
    """ELBO samples (Q, R, K) in nats of every response, weighting -> one tensor per model.

    The two responses of a pair share positions. Fresh masks in every repeat, the same for all models, which
    are on `device`.
    """
    scheme = Scheme(draw.design, draw.num_samples, pair_masks="positions")
    found = {name: [[] for _ in models] for name in draw.weightings}
    for repeat in range(draw.repeats):
        parts = {name: [[] for _ in models] for name in draw.weightings}
        for part in split_by_tokens(batch, draw.num_samples, MAX_TOKENS):
            drawn = scheme.draw(part, seed, repeat)
            packed = pack(part, drawn, mask_token_id).to(device)
            weights = {
                name: (reweight(drawn, part.response_length_R) if reweight else drawn.weight_N).double()
                for name, reweight in draw.weightings.items()
            }
            for index, model in enumerate(models):
                log_p_N = -model(**packed.model_inputs()).nll.double().cpu()
                for name, weight_N in weights.items():
                    elbo_S = segment_sum(weight_N * log_p_N, drawn.offsets_S1)
                    parts[name][index].append(elbo_S.view(-1, draw.num_samples))
        for name, by_model in parts.items():
            for index, values in enumerate(by_model):
                found[name][index].append(torch.cat(values))
    return {name: [torch.stack(values) for values in by_model] for name, by_model in found.items()}


def score_rows(draw: Draw, found: dict[str, list[Tensor]], drifts: list[str]) -> Iterator[dict]:
    """One row per drift, design and K: per pair, the variances over draws. found: the reference goes first.

    score: shared positions; score_independent: the two sides drawn apart, whose variances add; loss and
    loss_independent: of softplus(-score), the latter with the rejected side of the next repeat; mean: score.
    Of `paper`, whose samples are independent, from all single samples, at K = 4 and 8.
    """
    for name, by_model in found.items():
        reference_QRK = by_model[0]
        for drift, policy_QRK in zip(drifts, by_model[1:], strict=True):
            ratio_QRK = policy_QRK - reference_QRK
            for num_samples in (4, 8) if name == "paper" else (draw.num_samples,):
                # K = 8 independent samples are two draws of 4.
                value_QR = ratio_QRK.unflatten(2, (-1, num_samples)).mean(3).transpose(1, 2).flatten(0, 1)
                chosen_QB, rejected_QB = value_QR[:, 0::2], value_QR[:, 1::2]
                positions_QB = BETA * (chosen_QB - rejected_QB)
                independent_QB = BETA * (chosen_QB - rejected_QB.roll(-1, 0))
                score_B = positions_QB.var(0)
                independent_B = BETA**2 * (chosen_QB.var(0) + rejected_QB.var(0))
                if name == "paper":
                    single_QR = ratio_QRK.transpose(1, 2).flatten(0, 1)
                    side_QB = (single_QR[:, 0::2], single_QR[:, 1::2])
                    score_B = BETA**2 * (side_QB[0] - side_QB[1]).var(0) / num_samples
                    independent_B = BETA**2 * sum(side.var(0) for side in side_QB) / num_samples
                yield {
                    "kind": "score",
                    "drift": drift,
                    "design": name,
                    "num_samples": num_samples,
                    "repeats": len(value_QR),
                    "score": short(score_B),
                    "score_independent": short(independent_B),
                    "loss": short(softplus(-positions_QB).var(0)),
                    "loss_independent": short(softplus(-independent_QB).var(0)),
                    "mean": short(positions_QB.mean(0)),
                }


def absolute_rows(draw: Draw, found: dict[str, list[Tensor]], stages: list[str]) -> Iterator[dict]:
    """One row per stage, design and K: per response the variance of its ELBO; of pairs, of the difference."""
    for name, by_model in found.items():
        for stage, elbo_QRK in zip(stages, by_model, strict=True):
            for num_samples in (4, 8) if name == "paper" else (draw.num_samples,):
                value_QR, divisor = elbo_QRK.mean(2), 1
                if name == "paper":
                    value_QR, divisor = elbo_QRK.transpose(1, 2).flatten(0, 1), num_samples
                yield {
                    "kind": "absolute",
                    "drift": stage,
                    "design": name,
                    "num_samples": num_samples,
                    "repeats": len(value_QR),
                    "response": short(value_QR.var(0) / divisor),
                    "difference": short((value_QR[:, 0::2] - value_QR[:, 1::2]).var(0) / divisor),
                    "elbo": float(f"{elbo_QRK.mean():.4g}"),
                }


GRADIENTS = [
    ("paper", "independent", 4),
    ("graded-balanced", "positions", 4),
    ("balanced", "positions", 4),
    ("paper", "independent", 8),
    ("graded-balanced", "positions", 8),
    ("balanced", "positions", 8),
]


def gradient_row(
    policy: nn.Module,
    reference: nn.Module,
    batch: ResponseBatch,
    scheme: Scheme,
    *,
    mask_token_id: int,
    repeats: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict:
    """Trace of the variance of the loss gradient at block 0's up-projection, as in the paper, per pair."""
    sampled = variance.sample(
        policy,
        reference,
        batch,
        scheme,
        mask_token_id=mask_token_id,
        beta=BETA,
        num_repeats=repeats,
        seed=seed,
        max_tokens_per_pack=MAX_TOKENS,
        device=device,
        probe=policy.model.layers[0].mlp.up_proj,
    )
    return {
        "kind": "gradient",
        "repeats": repeats,
        "gradient": short(sampled.gradient_B),
        "score": short(variance.score_variance(sampled)),
        "loss": short(variance.loss_variance(sampled)),
    }


TABLE2 = {
    "paper, 4 x 1": Scheme("paper", 4),
    "paper, 1 x 1": Scheme("paper", 1),
    "paper, 8 x 1": Scheme("paper", 8),
    "paper, 1 x 4": Scheme("paper", 4, masks_per_level=4),
    "paper, 2 x 2": Scheme("paper", 4, masks_per_level=2),
    "paper, 4 x 1, not shared": Scheme("paper", 4, shared=False),
}
"""The rows of the paper's Table 2: levels x masks per level, masks shared by policy and reference or not."""

SFT_DESIGNS = ("paper", "coupled", "mirrored-balanced", "graded-balanced")


def sft_row(model: nn.Module, batch: ResponseBatch, scheme: Scheme, **options: Any) -> dict:
    """Trace of the variance of the SFT gradient, -B / L of the chosen responses, at the same layer.

    options: mask_token_id, repeats, seed, device.
    """
    device = options.get("device", "cpu")
    probe = variance.Probe(model.model.layers[0].mlp.up_proj)
    total_RG, square_R = 0.0, 0.0
    for repeat in range(options["repeats"]):
        found = []
        for part in split_by_tokens(batch, scheme.num_samples, MAX_TOKENS):
            packed = pack(part, scheme.draw(part, options["seed"], repeat), options["mask_token_id"])
            packed = packed.to(device)
            with probe.attached():
                nll_N = model(**packed.model_inputs()).nll
            loss_R = denoising_loss(elbo(nll_N, packed), part.response_length_R.to(device))
            found += probe.gradients(loss_R[0::2].sum(), packed, scheme.num_samples)
        gradient_RG = torch.stack(found[0::2]).double()
        total_RG = total_RG + gradient_RG
        square_R = square_R + gradient_RG.square().sum(1)
    repeats = options["repeats"]
    variance_R = (square_R - (total_RG / repeats).square().sum(1) * repeats) / (repeats - 1)
    return {"kind": "sft", "repeats": repeats, "gradient": short(variance_R)}


def short(values: Tensor) -> list[float]:
    """Four digits of every value."""
    return [float(f"{value:.4g}") for value in values.tolist()]
