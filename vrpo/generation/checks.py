"""Values that callers of the sampler give, checked before anything is computed."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int.

    Errors: ValueError for what is no integer (True, 2.5 and "2" are none) or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or _is_bool(value):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if number < minimum or (maximum is not None and number > maximum):
        bound = f"at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name} must be {bound}, got {number}")
    return number


def integers(name: str, values: Any, minimum: int, maximum: int) -> list[int]:
    """A sequence of `integer`s as a list."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of integers, got {_short(values)}")
    return [integer(name, value, minimum, maximum) for value in values]


def number(name: str, value: Any) -> float:
    """`value` as a float.

    Errors: ValueError for what is no real number, negative or not finite.
    """
    if not isinstance(value, Real) or _is_bool(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not (math.isfinite(converted) and converted >= 0):
        raise ValueError(f"{name} must be 0 or more and finite, got {value}")
    return converted


def token_ids(name: str, value: Any) -> Tensor:
    """Ids given as a list, a range, an array or a tensor, as int64 of one dimension on the CPU.

    Errors: ValueError for text, fractions, truth values, nested lists and negative ids.
    """
    if isinstance(value, (str, bytes)):
        raise ValueError(f"{name} must be token ids, got text: {value[:40]!r}; apply the tokenizer first")
    if value is None or isinstance(value, (Mapping, Set)):
        raise ValueError(f"{name} must be a sequence of token ids, got {type(value).__name__}")
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} must be a sequence of token ids, got {_short(value)}") from None
    if ids.dim() != 1:
        raise ValueError(f"{name} must be a flat sequence of token ids, got {_short(value)}")
    if not len(ids):
        return torch.empty(0, dtype=torch.int64)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {_short(value)}")
    ids = ids.to("cpu", torch.int64)
    if int(ids.min()) < 0:
        raise ValueError(f"{name} has a negative id: {int(ids.min())}")
    return ids


def prompt_ids(prompts: Any) -> list[Tensor]:
    """The ids of every prompt, see `token_ids`.

    Args:
        prompts: a sequence of prompts, or a (B, P) array or tensor, whose rows are taken whole.
    Errors: ValueError naming the prompt.
    """
    if isinstance(prompts, (str, bytes, Mapping, Set)) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be a sequence of token lists, got {_short(prompts)}")
    if isinstance(prompts, Tensor) and prompts.dim() == 0:
        raise ValueError("prompts must be a sequence of token lists, got a single number")
    tensors = [token_ids(f"prompt {index}", prompt) for index, prompt in enumerate(prompts)]
    for index, ids in enumerate(tensors):
        if not len(ids):
            raise ValueError(f"a prompt is empty (prompt {index}): every prompt needs at least one token")
    return tensors


def check_vocabulary(named_ids: Iterable[tuple[str, Sequence[int] | Tensor]], vocab_size: int) -> None:
    """ValueError naming the first id that the embedding has no row for."""
    for name, ids in named_ids:
        largest = int(ids.max()) if isinstance(ids, Tensor) else max(ids, default=-1)
        if largest >= vocab_size:
            raise ValueError(f"{name} has the id {largest}, the model knows ids below {vocab_size}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]} ..."
