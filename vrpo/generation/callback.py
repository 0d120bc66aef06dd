"""Answers to a few prompts during training, so that a person sees what the figures mean."""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm
from transformers import TrainerCallback

from vrpo.data.output import to_json
from vrpo.generation import checks
from vrpo.generation.config import SamplerConfig
from vrpo.generation.sampler import generate, trim_response
from vrpo.models import special_tokens

SAMPLES_FILE = "samples.jsonl"


class LogCompletionsCallback(TrainerCallback):
    """Before training, every `freq` optimizer steps and at the end: answers, printed and kept.

    They are a pure function of the weights and the prompts, and training does not notice them: no random
    state is touched, and every module has the mode it had. All processes decode, because a sharded model
    needs all of them; the main one writes one {"step", "prompt", "response"} a line to SAMPLES_FILE in
    output_dir, and where W&B or Trackio log the run, all of them as the table "completions", as TRL does. A
    run that is resumed drops what is ahead of its checkpoint.

    Args: prompts: token ids of each prompt. freq: optimizer steps between answers. config: how to decode;
        stop_ids that are empty become the tokenizer's end tokens. max_pack_tokens: tokens of one model call.
        num_completions_to_print: how many of the answers to print; None: all.
    Errors: ValueError for no prompts, an empty one, a number out of range, or a config of another kind.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        freq: int,
        config: SamplerConfig | None = None,
        max_pack_tokens: int = 16384,
        num_completions_to_print: int | None = None,
    ):
        self.prompts = checks.prompt_ids(prompts)
        if not self.prompts:
            raise ValueError("prompts must have at least one prompt, got none")
        self.freq = checks.integer("freq", freq, 1)
        self.config = SamplerConfig() if config is None else config
        if not isinstance(self.config, SamplerConfig):
            raise ValueError(f"config must be a SamplerConfig, got {type(config).__name__}")
        self.max_pack_tokens = checks.integer("max_pack_tokens", max_pack_tokens, 1)
        if num_completions_to_print is not None:
            checks.integer("num_completions_to_print", num_completions_to_print, 0)
        self.num_completions_to_print = num_completions_to_print
        self._last: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            _keep_until(_path(args), state.global_step)
        self._last = None
        if state.global_step == 0:
            self._answer(args, state, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.freq == 0 or state.global_step >= state.max_steps:
            self._answer(args, state, **kwargs)

    def _answer(self, args, state, model=None, processing_class=None, **kwargs) -> None:
        if self._last == state.global_step:
            return
        self._last = state.global_step
        special = special_tokens(model.config, processing_class)
        config = self.config
        if not config.stop_ids:
            settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
            config = SamplerConfig(**settings | {"stop_ids": special.terminal})
        response_BG = generate(
            model,
            self.prompts,
            config,
            mask_token_id=special.mask if args.mask_token_id is None else args.mask_token_id,
            max_pack_tokens=self.max_pack_tokens,
            progress=False,
        )
        if not state.is_world_process_zero:
            return
        lines = []
        shown = len(self.prompts) if self.num_completions_to_print is None else self.num_completions_to_print
        for index, (prompt, tokens_G) in enumerate(zip(self.prompts, response_BG, strict=True)):
            asked = processing_class.decode(prompt.tolist(), skip_special_tokens=True)
            text = processing_class.decode(
                trim_response(tokens_G, special.terminal), skip_special_tokens=True
            )
            lines.append(to_json({"step": state.global_step, "prompt": asked, "response": text}) + "\n")
            if index < shown:
                tqdm.write(f"step {state.global_step}: {asked!a} -> {text!a}")
        os.makedirs(args.output_dir, exist_ok=True)
        with _path(args).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        _log_table(args.report_to, _path(args), state.global_step)


def _log_table(loggers: Sequence[str], path: Path, step: int) -> None:
    """All answers so far, in the loggers that have tables and a run."""
    wanted = {"wandb", "trackio"} & set(loggers)
    if not wanted:
        return
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    data = [[row["step"], row["prompt"], row["response"]] for row in rows]
    for name in sorted(wanted):
        logger = importlib.import_module(name)
        table = logger.Table(dataframe=pd.DataFrame(data, columns=["step", "prompt", "completion"]))
        logger.log({"completions": table, "train/global_step": step})


def _path(args) -> Path:
    return Path(args.output_dir, SAMPLES_FILE)


def _keep_until(path: Path, step: int) -> None:
    """Drops what a run wrote that is begun anew, or resumed from an earlier step; a line cut short too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if step and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(kept), encoding="utf-8")
