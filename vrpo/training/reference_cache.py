"""Reference ELBOs on disk, in Arrow: written part by part, each visible only when whole, and looked up.

    folder/fingerprint.json                    what decides them, see fingerprint.py
    folder/epoch-0/part-00000.arrow ...        PART_EXAMPLES rows of the dataset each
    folder/epoch-1/part-00000-5f03.arrow       some of them: bit i of the hexadecimal number is the i-th row
    folder/evaluation/part-00000.arrow ...     the draw of evaluations

A part is a table with one line per response: example_id, side, key (a hash of the response's identity and
token ids), elbo (K numbers, nats). Which examples a part holds depends on what is asked for and what is there
already, so a computation that was interrupted goes on with any number of processes. Knows no models.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vrpo import disk
from vrpo.batch import ResponseBatch
from vrpo.estimator.masking import EVALUATION_EPOCH
from vrpo.training.fingerprint import Fingerprint, differing

PART_EXAMPLES = 256
"""Rows of a dataset in one part: what a process that is killed loses at most. Part of the format."""

FINGERPRINT_FILE = "fingerprint.json"
_CHECKSUM = b"sha256"


@dataclass(frozen=True)
class Part:
    """What one file holds: of block `block` of a dataset, PART_EXAMPLES rows, those of the bits of `mask`."""

    epoch: int
    block: int
    mask: int

    @property
    def rows(self) -> list[int]:
        """Their numbers in the dataset, ascending."""
        start = self.block * PART_EXAMPLES
        return [start + bit for bit in range(self.mask.bit_length()) if self.mask >> bit & 1]


class ReferenceCache:
    """The reference ELBOs of one dataset of num_examples rows, in one folder."""

    def __init__(self, folder: str | os.PathLike, num_examples: int):
        self.folder, self.num_examples = Path(folder), num_examples

    def claim(self, fingerprint: Fingerprint) -> None:
        """Create the folder with this fingerprint, or check that it is the one that lies there.

        Errors: those of `check`; OSError where nothing can be written.
        """
        self.check(fingerprint)
        path = self.folder / FINGERPRINT_FILE
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            disk.write_whole(path, (json.dumps(fingerprint, indent=1, sort_keys=True) + "\n").encode())

    def check(self, fingerprint: Fingerprint) -> None:
        """ValueError where something else lies in the folder, naming each part that differs."""
        path = self.folder / FINGERPRINT_FILE
        if path.is_file():
            stored = _read_json(path)
            if clauses := differing(stored, fingerprint):
                raise ValueError(
                    f"the precomputed reference ELBOs in {self.folder} are of something else; what differs: "
                    f"{'; '.join(clauses)}. Give what they were computed with, another ref_log_probs_cache, "
                    "or remove the folder to compute them again"
                )
            return
        if any(self.folder.glob("*/part-*")):
            raise ValueError(
                f"{self.folder} holds reference ELBOs without {FINGERPRINT_FILE}, so what they are of cannot "
                "be checked: remove the folder to compute them again, or give another ref_log_probs_cache"
            )

    def place(self, part: Part) -> Path:
        some = "" if part.mask == self._whole(part.block) else f"-{part.mask:x}"
        return self._folder(part.epoch) / f"part-{part.block:05d}{some}.arrow"

    def parts(self, epoch: int, rows: Sequence[int]) -> list[Part]:
        """The stored parts that hold some of these rows, ascending."""
        return [part for block in self._masks(rows) for part in self._stored(epoch, block)]

    def missing(self, epoch: int, rows: Sequence[int]) -> list[Part]:
        """What is still to be computed of an epoch, of which these rows are wanted, ascending."""
        found = []
        for block, mask in self._masks(rows).items():
            for part in self._stored(epoch, block):
                mask &= ~part.mask
            if mask:
                found.append(Part(epoch, block, mask))
        return found

    def _folder(self, epoch: int) -> Path:
        return self.folder / ("evaluation" if epoch == EVALUATION_EPOCH else f"epoch-{epoch}")

    def _whole(self, block: int) -> int:
        """The mask of all rows of a block."""
        return (1 << min(PART_EXAMPLES, self.num_examples - block * PART_EXAMPLES)) - 1

    def _masks(self, rows: Sequence[int]) -> dict[int, int]:
        """Block -> mask of those of the rows that are in it."""
        masks: dict[int, int] = {}
        for row in rows:
            block, bit = divmod(row, PART_EXAMPLES)
            masks[block] = masks.get(block, 0) | 1 << bit
        return masks

    def _stored(self, epoch: int, block: int) -> list[Part]:
        """The parts of a block: the whole one, or those of some rows."""
        whole = Part(epoch, block, self._whole(block))
        if self.place(whole).is_file():
            return [whole]
        found = []
        for path in sorted(self._folder(epoch).glob(f"part-{block:05d}-*.arrow")):
            try:
                found.append(Part(epoch, block, int(path.stem.rpartition("-")[2], 16)))
            except ValueError:
                raise _damaged(path, "its name is not one of ours") from None
        return found

    def write(self, part: Part, batch: ResponseBatch, elbo_RK: Tensor) -> None:
        """One part, which appears whole or not at all.

        Args: batch: its responses; elbo_RK (R, K) float32 or float64, on the CPU, in their order.
        """
        key_R = keys(batch).numpy()
        values = elbo_RK.contiguous().numpy()
        table = pa.table(
            {
                "example_id": batch.example_R.numpy(),
                "side": batch.side_R.numpy(),
                "key": key_R,
                "elbo": pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1]),
            }
        ).replace_schema_metadata({_CHECKSUM: _checksum(key_R, values)})
        path = self.place(part)
        path.parent.mkdir(exist_ok=True)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        disk.write_whole(path, sink.getvalue())

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """(key_R int64, elbo_RK) of one part.

        Errors: ValueError naming a file that is damaged, or cannot be read.
        """
        path = self.place(part)
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all().combine_chunks()
                key_R = table["key"].to_numpy().copy()
                lists = table["elbo"].chunk(0)
                elbo_RK = lists.flatten().to_numpy().reshape(len(lists), -1).copy()
            is_whole = table.schema.metadata[_CHECKSUM] == _checksum(key_R, elbo_RK)
        except (OSError, pa.ArrowException, KeyError, IndexError, TypeError, ValueError) as error:
            raise _damaged(path, " ".join(str(error).split())) from error
        if not is_whole:
            raise _damaged(path, "its contents do not match its checksum")
        return torch.from_numpy(key_R), torch.from_numpy(elbo_RK)


def keys(batch: ResponseBatch) -> Tensor:
    """key_R int64: a 64-bit BLAKE2 hash of example, side, prompt length and token ids of each response.

    With it a row of another dataset that has the same example_id is not taken for one that was computed.
    """
    tokens = batch.tokens_U.numpy()
    identity = torch.stack([batch.example_R, batch.side_R, batch.prompt_length_R], dim=1).numpy()
    ends = np.cumsum(batch.length_R.numpy())
    found = []
    for row, length, end in zip(identity, batch.length_R.tolist(), ends.tolist(), strict=True):
        digest = hashlib.blake2b(row.tobytes(), digest_size=8)
        digest.update(tokens[end - length : end])
        found.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(found, dtype=torch.long)


@dataclass(frozen=True)
class ElboTable:
    """The ELBOs of one epoch, of all datasets that have it: key_M int64 ascending, elbo_MK in nats."""

    key_M: Tensor
    elbo_MK: Tensor

    @classmethod
    def of(cls, parts: Iterable[tuple[Tensor, Tensor]]) -> "ElboTable":
        keys_, elbos = zip(*parts, strict=True)
        key_M, order_M = torch.sort(torch.cat(keys_), stable=True)
        return cls(key_M, torch.cat(elbos)[order_M])

    def find(self, key_R: Tensor) -> tuple[Tensor, Tensor]:
        """(elbo_RK, is_known_R); the ELBOs of unknown responses mean nothing."""
        place_R = torch.searchsorted(self.key_M, key_R).clamp(max=len(self.key_M) - 1)
        return self.elbo_MK[place_R], self.key_M[place_R] == key_R


def _checksum(key_R: np.ndarray, elbo_RK: np.ndarray) -> bytes:
    digest = hashlib.sha256(np.ascontiguousarray(key_R))
    digest.update(np.ascontiguousarray(elbo_RK))
    return digest.hexdigest().encode()


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"the precomputed reference ELBOs in {path} cannot be used ({reason}): remove the file, and it is "
        "computed again"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(stored, dict):
        raise _damaged(path, "it is no JSON object")
    return stored
