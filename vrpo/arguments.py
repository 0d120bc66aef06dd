"""What the commands accept beside the trainers' configs; names follow TRL's."""

from dataclasses import dataclass, field
from typing import Any

from vrpo.config import VRPOConfig
from vrpo.generate import SamplerConfig


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    """The data of a training run."""

    dataset_name: str = field(
        metadata={"help": "Training data: a .jsonl, .json or .parquet file, a folder, or a hub name."}
    )
    dataset_config: str | None = _field(None, "Configuration of a hub dataset.")
    dataset_train_split: str = _field("train", "Split to train on; slices such as train[:500] work.")
    dataset_test_split: str | None = _field(
        None, "Split of dataset_name to evaluate on, instead of eval_dataset_name."
    )
    eval_dataset_name: str | None = _field(
        None, "Data to evaluate on every eval_steps and at the end: a file, folder or hub name."
    )


@dataclass
class ModelArguments:
    """The model, and LoRA adapters on it."""

    model_name_or_path: str | None = _field(
        None, "Checkpoint to start from: a folder or a hub name, in LLaDA's format."
    )
    model_revision: str = _field("main", "Branch, tag or commit of a hub model.")
    dtype: str = _field(
        "float32",
        "Dtype of the weights: float32, bfloat16, float16 or auto (the checkpoint's). Training rounds "
        "small updates away in anything but float32.",
    )
    attn_implementation: str = _field(
        "vrpo", "Attention over packs: vrpo (the best one here), vrpo_sdpa, vrpo_varlen or vrpo_fa."
    )
    use_peft: bool = _field(False, "Train LoRA adapters instead of all weights.")
    lora_r: int = _field(16, "Rank of the adapters.")
    lora_alpha: int = _field(32, "Adapter output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _field(0.0, "Dropout of the adapters; off while disable_dropout is set.")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get adapters. Unset: every linear one but the head."},
    )


@dataclass
class ScoreArguments:
    """What to score, with which model, against which reference."""

    model_name_or_path: str = field(metadata={"help": "Model to score with: a folder or a hub name."})
    dataset_name: str = field(
        metadata={"help": "Preference pairs or prompt/completion rows: file, folder or hub name."}
    )
    output_file: str = field(metadata={"help": "JSONL file to write, one line per row of the data."})
    dataset_config: str | None = _field(None, "Configuration of a hub dataset.")
    dataset_split: str = _field("train", "Split to score; of a single file only a slice matters.")
    ref_model_name_or_path: str | None = _field(None, "Reference model; adds its ELBOs, rewards and margins.")
    model_revision: str = _field("main", "Branch, tag or commit of the model.")
    dtype: str = _field("auto", "Dtype of the weights: auto, float32, bfloat16 or float16.")
    attn_implementation: str = _field("vrpo", "As in training.")
    beta: float = _field(VRPOConfig.beta, "reward = beta * (ELBO - reference ELBO).")
    num_samples: int = _field(
        VRPOConfig.num_samples, "Masked copies of each response per estimate; more is more exact."
    )
    mask_design: str = _field(VRPOConfig.mask_design, "How levels and masks are drawn, as in training.")
    pair_masks: str = _field(VRPOConfig.pair_masks, "What the masks of a pair share, as in training.")
    num_replicates: int | None = _field(
        VRPOConfig.num_replicates, "Independent repetitions of the design, as in training."
    )
    max_length: int = _field(VRPOConfig.max_length, "Longest prompt + response in tokens.")
    max_tokens_per_pack: int = _field(VRPOConfig.max_tokens_per_pack, "Tokens of one forward pass.")
    mask_token_id: int | None = _field(None, "Id of the mask token. Unset: the model's.")
    seed: int = _field(VRPOConfig.seed, "Seed of the masks; the same seed gives the same figures.")
    device: str | None = _field(None, "cuda, cpu, ...; unset: a GPU where there is one.")


@dataclass
class GenerateArguments:
    """Which prompts to answer, with which model, and how to decode."""

    model_name_or_path: str = field(metadata={"help": "Model: a folder or a hub name."})
    prompt: str | None = _field(None, "One prompt; the answer is printed. Instead of dataset_name.")
    chat: bool = _field(False, "Take `prompt` for a user's message and put it into the chat template.")
    dataset_name: str | None = _field(
        None, "File, folder or hub name with a column `prompt`, text or messages. Needs output_file."
    )
    output_file: str | None = _field(None, "JSONL file to write: row, sample, prompt, response.")
    dataset_config: str | None = _field(None, "Configuration of a hub dataset.")
    dataset_split: str = _field("train", "Split to answer; of a single file only a slice matters.")
    num_return_sequences: int = _field(1, "Answers per prompt; more than one needs a temperature.")
    max_new_tokens: int = _field(SamplerConfig.max_new_tokens, "Tokens of every response.")
    block_length: int | None = _field(None, "Tokens per block, from left to right. Unset: one block.")
    steps: int | None = _field(None, "Model calls per response. Unset: one token per call.")
    temperature: float = _field(SamplerConfig.temperature, "0 takes the most likely token.")
    remasking: str = _field(SamplerConfig.remasking, "Which predictions to keep: low_confidence or random.")
    cfg_scale: float = _field(SamplerConfig.cfg_scale, "Classifier-free guidance; 0 is off.")
    logits_eos_inf: bool = _field(False, "Never produce EOS; LLaDA's setting for some tasks.")
    confidence_eos_eot_inf: bool = _field(False, "Decide EOS and EoT last; LLaDA's setting for others.")
    model_revision: str = _field("main", "Branch, tag or commit of the model.")
    dtype: str = _field("auto", "Dtype of the weights: auto, float32, bfloat16 or float16.")
    attn_implementation: str = _field("vrpo", "As in training.")
    mask_token_id: int | None = _field(None, "Id of the mask token. Unset: the model's.")
    max_tokens_per_pack: int = _field(16384, "Tokens of one forward pass.")
    seed: int = _field(VRPOConfig.seed, "Seed of the draws; the same seed gives the same answers.")
    device: str | None = _field(None, "cuda, cpu, ...; unset: a GPU where there is one.")
