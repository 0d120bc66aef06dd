"""How noisy score, loss and gradient are under a mask design: repeated fresh draws on a fixed set of pairs.

Nothing here assumes a design; it draws, packs and evaluates as a training step does. Variances are over
draws, per pair; confidence intervals come from resampling pairs, which are what one would draw anew.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vrpo.batch import MaskDraw, PackedBatch, ResponseBatch
from vrpo.estimator import masking
from vrpo.estimator.designs import DESIGNS
from vrpo.estimator.elbo import elbo
from vrpo.estimator.packing import pack
from vrpo.estimator.row_weights import balanced
from vrpo.objectives import preference
from vrpo.step import split_by_tokens

_REFERENCE_EPOCHS = 2**31
_NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Scheme:
    """One way to spend K forward passes per response and model.

    design, num_samples, masks_per_level, num_replicates, pair_masks: as in masking.draw.
    shared: policy and reference see the same masks, as in training; False only to show what that is worth.
    """

    design: str
    num_samples: int
    masks_per_level: int = 1
    num_replicates: int = 1
    pair_masks: str = "independent"
    shared: bool = True

    def draw(self, batch: ResponseBatch, seed: int, epoch: int) -> MaskDraw:
        return masking.draw(
            batch,
            design=self.design,
            num_samples=self.num_samples,
            masks_per_level=self.masks_per_level,
            num_replicates=self.num_replicates,
            pair_masks=self.pair_masks,
            seed=seed,
            epoch=epoch,
        )


@dataclass(frozen=True)
class Sampled:
    """What repeated draws gave. Q repeats, B pairs, float64 on the CPU.

    score_BQ: scores.
    gradient_B: trace of the variance, over draws, of each pair's loss gradient with respect to the weight of
        the probed layer; None if none was probed.
    iid_variance_B: variance of the score from the spread of all Q*K samples where these are independent and
        identically distributed, which is far less noisy than that of Q scores; None elsewhere.
    bias_BQ: for a biased design that re-weights the rows of an unbiased one: its score minus the score that
        the same masks have under exactly unbiased weights. The mean over draws is the bias of the design,
        with far less noise than a difference of independent means; None elsewhere.
    jackknife_BQ: preference.jackknife_dpo_loss of every draw, nats; None without independent replicates.
    """

    score_BQ: Tensor
    gradient_B: Tensor | None
    iid_variance_B: Tensor | None = None
    bias_BQ: Tensor | None = None
    jackknife_BQ: Tensor | None = None


def unbiased_twin(design: str) -> str | None:
    """The design that draws the masks of a biased one and weighs them without bias; None if none does."""
    known = DESIGNS[design]
    if known.unbiased or known.row_weights is None:
        return None
    twins = (name for name, twin in DESIGNS.items() if twin.levels is known.levels and twin.unbiased)
    return max(twins, key=lambda name: DESIGNS[name].row_weights is balanced)


class Probe:
    """Loss gradients of one linear layer's weight, pair by pair, from one backward pass over a pack.

    With x_t the layer's input and g_t the gradient of its output, token by token, the weight gradient of
    pair b is the sum over the tokens t of its segments of g_t x_t'.
    """

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def _hook(self, _, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Everything below the layer is cut off: its gradients are not needed, and backward is cheaper.
        self.input_TD = inputs[0].detach().flatten(0, -2)
        self.output = output.detach().requires_grad_(True)
        return self.output

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        handle = self.layer.register_forward_hook(self._hook)
        try:
            yield
        finally:
            handle.remove()

    def gradients(self, loss: Tensor, packed: PackedBatch, num_segments: int) -> list[Tensor]:
        """One for each run of num_segments segments of the pack."""
        (output_grad,) = torch.autograd.grad(loss, self.output)
        output_grad_TE = output_grad.flatten(0, -2)
        # Through the last layer's MLP go the masked rows alone.
        sees_all = len(self.input_TD) == len(packed.tokens_T)
        bounds = (packed.cu_seqlens_S1 if sees_all else packed.offsets_S1)[::num_segments].tolist()
        return [(output_grad_TE[a:b].T @ self.input_TD[a:b]).flatten().cpu() for a, b in pairwise(bounds)]


def sample(
    policy: nn.Module,
    reference: nn.Module,
    batch: ResponseBatch,
    scheme: Scheme,
    *,
    mask_token_id: int,
    beta: float,
    num_repeats: int,
    seed: int,
    max_tokens_per_pack: int = 16_384,
    device: torch.device | str = "cpu",
    probe: nn.Linear | None = None,
    on_forward: Callable[[], None] = lambda: None,
) -> Sampled:
    """Draw fresh masks num_repeats times and score every pair each time.

    Args:
        policy, reference: models of vrpo.models, on `device`, without dropout.
        batch: pairs. scheme: how each draw is made. beta: per nat. seed: of the draws; repeat q is epoch q.
        probe: a linear layer of the policy whose loss gradient (without the SFT term) is measured as well.
        on_forward: called after every pack, for progress bars.
    Returns: Sampled.
    """
    grad = Probe(probe) if probe is not None else None
    is_iid = DESIGNS[scheme.design].iid and scheme.masks_per_level == 1
    twin = unbiased_twin(scheme.design) if scheme.shared else None
    num_levels = scheme.num_samples // scheme.masks_per_level
    has_replicates = scheme.shared and masking.has_replicates(
        scheme.design, num_levels, scheme.num_replicates
    )
    scores, samples, biases, jackknives, sum_B, square_B = [], [], [], [], None, []
    for repeat in range(num_repeats):
        score_parts, sample_parts, bias_parts, jackknife_parts, gradients = [], [], [], [], []
        for part in split_by_tokens(batch, scheme.num_samples, max_tokens_per_pack):
            packed = pack(part, scheme.draw(part, seed, repeat), mask_token_id).to(device)
            other = packed
            if not scheme.shared:
                drawn = scheme.draw(part, seed, _REFERENCE_EPOCHS + repeat)
                other = pack(part, drawn, mask_token_id).to(device)
            with torch.no_grad():
                reference_N = _nll(reference, other)
            with contextlib.nullcontext() if grad else torch.no_grad():
                with grad.attached() if grad else contextlib.nullcontext():
                    policy_N = _nll(policy, packed)
                policy_RK, reference_RK = elbo(policy_N, packed), elbo(reference_N, other)
                score_B = preference.preference_score(policy_RK, reference_RK, beta)
                score_parts.append(score_B.detach().double().cpu())
            if twin is not None:
                exact = replace(scheme, design=twin).draw(part, seed, repeat).weight_N.to(device)
                exact = replace(packed, weight_N=exact)
                exact_B = preference.preference_score(
                    elbo(policy_N.detach(), exact), elbo(reference_N, exact), beta
                )
                bias_parts.append(score_parts[-1] - exact_B.double().cpu())
            if has_replicates:
                loss_B = preference.jackknife_dpo_loss(
                    policy_RK.detach(), reference_RK, beta, packed.replicate_K
                )
                jackknife_parts.append(loss_B.double().cpu())
            if is_iid:
                singles = tuple(range(scheme.num_samples))
                score_BK = preference.replicate_scores(policy_RK, reference_RK, beta, singles)
                sample_parts.append(score_BK.detach().double().cpu())
            if grad:
                loss = preference.dpo_loss(score_B).sum()
                gradients += grad.gradients(loss, packed, part.num_sides * scheme.num_samples)
            on_forward()
        scores.append(torch.cat(score_parts))
        if is_iid:
            samples.append(torch.cat(sample_parts))
        if twin is not None:
            biases.append(torch.cat(bias_parts))
        if jackknife_parts:
            jackknives.append(torch.cat(jackknife_parts))
        if grad:
            gradient_BG = torch.stack(gradients).double()
            sum_B = gradient_BG if sum_B is None else sum_B + gradient_BG
            square_B.append(gradient_BG.square().sum(1))
    gradient_B = None
    if grad and num_repeats > 1:
        mean_BG = sum_B / num_repeats
        gradient_B = (torch.stack(square_B).sum(0) - num_repeats * mean_BG.square().sum(1)) / (
            num_repeats - 1
        )
    iid_variance_B = torch.cat(samples, dim=1).var(dim=1) / scheme.num_samples if is_iid else None
    bias_BQ, jackknife_BQ = (torch.stack(parts, dim=1) if parts else None for parts in (biases, jackknives))
    return Sampled(torch.stack(scores, dim=1), gradient_B, iid_variance_B, bias_BQ, jackknife_BQ)


def _nll(model: nn.Module, packed: PackedBatch) -> Tensor:
    return model(**packed.model_inputs()).nll


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs with its 95 % interval from resampled pairs."""

    value: float
    low: float
    high: float


def mean_over_pairs(value_B: Tensor, baseline_B: Tensor | None = None) -> Estimate:
    """Mean, or ratio of means to a baseline measured on the same pairs, with a bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(value_B), (_NUM_RESAMPLES, len(value_B)), generator=generator)
    means = value_B[pick].mean(1)
    value = value_B.mean()
    if baseline_B is not None:
        means, value = means / baseline_B[pick].mean(1), value / baseline_B.mean()
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Estimate(float(value), low, high)


def score_variance(sampled: Sampled) -> Tensor:
    """Var over draws of the score of each pair, (B,)."""
    if sampled.iid_variance_B is not None:
        return sampled.iid_variance_B
    return sampled.score_BQ.var(dim=1, correction=1)


def loss_variance(sampled: Sampled) -> Tensor:
    """Var over draws of softplus(-score) of each pair, (B,), nats squared."""
    return softplus(-sampled.score_BQ).var(dim=1, correction=1)


def loss_bias(sampled: Sampled, true_score_B: Tensor) -> Tensor:
    """E over draws of the loss minus the loss at the true score, (B,), nats: upward by convexity."""
    return softplus(-sampled.score_BQ).mean(1) - softplus(-true_score_B)


def sign_flips(sampled: Sampled, true_score_B: Tensor) -> Tensor:
    """Share of draws whose score has the other sign than the true one, (B,)."""
    return (sampled.score_BQ.sign() != true_score_B.sign()[:, None]).double().mean(1)


def score_bias(sampled: Sampled, true_score_B: Tensor) -> Tensor:
    """Mean score minus the true one, (B,): the bias of a biased design, else noise of the repeats.

    Measured on the same masks where the design has an unbiased twin (Sampled.bias_BQ).
    """
    if sampled.bias_BQ is not None:
        return sampled.bias_BQ.mean(1)
    return sampled.score_BQ.mean(1) - true_score_B


def true_scores(found: Mapping[Scheme, Sampled]) -> Tensor:
    """The best guess of each pair's score: means over every unbiased shared scheme, by inverse variance."""
    num_pairs = max(len(sampled.score_BQ) for sampled in found.values())
    total_B, weight_B = torch.zeros(2, num_pairs, dtype=torch.float64)
    for scheme, sampled in found.items():
        if scheme.shared and DESIGNS[scheme.design].unbiased:
            num_measured, num_repeats = sampled.score_BQ.shape
            precision = num_repeats / score_variance(sampled).mean().clamp(min=1e-12)
            total_B[:num_measured] += precision * sampled.score_BQ.mean(1)
            weight_B[:num_measured] += precision
    return total_B / weight_B


def summarise(scheme: Scheme, found: Mapping[Scheme, Sampled], true_score_B: Tensor) -> dict[str, Estimate]:
    """Every figure of a scheme, and its ratio to the paper's design at equal forwards where both are known.

    score_variance, loss_variance, gradient_variance (squared norm), loss_bias and jackknife_bias (nats; the
    latter of "sigmoid_jackknife"), sign_flips (a share), score_bias; score_ratio, loss_ratio, gradient_ratio.
    Pairs that only one of two schemes has are left out of their ratio.
    """
    sampled = found[scheme]
    true_score_B = true_score_B[: len(sampled.score_BQ)]
    measured = {"score": score_variance(sampled), "loss": loss_variance(sampled)}
    if sampled.gradient_B is not None:
        measured["gradient"] = sampled.gradient_B
    told = {f"{name}_variance": mean_over_pairs(value_B) for name, value_B in measured.items()}
    told["loss_bias"] = mean_over_pairs(loss_bias(sampled, true_score_B))
    if sampled.jackknife_BQ is not None:
        jackknife_B = sampled.jackknife_BQ.mean(1) - softplus(-true_score_B)
        told["jackknife_bias"] = mean_over_pairs(jackknife_B)
    told["sign_flips"] = mean_over_pairs(sign_flips(sampled, true_score_B))
    told["score_bias"] = mean_over_pairs(score_bias(sampled, true_score_B))
    paper = found.get(Scheme("paper", scheme.num_samples))
    if paper is None or paper is sampled:
        return told
    baseline = {"score": score_variance(paper), "loss": loss_variance(paper), "gradient": paper.gradient_B}
    for name, value_B in measured.items():
        if baseline[name] is not None:
            size = min(len(value_B), len(baseline[name]))
            told[f"{name}_ratio"] = mean_over_pairs(value_B[:size], baseline[name][:size])
    return told
