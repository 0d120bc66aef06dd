"""The commands of `vrpo`, as data: what each is called, what it does, and where its code lies.

Code is named, not imported: `vrpo --help` needs neither torch nor transformers, which take seconds.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Command:
    """One subcommand of `vrpo`.

    name, summary: for the overview. example: shown in the help.
    code: "module:function", called with the parsed dataclasses, in the order of `groups`, then the config
        file's sections.
    fields: heading of the help -> "module:dataclass" whose fields are flags.
    sections: mappings that may stand in the config file without being flags, with what they hold.
    defaults: where the defaults come from.
    """

    name: str
    summary: str
    example: str
    code: str
    fields: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    defaults: str = ""

    @property
    def run(self) -> Callable[..., None]:
        return _load(self.code)

    @property
    def groups(self) -> dict[str, type]:
        """Heading of the help -> dataclass whose fields are flags."""
        return {heading: _load(place) for heading, place in self.fields.items()}


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


_DATA = {
    "Data": "vrpo.commands.arguments:ScriptArguments",
    "Model": "vrpo.commands.arguments:ModelArguments",
}

_QUANTIZATION = {"Quantization": "vrpo.models.quantized:Quantization"}
_EXTRAS = _QUANTIZATION | {"Answers during training": "vrpo.commands.completions:CompletionArguments"}

_COMMANDS = (
    Command(
        "sft",
        "train a masked-diffusion model on prompt/completion rows",
        "vrpo sft --model_name_or_path GSAI-ML/LLaDA-8B-Base --dataset_name sft.jsonl --output_dir out",
        "vrpo.commands.train:sft",
        _DATA | {"Masked diffusion": "vrpo.training.config:DiffusionSFTConfig"} | _EXTRAS,
        {
            "new_model": "sizes of a model that starts from random weights, with a BPE tokenizer trained on "
            "the training text: vocab_size, d_model, n_layers, n_heads, mlp_hidden_size. Instead of "
            "model_name_or_path."
        },
        "learning rate, warm-up and decay as in LLaDA's SFT (arXiv 2502.09992 section 2.3 and App. B), the "
        "betas of AdamW as in LLaDA 1.5; what the fields below do not explain is transformers'.",
    ),
    Command(
        "train",
        "align a masked-diffusion model with preference pairs (VRPO)",
        "vrpo train --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dataset_name pairs.jsonl "
        "--output_dir out",
        "vrpo.commands.train:train",
        _DATA | {"VRPO": "vrpo.training.config:VRPOConfig"} | _EXTRAS,
        defaults="the recipe of LLaDA 1.5 (arXiv 2505.19223 section 4 and App. D), but for how masks are "
        "drawn: --mask_design paper --pair_masks independent is the paper's draw. What the fields below do "
        "not explain is transformers'.",
    ),
    Command(
        "kto",
        "align a masked-diffusion model with single responses labelled good or bad (KTO)",
        "vrpo kto --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dataset_name labelled.jsonl "
        "--output_dir out",
        "vrpo.commands.train:kto",
        _DATA | {"KTO": "vrpo.training.kto_config:DiffusionKTOConfig"} | _EXTRAS,
        defaults="rate and beta of ELBO-KTO, the masks of vrpo train. What the fields below do not explain "
        "is transformers'.",
    ),
    Command(
        "score",
        "write the ELBO of each response of a file, and rewards against a reference",
        "vrpo score --model_name_or_path out --dataset_name pairs.jsonl --output_file scores.jsonl",
        "vrpo.commands.infer:score",
        {"Score": "vrpo.evaluation.score:ScoreArguments"} | _QUANTIZATION,
        defaults="those of vrpo train where they have one meaning.",
    ),
    Command(
        "variance",
        "measure the noise of score, loss and gradient by mask design, and recommend one",
        "vrpo variance --model_name_or_path out --ref_model_name_or_path GSAI-ML/LLaDA-8B-Instruct "
        "--dataset_name pairs.jsonl --output_file variance.json",
        "vrpo.commands.infer:variance",
        {"Variance": "vrpo.evaluation.variance_report:VarianceArguments"},
    ),
    Command(
        "generate",
        "answer one prompt, or the prompts of a file",
        "vrpo generate --model_name_or_path out --prompt 'What is 2 + 3?'",
        "vrpo.commands.infer:generate",
        {"Generate": "vrpo.generation.answer:GenerateArguments"} | _QUANTIZATION,
        defaults="LLaDA's sampler (arXiv 2502.09992 App. B.4): one token per call, the most likely one, the "
        "least sure ones masked again.",
    ),
    Command(
        "plan",
        "model the memory and time of a vrpo train on a machine, and what to change where it does not fit",
        "vrpo plan --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --num_gpus 8 --gradient_checkpointing",
        "vrpo.commands.plan:plan",
        {
            "Machine and data": "vrpo.commands.plan:PlanArguments",
            "Model": "vrpo.commands.arguments:ModelArguments",
            "VRPO": "vrpo.commands.planned_config:PlannedConfig",
        }
        | _EXTRAS,
        defaults="those of vrpo train, whose config file it takes as it is; the machine's are an H100's. It "
        "needs no GPU, and of the model its config.json only.",
    ),
    Command(
        "env",
        "print versions, devices and backends for bug reports",
        "vrpo env",
        "vrpo.commands.environment:env",
    ),
)

COMMANDS: dict[str, Command] = {command.name: command for command in _COMMANDS}


def overview() -> str:
    """What `vrpo --help` prints."""
    lines = "\n".join(f"  {command.name:<10}{command.summary}" for command in _COMMANDS)
    return (
        "Preference training for masked-diffusion language models (VRPO).\n\n"
        f"usage: vrpo <command> [--config file.yaml] [--field value ...]\n\n{lines}\n\n"
        "`vrpo <command> --help` explains a command, its fields and where their defaults come from; "
        "`vrpo --version`\nprints the version; --traceback shows where an error came from.\n"
    )
