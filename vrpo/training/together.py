"""What the processes of a run decide together: the error of one is an error of all, so that none waits."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


def any_process(is_true: bool, accelerator: Accelerator) -> bool:
    """Whether it is true in any process; a collective."""
    if accelerator.num_processes == 1:
        return is_true
    count = torch.tensor(float(is_true), device=accelerator.device)
    return float(accelerator.reduce(count, reduction="sum")) > 0


def on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """What the function gives in the main process, in all of them; an OSError or ValueError of it too."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [function()]
        except (OSError, ValueError) as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def raise_together(error: FloatingPointError | None, accelerator: Accelerator) -> None:
    """Raises in all processes what any of them has found; a collective."""
    if any_process(error is not None, accelerator):
        told = [None if error is None else str(error)]
        if accelerator.num_processes > 1:
            told = gather_object(told)
        raise FloatingPointError(next(text for text in told if text is not None)) from error
