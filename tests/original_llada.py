"""LLaDA in plain PyTorch with the module names of the original class, for PEFT to put adapters on.

Written from the architecture's description and the checkpoint's names; it shares no code with the product.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Config(dict):
    """The original config.json as PEFT wants to see a config: attributes and to_dict."""

    __getattr__ = dict.get

    def to_dict(self) -> dict:
        return dict(self)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Config":
        return cls(json.loads((Path(folder) / "config.json").read_text()))


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt())


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        d, kv = c.d_model, c.d_model * c.n_kv_heads // c.n_heads
        self.heads, self.kv_heads, self.theta = c.n_heads, c.n_kv_heads, c.rope_theta
        self.attn_norm, self.ff_norm = Norm(d), Norm(d)
        self.q_proj, self.attn_out = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k_proj, self.v_proj = nn.Linear(d, kv, bias=False), nn.Linear(d, kv, bias=False)
        self.ff_proj, self.up_proj = (nn.Linear(d, c.mlp_hidden_size, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(c.mlp_hidden_size, d, bias=False)

    def _rotate(self, x_BHLd: Tensor) -> Tensor:
        size = x_BHLd.shape[-1]
        angle = torch.arange(x_BHLd.shape[-2])[:, None] * self.theta ** (-torch.arange(0, size, 2) / size)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        first, second = x_BHLd.chunk(2, -1)
        return x_BHLd * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x_BLD: Tensor) -> Tensor:
        h = self.attn_norm(x_BLD)
        q, k, v = (
            layer(h).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, heads in (
                (self.q_proj, self.heads),
                (self.k_proj, self.kv_heads),
                (self.v_proj, self.kv_heads),
            )
        )
        q, k = self._rotate(q), self._rotate(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x_BLD = x_BLD + self.attn_out((weights @ v).transpose(1, 2).flatten(2))
        h = self.ff_norm(x_BLD)
        return x_BLD + self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))


class OriginalLLaDA(nn.Module):
    """`model.transformer.{wte, blocks, ln_f, ff_out}`; forward(input_ids (B, L)) -> logits (B, L, V)."""

    def __init__(self, folder: str | Path):
        super().__init__()
        self.config = c = Config.from_pretrained(folder)
        self.name_or_path = str(folder)
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(c.embedding_size, c.d_model),
                "blocks": nn.ModuleList(Block(c) for _ in range(c.n_layers)),
                "ln_f": Norm(c.d_model),
                "ff_out": nn.Linear(c.d_model, c.embedding_size, bias=False),
            }
        )
        self.load_state_dict(load_file(Path(folder) / "model.safetensors"))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["ff_out"]

    def prepare_inputs_for_generation(self) -> None:
        """PEFT looks for it in causal models."""

    def forward(self, input_ids: Tensor, **_) -> Tensor:
        x_BLD = self.model.transformer["wte"](input_ids)
        for block in self.model.transformer["blocks"]:
            x_BLD = block(x_BLD)
        return self.model.transformer["ff_out"](self.model.transformer["ln_f"](x_BLD))
