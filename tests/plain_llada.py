"""A second LLaDA, from the description of the architecture, sharing no code and no class with the product.

LLaDA (arXiv 2502.09992 section 2, modeling_llada.py of GSAI-ML/LLaDA-8B-Instruct): token embedding; blocks of
x + out(attention(norm(x))) and x + down(silu(gate(norm(x))) * up(norm(x))), every position attending to every
other; a last norm; a head, which may be the embedding. RMSNorm and softmax are computed in float32 or wider,
rotations in float32 or wider with float32 angles, turning dimension i with i + d/2. Weights go by the names
of the original checkpoint. One unpadded sequence at a time, one head at a time.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

# Name inside a block of ours -> name inside an original block, each written out.
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_OUTER_NAMES = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


def original_name(name: str) -> str:
    """The original checkpoint's name of a parameter of ours."""
    name = name.removesuffix(".weight")
    inside = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    short = f"blocks.{inside[1]}.{_BLOCK_NAMES[inside[2]]}" if inside else _OUTER_NAMES[name]
    return f"model.transformer.{short}.weight"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate(x_Ld: Tensor, theta: float) -> Tensor:
    """The rows of x_Ld turned by the angles of positions 0 .. L-1, rounded once to the dtype of x_Ld."""
    length, size = x_Ld.shape
    half = size // 2
    frequency = 1.0 / theta ** (2 * torch.arange(half, dtype=torch.float32) / size)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency[None, :]
    wide = x_Ld.to(_wide(x_Ld.dtype))
    first, second = wide[:, :half], wide[:, half:]
    cos, sin = torch.cos(angle), torch.sin(angle)
    turned = torch.hstack((first * cos - second * sin, second * cos + first * sin))
    return turned.to(x_Ld.dtype)


@dataclass
class PlainLLaDA:
    """weights: original name -> leaf tensor; call with token ids (L,) for logits (L, V)."""

    weights: dict[str, Tensor]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    rope_theta: float
    eps: float

    @classmethod
    def like(cls, model, dtype: torch.dtype = torch.float64) -> "PlainLLaDA":
        """The same numbers and sizes as a model of the product; only values are taken from it."""
        config = model.config.to_diff_dict()
        weights = {
            original_name(name): parameter.detach().to(dtype).clone().requires_grad_()
            for name, parameter in model.named_parameters()
        }
        return cls(
            weights,
            config["n_layers"],
            config["n_heads"],
            config["n_kv_heads"],
            config["rope_theta"],
            config["rms_norm_eps"],
        )

    def gradient_of(self, name: str) -> Tensor:
        """Gradient of the weight that a parameter of ours stands for."""
        return self.weights[original_name(name)].grad

    def _weight(self, name: str) -> Tensor:
        return self.weights[f"model.transformer.{name}.weight"]

    def _norm(self, x_LD: Tensor, name: str) -> Tensor:
        wide = x_LD.to(_wide(x_LD.dtype))
        scale = 1.0 / torch.sqrt((wide * wide).mean(dim=1, keepdim=True) + self.eps)
        return (wide * scale).to(x_LD.dtype) * self._weight(name)

    def _attention(self, x_LD: Tensor, block: str) -> Tensor:
        query, key, value = (x_LD @ self._weight(f"{block}.{n}_proj").T for n in "qkv")
        size = query.shape[1] // self.n_heads
        outputs = []
        for head in range(self.n_heads):
            shared = head * self.n_kv_heads // self.n_heads
            q = rotate(query[:, head * size : (head + 1) * size], self.rope_theta)
            k = rotate(key[:, shared * size : (shared + 1) * size], self.rope_theta)
            v = value[:, shared * size : (shared + 1) * size]
            scores = (q @ k.T).to(_wide(q.dtype)) / size**0.5
            outputs.append(torch.softmax(scores, dim=1).to(v.dtype) @ v)
        return torch.hstack(outputs) @ self._weight(f"{block}.attn_out").T

    def _feed_forward(self, x_LD: Tensor, block: str) -> Tensor:
        gate = x_LD @ self._weight(f"{block}.ff_proj").T
        gated = gate * torch.sigmoid(gate) * (x_LD @ self._weight(f"{block}.up_proj").T)
        return gated @ self._weight(f"{block}.ff_out").T

    def __call__(self, ids_L: Tensor) -> Tensor:
        x_LD = self._weight("wte")[ids_L]
        for i in range(self.n_layers):
            x_LD = x_LD + self._attention(self._norm(x_LD, f"blocks.{i}.attn_norm"), f"blocks.{i}")
            x_LD = x_LD + self._feed_forward(self._norm(x_LD, f"blocks.{i}.ff_norm"), f"blocks.{i}")
        is_tied = "model.transformer.ff_out.weight" not in self.weights
        return self._norm(x_LD, "ln_f") @ self._weight("wte" if is_tied else "ff_out").T
