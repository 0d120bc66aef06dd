"""The formula of `rms_norm`."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)), the quotient rounded to the dtype of hidden (..., D)."""
    return weight_D * F.rms_norm(hidden, hidden.shape[-1:], None, eps)
