"""DiffusionSFTTrainer: masked-diffusion supervised fine-tuning."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vrpo import data
from vrpo.step import denoising_step
from vrpo.training.config import DiffusionSFTConfig
from vrpo.training.trainer import DiffusionTrainer, as_nll


class DiffusionSFTTrainer(DiffusionTrainer):
    """Masked-diffusion supervised fine-tuning: minimises -B(y) / L of the completions.

    Args: as VRPOTrainer, without a reference; datasets in TRL's format `prompt`, `completion`, text or
        messages, or `prompt_ids`, `completion_ids`.

    Metrics, means over examples: `logps/completion` (ELBO estimate, nats), `elbo/completion_per_token`,
    `vrpo/tokens_per_second`.
    """

    args: DiffusionSFTConfig
    collator = data.CompletionCollator
    prepare_dataset = staticmethod(data.prepare_completions)

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: DiffusionSFTConfig | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, args or DiffusionSFTConfig(output_dir="sft_output"), **kwargs)

    def _micro_batch_loss(self, model, batch, epoch):
        result = denoising_step(
            batch,
            policy=as_nll(model),
            estimator=self.estimator,
            epoch=epoch,
            device=self.args.device,
        )
        metrics = {
            "logps/completion": result.elbo_R,
            "elbo/completion_per_token": -result.loss_R.detach(),
        }
        return result.loss_R, metrics, result.num_tokens
