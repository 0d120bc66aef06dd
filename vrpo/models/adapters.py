"""PEFT adapters on our models: which model has one, and putting one on."""

from typing import Any

from torch import nn
from transformers.utils import is_peft_available


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT; False where the package is not installed."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def require_peft(who: str) -> None:
    """ValueError unless the peft package is installed."""
    if not is_peft_available():
        raise ValueError(f"{who} needs the package peft: pip install 'vrpo[peft]'")


def add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """The model wrapped with a new adapter.

    Errors: ValueError without peft, or if the model has an adapter already.
    """
    require_peft("peft_config")
    from peft import get_peft_model

    if is_peft_model(model):
        raise ValueError("peft_config was given, but model is a PeftModel already: pass one of them")
    return get_peft_model(model, peft_config)
