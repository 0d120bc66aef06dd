"""What a trainer refuses before its first step because the run would end in an error, or do nothing."""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from vrpo.batch import ResponseBatch
from vrpo.models import LLaDAForMaskedDiffusion
from vrpo.models.adapters import is_peft_model
from vrpo.models.files import why_unsupported
from vrpo.models.quantized import is_quantized


def check_model(model: nn.Module, args: TrainingArguments, *, gets_adapter: bool = False) -> None:
    """ValueError for a model that is not one of masked diffusion, or whose weights cannot train like this."""
    base = check_masked_diffusion(model, "model")
    if args.fp16 and any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise ValueError("fp16=True scales gradients of float32 weights, but the model's are float16")
    if is_quantized(base):
        _check_quantized(args, has_adapter=gets_adapter or is_peft_model(model))


def check_masked_diffusion(model: nn.Module, name: str) -> nn.Module:
    """The model under its adapters. Errors: ValueError, naming the argument, if it is of another class."""
    base = getattr(model, "get_base_model", lambda: model)()  # a base with an adapter in it is no PeftModel
    if not isinstance(base, LLaDAForMaskedDiffusion):
        config = base.config.to_dict() if isinstance(base, PreTrainedModel) else {}
        raise ValueError(
            f"{name} must be a masked-diffusion model (LLaDAForMaskedDiffusion, or PEFT around one), got "
            f"{type(base).__name__}. {why_unsupported(config)}"
        )
    return base


def _check_quantized(args: TrainingArguments, *, has_adapter: bool) -> None:
    if not has_adapter:
        raise ValueError(
            "a quantized model has no weights that train: pass peft_config (use_peft) for an adapter on it, "
            "or load it without load_in_4bit and load_in_8bit"
        )
    engines = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
    engine = engines.get(args.distributed_state.distributed_type)
    if engine is not None:
        raise ValueError(
            f"a quantized model is not supported under {engine}, which would cut or cast the packed bits "
            "without their scales: use DDP, where each process holds the whole of it"
        )


def check_optimizer(args: TrainingArguments, model: nn.Module) -> None:
    """ValueError for an optimizer whose package is missing or whose arguments are wrong."""
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if kind.__module__.startswith("torch."):
            kind([nn.Parameter(torch.zeros(1))], **kwargs)  # its own opinion of numbers
    except Exception as error:
        raise ValueError(f"optim={args.optim.value!r}: {' '.join(str(error).split())}") from error
    for argument in (args.optim_args or "").replace(" ", "").split(","):
        if argument and not _is_read(argument, args, model):
            raise ValueError(
                f"optim_args: optim={args.optim.value!r} does not read {argument!r}, which would do nothing"
            )


def _is_read(argument: str, args: TrainingArguments, model: nn.Module) -> bool:
    """Whether one key=value of optim_args reaches the optimizer: asked with another value, or none."""
    key, value = argument.split("=", 1)
    others = [one for one in args.optim_args.replace(" ", "").split(",") if one.split("=")[0] != key]

    def options(*more: str) -> str:
        changed = copy.copy(args)
        changed.optim_args = ",".join((*others, *more)) or None
        try:
            return repr(Trainer.get_optimizer_cls_and_kwargs(changed, model)[1])
        except Exception as error:  # another value may be a wrong one: then it was read
            return repr(error)

    as_given = options(argument)
    return any(options(*more) != as_given for more in ((), (f"{key}={_other(value)}",)))


def _other(value: str) -> str:
    try:
        return str(2 * float(value) + 1)
    except ValueError:
        return "False" if value.lower() == "true" else "True"


def responses_of(inputs: Any) -> ResponseBatch:
    """What a batch trains or is evaluated on; ValueError where a data_collator of one's own forgot it."""
    batch = inputs.get("responses") if isinstance(inputs, Mapping) else None
    if not isinstance(batch, ResponseBatch):
        got = f"the keys {sorted(inputs)}" if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(
            "data_collator must return a dict with a vrpo.batch.ResponseBatch under 'responses', as "
            f"vrpo.data.PairCollator and CompletionCollator do; got {got}"
        )
    return batch


def check_batches_exist(args: TrainingArguments, train: Any, evaluation: Any) -> None:
    """ValueError where dataloader_drop_last would leave nothing to train on, or to evaluate."""
    if not args.dataloader_drop_last:
        return
    sets = evaluation if isinstance(evaluation, Mapping) else {"eval": evaluation}
    batches = [("train", train, args.train_batch_size)]
    batches += [(name, dataset, args.eval_batch_size) for name, dataset in sets.items()]
    for name, dataset, batch_size in batches:
        needed = batch_size * args.world_size
        if hasattr(dataset, "__len__") and len(dataset) < needed:
            raise ValueError(
                f"dataloader_drop_last leaves no batch of the {len(dataset)} {name} rows: one batch of all "
                f"processes takes {needed}"
            )


def check_metric_for_best_model(
    args: TrainingArguments, evaluation: Any, names: Callable[[Any], Collection[str]]
) -> None:
    """ValueError for a metric that no evaluation reports; otherwise a KeyError after the first one.

    names: of a dataset, the metrics that its evaluation reports beside the loss.
    """
    wanted = args.metric_for_best_model
    if wanted is None or evaluation is None:
        return
    sets = (
        {f"{name}_": rows for name, rows in evaluation.items()} if isinstance(evaluation, Mapping) else None
    )
    sets = {"": evaluation} if sets is None else sets
    known = [f"{prefix}{name}" for prefix, rows in sets.items() for name in ("loss", *names(rows))]
    if wanted.removeprefix("eval_") not in known:
        raise ValueError(
            f"metric_for_best_model must be one of {', '.join(known)}, which the evaluations of this run "
            f"report; got {wanted!r}"
        )
