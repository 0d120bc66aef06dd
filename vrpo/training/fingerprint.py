"""What decides a reference's ELBOs, part by part: stored with them, compared before they are used again.

    ELBO(reference weights and architecture, precision, mask draw, token ids)

Nothing else enters, neither beta nor rate nor loss: runs that agree in these parts may share what was
computed. Where they do not, the parts that differ are named.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig

from vrpo.batch import ResponseBatch
from vrpo.estimator.masking import EVALUATION_EPOCH
from vrpo.models.partitioned import any_partitioned, whole, whole_shape
from vrpo.step import Estimator
from vrpo.training.resume import digest_of_dataset

Fingerprint = dict[str, Any]
"""Part -> what it was, as JSON knows it."""

FORMAT = 1
"""Of the files. Another one is another part that differs."""

_WITHOUT_EFFECT = {  # fields of a model config that do not change what the model computes for given tokens
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "mask_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_PARTS = {
    "format": "they were written by another version of this package",
    "reference": "the weights of the reference",
    "architecture": "the architecture of the reference",
    "precision": "the precision it is run in",
    "draw": "the mask draw",
    "data": "the token ids or example ids: other rows, tokenizer, chat template or max_length",
}


def fingerprint_of(
    *,
    weights: str,
    config: PreTrainedConfig,
    precision: Mapping[str, Any],
    estimator: Estimator,
    dataset: Dataset,
    num_sides: int,
) -> Fingerprint:
    """The fingerprint of the reference ELBOs of a dataset; `weights` is of `hash_of_weights`."""
    settings = config.to_dict()
    return {
        "format": FORMAT,
        "reference": weights,
        "architecture": {
            name: value if isinstance(value, int | float | str | bool | None) else str(value)
            for name, value in sorted(settings.items())
            if name not in _WITHOUT_EFFECT
        },
        "precision": dict(precision),
        "draw": {**_given(asdict(estimator)), "masks": _digest_of_draw(estimator, num_sides)},
        "data": digest_of_dataset(dataset),
    }


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is not set: what was stored before there was such a field is the same draw."""
    return {name: value for name, value in settings.items() if value is not None}


def differing(stored: Mapping[str, Any], wanted: Fingerprint) -> list[str]:
    """A clause for each part that differs, with the values where they are readable."""
    clauses = []
    for part, value in wanted.items():
        before = stored.get(part)
        if before == value:
            continue
        clause = _PARTS[part]
        if isinstance(before, dict) and isinstance(value, dict):
            changed = [
                f"{name} {before.get(name)} -> {value.get(name)}"
                for name in sorted({*before, *value})
                if before.get(name) != value.get(name)
            ]
            clause = f"{clause} ({', '.join(changed)})"
        clauses.append(clause)
    return clauses


def hash_of_weights(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes, dtypes and every byte of the tensors, whatever their device or process.

    A collective where ZeRO-3 keeps them in parts.

    Of every byte: an adapter that was merged in, a changed row of an embedding or a layer that was edited by
    hand may leave any sample of the values as it was, and stored ELBOs outlive the run that made them. About
    a second per GB and thread, next to which the forward passes that it may save take hours.
    """
    # By the names they have without PEFT: which layers carry an adapter is not the base's matter.
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in parameters
    }
    names = sorted(plain)
    if any_partitioned(plain.values()):  # in all processes one after the other
        digests = [_digest_of_tensor(whole(plain[name])) for name in names]
    else:
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing frees the lock of Python
            digests = list(pool.map(lambda name: _digest_of_tensor(plain[name]), names))
    digest = hashlib.sha256()
    for name, found in zip(names, digests, strict=True):
        digest.update(f"{name} {whole_shape(plain[name])} {plain[name].dtype} {found}\n".encode())
    return digest.hexdigest()


def _digest_of_tensor(tensor: Tensor) -> str:
    flat = tensor.detach().reshape(-1).contiguous()
    return hashlib.sha256(flat.view(torch.uint8).cpu().numpy()).hexdigest() if len(flat) else ""


def precision_of(parameters: Iterable[Tensor], attention: str, accelerator: Accelerator) -> dict[str, Any]:
    """What decides the rounding of a model's ELBOs beside the hardware: as JSON.

    The same mixed precision is another one under engines that cast the weights themselves.
    """
    mixed = accelerator.mixed_precision
    casts = {DistributedType.FSDP: "fsdp", DistributedType.DEEPSPEED: "deepspeed"}
    by = casts.get(accelerator.distributed_type, "autocast")
    return {
        "weights": sorted({str(parameter.dtype) for parameter in parameters}),
        "mixed_precision": mixed if mixed == "no" else f"{mixed} by {by}",
        "attention": attention,
        "tf32": torch.get_float32_matmul_precision() != "highest",
    }


def _digest_of_draw(estimator: Estimator, num_sides: int) -> str:
    """SHA-256 of what the estimator packs for responses of many lengths, in training and in evaluation.

    Of the draw itself and not of a version number, which somebody would have to think of.
    """
    length_R = torch.tensor([1, 2, 3, 5, 8, 13, 40, 129, 500, 1025]).repeat_interleave(num_sides)
    length_R += torch.arange(num_sides).repeat(len(length_R) // num_sides) * 3
    batch = ResponseBatch(
        tokens_U=torch.arange(int(length_R.sum()) + len(length_R)) + estimator.mask_token_id + 1,
        prompt_length_R=torch.ones_like(length_R),
        response_length_R=length_R,
        example_R=torch.arange(len(length_R) // num_sides).repeat_interleave(num_sides),
        side_R=torch.arange(num_sides).repeat(len(length_R) // num_sides),
        num_sides=num_sides,
    )
    digest = hashlib.sha256()
    for epoch in (0, 1, EVALUATION_EPOCH):
        pack = estimator.pack(batch, epoch, "cpu")
        for tensor in (
            pack.tokens_T,
            pack.position_T,
            pack.row_N,
            pack.target_N,
            pack.weight_N,
            pack.offsets_S1,
        ):
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
