"""A tiny bidirectional language model in the layout of transformers: a body under a head that is a module."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """Every position sees itself and its two neighbours; forward(input_ids (B, L)) -> .logits (B, L, V)."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden_size)
        self.mix = nn.Conv1d(hidden_size, hidden_size, kernel_size=3, padding=1)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.to(dtype)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        embedded = self.embed(input_ids).transpose(1, 2)
        return SimpleNamespace(logits=self.lm_head(self.mix(embedded).tanh().transpose(1, 2)))
