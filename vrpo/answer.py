"""`vrpo generate`: answers to one prompt, or to the prompts of a file."""

import json

import torch

from vrpo import data
from vrpo.arguments import GenerateArguments
from vrpo.checkpoint import check_writable, default_device, load_policy
from vrpo.encode import Text, encode_prompts
from vrpo.generate import SamplerConfig, generate, trim_response
from vrpo.models import load_tokenizer, special_tokens


def answer(args: GenerateArguments) -> list[dict[str, Text | int]]:
    """Decode with LLaDA's sampler (`generate.generate`) and write `args.output_file` if it is given.

    Returns: one mapping per answer: row and sample (integers), prompt as given, response as text without
        special tokens. Sample s of row r depends on (seed, r * num_return_sequences + s) alone.
    Errors: ValueError for a missing column or empty prompt, naming it, and for settings that exclude
        each other.
    """
    prompts = _prompts(args)
    if args.num_return_sequences < 1:
        raise ValueError(f"num_return_sequences must be at least 1, got {args.num_return_sequences}")
    if args.num_return_sequences > 1 and args.temperature == 0 and args.remasking != "random":
        raise ValueError("num_return_sequences > 1 gives equal answers at temperature 0; raise temperature")
    output = None if args.output_file is None else check_writable(args.output_file)
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
    prompt_ids = encode_prompts(prompts, tokenizer)
    response_BG = generate(
        model.to(torch.device(default_device(args.device))),
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
    if output is not None:
        with output.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in answers)
    return answers


def _prompts(args: GenerateArguments) -> list[Text]:
    if (args.prompt is None) == (args.dataset_name is None):
        raise ValueError("give either prompt or dataset_name")
    if args.prompt is not None:
        return [[{"role": "user", "content": args.prompt}] if args.chat else args.prompt]
    if args.chat:
        raise ValueError("chat belongs to prompt; a dataset says itself which prompts are messages")
    if args.output_file is None:
        raise ValueError("dataset_name needs output_file, where the answers go")
    rows = data.load_rows(args.dataset_name, config=args.dataset_config, split=args.dataset_split)
    if "prompt" not in rows.column_names:
        raise ValueError(f"the dataset lacks the column prompt: it has {', '.join(rows.column_names)}")
    return rows["prompt"][:]
