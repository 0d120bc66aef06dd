"""last_hidden: the hidden states that a model hands to its head, without the logits.

Duck-typed: any torch module whose head is a module. Nothing here knows a model family or imports one.
"""

from typing import Any

from torch import Tensor, nn

_WITHOUT_LOGITS = "take the hidden states from the model's body and use the embedding's weight as the head"


def last_hidden(model: nn.Module, *args: Any, head: nn.Module | None = None, **kwargs: Any) -> Tensor:
    """What the model hands to its head: the hidden states after the final norm, (B, L, D).

        head(last_hidden(model, input_ids))  ==  model(input_ids).logits

    Calls `model(*args, **kwargs)` as it is, wrapped or not (PEFT, DDP), with a forward-pre-hook on the head
    that keeps the hidden states and gives the head zero rows: no logits are computed, no memory is taken for
    them. The hook is gone when the call returns or raises. Gradients flow through the result. The weight for
    the op that follows is `model.get_output_embeddings().weight`, and its bias, if it has one, goes to
    `bias=`. A LoRA adapter *on the head* is not in the weight: pass
    `head.weight + head.get_delta_weight("default")`.

    Works for models loaded with trust_remote_code (LLaDA's `model.transformer.ff_out`, Dream's `lm_head`),
    for transformers' own and for `vrpo`'s. What such a model does *after* its head is not in the hidden
    states: hand a soft-cap to `softcap=` and a factor (LLaDA's scale_logits) to `scale=` of the op that
    follows, and use `shift=True` where position i - 1 predicts token i (Dream).

    Args:
        model: the model. To find its head it, or what it wraps (`.module`), must have
            `get_output_embeddings`, as every transformers model has.
        *args, **kwargs: of the model's forward, so that it returns logits: without labels.
        head: the module that turns hidden states into logits, if the model cannot say it.
    Returns: (B, L, D), whatever the head was given; fewer rows if the model selects some (logits_to_keep).
    Errors: ValueError if there is no head to be found, it is an embedding (tied weights multiplied by a
        function), it did not run exactly once on hidden states, or it is inside a module that torch.compile
        made (a compiled graph may ignore the hook, or keep it for ever); and for labels.
    """
    if kwargs.get("labels") is not None:
        raise ValueError("labels must be left out: without logits there is no loss to compute")
    module = _find_head(model) if head is None else head
    if not isinstance(module, nn.Module):
        raise ValueError(f"head must be the module that makes logits, got {type(module).__name__}")
    if isinstance(module, nn.Embedding):
        raise ValueError(
            f"the head must be a module that the model calls on hidden states, got {type(module).__name__}: "
            f"with tied weights this model multiplies by its embedding in a function; {_WITHOUT_LOGITS}"
        )
    _require_eager(model, module)
    caught: list[Tensor] = []

    def keep(_module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
        place, hidden = next(iter([*enumerate(given), *named.items()]), (0, None))
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.dim() < 2:
            raise ValueError(f"the head must be called with hidden states (..., L, D), got {_told(hidden)}")
        if caught:
            raise ValueError(
                "the head must run once in a forward pass, got a second call: it is not clear which hidden "
                "states are wanted (several heads of one module, or a loop over chunks)"
            )
        caught.append(hidden)
        nothing = hidden[..., :0, :]
        if isinstance(place, str):
            return given, named | {place: nothing}
        return (nothing, *given[1:]), named

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(*args, **kwargs)
    finally:
        handle.remove()
    if not caught:
        raise ValueError(
            f"the head, {type(module).__name__}, never ran in the model's forward pass: the model may use "
            f"its weight in a function or have another head; pass head=, or {_WITHOUT_LOGITS}"
        )
    return caught[0]


def _find_head(model: nn.Module) -> nn.Module:
    """What `get_output_embeddings` of the model, or of what wrappers like DDP keep in `.module`, names."""
    inner = model
    while not hasattr(inner, "get_output_embeddings"):
        if not isinstance(getattr(inner, "module", None), nn.Module):
            raise ValueError(
                "model must say its head by get_output_embeddings(), but "
                f"{type(inner).__name__} has no such method; pass head="
            )
        inner = inner.module
    found = inner.get_output_embeddings()
    if found is None:
        raise ValueError(f"{type(inner).__name__}.get_output_embeddings() gives no head; pass head=")
    return found


def _require_eager(model: nn.Module, head: nn.Module) -> None:
    """A graph of torch.compile is not guarded against hooks that come and go."""
    for part in model.modules():
        compiled = hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        if compiled and any(module is head for module in part.modules()):
            raise ValueError(
                f"model must not be compiled around its head, but {type(part).__name__} is: pass the module "
                "that was given to torch.compile, and compile its layers instead"
            )


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}"
    return type(value).__name__
