"""Where the reference's ELBOs come from: fields of the trainers whose loss compares with a reference."""

from dataclasses import dataclass, field
from pathlib import Path


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ReferenceArguments:
    """Fields that a config inherits before DiffusionConfig. Names are TRL's where it has one."""

    precompute_ref_log_probs: bool = field(
        default=False,
        metadata=_help(
            "Compute the ELBOs of the reference for all epochs before training, and keep no reference: the "
            "step loses its forward pass and its memory. The masks stay those of the policy. What was "
            "computed is used again where it is of the same reference, data, draw and precision."
        ),
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata=_help(
            "Examples of one forward pass of precompute_ref_log_probs, at most; max_tokens_per_pack bounds "
            "it too. None: as many as that holds."
        ),
    )
    ref_log_probs_cache: str | None = field(
        default=None,
        metadata=_help(
            "Folder of the precomputed ELBOs, which runs with another beta, rate or loss may share. None: "
            "output_dir/reference_elbos."
        ),
    )
    precompute_only: bool = field(
        default=False,
        metadata=_help(
            "precompute_ref_log_probs, and train nothing: on other machines, or for several runs that share "
            "ref_log_probs_cache."
        ),
    )
    sync_ref_model: bool = field(
        default=False,
        metadata=_help(
            "Let the reference follow the policy (TR-DPO, arXiv 2404.09656): every ref_model_sync_steps "
            "optimizer steps, reference = alpha * policy + (1 - alpha) * reference. Needs a second model."
        ),
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=_help("alpha of sync_ref_model, in (0, 1]; 1 replaces the reference.")
    )
    ref_model_sync_steps: int = field(
        default=512, metadata=_help("Optimizer steps from one sync_ref_model to the next.")
    )

    def __post_init__(self):
        if self.precompute_only:
            self.precompute_ref_log_probs = True
        super().__post_init__()
        if self.ref_log_probs_cache is not None:
            path = Path(self.ref_log_probs_cache)
            if path.exists() and not path.is_dir():
                raise ValueError(f"ref_log_probs_cache must be a folder, got {str(path)!r}")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model and precompute_ref_log_probs exclude each other: a reference that moves "
                "cannot be computed beforehand"
            )
        if self.precompute_ref_log_probs and getattr(self, "share_trunk", None):
            raise ValueError("share_trunk=True shares nothing with a precomputed reference: leave it unset")
