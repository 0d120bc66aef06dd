"""Layers of the Llama family as diffusion checkpoints were trained with them.

transformers' Llama casts cos and sin to the dtype of the activations and rotates in it. LLaDA rotates in
float32 whatever the weights are and rounds once (`rope_full_precision`); so do these layers.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from vrpo_kernels import gather_rows, rms_norm, rotary


class Rotation:
    """cos and sin of each position's angles, (B, L, d) float32.

    Neither a tuple nor a dataclass: FSDP's mixed precision looks into both, in the arguments of every layer,
    and casts the floating tensors it finds.
    """

    def __init__(self, cos_BLd: Tensor, sin_BLd: Tensor):
        self.cos_BLd, self.sin_BLd = cos_BLd, sin_BLd


class RotaryEmbedding(nn.Module):
    """Angles of the positions, float32 in a model of any dtype.

        angle_{p,i} = p * theta ** (-2 i / d)        i = 0 .. d/2 - 1; dimensions i and i + d/2 turn together

    Source: get_rotary_embedding in modeling_llada.py of GSAI-ML/LLaDA-8B-Instruct.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        size, theta = config.head_dim, config.rope_parameters["rope_theta"]
        # Not a buffer: model.to(bfloat16), .half() and the like would round the frequencies. On the CPU even
        # where the model is made on "meta", so that no loader has to fill it in.
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
        self.frequency_d2 = 1.0 / theta**exponent

    def forward(self, hidden_BLD: Tensor, position_ids: Tensor) -> Rotation:
        """The rotation of position_ids (B, L); only the device of hidden_BLD matters."""
        frequency_d2 = self.frequency_d2.to(hidden_BLD.device, non_blocking=True)
        angle = position_ids[..., None].float() * frequency_d2
        angle = torch.cat((angle, angle), dim=-1)
        return Rotation(angle.cos(), angle.sin())


def rotate(query: Tensor, key: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """query and key (B, heads, L, d), turned by the angles of their positions.

    Numerics: float16 and bfloat16 are multiplied and added in float32 and rounded once, to their own dtype.
    One kernel does it, with the same bits, on a GPU, and on a CPU in float32.
    """
    cos, sin = (part.to(query.device) for part in (rotation.cos_BLd, rotation.sin_BLd))
    if query.device.type == "cuda" or (query.device.type == "cpu" and query.dtype == torch.float32):
        half = query.shape[-1] // 2  # both halves of the angles are alike
        cos, sin = (part[..., :half].expand(len(query), -1, -1) for part in (cos, sin))
        return rotary(query, key, cos, sin)
    rotated_query, rotated_key = apply_rotary_pos_emb(query, key, cos, sin)  # promotes to float32
    return rotated_query.to(query.dtype), rotated_key.to(key.dtype)


def _autocast_suspended(device_type: str) -> AbstractContextManager:
    # torch.amp.is_autocast_available would tell, but torch.compile of torch 2.11 cannot trace it, and so left
    # every norm out of its compiled layer.
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


class RMSNorm(LlamaRMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight; the quotient in float32, or float64 for float64.

    Rounded twice, as LLaDA rounds: the quotient to the dtype of x, then its product with the weight.
    In float32 on a CPU one pass does it (vrpo_kernels.rms_norm), compiled layers included: the same bits.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        is_float32 = hidden_states.dtype == self.weight.dtype == torch.float32
        if hidden_states.device.type == "cpu" and is_float32:
            return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
        # Autocast on CUDA would widen what rms_norm reads and writes; it computes in float32 by itself.
        with _autocast_suspended(hidden_states.device.type):
            quotient = F.rms_norm(hidden_states, hidden_states.shape[-1:], None, self.variance_epsilon)
        return self.weight * quotient


class Attention(LlamaAttention):
    """Bidirectional attention with `rotate`; the function that attends is config._attn_implementation."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotation,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) -> (B, L, D), and the attention weights where the function returns them.

        With rows, (N,) int64 in [0, B * L), the outputs of these positions alone: (N, D).
        """
        for name in ("cache", "past_key_values"):  # its newer and its older name; always None here
            kwargs.pop(name, None)
        batch_shape = hidden_states.shape[:-1]
        query, key, value = (
            project(hidden_states).view(*batch_shape, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, key, position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = output.reshape(*batch_shape, -1).contiguous()
        if rows is not None:
            output = gather_rows(output.flatten(0, 1), rows)
        return self.o_proj(output), weights


class LlamaDecoderLayer(modeling_llama.LlamaDecoderLayer):
    """Llama's layer, which as the last of a model leaves out what nobody reads.

    Above its attention no position looks at another, so that part runs on the rows asked for. The name is
    that of the base, by which FSDP and device maps find the layers of a model.
    """

    is_last = False

    def forward(self, hidden_states: Tensor, *, rows: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, L, D); of the last layer (N, D) where rows, (N,) int64, are given."""
        if not self.is_last:
            rows = None
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), rows=rows, **kwargs)
        if rows is not None:
            hidden_states = gather_rows(hidden_states.flatten(0, 1), rows)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
