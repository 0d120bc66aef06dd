"""DiffusionKTOTrainer: preference training on single labelled responses (ELBO-KTO)."""

import functools
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from vrpo import data
from vrpo.batch import ResponseBatch
from vrpo.gradient import StepResult
from vrpo.objectives.pairs import NOISE
from vrpo.objectives.preference import log_ratio
from vrpo.objectives.unpaired import KTOObjective
from vrpo.step import num_cuts
from vrpo.training.kto_config import DiffusionKTOConfig
from vrpo.training.packed_trainer import Metrics
from vrpo.training.reference_trainer import ReferenceTrainer


class DiffusionKTOTrainer(ReferenceTrainer):
    """KTO (arXiv 2402.01306) of a masked-diffusion LM: ELBOs in the place of log-probabilities.

    A batch, of all processes, is one micro-batch: z0 is its mean, however it is cut into packs. Where it does
    not fit max_tokens_per_pack it is replayed pack by pack; with gradient_mode="joint" the largest possible
    batch has to fit. In evaluation z0 is the mean over the whole evaluation set, so that eval_loss depends
    neither on per_device_eval_batch_size nor on the number of processes.

    Args: as VRPOTrainer, with DiffusionKTOConfig; datasets in TRL's unpaired format `prompt`, `completion`,
        `label` (true: desirable), text or messages, or `prompt_ids`, `completion_ids`, `label`; pairs
        without a label are taken apart.

    Metrics, means over responses: `rewards/{chosen,rejected}` (beta times the log-ratio, over the desirable
    and over the undesirable ones), `rewards/margins` (their difference), `kl` (z0, nats), `logps/completion`,
    `elbo/ref_completion` (nats), `elbo/completion_per_token`, `vrpo/tokens_per_second`. With independent
    replicates also `vrpo/{score_std,loss_bias,loss_bias_bound,sign_flips,gradient_noise}`, of the score of
    one response and not of a pair: see `KTOObjective.noise`.
    """

    args: DiffusionKTOConfig
    config_class = DiffusionKTOConfig
    collator = data.LabelledCollator
    stream_sides = data.COMPLETION_SIDES
    has_label = True
    prepare_dataset = staticmethod(data.prepare_labelled)
    method = "kto"
    whole_batches = True
    metric_names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "kl",
        "logps/completion",
        "elbo/ref_completion",
        "elbo/completion_per_token",
        *(f"vrpo/{name}" for name in NOISE),
    )

    @functools.cached_property
    def _evaluated(self) -> list[Metrics]:
        """The metrics of each batch of the evaluation that is going on."""
        return []

    def _metrics_of_evaluation(self, dataset):
        missing = set()
        if dataset is not None and "label" in getattr(dataset, "column_names", ()):
            kinds = {True: "rewards/chosen", False: "rewards/rejected"}
            missing = {name for kind, name in kinds.items() if kind not in dataset.unique("label")}
        if missing:
            missing.add("rewards/margins")
        return [name for name in super()._metrics_of_evaluation(dataset) if name not in missing]

    def _fitting(self, prepared, tokenizer, model, split):
        prepared = super()._fitting(prepared, tokenizer, model, split)
        if split == "train" and self.gradient_mode == "joint":
            # Any examples may meet in a batch: told here, and not when they do after hours.
            largest = np.sort(data.num_tokens(prepared))[-self.args.train_batch_size :]
            self._check_batch(int(largest.sum()), f"the {len(largest)} longest responses")
        return prepared

    def _check_batch(self, tokens: int, what: str) -> None:
        """ValueError unless a batch of so many tokens, each masked copy counted once, fits one pack."""
        args = self.args
        if args.num_samples * tokens > args.max_tokens_per_pack:
            raise ValueError(
                f"gradient_mode='joint' takes a whole batch in one graph, for its mean z0: {what} in a batch "
                f"take {args.num_samples * tokens} tokens with num_samples={args.num_samples}, but "
                f"max_tokens_per_pack={args.max_tokens_per_pack}; raise that, lower "
                f"per_device_train_batch_size={args.per_device_train_batch_size} or num_samples, or use "
                "gradient_mode='auto' (without dropout), which replays"
            )

    def _micro_batches(self, batch: ResponseBatch) -> list[tuple[ResponseBatch, int]]:
        if self.gradient_mode != "joint":
            return super()._micro_batches(batch)
        if self.model.training:
            self._check_batch(int(batch.length_R.sum()), f"the {batch.num_examples} responses")
            return [(batch, 1)]
        # Without a gradient there is no graph that would have to hold it.
        count = num_cuts(batch, self.args.num_samples, self.args.max_tokens_per_pack)
        return [(batch, count if self.args.world_size == 1 else self._largest([count])[0])]

    def _objective(self, batch: ResponseBatch, replicate_K: tuple[int, ...]) -> KTOObjective:
        return self._objective_of(
            batch.side_R == 0,
            replicate_K,
            sum_over_processes=lambda total: self.accelerator.reduce(total, reduction="sum"),
        )

    def _objective_of(self, is_desirable_R: Tensor, replicate_K: tuple[int, ...], **more) -> KTOObjective:
        args = self.args
        return KTOObjective(
            is_desirable_R,
            replicate_K,
            loss_type=args.loss_type,
            beta=args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
            **more,
        )

    def _metrics(self, batch: ResponseBatch, result: StepResult) -> Metrics:
        objective = self._objective(batch, result.replicate_K)
        policy_RK, reference_RK = result.policy_RK, result.reference_RK
        ratio_R = log_ratio(policy_RK, reference_RK)
        center, reward_R = objective.center(ratio_R), self.args.beta * ratio_R
        policy_R = policy_RK.mean(dim=1)
        is_desirable_R = (batch.side_R == 0).to(ratio_R)
        noise = objective.noise(policy_RK, reference_RK, center)
        return {
            # Over all responses; `_means_of_kinds` divides by the share of their kind.
            "rewards/chosen": reward_R * is_desirable_R,
            "rewards/rejected": reward_R * (1 - is_desirable_R),
            "label": is_desirable_R,
            "kl": center.expand_as(ratio_R),
            "logps/completion": policy_R,
            "elbo/ref_completion": reference_RK.mean(dim=1),
            "elbo/completion_per_token": policy_R / batch.response_length_R.to(policy_R),
            **{f"vrpo/{name}": value_R for name, value_R in noise.items()},
        }

    # ---- evaluation, whose z0 is known when all of it is done ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated.clear()
        compute = self.compute_metrics
        if compute is not None and self.args.loss_type == "kto":
            self.compute_metrics = lambda found: compute(
                EvalPrediction(self._of_whole_set(found.predictions), found.label_ids)
            )
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.compute_metrics = compute
        return output._replace(predictions=self._of_whole_set(output.predictions))

    def _record(self, mode: str, metrics: Metrics) -> None:
        if mode == "eval":
            self._evaluated.append({name: value_R.cpu() for name, value_R in metrics.items()})
        else:
            super()._record(mode, metrics)

    def _take(self, mode: str) -> dict[str, float]:
        if mode == "eval" and self._evaluated:
            super()._record(mode, self._with_one_center(_joined(self._evaluated, torch.cat)))
            self._evaluated.clear()
        return _means_of_kinds(super()._take(mode))

    def _with_one_center(self, values: Metrics) -> Metrics:
        """The metrics of all evaluated responses, what depends on z0 for the z0 of all of them."""
        objective = self._objective_of(values["label"] > 0, (0,))
        ratio_R = (values["rewards/chosen"] + values["rewards/rejected"]) / self.args.beta
        center = objective.center(ratio_R)
        found = {"loss": objective.losses(ratio_R, center), "kl": center.expand_as(ratio_R)}
        if "vrpo/score_std" in values:
            noise = objective.noise_of(ratio_R, values["vrpo/score_std"], center)
            found |= {f"vrpo/{name}": value_R for name, value_R in noise.items()}
        return values | found

    def _of_whole_set(self, predictions: Any) -> Any:
        """What `prediction_step` gave of each batch, a dict of arrays or a list of them, by the z0 of all."""
        if predictions is None or self.args.loss_type != "kto":
            return predictions
        parts = predictions if isinstance(predictions, list) else [predictions]
        values = {name: torch.from_numpy(value) for name, value in _joined(parts, np.concatenate).items()}
        whole = {name: value.numpy() for name, value in self._with_one_center(values).items()}
        if not isinstance(predictions, list):
            return whole
        ends = np.cumsum([len(part["loss"]) for part in parts])[:-1]
        cut = {name: np.split(value, ends) for name, value in whole.items()}
        return [{name: cut[name][index] for name in cut} for index in range(len(parts))]


def _joined(parts: list[dict[str, Any]], join: Any) -> dict[str, Any]:
    """Name -> the values of all parts."""
    values = defaultdict(list)
    for part in parts:
        for name, value in part.items():
            values[name].append(value)
    return {name: join(found) for name, found in values.items()}


def _means_of_kinds(means: dict[str, float]) -> dict[str, float]:
    """Rewards as means over the responses of their kind; those of a kind that did not occur are left out."""
    if "label" not in means:
        return means
    share = means.pop("label")
    chosen, rejected = means.pop("rewards/chosen"), means.pop("rewards/rejected")
    if share > 0:
        means["rewards/chosen"] = chosen / share
    if share < 1:
        means["rewards/rejected"] = rejected / (1 - share)
    if 0 < share < 1:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means
