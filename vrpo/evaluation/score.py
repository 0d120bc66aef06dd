"""`vrpo score`: ELBOs of the responses in a file, and rewards and margins against a reference."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from vrpo import data
from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.data.output import check_output, to_json, write
from vrpo.estimator.elbo import elbo, elbo_std
from vrpo.estimator.masking import (
    EVALUATION_EPOCH,
    check_design,
    default_replicates,
    independent_replicates,
)
from vrpo.evaluation.inputs import check_numbers, load_models
from vrpo.models.quantized import Quantization
from vrpo.objectives import preference
from vrpo.step import Estimator, split_by_tokens
from vrpo.training.config import VRPOConfig

_ROWS_AT_ONCE = 64


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ScoreArguments:
    """What to score, with which model, against which reference."""

    model_name_or_path: str = field(metadata={"help": "Model to score with: a folder or a hub name."})
    dataset_name: str | list[str] = field(
        metadata={"help": "Preference pairs or prompt/completion rows: files, folder or hub name."}
    )
    output_file: str = field(metadata={"help": "JSONL file to write, one line per row of the data."})
    dataset_config: str | None = _field(None, "Configuration of a hub dataset.")
    dataset_split: str = _field(
        "train", "Split to score, or a slice such as train[:100]; a file has none but train."
    )
    ref_model_name_or_path: str | None = _field(None, "Reference model; adds its ELBOs, rewards and margins.")
    model_revision: str = _field("main", "Branch, tag or commit of the model.")
    dtype: str = _field("auto", "Dtype of the weights: auto, float32, bfloat16 or float16.")
    attn_implementation: str = _field("vrpo", "As in training.")
    beta: float = _field(VRPOConfig.beta, "reward = beta * (ELBO - reference ELBO).")
    num_samples: int = _field(
        VRPOConfig.num_samples, "Masked copies of each response per estimate; more is more exact."
    )
    mask_design: str = _field(
        VRPOConfig.mask_design,
        "How levels and masks are drawn: a name of vrpo.estimator.designs.DESIGNS. The default is that of "
        "training: of the exactly unbiased ones it has about the least variance for margins and for ELBOs by "
        "themselves. Of the others 'ratio' is biased: by at most 19 % of the ELBO at answers of 2 tokens "
        "with 4 samples.",
    )
    pair_masks: str = _field(VRPOConfig.pair_masks, "What the masks of a pair share, as in training.")
    num_replicates: int | None = _field(
        VRPOConfig.num_replicates,
        "Independent repetitions of the design, whose spread gives elbo_std_* and margin_std. Unset: as in "
        "training, 2 where the design needs them and num_samples is even and at least 8, else 1.",
    )
    max_length: int = _field(VRPOConfig.max_length, "Longest prompt + response in tokens.")
    max_tokens_per_pack: int = _field(VRPOConfig.max_tokens_per_pack, "Tokens of one forward pass.")
    mask_token_id: int | None = _field(None, "Id of the mask token. Unset: the model's.")
    seed: int = _field(VRPOConfig.seed, "Seed of the masks; the same seed gives the same figures.")
    device: str | None = _field(None, "cuda, cpu, ...; unset: a GPU where there is one.")


@dataclass(frozen=True)
class Scorer:
    """A model, perhaps a reference, and how their ELBOs are estimated.

    beta: reward = beta * (ELBO - reference ELBO), per nat.
    max_tokens_per_pack: tokens of one forward pass.
    """

    model: nn.Module
    reference: nn.Module | None
    estimator: Estimator
    beta: float
    max_tokens_per_pack: int
    device: torch.device | str

    @torch.no_grad()
    def score(self, batch: ResponseBatch) -> Iterator[dict[str, float]]:
        """One mapping per example, in order; the fields are those of `score_file`.

        The masks are those of an evaluation: a pure function of (seed, example id, side, sample), the
        same for model and reference.
        """
        sides = ("chosen", "rejected") if batch.num_sides == 2 else ("completion",)
        drawn = self.estimator
        replicate_K = independent_replicates(drawn.mask_design, drawn.num_samples, drawn.num_replicates)
        for part in split_by_tokens(batch, self.estimator.num_samples, self.max_tokens_per_pack):
            packed = self.estimator.pack(part, EVALUATION_EPOCH, self.device)
            columns = {"example_id": part.example_R[:: part.num_sides]}
            elbo_RK = _elbo(self.model, packed)
            for side, name in enumerate(sides):
                columns[f"tokens_{name}"] = part.response_length_R[side :: part.num_sides]
                columns[f"elbo_{name}"] = elbo_RK.mean(dim=1)[side :: part.num_sides]
                columns[f"elbo_std_{name}"] = elbo_std(elbo_RK, replicate_K)[side :: part.num_sides]
            if self.reference is not None:
                reference_RK = _elbo(self.reference, packed)
                reference_std_R = elbo_std(reference_RK, replicate_K)
                reward_R = self.beta * preference.log_ratio(elbo_RK, reference_RK)
                for side, name in enumerate(sides):
                    columns[f"ref_elbo_{name}"] = reference_RK.mean(dim=1)[side :: part.num_sides]
                    columns[f"ref_elbo_std_{name}"] = reference_std_R[side :: part.num_sides]
                    columns[f"reward_{name}"] = reward_R[side :: part.num_sides]
                if len(sides) == 2:
                    columns["margin"] = preference.preference_score(elbo_RK, reference_RK, self.beta)
                    columns["margin_std"] = preference.score_std(
                        elbo_RK, reference_RK, self.beta, packed.replicate_K
                    )
            values = [column.tolist() for column in columns.values()]
            for row in zip(*values, strict=True):
                yield dict(zip(columns, row, strict=True))


def _elbo(model: nn.Module, packed: PackedBatch) -> Tensor:
    return elbo(model(**packed.model_inputs()).nll, packed)


def score_dataset(scorer: Scorer, dataset: Dataset) -> list[dict[str, float]]:
    """Scores of a prepared dataset (see `data.prepare_pairs`, `data.prepare_completions`), in its order."""
    is_pairs = "chosen_ids" in dataset.column_names
    collate = data.PairCollator() if is_pairs else data.CompletionCollator()
    rows = []
    with tqdm(total=len(dataset), desc="Scoring", unit="row") as bar:
        for start in range(0, len(dataset), _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, len(dataset))
            batch = collate([dataset[i] for i in range(start, stop)])["responses"]
            for row in scorer.score(batch):
                _check_finite(row)
                rows.append(row)
                bar.update()
    return rows


def _check_finite(row: dict[str, float]) -> None:
    """FloatingPointError unless every ELBO of the row is a number."""
    for name, value in row.items():
        if not name.endswith("std") and "_std_" not in name and not math.isfinite(value):
            raise FloatingPointError(
                f"{name} of row {row['example_id']} is {value}: the weights hold NaN or infinity, or "
                "overflow in their dtype; look at the checkpoint, or give dtype=float32"
            )


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the rows.

    elbo/{side} in nats per response, elbo/{side}_per_token (total over total), elbo/{side}_std, the root mean
    square of elbo_std_* where the masks tell it: how far the masks put the ELBO of a row off; of pairs
    elbo/accuracies, how often the model finds the chosen response more probable; with a reference the same
    of it (ref_elbo/...), rewards/{side} and, of pairs, rewards/{margins, accuracies}. A tie counts as wrong.
    *_error: standard error over the rows, which has the noise of the masks in it.
    """
    sides = [name.removeprefix("tokens_") for name in rows[0] if name.startswith("tokens_")]
    column = {name: torch.tensor([row[name] for row in rows]).double() for name in rows[0]}
    means: dict[str, Tensor] = {}
    totals: dict[str, float] = {"rows": len(rows)}
    for kind in ("elbo", "ref_elbo"):
        if f"{kind}_{sides[0]}" not in column:
            continue
        for side in sides:
            elbo_B = means[f"{kind}/{side}"] = column[f"{kind}_{side}"]
            totals[f"{kind}/{side}_per_token"] = (elbo_B.sum() / column[f"tokens_{side}"].sum()).item()
            std_B = column[f"{kind}_std_{side}"]
            if not std_B.isnan().any():
                totals[f"{kind}/{side}_std"] = std_B.square().mean().sqrt().item()
        if len(sides) == 2:
            right = column[f"{kind}_chosen"] > column[f"{kind}_rejected"]
            means[f"{kind}/accuracies"] = right.double()
    if f"reward_{sides[0]}" in column:
        means |= {f"rewards/{side}": column[f"reward_{side}"] for side in sides}
    if "margin" in column:
        means["rewards/margins"] = column["margin"]
        means["rewards/accuracies"] = (column["margin"] > 0).double()
    for name, value_B in means.items():
        totals[name] = value_B.mean().item()
        if len(rows) > 1:
            totals[f"{name}_error"] = (value_B.std() / len(rows) ** 0.5).item()
    return totals


def mask_options(args: ScoreArguments) -> dict[str, Any]:
    """mask_design, pair_masks and num_replicates, the last as in training where it is not given.

    One design for margins and for ELBOs by themselves. The noise of an ELBO is another one than that of a
    margin, what a level is worth beside what a token is worth, and `graded-balanced` takes away both: every
    sample keeps a fixed total, so that a constant log p has none, levels are antithetic in their strata, and
    row weights are balanced (benchmarks/results/variance.csv, "absolute").

    Errors: ValueError naming the argument.
    """
    num_replicates = args.num_replicates
    if num_replicates is None:
        num_replicates = default_replicates(args.mask_design, args.num_samples)
    check_design(args.mask_design, args.num_samples, 1, num_replicates, args.pair_masks)
    return {"mask_design": args.mask_design, "pair_masks": args.pair_masks, "num_replicates": num_replicates}


def score_file(
    args: ScoreArguments, quantization: Quantization | None = None
) -> tuple[dict[str, Any], data.DataReport]:
    """Score `args.dataset_name` and write `args.output_file`, one JSON object per line:

        example_id; of each side (chosen and rejected, or completion) tokens_*, elbo_* (nats, summed over
        the response) and elbo_std_*, its standard error over mask draws; with a reference ref_elbo_*,
        ref_elbo_std_*, reward_*, and of pairs margin and margin_std. Standard errors come from the spread
        of the draw's independent replicates and are null where it has none.

    `summarise` of the rows and the packed tokens per second go into a second file, .summary.json instead of
    the suffix of the first.

    Returns: that summary, and the report on the data.
    """
    masks = mask_options(args)
    check_numbers(args)
    output, summary_output = check_output(
        args.output_file,
        models={
            "model_name_or_path": args.model_name_or_path,
            "ref_model_name_or_path": args.ref_model_name_or_path,
        },
        data={"dataset_name": args.dataset_name},
        beside=(".summary.json",),
    )
    rows = data.load_rows(args.dataset_name, config=args.dataset_config, split=args.dataset_split)
    models = load_models(args, revision=args.model_revision, quantization=quantization)
    is_pairs = bool({"chosen", "chosen_ids"} & set(rows.column_names))
    prepare = data.prepare_pairs if is_pairs else data.prepare_completions
    dataset, report = prepare(
        rows,
        models.tokenizer,
        max_length=args.max_length,
        vocab_size=models.vocab_size,
        mask_token_id=models.mask_token_id,
    )
    models.check_length(report.longest)
    data.check_token_budget(dataset, args.num_samples, args.max_tokens_per_pack)
    estimator = Estimator(
        mask_token_id=models.mask_token_id,
        num_samples=args.num_samples,
        masks_per_level=1,
        seed=args.seed,
        **masks,
    )
    scorer = Scorer(
        models.model, models.reference, estimator, args.beta, args.max_tokens_per_pack, models.device
    )
    started = time.perf_counter()
    scored = score_dataset(scorer, dataset)
    seconds = time.perf_counter() - started
    packed = args.num_samples * (2 * report.prompt_tokens if is_pairs else report.prompt_tokens)
    packed += args.num_samples * report.response_tokens
    summary = summarise(scored) | {"tokens_per_second": packed / seconds}
    write(
        {
            output: "".join(to_json(row) + "\n" for row in scored),
            summary_output: to_json(summary, indent=1) + "\n",
        }
    )
    return summary, report
