"""Resuming the run that was interrupted, and no other one: which checkpoint, whole or not, of which run.

Every checkpoint holds `vrpo_run.json`, what the run was. What decides which example is masked how, and
against which reference it is scored, must be the same on resume: a run that changes it midway is neither
the old run nor a new one. So must the adapter, and what optimizer states depend on. What people change on
purpose (rate, beta, number of samples, batch) is told, and takes effect (vrpo.training.changed).
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from vrpo.models.partitioned import whole, whole_shape
from vrpo.training.changed import check_changed
from vrpo.training.checkpoints import STATE_FILES, checkpoints, fault_of

logger = logging.get_logger(__name__)

RUN_FILE = "vrpo_run.json"
LOCK_FILE = ".vrpo.lock"
_SAMPLED = 64
_MUST_EQUAL = {
    "trainer": "the kind of training",
    "data": "the training data, or the tokenizer that read them",
    "reference": "the weights of the reference or of the base model under the adapter",
    "seed": "seed",
    "data_seed": "data_seed",
    "mask_token_id": "mask_token_id",
    "adapter": "the adapter",
}
# Of the inherited arguments, those that change what is learnt. Of our own, all but these do.
_INHERITED = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "bf16",
    "fp16",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
_OWN_WITHOUT_EFFECT = {"max_tokens_per_pack", "gradient_mode", "share_trunk", "dataset_num_proc"}
# What is left out by drop_unusable_rows shows in the digest of the data.
_OWN_WITHOUT_EFFECT |= {"drop_unusable_rows", "training_report", "activation_offloading"}
# The reference ELBOs are the same whichever place they lie in, and whatever shared a forward pass.
_OWN_WITHOUT_EFFECT |= {"precompute_ref_batch_size", "ref_log_probs_cache", "precompute_only"}
# Where an adapter's base lies, and what PEFT notes of itself and of how the weights began.
_NOT_OF_ADAPTER = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
    "auto_mapping",
    "peft_version",
    "init_lora_weights",
}


def run_of(
    trainer: str,
    args: TrainingArguments,
    dataset: Dataset | None,
    reference: str,
    mask_token_id: int,
    adapters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run is, as JSON. reference: a digest of frozen weights; adapters: PEFT's configs by name."""
    return {
        "trainer": trainer,
        "data": digest_of_dataset(dataset),
        "reference": reference,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "mask_token_id": mask_token_id,
        "adapter": {name: _adapter(config) for name, config in (adapters or {}).items()},
        "length": {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs},
        "world_size": args.world_size,
        "settings": settings_of(args),
    }


def settings_of(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that change what is learnt: all of our own but a few, and some inherited ones."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(args)} - inherited - _OWN_WITHOUT_EFFECT
    settings = {name: getattr(args, name) for name in sorted({*own, *_INHERITED})}
    plain = {name: getattr(value, "value", value) for name, value in settings.items()}
    # As they come back from RUN_FILE; a subclass of a config may have fields that JSON does not know.
    return json.loads(json.dumps(plain, default=lambda value: getattr(value, "__qualname__", str(value))))


def _adapter(config: Any) -> dict[str, Any]:
    """What a PEFT config says of the adapter's function."""
    values = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_ADAPTER}

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))

    return json.loads(json.dumps(values, default=plain))


def digest_of_dataset(dataset: Dataset | None) -> str:
    """SHA-256 of the token ids, example ids and labels, in order; of a stream, of its first rows."""
    if hasattr(dataset, "digest"):
        return dataset.digest
    digest = hashlib.sha256()
    if dataset is not None:
        names = sorted(n for n in dataset.column_names if n.endswith(("_ids", "_id")) or n == "label")
        for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
            for name in names:
                column = table.column(name).combine_chunks()
                digest.update(name.encode())
                if hasattr(column, "flatten") and hasattr(column, "value_lengths"):
                    digest.update(np.ascontiguousarray(column.value_lengths().to_numpy(zero_copy_only=False)))
                    column = column.flatten()
                digest.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)))
    return digest.hexdigest()


def digest_of_weights(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes and a sample of each tensor; training changes every one of them.

    A collective where ZeRO-3 keeps them in parts.
    """
    digest = hashlib.sha256()
    # By the names they have without PEFT: which layers carry an adapter is not the base's matter.
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in parameters
    }
    for name, tensor in sorted(plain.items()):
        flat = whole(tensor).flatten()
        digest.update(f"{name} {whole_shape(tensor)}".encode())
        if len(flat):
            index = torch.linspace(0, len(flat) - 1, min(_SAMPLED, len(flat)), dtype=torch.float64)
            digest.update(flat[index.long().to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def checkpoint_to_resume(
    value: str | bool | None,
    output_dir: str,
    *,
    found: list[Path] | None = None,
    fault: Callable[[Path], str | None] = fault_of,
    is_told: bool = True,
) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means; None to start anew.

    Args:
        value: a folder; "true": the newest whole checkpoint in output_dir; "auto": the same, or None where
            there is no checkpoint at all, so that one command line starts a run and goes on with it.
        found: the checkpoints in output_dir, newest first; None: looked up.
        fault: what keeps a run from going on from a checkpoint, None if it is whole.
        is_told: warn of the checkpoints that are passed over.

    Errors: ValueError for "true" where output_dir has no checkpoint, for both words where none is whole, with
        the fault of each, and for a path that is no folder.
    """
    word = str(value).strip().lower()
    if word in ("none", "false", "no", "off", ""):
        return None
    if word in ("true", "yes", "on", "auto"):
        found = checkpoints(output_dir) if found is None else found
        if not found and word == "auto":
            return None
        if not found:
            raise ValueError(f"resume_from_checkpoint={word}: output_dir {output_dir!r} has no checkpoint")
        return str(_newest_whole(found, fault, is_told))
    if not Path(str(value)).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: there is no folder {str(value)!r}; 'true' takes the last whole "
            "checkpoint in output_dir, 'auto' the same where there is one, 'false' starts anew"
        )
    return str(value)


def _newest_whole(found: list[Path], fault: Callable[[Path], str | None], is_told: bool) -> Path:
    passed_over = []
    for folder in found:
        told = fault(folder)
        if told is None:
            if passed_over and is_told:
                logger.warning(f"going on from {folder}; passed over: {'; '.join(passed_over)}")
            return folder
        passed_over.append(f"{folder.name} {told}")
    raise ValueError(
        f"resume_from_checkpoint: no checkpoint in {found[0].parent} is whole: {'; '.join(passed_over)}. "
        "Mend one, or remove them to start anew"
    )


def check_checkpoint(
    folder: str, run: dict[str, Any], *, is_plain: bool, is_adapter: bool, is_deepspeed: bool = False
) -> list[str]:
    """The settings that differ, told in a warning; ValueError unless the checkpoint is of this run.

    is_plain: neither FSDP nor DeepSpeed, which keep states in files of their own.
    """
    missing = [name for name in STATE_FILES if not Path(folder, name).is_file()]
    if is_plain and missing:
        logger.warning(f"{folder} has no {' and no '.join(missing)}: optimizer and schedule start again")
    if is_plain:
        _check_kind(Path(folder), is_adapter)
    saved = _read_run(folder)
    if saved is None:
        logger.warning(
            f"{folder} has no {RUN_FILE}: whether it is a checkpoint of this run cannot be checked"
        )
        return []
    differing = _differing(saved, run)
    if differing:
        raise ValueError(
            f"resume_from_checkpoint: {folder} is of another run: {'; '.join(differing)} changed. Give what "
            "it was trained with, or start anew in another output_dir"
        )
    before, now = _settings(saved), _settings(run)
    changed = {
        name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]
    }
    check_changed(changed, has_states=not (is_plain and missing), is_deepspeed=is_deepspeed)
    if changed:
        told = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        logger.warning(f"resuming {folder} with other settings: {told}")
    return list(changed)


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    return {**run.get("settings", {}), **run.get("length", {}), "world_size": run.get("world_size")}


def check_output_dir(output_dir: str, run: dict[str, Any], save_strategy: SaveStrategy) -> None:
    """ValueError if output_dir holds checkpoints of another run: they would be rotated away, or resumed."""
    if save_strategy == SaveStrategy.NO:
        return
    for folder in checkpoints(output_dir):
        saved = _read_run(folder)
        # Checkpoints of before did not say how long their run was.
        same = saved is not None and not _differing(saved, run)
        if not same or any(saved.get(name, run[name]) != run[name] for name in ("settings", "length")):
            raise ValueError(
                f"output_dir {output_dir!r} holds a checkpoint of another run, {folder.name}: choose another "
                "output_dir, remove it, or set resume_from_checkpoint to go on with it"
            )


@contextlib.contextmanager
def only_run_in(output_dir: str, *, is_writer: bool) -> Iterator[None]:
    """Holds a lock on output_dir in the process that writes; the system frees it when that process ends.

    Errors: ValueError where another run holds it: two would delete each other's checkpoints.
    """
    if not is_writer:
        yield
        return
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(output_dir, LOCK_FILE), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"output_dir {output_dir!r} is in use by another training run") from error
    try:
        yield
    finally:
        lock.release()


def write_run(folder: str, run: dict[str, Any]) -> None:
    Path(folder, RUN_FILE).write_text(json.dumps(run, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read_run(folder: str | Path) -> dict[str, Any] | None:
    path = Path(folder, RUN_FILE)
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} does not describe a run")
    return saved


def _differing(saved: dict[str, Any], run: dict[str, Any]) -> list[str]:
    found = []
    for name, told in _MUST_EQUAL.items():
        before, now = saved.get(name), run[name]
        if before == now or (name == "adapter" and before is None):  # checkpoints of before did not say
            continue
        if name == "adapter":
            told = f"{told} ({', '.join(_of_adapters(before, now))})"
        found.append(f"{told} ({before} -> {now})" if told == name else told)
    return found


def _of_adapters(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between adapters of the same names."""
    if before.keys() != now.keys():
        return [f"{sorted(before)} -> {sorted(now)}"]
    return [
        f"{field} {before[name].get(field)} -> {value}"
        for name in now
        for field, value in now[name].items()
        if before[name].get(field) != value
    ]


def _check_kind(folder: Path, is_adapter: bool) -> None:
    """ValueError where a model is expected and an adapter lies there, or the other way round."""
    has_adapter = any(folder.glob("**/adapter_model.*"))
    if is_adapter and not has_adapter:
        raise ValueError(f"{folder} has the weights of a whole model and no adapter_model.safetensors")
    if not is_adapter and has_adapter:
        raise ValueError(f"{folder} has an adapter, but the trainer trains the whole model: pass peft_config")
