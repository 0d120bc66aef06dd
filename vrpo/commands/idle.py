"""Flags of the training commands that nothing would read: refused before anything is loaded."""

from vrpo.commands.arguments import ModelArguments
from vrpo.training.config import DiffusionConfig
from vrpo.training.no_effect import Needs, check_effects

_PEFT = Needs("use_peft", lambda args: args.use_peft)
_MODEL = {name: _PEFT for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")}

_LOADED = Needs(
    "model_name_or_path: a new_model has weights of its own, in float32",
    lambda args: args.model_name_or_path is not None,
)
_NEW_MODEL = {name: _LOADED for name in ("dtype", "attn_implementation", "model_revision")}

_PUSHED = Needs("push_to_hub", lambda config: config.push_to_hub)
_LOGGED = Needs("a logger: report_to=wandb, tensorboard, trackio, ...", lambda config: bool(config.report_to))
_TRACKIO = Needs("report_to=trackio", lambda config: "trackio" in config.report_to)
_RUN = {
    # Of the trainers these are read by calls and callbacks of one's own too, which no command makes.
    "hub_model_id": _PUSHED,
    "hub_revision": _PUSHED,
    "hub_private_repo": Needs(
        "push_to_hub or report_to=trackio", lambda config: _PUSHED.holds(config) or _TRACKIO.holds(config)
    ),
    "run_name": _LOGGED,
    "project": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
}


def check_idle(model_args: ModelArguments, config: DiffusionConfig) -> None:
    """ValueError naming the first flag that does nothing, and what it needs."""
    check_effects(model_args, _MODEL)
    check_effects(model_args, _NEW_MODEL)
    check_effects(config, _RUN)
