"""The formula of `rotary`, in float32 or wider."""

import torch
from torch import Tensor


def rotary(heads_BHLd: Tensor, cos_BLh: Tensor, sin_BLh: Tensor) -> Tensor:
    """out_i = x_i cos_i - x_{i+h} sin_i,   out_{i+h} = x_{i+h} cos_i + x_i sin_i,   i < h = d / 2.

    Args: heads_BHLd (B, heads, L, d) floating; cos_BLh, sin_BLh (B, L, d / 2).
    Returns: the turned heads, rounded to their own dtype once.
    """
    wide = torch.promote_types(heads_BHLd.dtype, torch.float32)
    low, high = heads_BHLd.to(wide).chunk(2, dim=-1)
    cos, sin = cos_BLh[:, None], sin_BLh[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(heads_BHLd.dtype)
