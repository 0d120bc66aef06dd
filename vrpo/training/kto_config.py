"""Configuration of DiffusionKTOTrainer; names follow TRL's KTOConfig."""

from dataclasses import dataclass, field

from vrpo.objectives.unpaired import LOSSES
from vrpo.training.config import ReferenceConfig


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class DiffusionKTOConfig(ReferenceConfig):
    """KTO on single labelled responses, with ELBOs (ELBO-KTO); rate and beta are its."""

    beta: float = field(
        default=0.1,
        metadata=_help(
            "Weight of the ELBO log-ratio inside the sigmoid, per nat of the whole response; > 0."
        ),
    )
    loss_type: str = field(
        default="kto",
        metadata=_help(
            "'kto': 1 - sigmoid of beta times the log-ratio above or below its mean over the batch of all "
            "processes, in evaluation over the whole set; 'apo_zero_unpaired': above or below 0. Both are "
            "biased by noise, see vrpo/loss_bias."
        ),
    )
    desirable_weight: float = field(
        default=1.0, metadata=_help("Factor of the loss of desirable responses; above 0.")
    )
    undesirable_weight: float = field(
        default=1.0,
        metadata=_help(
            "Factor of the loss of undesirable responses; above 0. The paper wants desirable_weight * number "
            "of desirable ones over undesirable_weight * number of the others in [1, 4/3]."
        ),
    )
    learning_rate: float = field(default=1e-6, metadata=_help("Peak learning rate; 1e-6 in ELBO-KTO."))
    weight_decay: float = field(default=0.01, metadata=_help("AdamW decay."))
    warmup_steps: float = field(default=15, metadata=_help("Linear warm-up steps, or a ratio if below 1."))
    gradient_accumulation_steps: int = field(
        default=8, metadata=_help("Batches per optimizer step; z0 is that of one batch of all processes.")
    )

    def __post_init__(self):
        super().__post_init__()
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}, got {self.loss_type!r}")
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.batch_eval_metrics and self.loss_type == "kto":
            raise ValueError(
                "batch_eval_metrics=True asks for the metrics of each batch before the others are there, and "
                "z0 of loss_type='kto' is a mean over the whole evaluation set: leave it unset"
            )
