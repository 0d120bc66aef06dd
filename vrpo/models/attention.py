"""Bidirectional attention over packs of segments: which backend, why, and the backends.

A pack is one row of T tokens, cut into segments by `cu_seqlens_S1`; a token attends to every token
of its own segment and to no other. Nothing is padded and no T x T tensor exists. The functions are
registered with transformers' AttentionInterface *without* a mask function, so transformers builds
no mask and hands every keyword of the model call through to here.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable
from functools import cache, cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from vrpo_kernels import segment_attention
from vrpo_kernels.segment_attention import reasons_against as segment_attention_reasons

# Registered name -> requested backend. No name may contain "flash": transformers takes such names
# for its own flash-attention integration and demands the package.
ATTENTION_NAMES = {
    "vrpo": "auto",
    "vrpo_sdpa": "sdpa",
    "vrpo_varlen": "torch_varlen",
    "vrpo_fa": "flash_attn",
}
BACKENDS = ("flash_attn", "torch_varlen", "segments", "sdpa")
_HALF = (torch.bfloat16, torch.float16)


def choose_attention(
    device: torch.device | str, dtype: torch.dtype, requested: str = "auto"
) -> tuple[str, str]:
    """The attention backend for packs on this device and dtype, and the reason in one sentence.

    Args:
        device: where the model runs; only its type matters.
        dtype: the dtype queries are computed in (under autocast, the autocast dtype).
        requested: "auto", or one of "flash_attn" (package flash-attn, extra `flash`),
            "torch_varlen" (torch.nn.attention.varlen), "segments" (vrpo_kernels.segment_attention, float32
            on a CPU), "sdpa" (one scaled_dot_product_attention per run of equally long segments; any
            device and dtype).
    Returns:
        (name, reason), name one of `BACKENDS`.
    Errors:
        ValueError for an unknown name, or an explicit request this machine cannot serve, with the
        reasons.
    """
    device_type = torch.device(device).type
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"attention must be one of {('auto', *BACKENDS)}, got {requested!r}")
    missing = {name: [] for name in BACKENDS}
    missing["segments"] += segment_attention_reasons(device_type, dtype)
    for name in ("flash_attn", "torch_varlen"):
        if device_type != "cuda":
            missing[name].append(f"needs a CUDA device, got {device_type}")
        if dtype not in _HALF:
            missing[name].append(f"needs bfloat16 or float16, got {dtype}")
    if not _is_importable("flash_attn"):
        missing["flash_attn"].append("package flash-attn is not installed (pip install 'vrpo[flash]')")
    if not _is_importable("torch.nn.attention.varlen"):
        missing["torch_varlen"].append(f"torch {torch.__version__} has no torch.nn.attention.varlen")
    if requested != "auto":
        if missing[requested]:
            raise ValueError(f"attention {requested!r}: " + "; ".join(missing[requested]))
        return requested, "asked for"
    name = next(name for name in BACKENDS if not missing[name])
    refused = [f"{other} {'; '.join(missing[other])}" for other in BACKENDS if missing[other]]
    return name, "first of " + ", ".join(BACKENDS) + " that works here" + "".join(
        f"; {text}" for text in refused
    )


@cache
def _is_importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class Segments:
    """Segment boundaries of one pack; what backends need is computed once per model call.

    Args:
        cu_seqlens_S1: (S + 1,) int32, 0 = cu[0] < cu[1] < ... < cu[S] = T.
        max_seqlen: longest segment, tokens.
    """

    def __init__(self, cu_seqlens_S1: Tensor, max_seqlen: int):
        if cu_seqlens_S1.dim() != 1 or cu_seqlens_S1.dtype != torch.int32:
            raise ValueError(
                "cu_seqlens_S1 must be a 1-D int32 tensor, got shape "
                f"{tuple(cu_seqlens_S1.shape)}, {cu_seqlens_S1.dtype}"
            )
        self.cu_seqlens_S1 = cu_seqlens_S1
        self.max_seqlen = max_seqlen

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Maximal runs of consecutive equally long segments: (first token, segments, length).

        The K copies of a response have one length, so there are at most 2B runs for B pairs. Reads
        the boundaries on the host (on CUDA: one synchronisation, only if sdpa is in use).
        """
        boundaries = self.cu_seqlens_S1.tolist()
        runs: list[tuple[int, int, int]] = []
        for start, end in pairwise(boundaries):
            length = end - start
            if length <= 0:
                raise ValueError(f"cu_seqlens_S1 must increase: segment at token {start} has {length} tokens")
            if runs and runs[-1][2] == length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            else:
                runs.append((start, 1, length))
        return runs


def _sdpa(query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None, scale: float) -> Tensor:
    """(B, H, L, d) x 3 -> (B, H, L, d); key and value may have fewer heads."""
    has_groups = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attend, scale=scale, enable_gqa=has_groups
    )


def _attend_segments(query_THd, key_THd, value_THd, segments: Segments, scale: float) -> Tensor:
    return segment_attention(query_THd, key_THd, value_THd, segments.cu_seqlens_S1, scale=scale)


def _attend_sdpa(query_THd, key_THd, value_THd, segments: Segments, scale: float) -> Tensor:
    """One call per run of equally long segments, batched by a view: no copy, no padding."""
    # split, not slices: the gradient of a slice is a zero-filled (T, H, d) tensor per run, that of
    # split one concatenation. With 32 runs this is 3x on forward + backward.
    sizes = [count * length for _, count, length in segments.runs]
    pieces = zip(*(tensor.split(sizes) for tensor in (query_THd, key_THd, value_THd)), strict=True)
    outputs = []
    for (_, count, length), tensors in zip(segments.runs, pieces, strict=True):
        q, k, v = (tensor.unflatten(0, (count, length)).transpose(1, 2) for tensor in tensors)
        outputs.append(_sdpa(q, k, v, None, scale).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@cache
def _torch_varlen_function() -> Callable[..., Tensor]:
    """torch's varlen_attn as f(q, k, v, cu, max_seqlen, scale); keywords changed in torch 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    # Full attention is the default, whether the version spells it is_causal=False or window_size=
    # (-1, -1), so neither is passed. `scale` and `enable_gqa` came one after the other; before
    # `enable_gqa` the kernel took fewer key heads as they are.
    known = inspect.signature(varlen_attn).parameters

    def attend(query, key, value, cu_seqlens, max_seqlen, scale):
        extra = {}
        if "scale" in known:
            extra["scale"] = scale
        elif not math.isclose(scale, query.shape[-1] ** -0.5):
            raise ValueError(
                f"varlen_attn of torch {torch.__version__} scales by head_size ** -0.5 only, got "
                f"scale={scale}"
            )
        if "enable_gqa" in known:
            extra["enable_gqa"] = query.shape[1] != key.shape[1]
        return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **extra)

    return attend


def _attend_torch_varlen(query_THd, key_THd, value_THd, segments: Segments, scale: float) -> Tensor:
    # Its backward adds with atomics, in an order that changes, unless use_deterministic_algorithms is on in
    # torch (transformers: full_determinism): 0.5 % of a step at LLaDA-8B's shape on an H100 (docs/gpu.md).
    return _torch_varlen_function()(
        query_THd, key_THd, value_THd, segments.cu_seqlens_S1, segments.max_seqlen, scale
    )


def _attend_flash_attn(query_THd, key_THd, value_THd, segments: Segments, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest = segments.cu_seqlens_S1, segments.max_seqlen
    return flash_attn_varlen_func(
        query_THd,
        key_THd,
        value_THd,
        cu,
        cu,
        longest,
        longest,
        softmax_scale=scale,
        causal=False,
        deterministic=True,  # the backward otherwise adds with atomics, in an order that changes
    )


_ATTEND = {
    "flash_attn": _attend_flash_attn,
    "torch_varlen": _attend_torch_varlen,
    "segments": _attend_segments,
    "sdpa": _attend_sdpa,
}


def _compute_dtype(query: Tensor) -> torch.dtype:
    """The dtype attention runs in: under autocast float32 gives way, as in torch's own attention."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype == torch.float32:
        return torch.get_autocast_dtype(device_type)
    return query.dtype


@torch.compiler.disable  # it reads the boundaries of a pack on the host, and no two packs have the same
def attend_packed(
    query_THd: Tensor,
    key_THd: Tensor,
    value_THd: Tensor,
    segments: Segments,
    *,
    scale: float,
    requested: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v inside each segment of a pack; nothing crosses a boundary.

    Args:
        query_THd: (T, heads, head size); key_THd, value_THd: (T, key heads, head size), key heads
            divide heads.
        segments: the boundaries.
        scale: factor on q k^T, usually head_size ** -0.5.
        requested: see `choose_attention`.
    Returns: (T, heads, head size) in the compute dtype.
    Numerics: the same backend and the same kernel with and without gradients, so outputs are
        bitwise equal.
    """
    dtype = _compute_dtype(query_THd)
    name, _ = choose_attention(query_THd.device, dtype, requested)
    query_THd, key_THd, value_THd = (tensor.to(dtype) for tensor in (query_THd, key_THd, value_THd))
    return _ATTEND[name](query_THd, key_THd, value_THd, segments, scale)


def _attention_function(requested: str) -> Callable[..., tuple[Tensor, None]]:
    """The function transformers calls in each layer: (B, heads, L, d) in, (B, L, heads, d) out."""

    def attend(module, query, key, value, attention_mask, scaling, segments=None, dropout=0.0, **kwargs):
        if dropout:
            raise ValueError(f"attention dropout must be 0 (LLaDA has none), got {dropout}")
        if segments is None:
            output = _sdpa(query, key, value, attention_mask, scaling).transpose(1, 2)
        else:
            if attention_mask is not None:
                raise ValueError("a pack takes no attention_mask: cu_seq_lens says who attends to whom")
            q, k, v = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))
            output = attend_packed(q, k, v, segments, scale=scaling, requested=requested)[None]
        return output.contiguous(), None

    return attend


def register_attention() -> None:
    """Make `ATTENTION_NAMES` known to transformers (attn_implementation="vrpo", ...)."""
    for name, requested in ATTENTION_NAMES.items():
        AttentionInterface.register(name, _attention_function(requested))
