"""What a training would do, told before it runs: lengths, steps, packs, and the first masks as text.

Every function but `look` is pure: it returns lines of text. Nothing here runs a model.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as compute
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.data import DataReport
from vrpo.data.budget import SIDE_COLUMNS
from vrpo.training.known_reference import KnownReference
from vrpo.training.trainer import DiffusionTrainer

_NUM_BATCHES = 8
_STREAMED = 64  # batches of a stream, whose length is not known
_NUM_SAMPLES = 2
_PERCENTILES = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
_LONGEST_TEXT = 1200

Lengths = Mapping[str, np.ndarray]
"""Name -> tokens of each: "prompt", and "chosen" and "rejected", or "completion"."""


@dataclass(frozen=True)
class Look:
    """What a training starts with.

    lengths: of the whole training set, or of the first rows of a stream, none twice. tokens_E: tokens of each
        example, its prompt once per response, EOS fill included.
    total_tokens: of the examples of all steps of all processes, a masked copy counted as one; is_exact:
        whether all of them were looked at, and it is not an estimate.
    cuts: for each of the first batches, packs of each of its micro-batches. steps_per_epoch: None of a
        stream.
    batch, pack: the first micro-batch, before it is cut into packs.
    """

    report: DataReport | None
    lengths: Lengths
    tokens_E: np.ndarray
    cuts: list[list[int]]
    steps_per_epoch: int | None
    max_steps: int
    examples_per_step: int
    total_tokens: float
    is_exact: bool
    batch: ResponseBatch
    pack: PackedBatch

    @property
    def num_sides(self) -> int:
        return self.batch.num_sides

    @property
    def mean_prompt(self) -> float:
        return float(self.lengths["prompt"].mean())

    @property
    def mean_response(self) -> float:
        """With its EOS fill."""
        return float(self.tokens_E.mean()) / self.num_sides - self.mean_prompt


def look(trainer: DiffusionTrainer) -> Look:
    """Reads the first batches as training would; in every process, where there are several."""
    rows = trainer.train_dataset
    trainer.model.train()  # EOS fill is training's alone
    loader = trainer.get_train_dataloader()
    is_stream = not isinstance(rows, Dataset)
    steps = trainer.set_initial_training_values(trainer.args, loader)
    needed = steps[-1] * trainer.args.gradient_accumulation_steps
    passes, batches = _first_batches(trainer, loader, min(needed, _STREAMED) if is_stream else _NUM_BATCHES)
    cuts = [trainer._micro_batches(batch) for batch in batches[:_NUM_BATCHES]]
    part, _ = cuts[0][0]
    once = [batch for number, batch in zip(passes, batches, strict=True) if number == 0]
    if is_stream:
        total = _tokens_of_stream(passes, batches, needed)
    else:
        total = _tokens_of_steps(trainer, loader, steps[-1])
    of_process = torch.tensor([total], dtype=torch.float64, device=trainer.args.device)
    return Look(
        report=trainer.data_reports.get("train"),
        lengths=_of_batches(once) if is_stream else _of_dataset(rows),
        tokens_E=_costs(once) if is_stream else np.asarray(trainer._costs_of_epoch(rows, 0)),
        cuts=[[count for _, count in parts] for parts in cuts],
        steps_per_epoch=None if is_stream else steps[1],
        max_steps=steps[-1],
        examples_per_step=steps[4],
        total_tokens=float(trainer.accelerator.gather(of_process).sum()),
        is_exact=not is_stream or len(batches) >= needed,
        batch=part,
        pack=trainer.estimator.pack(part, 0, "cpu"),
    )


def _first_batches(
    trainer: DiffusionTrainer, loader: DataLoader, number: int
) -> tuple[list[int], list[ResponseBatch]]:
    """Of each of the first batches the pass over a stream that it is of (else 0), and the batch."""
    passes, batches = [], []
    for inputs in itertools.islice(loader, number):
        trainer._pass = inputs.get("epoch")
        passes.append(trainer._pass or 0)
        batches.append(trainer._responses(inputs, trainer.model))
    return passes, batches


def _tokens_of_steps(trainer: DiffusionTrainer, loader: DataLoader, max_steps: int) -> int:
    """Tokens of the examples that this process takes in all steps, as its sampler deals them out."""
    per_step, tokens, epoch = trainer.args.gradient_accumulation_steps, 0, 0
    while max_steps > 0:
        costs = np.asarray(trainer._costs_of_epoch(trainer.train_dataset, epoch))
        _set_epoch(loader.batch_sampler, epoch)
        batches = list(itertools.islice(loader.batch_sampler, max_steps * per_step))
        tokens += int(costs[np.concatenate(batches)].sum())
        max_steps -= -(-len(batches) // per_step)  # the last step of an epoch may be a smaller one
        epoch += 1
    return tokens


def _set_epoch(sampler: Any, epoch: int) -> None:
    """accelerate's own reaches through two samplers, and there may be three."""
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def _tokens_of_stream(passes: Sequence[int], batches: Sequence[ResponseBatch], needed: int) -> float:
    """Tokens of the first `needed` batches; where fewer are known, by their mean.

    The last batch of a pass is a smaller one, so that the mean is that of whole passes where there are some.
    """
    costs = [int(batch.length_R.sum()) for batch in batches]
    if len(costs) >= needed:
        return sum(costs[:needed])
    whole = [cost for number, cost in zip(passes, costs, strict=True) if number < passes[-1]]
    return needed * float(np.mean(whole or costs))


def _of_dataset(rows: Dataset) -> Lengths:
    names = ["prompt_ids", *(name for name in rows.column_names if name in SIDE_COLUMNS)]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for table in rows.select_columns(names).with_format("arrow").iter(batch_size=10_000):
        for name in names:
            found[name].append(compute.list_value_length(table[name]).to_numpy())
    return {name.removesuffix("_ids"): np.concatenate(parts) for name, parts in found.items()}


def _of_batches(batches: Sequence[ResponseBatch]) -> Lengths:
    sides = _names(batches[0].num_sides)
    prompts = [batch.prompt_length_R[:: batch.num_sides].numpy() for batch in batches]
    lengths = {"prompt": np.concatenate(prompts)}
    for index, name in enumerate(sides):
        parts = [batch.response_length_R[index :: batch.num_sides].numpy() for batch in batches]
        lengths[name] = np.concatenate(parts)
    return lengths


def _costs(batches: Sequence[ResponseBatch]) -> np.ndarray:
    return np.concatenate([b.length_R.view(-1, b.num_sides).sum(dim=1).numpy() for b in batches])


def _names(num_sides: int) -> tuple[str, ...]:
    return ("chosen", "rejected") if num_sides == 2 else ("completion",)


def data_text(report: DataReport | None, lengths: Lengths) -> str:
    """Rows read, dropped and truncated, and percentiles of the lengths in tokens."""
    kept = len(lengths["prompt"])
    if report is None:
        lines = [f"data       a stream; of its first {kept} rows"]
    else:
        unusable, equal = len(report.unusable), report.dropped_same
        longer = report.kept * report.examples_per_row - kept
        counted = f"{kept} of {report.rows} rows; dropped {report.rows - kept}"
        if report.examples_per_row > 1:
            counted = f"{kept} examples of {report.rows} rows, taken apart; dropped"
        lines = [
            f"data       {counted}: {unusable} unusable, "
            f"{equal} equal after truncation, {longer} over the token budget",
            f"truncated  {report.prompts_truncated} prompts ({report.prompt_tokens_cut} tokens), "
            f"{report.responses_truncated} responses ({report.response_tokens_cut} tokens)",
        ]
    lines += ["", f"{'tokens':<12}" + "".join(f"{name:>8}" for name in (*_PERCENTILES, "mean"))]
    for name, values in lengths.items():
        points = np.percentile(values, list(_PERCENTILES.values()), method="nearest")
        lines.append(f"  {name:<10}" + "".join(f"{int(p):>8}" for p in points) + f"{values.mean():>8.1f}")
    return "\n".join(lines) + "\n"


def steps_text(seen: Look, num_samples: int) -> str:
    """Optimizer steps, packed tokens (all masked copies, padding none) and packs."""
    of_run = num_samples * seen.total_tokens
    about = "" if seen.is_exact else ", by the mean of its first batches"
    epochs = "" if seen.steps_per_epoch is None else f"{seen.steps_per_epoch} per epoch, "
    steps = f"steps      {epochs}{seen.max_steps} in total, of {seen.examples_per_step} examples"
    packs = [count for counts in seen.cuts for count in counts]
    lines = [
        steps,
        f"tokens     {of_run / seen.max_steps:,.0f} packed per step, {of_run:,.0f} in total{about}; "
        f"K = {num_samples}",
        f"packs      {len(packs) / len(seen.cuts):.1f} micro-batches per batch of a device, "
        f"{np.mean(packs):.1f} packs per micro-batch, at most {max(packs)}; of the first "
        f"{len(seen.cuts)} batches",
    ]
    return "\n".join(lines) + "\n"


def reference_text(known: KnownReference) -> str:
    """Reference ELBOs that are needed beforehand, and how many of them are missing; all epochs counted."""
    needed = sum(len(rows) for split in known.splits for rows in split.rows.values())
    missing = sum(len(part.rows) for split in known.splits for part in split.missing())
    return (
        f"reference  ELBOs of {needed} examples, each epoch's counted; {missing} of them are to be computed, "
        f"the others are in {known.folder}\n"
    )


def pack_text(
    tokenizer: PreTrainedTokenizerBase, batch: ResponseBatch, pack: PackedBatch, num_examples: int = 1
) -> str:
    """The first examples of a pack for the eye: of each response, the prompt and some masked copies.

    A line of a copy: the level, which is the masked share of the response; the weight of its masked tokens
    in the ELBO, least to most where they differ; the response as the model sees it.
    """
    samples = pack.num_samples
    lines = [f"first pack: {batch.num_examples} examples, {len(pack.tokens_T)} tokens, K = {samples}"]
    for response in range(num_examples * batch.num_sides):
        start = samples * response
        prompt_length = int(batch.prompt_length_R[response])
        tokens = _clean(batch, response)
        side, example = response % batch.num_sides, int(batch.example_R[response])
        if side == 0:
            lines.append(f"  example {example}, prompt of {prompt_length} tokens")
            lines.append(f"    {_shown(tokenizer, tokens[:prompt_length])}")
        name = _names(batch.num_sides)[side]
        lines.append(f"  {name}, {len(tokens) - prompt_length} tokens")
        lines.append(f"    {_shown(tokenizer, tokens[prompt_length:])}")
        for sample in range(min(_NUM_SAMPLES, samples)):
            copy = pack.segments(start + sample, start + sample + 1)
            lines += _copy_lines(tokenizer, copy, prompt_length, sample)
    return "\n".join(lines) + "\n"


def _clean(batch: ResponseBatch, response: int) -> list[int]:
    ends = np.cumsum(batch.length_R.numpy())
    start = int(ends[response] - batch.length_R[response])
    return batch.tokens_U[start : int(ends[response])].tolist()


def _copy_lines(
    tokenizer: PreTrainedTokenizerBase, copy: PackedBatch, prompt_length: int, sample: int
) -> list[str]:
    masked, length = len(copy.row_N), len(copy.tokens_T) - prompt_length
    weight = "none"
    if masked:
        least, most = float(copy.weight_N.min()), float(copy.weight_N.max())
        weight = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
    return [
        f"    sample {sample}: {masked} of {length} masked, level {masked / length:.3f}, weight {weight}",
        f"      {_shown(tokenizer, copy.tokens_T[prompt_length:].tolist())}",
    ]


def _shown(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """In quotes, so that line breaks and spaces are seen; the middle of a long text is left out."""
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if len(text) <= _LONGEST_TEXT:
        return repr(text)
    half = _LONGEST_TEXT // 2
    return f"{text[:half]!r} ({len(text) - 2 * half} characters) {text[-half:]!r}"
