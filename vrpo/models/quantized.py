"""Weights in 4 or 8 bits (bitsandbytes): how, checked before a checkpoint is read, and what belongs to them.

The linear layers of the body are quantized as they are loaded; embedding, norms and head keep the dtype of
the model. A quantized base is frozen: what trains are adapters on it (QLoRA, arXiv 2305.14314).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

_TYPES = ("nf4", "fp4")


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Quantization:
    """How the base is quantized; by default it is not. Names and defaults are those of TRL's ModelConfig.

    Errors: ValueError for two widths at once, settings without the width that they belong to, or a missing
        package.
    """

    load_in_4bit: bool = _field(
        False, "Load the linear layers of the body in 4 bits (bitsandbytes); to train, with use_peft."
    )
    load_in_8bit: bool = _field(
        False, "Load the linear layers of the body in 8 bits (bitsandbytes); to train, with use_peft."
    )
    bnb_4bit_quant_type: str = _field("nf4", "Of load_in_4bit: nf4 or fp4.")
    use_bnb_nested_quant: bool = _field(
        False, "Of load_in_4bit: quantize the scales too, 0.4 bits less per weight."
    )

    def __post_init__(self) -> None:
        if self.bnb_4bit_quant_type not in _TYPES:
            raise ValueError(f"bnb_4bit_quant_type must be one of {_TYPES}, got {self.bnb_4bit_quant_type!r}")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: give one")
        if not self.load_in_4bit:
            for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name}={getattr(self, name)!r} does nothing without load_in_4bit")
        if self.name is not None and not is_bitsandbytes_available():
            raise ValueError(f"{self.name} needs the package bitsandbytes: pip install 'vrpo[quantized]'")

    @property
    def name(self) -> str | None:
        """The argument that asks for it; None for whole weights."""
        if self.load_in_4bit:
            return "load_in_4bit"
        return "load_in_8bit" if self.load_in_8bit else None

    @property
    def bytes_per_weight(self) -> float:
        """Of the quantized layers, with the scales; 0.0 where nothing is quantized.

        4 bits: a float32 scale for 64 weights; nested, 8 bits for it and a float32 one for 256 of them.
        8 bits: a float32 scale for a whole row, which is not counted.
        """
        if self.load_in_8bit:
            return 1.0
        if not self.load_in_4bit:
            return 0.0
        return 0.5 + (1 / 64 + 4 / (64 * 256) if self.use_bnb_nested_quant else 4 / 64)

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """What transformers takes; 4-bit weights are multiplied in `dtype`, under autocast in its dtype."""
        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether layers of the model, or of the base under an adapter, were quantized as they were loaded."""
    base = getattr(model, "get_base_model", lambda: model)()
    return getattr(base, "is_quantized", False)


def keep_differentiable(model: nn.Module) -> None:
    """4-bit layers of a model that trains stay as they are when it is evaluated on a CPU.

    With AVX512-BF16 the first evaluation repacks them, and from then on they pass no gradient on, in training
    either, and nothing says so (bitsandbytes 0.50).
    """
    if not is_quantized(model):
        return
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # undoes the packing where it was done already
            module.support_avx512bf16_for_cpu = False


def quantization_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Scales and codes of quantized weights: the weights are nothing without them, and no parameters."""
    if not is_quantized(model):
        return []
    named = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return [
        (name, value)
        for name, value in model.state_dict().items()
        if name not in named and isinstance(value, Tensor)
    ]
