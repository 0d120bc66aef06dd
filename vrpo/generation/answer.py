"""`vrpo generate`: answers to one prompt, or to the prompts of a file."""

from dataclasses import dataclass, field
from typing import Any

from vrpo import data
from vrpo.data.encode import encode_prompts
from vrpo.data.formats import TEMPLATE_COLUMNS, Text
from vrpo.data.output import check_output, to_json, write
from vrpo.generation.sampler import SamplerConfig, generate, trim_response
from vrpo.models import load_tokenizer, special_tokens
from vrpo.models.checkpoint import load_policy
from vrpo.models.paths import check_device, check_loading, check_model_path


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
            "help": "Files, folder or hub name with a column `prompt`, text or messages. Needs output_file."
        },
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
    seed: int = _field(42, "Seed of the draws; the same seed gives the same answers.")
    device: str | None = _field(None, "cuda, cpu, ...; unset: a GPU where there is one.")


def answer(args: GenerateArguments) -> list[dict[str, Text | int]]:
    """Decode with LLaDA's sampler (`generate.generate`) and write `args.output_file` if it is given.

    Returns: one mapping per answer: row and sample (integers), prompt as given, response as text without
        special tokens. Sample s of row r depends on (seed, r * num_return_sequences + s) alone.
    Errors: ValueError for a missing column or empty prompt, naming it, and for settings that exclude
        each other.
    """
    if args.output_file is not None:
        (output,) = check_output(
            args.output_file,
            models={"model_name_or_path": args.model_name_or_path},
            data={"dataset_name": args.dataset_name},
        )
    prompts, template_columns = _prompts(args)
    if args.num_return_sequences < 1:
        raise ValueError(f"num_return_sequences must be at least 1, got {args.num_return_sequences}")
    if args.num_return_sequences > 1 and args.temperature == 0 and args.remasking != "random":
        raise ValueError("num_return_sequences > 1 gives equal answers at temperature 0; raise temperature")
    device = check_device(args.device)
    check_loading(args.dtype, args.attn_implementation)
    check_model_path(args.model_name_or_path, argument="model_name_or_path", revision=args.model_revision)
    tokenizer = load_tokenizer(args.model_name_or_path, revision=args.model_revision)
    model = load_policy(
        args.model_name_or_path,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        revision=args.model_revision,
    )
    special = special_tokens(model.config, tokenizer)
    eos = () if special.eos is None else (special.eos,)
    sampler = SamplerConfig(
        max_new_tokens=args.max_new_tokens,
        block_length=args.block_length,
        steps=args.steps,
        temperature=args.temperature,
        remasking=args.remasking,
        cfg_scale=args.cfg_scale,
        suppress_ids=eos if args.logits_eos_inf else (),
        defer_ids=special.terminal if args.confidence_eos_eot_inf else (),
        stop_ids=special.terminal,
    )
    prompt_ids = encode_prompts(prompts, tokenizer, **template_columns)
    response_BG = generate(
        model.to(device),
        [ids for ids in prompt_ids for _ in range(args.num_return_sequences)],
        sampler,
        mask_token_id=special.mask if args.mask_token_id is None else args.mask_token_id,
        seed=args.seed,
        max_pack_tokens=args.max_tokens_per_pack,
    )
    answers = []
    for index, tokens_G in enumerate(response_BG):
        row, sample = divmod(index, args.num_return_sequences)
        text = tokenizer.decode(trim_response(tokens_G, special.terminal), skip_special_tokens=True)
        answers.append({"row": row, "sample": sample, "prompt": prompts[row], "response": text})
    if args.output_file is not None:
        write({output: "".join(to_json(item) + "\n" for item in answers)})
    return answers


def _prompts(args: GenerateArguments) -> tuple[list[Text], dict[str, list[Any]]]:
    """The prompts, and the columns besides that the chat template gets."""
    if (args.prompt is None) == (args.dataset_name is None):
        raise ValueError("give either prompt or dataset_name")
    if args.prompt is not None:
        return [[{"role": "user", "content": args.prompt}] if args.chat else args.prompt], {}
    if args.chat:
        raise ValueError("chat belongs to prompt; a dataset says itself which prompts are messages")
    if args.output_file is None:
        raise ValueError("dataset_name needs output_file, where the answers go")
    rows = data.load_rows(args.dataset_name, config=args.dataset_config, split=args.dataset_split)
    if "prompt" not in rows.column_names:
        raise ValueError(f"the dataset lacks the column prompt: it has {', '.join(rows.column_names)}")
    columns = data.read_columns(rows, ("prompt", *TEMPLATE_COLUMNS))
    return columns.pop("prompt"), columns
