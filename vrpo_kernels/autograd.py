"""What registering a backward pass with torch.library leaves open: second derivatives and torch.func.

An op with a fused backward pass can be differentiated once. torch notices a second derivative only if it
happens to run through an input of a backward op; a gradient that was formed in the forward pass has none, and
its second derivative is then silently zero. Forward-mode tangents are dropped as silently, and
`torch.func.grad` refuses such an op altogether. `register` closes all three gaps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

SavedBackward = Callable[..., tuple]
"""(ctx, saved, *gradients of the outputs) -> one gradient or None per input; saved is ctx.saved_tensors."""


_REFERENCE = "Call it with backend='reference', which is plain PyTorch, or leave the derivative out"


def _refusal(name: str, what: str, advice: str = _REFERENCE) -> str:
    return (
        f"{name} has no {what}: its fused backward pass can be differentiated once, in reverse mode. {advice}"
    )


class _RefuseSecond(torch.autograd.Function):
    """Identity on the first `count` tensors; to differentiate the results in any of `tensors` raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx, *_gradients):
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx, *_tangents):
        raise RuntimeError(ctx.message)


def once_differentiable(name: str, backward: SavedBackward, advice: str = _REFERENCE) -> Callable[..., tuple]:
    """A backward pass (ctx, *gradients) whose results raise when they are differentiated once more.

    Unlike torch's decorator of that name it also raises where the upstream gradient is a constant: the
    results are tied to every saved tensor that requires a gradient. `create_graph=True` alone stays allowed.

    Args: name of the public function and advice, for the message.
    """
    message = _refusal(name, "second derivative", advice)

    def wrapped(ctx: Any, *gradients: Tensor | None) -> tuple:
        saved = ctx.saved_tensors  # once: checkpointing recomputes them, and they may be overwritten below
        with torch.no_grad():
            results = backward(ctx, saved, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        ties = [t for t in (*saved, *gradients) if isinstance(t, Tensor) and t.requires_grad]
        formed = [result for result in results if result is not None]
        if not ties or not formed:
            return results
        tied = iter(_RefuseSecond.apply(message, len(formed), *formed, *ties))
        return tuple(None if result is None else next(tied) for result in results)

    return wrapped


def require_constant(op: str, name: str, tensor: Tensor) -> None:
    """Refuse an argument that something is to be differentiated by, where an op has no derivative."""
    has_tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
    if has_tangent or (torch.is_grad_enabled() and tensor.requires_grad):
        raise ValueError(f"{name} is a constant to {op}, which has no derivative in it; pass {name}.detach()")


def register_loop(op: Any) -> None:
    """`torch.func.vmap` over a custom op: one call per element, each as exact as it is alone."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        calls = [op(*_element(args, in_dims, index)) for index in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

    op.register_vmap(rule)


def _element(args: tuple, in_dims: tuple, index: int) -> list:
    return [arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, in_dims, strict=True)]


def is_managed() -> bool:
    """Whether torch.compile, a torch.func transform or forward-mode AD decides what memory holds."""
    return torch.compiler.is_compiling() or is_transformed()


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is under way, also in what torch.compile traces."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def register(
    op: Any, name: str, backward: Callable[..., tuple], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Registers the backward pass of a custom op; the function to call in the op's place.

    It is the op itself, except under torch.func transforms, which a custom op's own registration does not
    support: there it is an equal `autograd.Function`.

    Args:
        op: what `torch.library.custom_op` returned.
        name: the public function's, for messages.
        backward: as `torch.library.register_autograd` takes it, usually from `once_differentiable`.
        setup_context: (ctx, inputs, output).
    """
    op.register_autograd(backward, setup_context=setup_context)
    register_loop(op)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return op(*args)

        @staticmethod
        def vmap(info, in_dims, *args):
            calls = [Transformed.apply(*_element(args, in_dims, i)) for i in range(info.batch_size)]
            if isinstance(calls[0], Tensor):
                return torch.stack(calls), 0
            return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

        @staticmethod
        def jvp(ctx, *_tangents):
            raise RuntimeError(_refusal(name, "forward-mode derivative"))

    Transformed.setup_context = staticmethod(setup_context)
    Transformed.backward = staticmethod(backward)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():  # which cannot trace `Transformed`
            if forward_ad._current_level >= 0:
                raise RuntimeError(_refusal(name, "forward-mode derivative"))
            return op(*args)
        return Transformed.apply(*args) if is_transformed() else op(*args)

    return call
