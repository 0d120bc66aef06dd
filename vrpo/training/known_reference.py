"""The precomputed ELBOs of a reference as the steps of a run ask for them, and what guards their use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from vrpo.batch import ResponseBatch
from vrpo.estimator.masking import EVALUATION_EPOCH
from vrpo.gradient import StepResult
from vrpo.step import Estimator
from vrpo.training.reference_cache import ElboTable, Part, ReferenceCache, keys

logger = logging.get_logger(__name__)

TOLERANCE = {"full": 1e-3, "half": 5e-2}
"""Of the stored values, by how much those of now may differ in 32 and in 16 bits, as a share of their mean
magnitude: another batch or device of the same precision rounds otherwise; other weights or other masks differ
by far more."""


@dataclass(frozen=True)
class Split:
    """A dataset whose reference ELBOs are needed, of which rows in which epochs, and where they lie."""

    dataset: Dataset
    rows: Mapping[int, Sequence[int]]
    cache: ReferenceCache

    @property
    def epochs(self) -> tuple[int, ...]:
        return tuple(self.rows)

    @property
    def is_evaluation(self) -> bool:
        return self.epochs == (EVALUATION_EPOCH,)

    def missing(self) -> list[Part]:
        """What is still to be computed."""
        return [part for epoch, rows in self.rows.items() for part in self.cache.missing(epoch, rows)]


class KnownReference:
    """The precomputed ELBOs of a run, as its steps ask for them.

    Args:
        digest: SHA-256 of the fingerprints, for the record of the run.
        tolerance: see TOLERANCE.
        starts_here: whether the policy is the reference until its first optimizer step.
    """

    def __init__(
        self, splits: list[Split], estimator: Estimator, *, digest: str, tolerance: float, starts_here: bool
    ):
        self.splits, self.estimator, self.digest = splits, estimator, digest
        self._tolerance, self._starts_here = tolerance, starts_here
        self._tables: dict[bool, tuple[int, ElboTable]] = {}

    @property
    def folder(self) -> Path:
        """Where all of them lie."""
        return self.splits[0].cache.folder.parent

    def __call__(self, batch: ResponseBatch, epoch: int, estimator: Estimator) -> Tensor:
        """elbo_RK (R, K) of the reference, nats, on the CPU, under the masks of that epoch.

        Errors: ValueError for responses or epochs that were not computed, and for another draw.
        """
        if estimator != self.estimator:
            raise ValueError(
                f"the reference ELBOs were precomputed with {self.estimator}, but now the draw is "
                f"{estimator}: make a new trainer with the new arguments"
            )
        elbo_RK, is_known_R = self._table(epoch).find(keys(batch))
        if not is_known_R.all():
            unknown = batch.example_R[~is_known_R].unique()
            raise ValueError(
                f"precompute_ref_log_probs: the examples {unknown[:5].tolist()} are not of the datasets that "
                "the trainer was made with, have other tokens, or come after its last step, so their "
                "reference ELBOs are not known. Give every dataset to evaluate on as (one of) eval_dataset"
            )
        return elbo_RK

    def check_epochs(self, num_epochs: int) -> None:
        """ValueError unless training may run that long."""
        known = max((len(split.epochs) for split in self.splits if not split.is_evaluation), default=0)
        if num_epochs > known:
            raise ValueError(
                f"training takes {num_epochs} epochs, but the reference ELBOs were precomputed for {known}: "
                "make a new trainer with the new number of epochs or steps, and what is missing is computed"
            )

    def check_rows(self, rows: Mapping[int, Sequence[int]]) -> None:
        """ValueError unless training may take these rows: epoch -> their numbers."""
        (known,) = [split.rows for split in self.splits if not split.is_evaluation]
        for epoch, wanted in rows.items():
            if more := set(wanted) - set(known[epoch]):
                raise ValueError(
                    f"training takes {len(wanted)} examples of epoch {epoch}, but the reference ELBOs of "
                    f"{len(more)} of them were not precomputed: make a new trainer with the new number of "
                    "epochs or steps, or the new batch, and what is missing is computed"
                )

    def observe(self, result: StepResult, global_step: int) -> None:
        """Of the first step it sees, compares the reference with a policy that has not moved from it yet.

        Errors: as `check`.
        """
        if self._starts_here and global_step == 0:
            self.check(result.policy_RK, result.reference_RK, "the policy before its first step")
        self._starts_here = False

    def check(self, now_RK: Tensor, stored_RK: Tensor, what: str) -> None:
        """Logs how far stored ELBOs are from those that `what` has now.

        Errors: ValueError where they differ by more than rounding.
        """
        difference_RK = (now_RK.double() - stored_RK.double()).abs()
        drift = (difference_RK.mean() / stored_RK.double().abs().mean().clamp(min=1e-12)).item()
        largest = difference_RK.max().item()
        logger.info(
            f"precomputed reference against {what}: mean difference {drift:.1e} of the ELBOs, "
            f"{largest:.2e} nats at most"
        )
        if not drift <= self._tolerance:  # of NaN, too
            raise ValueError(
                f"the precomputed reference ELBOs differ from {what} by {drift:.1e} of their size (rounding "
                f"gives {self._tolerance} at most), {largest:.3g} nats at most: they were computed by other "
                f"code, or are damaged. Remove {self.folder} to compute them again"
            )

    def _table(self, epoch: int) -> ElboTable:
        is_evaluation = epoch == EVALUATION_EPOCH
        held = self._tables.get(is_evaluation)
        if held is None or held[0] != epoch:  # of training only the epoch that runs
            held = self._tables[is_evaluation] = (epoch, self._read(epoch))
        return held[1]

    def _read(self, epoch: int) -> ElboTable:
        splits = [split for split in self.splits if epoch in split.epochs]
        if not splits:
            is_evaluation = epoch == EVALUATION_EPOCH
            what = "evaluation: give the trainer an eval_dataset" if is_evaluation else f"epoch {epoch}"
            raise ValueError(f"precompute_ref_log_probs: nothing was computed for {what}")
        return ElboTable.of(
            split.cache.read(part) for split in splits for part in split.cache.parts(epoch, split.rows[epoch])
        )


class CheckEpochs(TrainerCallback):
    """No run begins that would reach an epoch or rows whose reference ELBOs are not there.

    rows: of the training as it is configured when it begins, see `used_rows.rows_of_training`.
    """

    def __init__(self, known: KnownReference, rows: Callable[[], Mapping[int, Sequence[int]]]):
        self.known, self.rows = known, rows

    def on_train_begin(self, args, state, control, **kwargs):
        self.known.check_epochs(state.num_train_epochs)
        self.known.check_rows(self.rows())
