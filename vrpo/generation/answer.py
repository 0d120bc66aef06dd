"""`vrpo generate`: answers to one prompt, or to the prompts of a file."""

from dataclasses import dataclass, field, replace
from typing import Any

from vrpo import data
from vrpo.data import Text
from vrpo.data.output import check_output, to_json, write
from vrpo.generation import checks
from vrpo.generation.config import SamplerConfig
from vrpo.generation.questions import Questions, from_prompt, from_rows
from vrpo.generation.sampler import MAX_SEED, generate, trim_response
from vrpo.models import SpecialTokens, load_tokenizer, max_positions, special_tokens
from vrpo.models.checkpoint import load_policy
from vrpo.models.paths import check_device, check_loading, check_model_path
from vrpo.models.quantized import Quantization, is_quantized


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class GenerateArguments:
    """Which prompts to answer, with which model, and how to decode."""

    model_name_or_path: str = field(metadata={"help": "Model: a folder or a hub name."})
    prompt: str | None = _field(None, "One prompt; the answer is printed. Instead of dataset_name.")
    chat: bool = _field(False, "Take `prompt` for a user's message and put it into the chat template.")
    dataset_name: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Files, folder or hub name; rows as in training, or prompts alone. Needs output_file."
        },
    )
    output_file: str | None = _field(None, "JSONL file to write: row, sample, prompt, response.")
    dataset_config: str | None = _field(None, "Configuration of a hub dataset.")
    dataset_split: str = _field(
        "train", "Split to answer, or a slice such as train[:100]; a file has none but train."
    )
    num_return_sequences: int = _field(1, "Answers per prompt; more than one needs a temperature.")
    max_new_tokens: int = _field(SamplerConfig.max_new_tokens, "Tokens of every response.")
    block_length: int | None = _field(None, "Tokens per block, from left to right. Unset: one block.")
    steps: int | None = _field(None, "Model calls per response. Unset: one token per call.")
    temperature: float = _field(SamplerConfig.temperature, "0 takes the most likely token.")
    remasking: str = _field(SamplerConfig.remasking, "Which predictions to keep: low_confidence or random.")
    cfg_scale: float = _field(SamplerConfig.cfg_scale, "Classifier-free guidance; 0 is off.")
    logits_eos_inf: bool = _field(False, "Never produce EOS; LLaDA's setting for some tasks.")
    confidence_eos_eot_inf: bool = _field(
        False,
        "Leave EOS and EoT out of confidences, so that they come last; LLaDA's setting for others. "
        "Without effect on random remasking.",
    )
    model_revision: str = _field("main", "Branch, tag or commit of the model.")
    dtype: str = _field("auto", "Dtype of the weights: auto, float32, bfloat16 or float16.")
    attn_implementation: str = _field("vrpo", "As in training.")
    mask_token_id: int | None = _field(None, "Id of the mask token. Unset: the model's.")
    max_tokens_per_pack: int = _field(16384, "Tokens of one forward pass.")
    seed: int = _field(42, "Seed of the draws; the same seed gives the same answers.")
    device: str | None = _field(None, "cuda, cpu, ...; unset: a GPU where there is one.")


def answer(args: GenerateArguments, quantization: Quantization | None = None) -> list[dict[str, Text | int]]:
    """Decode with LLaDA's sampler (`sampler.generate`) and write `args.output_file` if it is given.

    Returns: one mapping per answer: row and sample (integers), prompt (text or messages), response as text
        without special tokens. Sample s of row r depends on (seed, r * num_return_sequences + s) alone.
    Errors: ValueError for rows without a usable prompt, naming them, for a prompt beyond the model's
        positions, and for settings that are wrong or exclude each other; FloatingPointError for a model
        whose logits are not finite. Nothing is written then.
    """
    if args.output_file is not None:
        (output,) = check_output(
            args.output_file,
            models={"model_name_or_path": args.model_name_or_path},
            data={"dataset_name": args.dataset_name},
        )
    settings = _settings(args)
    questions = _questions(args)
    device = check_device(args.device)
    check_loading(args.dtype, args.attn_implementation)
    check_model_path(args.model_name_or_path, argument="model_name_or_path", revision=args.model_revision)
    tokenizer = load_tokenizer(args.model_name_or_path, revision=args.model_revision)
    prompt_ids = questions.token_ids(tokenizer)
    model = load_policy(
        args.model_name_or_path,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        revision=args.model_revision,
        quantization=quantization,
        device=device,
    )
    check_lengths(prompt_ids, args.max_new_tokens, max_positions(model.config))
    special = special_tokens(model.config, tokenizer)
    response_BG = generate(
        model if is_quantized(model) else model.to(device),
        [ids for ids in prompt_ids for _ in range(args.num_return_sequences)],
        _with_special_tokens(settings, special, args),
        mask_token_id=special.mask if args.mask_token_id is None else args.mask_token_id,
        seed=args.seed,
        max_pack_tokens=args.max_tokens_per_pack,
    )
    answers = []
    for index, tokens_G in enumerate(response_BG):
        row, sample = divmod(index, args.num_return_sequences)
        text = tokenizer.decode(trim_response(tokens_G, special.terminal), skip_special_tokens=True)
        answers.append({"row": row, "sample": sample, "prompt": questions.prompts[row], "response": text})
    if args.output_file is not None:
        write({output: "".join(to_json(item) + "\n" for item in answers)})
    return answers


def _settings(args: GenerateArguments) -> SamplerConfig:
    """Everything that can be checked before data and model are read."""
    checks.integer("num_return_sequences", args.num_return_sequences, 1)
    checks.integer("max_tokens_per_pack", args.max_tokens_per_pack, 1)
    checks.integer("seed", args.seed, 0, MAX_SEED)
    if args.mask_token_id is not None:
        checks.integer("mask_token_id", args.mask_token_id, 0)
    settings = SamplerConfig(
        max_new_tokens=args.max_new_tokens,
        block_length=args.block_length,
        steps=args.steps,
        temperature=args.temperature,
        remasking=args.remasking,
        cfg_scale=args.cfg_scale,
    )
    if args.num_return_sequences > 1 and not settings.draws_matter:
        raise ValueError(
            "num_return_sequences > 1 gives equal answers when nothing is drawn; raise temperature"
        )
    return settings


def _with_special_tokens(
    settings: SamplerConfig, special: SpecialTokens, args: GenerateArguments
) -> SamplerConfig:
    if args.logits_eos_inf and special.eos is None:
        raise ValueError("logits_eos_inf: neither the tokenizer nor the model has an EOS token")
    if args.confidence_eos_eot_inf and not special.terminal:
        raise ValueError(
            "confidence_eos_eot_inf: neither the tokenizer nor the model has an EOS or EoT token"
        )
    return replace(
        settings,
        suppress_ids=(special.eos,) if args.logits_eos_inf else (),
        defer_ids=special.terminal if args.confidence_eos_eot_inf else (),
        stop_ids=special.terminal,
    )


def check_lengths(prompt_ids: list[list[int]], num_new: int, limit: int) -> None:
    """ValueError naming the first prompt that is empty or leaves no room for num_new tokens."""
    for row, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"the prompt of row {row} has no tokens")
        if len(ids) + num_new > limit:
            raise ValueError(
                f"the prompt of row {row} has {len(ids)} tokens and max_new_tokens is {num_new}: "
                f"the model has positions for {limit}"
            )


def _questions(args: GenerateArguments) -> Questions:
    if (args.prompt is None) == (args.dataset_name is None):
        raise ValueError("give either prompt or dataset_name")
    if args.prompt is not None:
        return from_prompt(args.prompt, chat=args.chat)
    if args.chat:
        raise ValueError("chat belongs to prompt; a dataset says itself which prompts are messages")
    if args.output_file is None:
        raise ValueError("dataset_name needs output_file, where the answers go")
    return from_rows(data.load_rows(args.dataset_name, config=args.dataset_config, split=args.dataset_split))
