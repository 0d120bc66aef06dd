"""torch.compile of the layers of a model, one by one and in place.

accelerate would compile the model as a whole, whose every call has another pack: other lengths, other
boundaries, and each of them is compiled anew. Here each layer is compiled by itself, for any length
(dynamic shapes), and attention, which reads the boundaries, stays outside. The layers share what was
compiled, so that the first step compiles all of it: once with a graph and once without, once for layers that
train and once for frozen ones, and for the last layer by itself. No weight changes its name.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from transformers import TrainingArguments

from vrpo.models.llada import LLaDABody

# With a graph or without, adapted or not, adapter on or off, the lowest that trains, the last: where upper
# layers train, nine forms meet, and torch compiles eight of a function by itself.
_MOST_FORMS = 16
_MODES = (None, "default", "max-autotune-no-cudagraphs")


def check_compilation(args: TrainingArguments) -> None:
    """ValueError for a compilation that would not work here, or that another place than args asks for."""
    if not args.torch_compile:
        backend = TorchDynamoPlugin().backend.value
        if backend.lower() != "no":
            raise ValueError(
                f"accelerate's configuration asks for torch.compile (dynamo_backend={backend}), which would "
                "compile every pack anew: set torch_compile=True instead"
            )
        return
    if args.torch_compile_mode not in _MODES:
        raise ValueError(
            f"torch_compile_mode must be one of {_MODES[1:]}, got {args.torch_compile_mode!r}: others record "
            "a CUDA graph for every length, and each pack has another one"
        )


def check_compiler(args: TrainingArguments) -> None:
    """ValueError where the backend is unknown or finds no compiler, told by a function of one line."""
    if not args.torch_compile:
        return
    try:
        how = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        torch.compile(lambda x: x + 1, **how)(torch.zeros(2, device=args.device))
    except Exception as error:
        raise ValueError(
            f"torch_compile=True: the backend {args.torch_compile_backend!r} does not work here: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def compile_layers(model: nn.Module, args: TrainingArguments) -> nn.Module:
    """The model, its layers compiled where args.torch_compile says so; copies of it are not.

    With a graph and without one are two compilations, which may round differently: the first score, of a
    policy that is its reference, is 0 up to rounding only.
    """
    if not args.torch_compile:
        return model
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_FORMS)
    body = next(module for module in model.modules() if isinstance(module, LLaDABody))
    for layer in body.layers:
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
    return model


def leave_compilation_to_us(accelerator: Accelerator) -> None:
    """accelerate compiles nothing itself."""
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
