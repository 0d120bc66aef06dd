"""Tiny LLaDA models and packs of random segments, for the tests of models, attention and sampling."""

from itertools import accumulate

import torch

from vrpo.models import LLaDAConfig, LLaDAForMaskedDiffusion

MASK_ID = 48
VOCAB = 50


def tiny_model(
    attention: str = "vrpo", dtype: torch.dtype = torch.float64, **options
) -> LLaDAForMaskedDiffusion:
    """Two layers, grouped heads, weights large enough that attention matters; the same every time."""
    sizes = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "mlp_hidden_size": 48,
        "max_sequence_length": 64,
        "embedding_size": VOCAB,
        "mask_token_id": MASK_ID,
        "init_std": 0.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LLaDAConfig(**sizes | options, attn_implementation=attention)
        return LLaDAForMaskedDiffusion(config).to(dtype).eval()


def random_segments(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, MASK_ID, (length,), generator=generator) for length in lengths]


def pack(segments: list[torch.Tensor]) -> dict:
    """What the model takes for a pack of these segments."""
    lengths = [len(segment) for segment in segments]
    cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(segments)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
