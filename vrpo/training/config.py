"""Configuration of the trainers: TrainingArguments plus the fields below, each with unit, range and source.

Names follow TRL's DPOConfig and SFTConfig where they have one. Defaults are the recipe of LLaDA 1.5
(arXiv 2505.19223 section 4 and App. D) where it states a value.
"""

import os
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available
from transformers.trainer_utils import IntervalStrategy

from vrpo.estimator.masking import check_design, check_replicates, default_replicates
from vrpo.objectives.losses import NEEDS_REPLICATES, check_losses
from vrpo.training.compiled import check_compilation
from vrpo.training.launch import check_engine, check_launch
from vrpo.training.no_effect import check_effects
from vrpo.training.offload import check_offloading
from vrpo.training.ranges import check_numbers
from vrpo.training.reference_config import ReferenceArguments
from vrpo.training.support import check_supported

GRADIENT_MODES = ("auto", "joint", "replay")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class DiffusionConfig(TrainingArguments):
    """What every masked-diffusion trainer needs; not used by itself."""

    num_samples: int = field(
        default=1,
        metadata=_help("K: masked copies of each response per ELBO estimate, n_t * n_yt; at least 1."),
    )
    masks_per_level: int = field(
        default=1,
        metadata=_help(
            "n_yt: masks drawn at each mask level; divides num_samples. The paper's optimum is 1."
        ),
    )
    mask_design: str = field(
        default="paper",
        metadata=_help(
            "How levels and masks are drawn: a name of vrpo.estimator.designs.DESIGNS. 'paper' is the l-form "
            "of LLaDA 1.5 with independent levels. 'graded-balanced' is the same draw for num_samples=1 and, "
            "without bias, a less noisy ELBO with more; 'ratio' has less noise still and a bias, small but "
            "for very short answers: at most 19 % of the ELBO at 2 tokens with 4 samples. `vrpo variance` "
            "measures them on your model."
        ),
    )
    max_length: int = field(
        default=4096,
        metadata=_help(
            "Longest prompt + response in tokens. Longer ones lose the beginning of the prompt and the end "
            "of the response; each is guaranteed half and may use what the other leaves. 4096 is LLaDA's "
            "context."
        ),
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata=_help("Longest prompt in tokens; a longer one keeps its end. None: no limit of its own."),
    )
    max_tokens_per_pack: int = field(
        default=65536,
        metadata=_help(
            "Token budget of one forward pass: all masked copies of a micro-batch. It decides how many "
            "examples share a pack and never changes the loss. One pair needs 2 * num_samples * length; "
            "65536 holds a pair of the longest sequences at the defaults. Lower it when memory runs out; "
            "one masked copy of the longest sequence must fit."
        ),
    )
    gradient_mode: str = field(
        default="auto",
        metadata=_help(
            "How the gradient of an example is taken. 'joint': from one graph of all its masked copies, "
            "which must fit into max_tokens_per_pack. 'replay': a first pass without graph gives the loss, a "
            "second one its gradient pack by pack; memory does not grow with num_samples, for one more "
            "forward pass. 'auto': joint where an example fits, replayed where it does not. The gradient is "
            "the same."
        ),
    )
    train_top_layers: int | None = field(
        default=None,
        metadata=_help(
            "Train only so many of the uppermost layers, with the last norm and the head; with LoRA, adapt "
            "only these. What is below is frozen. None: all."
        ),
    )
    activation_offloading: bool = field(
        default=False,
        metadata=_help(
            "Keep the activations that backward needs in the memory of the host, for two copies over the "
            "bus. With gradient_checkpointing the inputs of the layers are all that moves."
        ),
    )
    mask_token_id: int | None = field(
        default=None,
        metadata=_help("Id of the mask token. None: the model config's, else the tokenizer's."),
    )
    disable_dropout: bool = field(
        default=True,
        metadata=_help("Switch every dropout off, LoRA's too; the ELBO needs a deterministic model."),
    )
    dataset_num_proc: int | None = field(default=None, metadata=_help("Processes that tokenise the dataset."))
    streaming_shuffle_buffer: int = field(
        default=1000,
        metadata=_help(
            "Of a stream (IterableDataset): each row is drawn from the next this many ones, otherwise in "
            "each pass. 0, or train_sampling_strategy='sequential': the order of the stream."
        ),
    )
    training_report: bool = field(
        default=True,
        metadata=_help("Write report.md and report.png, the curves of the run, beside the saved model."),
    )
    drop_unusable_rows: bool = field(
        default=False,
        metadata=_help(
            "Leave rows that cannot be used out of training and evaluation instead of stopping. What is "
            "wrong with each is logged and written to dropped_rows.jsonl in output_dir."
        ),
    )
    enable_jit_checkpoint: bool = field(
        default=True,
        metadata=_help(
            "SIGTERM, or one Ctrl-C: finish the running step, save a checkpoint, leave with exit code 143 or "
            "130. Not with save_strategy='no'."
        ),
    )
    # The defaults of TrainingArguments that the recipe replaces.
    adam_beta2: float = field(default=0.95, metadata=_help("AdamW beta2; 0.95 in LLaDA 1.5."))
    lr_scheduler_type: str = field(default="cosine", metadata=_help("Learning-rate schedule."))
    num_train_epochs: float = field(default=1.0, metadata=_help("Passes over the dataset."))
    logging_steps: float = field(default=10, metadata=_help("Steps between log lines."))
    logging_first_step: bool = field(
        default=True,
        metadata=_help("Log step 1, where the loss must be ln 2 and the margin 0."),
    )
    bf16: bool | None = field(
        default=None,
        metadata=_help("bf16 autocast. None: on where the device is a GPU with bf16, off on CPUs."),
    )
    remove_unused_columns: bool = field(
        default=False, metadata=_help("Must stay False: the collator reads the columns by name.")
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16
                and not self.use_cpu
                and torch.cuda.is_available()
                and torch.cuda.is_bf16_supported()
            )
        check_numbers(self)
        # torch's AdamW takes no integer for them, and 0 in a YAML file is one.
        self.adam_beta1, self.adam_beta2 = float(self.adam_beta1), float(self.adam_beta2)
        if self.deepspeed and not is_deepspeed_available():
            raise ValueError("deepspeed needs the package deepspeed: pip install deepspeed, or use fsdp")
        # transformers opens what is neither, and open(2) is stderr, which it then closes.
        for name in ("fsdp_config", "deepspeed", "accelerator_config"):
            value = getattr(self, name, None)
            if isinstance(value, int | float):
                raise ValueError(f"{name} must be a dictionary or the path of a JSON file, got {value!r}")
        if isinstance(self.fsdp, str) and self.fsdp.lower() in ("true", "false"):
            self.fsdp = self.fsdp.lower() == "true"  # a flag or a YAML file has words for it
        check_engine(self)
        if not isinstance(self.report_to, str | list | tuple | None):
            raise ValueError(f"report_to must be a name or a list of names, got {self.report_to!r}")
        try:
            super().__post_init__()
        except OSError:
            raise
        except Exception as error:  # wrong types surface as whatever the line that met them raises
            raise ValueError(f"training arguments: {' '.join(str(error).split())}") from error
        if self.data_seed is None:
            self.data_seed = (
                self.seed
            )  # else the order of the data hangs on the global random state at train()
        if self.logging_strategy == IntervalStrategy.NO:
            self.logging_first_step = False
        check_design(self.mask_design, self.num_samples, self.masks_per_level)
        if self.gradient_mode not in GRADIENT_MODES:
            raise ValueError(f"gradient_mode must be one of {GRADIENT_MODES}, got {self.gradient_mode!r}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the collator reads columns by name")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"max_prompt_length must be in [1, max_length = {self.max_length}), "
                f"got {self.max_prompt_length}"
            )
        check_supported(self)
        check_effects(self)
        check_launch(self)
        check_compilation(self)
        check_offloading(self)
        _check_writable(self.output_dir)


def _check_writable(output_dir: str) -> None:
    """ValueError unless output_dir can be created and written to. Creates nothing."""
    path = os.path.abspath(output_dir)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir must be a writable directory, got {output_dir!r}: {path} is not")


@dataclass
class ReferenceConfig(ReferenceArguments, DiffusionConfig):
    """What trainers with a reference need beside; not used by itself."""

    mask_design: str = field(
        default="graded-balanced",
        metadata=_help(
            "How levels and masks are drawn: a name of vrpo.estimator.designs.DESIGNS. 'graded-balanced' is "
            "exactly unbiased and has about .4 times the variance of 'paper' on the models tried; 'paper' "
            "is the l-form of LLaDA 1.5 with independent levels; 'ratio' has less variance still and a bias, "
            "small but for very short answers: at most 19 % of the ELBO at 2 tokens with 4 samples. `vrpo "
            "variance` measures them on your own model."
        ),
    )
    num_replicates: int | None = field(
        default=None,
        metadata=_help(
            "Independent repetitions of the mask design among the num_samples; divides num_samples / "
            "masks_per_level. With 2 or more every design logs its own noise (vrpo/score_std) and allows the "
            "jackknife loss, but each has fewer samples to balance. None: 2 where the design has no "
            "independent samples of its own and num_samples is even and at least 8, else 1."
        ),
    )
    share_trunk: bool | None = field(
        default=None,
        metadata=_help(
            "Compute the lowest layers once for policy and reference, where they are frozen in both and "
            "equal: the same bits for less work. None: as far as possible; true: an error where it is not; "
            "false: never."
        ),
    )
    num_samples: int = field(
        default=8,
        metadata=_help("K: masked copies of each response per ELBO estimate; 8 in LLaDA 1.5."),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_replicates is None:
            self.num_replicates = default_replicates(self.mask_design, self.num_samples)
        check_design(self.mask_design, self.num_samples, self.masks_per_level, self.num_replicates)


@dataclass
class VRPOConfig(ReferenceConfig):
    """Preference training of a masked-diffusion LM: arXiv 2505.19223, LLaDA 1.5.

    The paper's batch is 64 pairs: 8 per device times 8 accumulated here, on one device. Only the mask draw
    departs from its recipe, to another one of the same expectation and a fraction of the variance;
    mask_design="paper", pair_masks="independent" is the paper's.
    """

    beta: float = field(
        default=0.2,
        metadata=_help(
            "Weight of the ELBO log-ratio inside the sigmoid, per nat of the un-normalised sum; > 0. 0.2 in "
            "LLaDA 1.5. Per nat per token in sigmoid_norm and simpo, which want one about as many times "
            "larger as a response has tokens (2 to 10); in ipo and sppo_hard the target is 1 / (2 beta)."
        ),
    )
    loss_type: list[str] | str = field(
        default_factory=lambda: ["sigmoid"],  # of a list, HfArgumentParser reads a factory alone
        metadata=_help(
            "One of vrpo.objectives.losses.LOSSES, TRL's names, or several to be added with loss_weights: "
            "sigmoid (DPO), robust, exo_pair, hinge, ipo, sigmoid_norm, simpo (without reference), apo_zero, "
            "apo_down, nca_pair, bco_pair, sppo_hard. The noise of the score biases each, see "
            "vrpo/loss_bias. 'sigmoid_jackknife': sigmoid with the first order of that bias removed; needs "
            "num_replicates > 1, or a mask_design whose samples are independent (paper, t, coupled) and "
            "num_samples > 1."
        ),
    )
    loss_weights: list[float] | None = field(
        default=None, metadata=_help("Weights of the losses in loss_type, positive. None: 1 for each.")
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=_help(
            "Share of pairs labelled the wrong way round, in [0, 0.5): conservative DPO in sigmoid, "
            "sigmoid_norm and simpo, the unbiased correction in robust, the target in exo_pair (1e-3 there)."
        ),
    )
    ld_alpha: float | None = field(
        default=None,
        metadata=_help(
            "LD-DPO (arXiv 2409.06411): what the tokens of a response beyond the length of the other one "
            "count in the ELBOs of policy and reference, in [0, 1]; 0 leaves them out. Scores shrink with "
            "it, so beta may be larger. Needs sft_weight=0. None: all count 1."
        ),
    )
    simpo_gamma: float = field(
        default=0.5, metadata=_help("Margin that simpo asks for, in units of the score; at least 0.")
    )
    pair_masks: str = field(
        default="positions",
        metadata=_help(
            "What the masks of the two responses of a pair have in common. 'positions': token i is masked in "
            "both or in neither, as far as lengths allow, so that noise of what they share cancels in the "
            "score; 'levels': the mask levels, as fractions of their lengths; 'independent': nothing, as in "
            "LLaDA 1.5. Each response's masks have the same law in all three: none adds a bias."
        ),
    )
    sft_weight: float = field(
        default=0.05,
        metadata=_help(
            "Weight of the masked-diffusion SFT loss of the chosen response (nats per token); >= 0. 0.05 in "
            "LLaDA 1.5. Raise it when logps/chosen falls below the reference's."
        ),
    )
    learning_rate: float = field(default=5e-7, metadata=_help("Peak learning rate; 5e-7 in LLaDA 1.5."))
    weight_decay: float = field(default=0.01, metadata=_help("AdamW decay; 0.01 in LLaDA 1.5."))
    warmup_steps: float = field(
        default=15, metadata=_help("Linear warm-up steps, or a ratio if below 1; 15 in LLaDA 1.5.")
    )
    gradient_accumulation_steps: int = field(
        default=8, metadata=_help("Batches per optimizer step; with 8 pairs each, LLaDA 1.5's 64.")
    )

    def __post_init__(self):
        super().__post_init__()
        check_design(
            self.mask_design, self.num_samples, self.masks_per_level, self.num_replicates, self.pair_masks
        )
        self.loss_type = _listed("loss_type", self.loss_type)
        if self.loss_weights is not None:
            self.loss_weights = _listed("loss_weights", self.loss_weights)
        check_losses(
            self.loss_type,
            self.loss_weights,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            simpo_gamma=self.simpo_gamma,
            sft_weight=self.sft_weight,
        )
        _check_ld_alpha(self.ld_alpha, self.sft_weight)
        if needing := sorted(NEEDS_REPLICATES & set(self.loss_type)):
            num_levels = self.num_samples // self.masks_per_level
            check_replicates(needing[0], self.mask_design, num_levels, self.num_replicates)


def _check_ld_alpha(ld_alpha: float | None, sft_weight: float) -> None:
    if ld_alpha is None:
        return
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], or None, got {ld_alpha}")
    if sft_weight:
        raise ValueError(
            f"ld_alpha={ld_alpha} needs sft_weight=0: the ELBO of the chosen response, which that term is "
            "made of, counts its last tokens less"
        )


def _listed(name: str, value: Any) -> list:
    """One value as a list of it, several as a list."""
    if isinstance(value, str | Real):
        return [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be one value or a list, got {value!r}")
    return list(value)


@dataclass
class DiffusionSFTConfig(DiffusionConfig):
    """Masked-diffusion SFT as in LLaDA (arXiv 2502.09992 section 2.3 and App. B)."""

    learning_rate: float = field(default=2.5e-5, metadata=_help("Peak learning rate; 2.5e-5 in LLaDA."))
    weight_decay: float = field(default=0.1, metadata=_help("AdamW decay; 0.1 in LLaDA."))
    warmup_steps: float = field(
        default=50, metadata=_help("Linear warm-up steps, or a ratio if below 1; 50 in LLaDA.")
    )
    max_eos_fill: int | None = field(
        default=None,
        metadata=_help(
            "EOS fill, tokens: in training, responses are continued by 0 to max_eos_fill EOS tokens, afresh "
            "each epoch, every doubling equally likely, within max_length. Without it a model learns the "
            "length of an answer from the number of masks and fills all that it is given. It should reach "
            "the largest max_new_tokens you will decode with. None: 4 times the longest response of the "
            "training set. 0: no fill."
        ),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_eos_fill is not None and not 0 <= self.max_eos_fill < 2**30:
            raise ValueError(
                f"max_eos_fill must be a number of tokens below 2**30, 0 for no fill, or None, "
                f"got {self.max_eos_fill}"
            )
