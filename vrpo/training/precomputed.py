"""Precomputed references: the ELBOs of all epochs before the first step, and none to keep during training.

Masks are a pure function of (seed, epoch, example, side, sample), so the reference's ELBO of every sample is
known before training, and with it the step loses a quarter of its arithmetic and all of the reference's
memory. Computed by any number of processes, part by part (reference_cache.py); a run that was killed goes on
where it was. Epochs are those of the draw (`PackedTrainer._draw_epoch`), and one for evaluations. Of an epoch
that training does not finish only the examples that it takes are computed (used_rows.py).
"""

import contextlib
import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from datasets import Dataset
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.estimator.elbo import segment_elbo
from vrpo.estimator.masking import EVALUATION_EPOCH
from vrpo.models.adapters import is_peft_model
from vrpo.models.partitioned import any_partitioned
from vrpo.models.quantized import quantization_state
from vrpo.step import NLL, num_cuts, split_by_tokens, split_segments
from vrpo.training.checks import responses_of
from vrpo.training.fingerprint import Fingerprint, fingerprint_of, hash_of_weights, precision_of
from vrpo.training.known_reference import TOLERANCE, KnownReference, Split
from vrpo.training.packed_trainer import ModelNLL
from vrpo.training.precision import prepare_reference, release
from vrpo.training.reference import build_reference, check_reference
from vrpo.training.reference_cache import Part, ReferenceCache
from vrpo.training.together import on_main, raise_together
from vrpo.training.trainer import DiffusionTrainer
from vrpo.training.used_rows import rows_of_training
from vrpo.training.zero import leave_engine, running_engine, zero_stage

logger = logging.get_logger(__name__)

FOLDER = "reference_elbos"
_LOCK_FILE = ".lock"


def precompute(trainer: DiffusionTrainer, ref_model: nn.Module | None) -> KnownReference:
    """Computes what is missing of the reference ELBOs that the trainer's datasets need, and looks after them.

    Args: ref_model: the reference; None: the model as it is now, with PEFT without its adapter. It is freed
        by the caller.
    Errors: ValueError for stored ELBOs of something else (naming what differs), engines and datasets that it
        does not work with, a cache that another run writes to; OSError where it cannot be written.
    """
    known, fingerprints = _described(trainer, ref_model)
    splits = known.splits
    with _only_writer(trainer.accelerator, known.folder):
        work = on_main(trainer.accelerator, lambda: _claim(splits, fingerprints))
        if work:
            with _running(trainer, ref_model) as nll:
                _compute(trainer, nll, splits, work)
            trainer.accelerator.wait_for_everyone()
    if left := [split.cache.folder for split in splits if split.missing()]:
        raise ValueError(
            f"reference ELBOs that other processes computed are not in {left[0]}: all processes need one "
            "file system; set ref_log_probs_cache to a folder on a shared one"
        )
    if not work and not _is_sharded(trainer):  # sharding a model for one pass would take longer
        with _running(trainer, ref_model) as nll:
            _check_first(trainer, nll, known)
    return known


def check_precompute(trainer: DiffusionTrainer, ref_model: nn.Module | None) -> KnownReference:
    """What `precompute` would look after; nothing is computed or written.

    Errors: ValueError for what `precompute` refuses before it computes.
    """
    known, fingerprints = _described(trainer, ref_model)
    for split, fingerprint in zip(known.splits, fingerprints, strict=True):
        split.cache.check(fingerprint)
    return known


def _described(
    trainer: DiffusionTrainer, ref_model: nn.Module | None
) -> tuple[KnownReference, list[Fingerprint]]:
    """Which ELBOs are needed and where they lie, and what decides them, split by split."""
    _check_possible(trainer)
    check_reference(trainer, ref_model)
    splits = _splits(trainer)
    fingerprints = _fingerprints(trainer, ref_model, splits)
    is_half = trainer.accelerator.mixed_precision != "no" or _is_half(ref_model or trainer.model)
    known = KnownReference(
        splits,
        trainer.estimator,
        digest=hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest(),
        tolerance=TOLERANCE["half" if is_half else "full"],
        starts_here=ref_model is None,
    )
    return known, fingerprints


def _check_possible(trainer: DiffusionTrainer) -> None:
    for dataset in (trainer.train_dataset, *_evaluations(trainer).values()):
        if dataset is not None and not hasattr(dataset, "__len__"):
            raise ValueError(
                "precompute_ref_log_probs needs datasets of known length, got an IterableDataset: what a "
                "stream will bring cannot be computed beforehand; load it as a Dataset, or set it to false"
            )
    if trainer.train_dataset is None and not _evaluations(trainer):
        raise ValueError("precompute_ref_log_probs needs a train_dataset or an eval_dataset")
    if trainer.model_init is not None:
        raise ValueError(
            "precompute_ref_log_probs does not work with model_init: each train() would have another "
            "reference; pass the model"
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError("precompute_ref_log_probs does not work under FSDP1: set version 2 in fsdp_config")


def _evaluations(trainer: DiffusionTrainer) -> dict[str, Dataset]:
    found = trainer.eval_dataset
    if isinstance(found, dict):
        return found
    return {} if found is None else {"": found}


def _splits(trainer: DiffusionTrainer) -> list[Split]:
    args = trainer.args
    folder = Path(args.ref_log_probs_cache or Path(args.output_dir, FOLDER))
    splits = []
    if trainer.train_dataset is not None:
        splits.append(_split(trainer.train_dataset, rows_of_training(trainer), folder / "train"))
    for name, dataset in _evaluations(trainer).items():
        place = folder / (f"eval-{quote(name, safe='')}" if name else "eval")
        splits.append(_split(dataset, {EVALUATION_EPOCH: range(len(dataset))}, place))
    return splits


def _split(dataset: Dataset, rows: Mapping[int, Sequence[int]], place: Path) -> Split:
    return Split(dataset, rows, ReferenceCache(place, len(dataset)))


def _is_sharded(trainer: DiffusionTrainer) -> bool:
    """Whether every pass of a model is a collective."""
    return trainer.is_fsdp_enabled or zero_stage(trainer.accelerator) == 3


def _fingerprints(
    trainer: DiffusionTrainer, ref_model: nn.Module | None, splits: list[Split]
) -> list[Fingerprint]:
    model = trainer.model if ref_model is None else ref_model
    is_base = ref_model is None and is_peft_model(model)
    parameters = [(n, p) for n, p in model.named_parameters() if not (is_base and p.requires_grad)]
    hashed = functools.partial(hash_of_weights, [*parameters, *quantization_state(model)])
    weights = hashed() if any_partitioned(p for _, p in parameters) else None
    return on_main(
        trainer.accelerator,
        lambda: _fingerprints_of(trainer, splits, model, parameters, weights or hashed()),
    )


def _fingerprints_of(
    trainer: DiffusionTrainer,
    splits: list[Split],
    model: nn.Module,
    parameters: list[tuple[str, Tensor]],
    weights: str,
) -> list[Fingerprint]:
    precision = precision_of(
        (p for _, p in parameters), model.config._attn_implementation, trainer.accelerator
    )
    if trainer.args.torch_compile:
        precision["compiled"] = trainer.args.torch_compile_backend
    return [
        fingerprint_of(
            weights=weights,
            config=model.config,
            precision=precision,
            estimator=trainer.estimator,
            dataset=split.dataset,
            num_sides=_batch(trainer, split.dataset, range(1)).num_sides,
        )
        for split in splits
    ]


def _claim(splits: list[Split], fingerprints: list[Fingerprint]) -> list[tuple[int, Part]]:
    """(split, part) of what is to be computed."""
    for split, fingerprint in zip(splits, fingerprints, strict=True):
        split.cache.claim(fingerprint)
    return [(index, part) for index, split in enumerate(splits) for part in split.missing()]


def _is_half(model: nn.Module) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


def _batch(trainer: DiffusionTrainer, dataset: Dataset, rows: Iterable[int]) -> ResponseBatch:
    return responses_of(trainer.data_collator([dataset[row] for row in rows]))


@contextlib.contextmanager
def _running(trainer: DiffusionTrainer, ref_model: nn.Module | None) -> Iterator[NLL]:
    """The reference, as the step would run it; the policy itself where that is possible, no copy."""
    is_adapter = ref_model is None and is_peft_model(trainer.model)
    if ref_model is None and not trainer.is_fsdp_enabled:  # the policy has not moved yet: it is the reference
        model, was_training = trainer.model, trainer.model.training
        in_engine = running_engine if trainer.is_deepspeed_enabled else prepare_reference
        prepared = in_engine(trainer.accelerator, model.eval())
    elif is_adapter:
        model = copy.deepcopy(trainer.model).requires_grad_(False).eval()
        was_training, prepared = False, fsdp2_prepare_model(trainer.accelerator, model)
    else:
        prepared = build_reference(trainer, ref_model)
        model, was_training = trainer.accelerator.unwrap_model(prepared), False
    unadapted = (
        trainer.accelerator.unwrap_model(prepared).disable_adapter if is_adapter else contextlib.nullcontext
    )
    try:
        with torch.no_grad(), unadapted(), trainer.compute_loss_context_manager():
            yield ModelNLL(prepared)
    finally:
        if trainer.is_deepspeed_enabled:
            leave_engine(prepared)
        release(model)
        model.train(was_training)


def _compute(trainer: DiffusionTrainer, nll: NLL, splits: list[Split], work: list[tuple[int, Part]]) -> None:
    """This process's share of the parts, each written when it is done.

    A sharded model runs collectives in every pass: then all processes take as many parts and passes, and the
    values of those that nobody needs are dropped.
    """
    rank, world_size = trainer.args.process_index, trainer.args.world_size
    in_step = _is_sharded(trainer)
    rounds, error = range(0, len(work), world_size), None
    examples = sum(len(part.rows) for _, part in work)
    logger.info(
        f"precomputing the reference ELBOs of {examples} examples, each epoch's counted, in {len(work)} "
        f"parts on {world_size} processes"
    )
    bar = tqdm(rounds, desc="Reference", unit="part", disable=trainer.args.disable_tqdm or rank > 0)
    for first in bar:
        is_needed = first + rank < len(work)
        if not (is_needed or in_step):
            continue
        index, part = work[(first + rank) % len(work)]
        split = splits[index]
        batch = _batch(trainer, split.dataset, part.rows)
        num_passes = sum(count for _, count in _cut(trainer, batch))
        if in_step:
            num_passes = trainer._largest([num_passes])[0]
        elbo_RK = _elbos(trainer, nll, batch, part.epoch, num_passes)
        error = _not_finite(batch, elbo_RK)
        if in_step:
            raise_together(error, trainer.accelerator)
        if error is not None:
            break
        if is_needed:
            split.cache.write(part, batch, elbo_RK)
    raise_together(error, trainer.accelerator)  # what the others computed is kept


def _not_finite(batch: ResponseBatch, elbo_RK: Tensor) -> FloatingPointError | None:
    is_bad_R = ~torch.isfinite(elbo_RK).all(dim=1)
    if not is_bad_R.any():
        return None
    bad = batch.example_R[is_bad_R].unique()[:5].tolist()
    return FloatingPointError(
        f"the reference's ELBO of the examples {bad} is not finite: its weights hold NaN or infinity, or "
        "overflow in their dtype"
    )


def _cut(trainer: DiffusionTrainer, batch: ResponseBatch) -> Iterator[tuple[ResponseBatch, int]]:
    """(examples, number of packs) of each forward pass or several, filled as far as the budget allows."""
    args = trainer.args
    size = args.precompute_ref_batch_size or batch.num_examples
    for start in range(0, batch.num_examples, size):
        some = batch.examples(start, min(start + size, batch.num_examples))
        for part in split_by_tokens(some, args.num_samples, args.max_tokens_per_pack):
            yield part, num_cuts(part, args.num_samples, args.max_tokens_per_pack)


def _packs(trainer: DiffusionTrainer, batch: ResponseBatch, epoch: int) -> Iterator[PackedBatch]:
    for part, _ in _cut(trainer, batch):
        yield from split_segments(
            trainer.estimator.pack(part, epoch, "cpu"), trainer.args.max_tokens_per_pack
        )


def _elbos(trainer: DiffusionTrainer, nll: NLL, batch: ResponseBatch, epoch: int, num_passes: int) -> Tensor:
    """elbo_RK (R, K) of a batch, on the CPU; the last pack runs again where num_passes are more."""
    elbos = []
    for pack in _packs(trainer, batch, epoch):
        pack = pack.to(trainer.args.device)
        elbos.append(segment_elbo(nll(pack), pack))
    for _ in range(len(elbos), num_passes):
        nll(pack)
    return torch.cat(elbos).view(-1, trainer.args.num_samples).cpu()


def _check_first(trainer: DiffusionTrainer, nll: NLL, known: KnownReference) -> None:
    """One forward pass of the reference against what is stored."""
    split = known.splits[0]
    epoch = split.epochs[0]
    batch = _batch(trainer, split.dataset, split.rows[epoch][:1])
    stored_RK = known(batch, epoch, trainer.estimator)
    known.check(_elbos(trainer, nll, batch, epoch, 1), stored_RK, "the reference now")


@contextlib.contextmanager
def _only_writer(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Holds a lock on the folder in the main process: two runs would write each other's parts."""
    lock = FileLock(folder / _LOCK_FILE, timeout=0)

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"another run is computing reference ELBOs in {folder}: wait for it, or give another "
                "ref_log_probs_cache"
            ) from error

    on_main(accelerator, acquire)
    try:
        yield
    finally:
        lock.release()
