"""Philox4x32-10 in int64 PyTorch: the specification of every random number in this project.

The C++ and Triton versions are checked bit for bit against `_by_formula`. A draw is a pure function of
integers, so it is the same on every device, world size and resume, and no global RNG state is touched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vrpo_kernels import autograd, checks
from vrpo_kernels.backend import extension_loaded

_U32 = 0xFFFFFFFF
_MULTIPLIER_A = 0xD2511F53
_MULTIPLIER_B = 0xCD9E8D57
_WEYL_A = 0x9E3779B9
_WEYL_B = 0xBB67AE85
_NUM_ROUNDS = 10


def _multiply_32x32(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, without leaving signed int64."""
    # constant * word can reach 2^64; split the word so that each partial product stays below 2^48.
    low_product = constant * (word & 0xFFFF)
    high_product = constant * (word >> 16) + (low_product >> 16)
    return (high_product >> 16) & _U32, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox4x32(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four independent 32-bit words per counter: the counter-based generator Philox4x32-10.

    Args:
        seed: the 64-bit key, 0 <= seed < 2**64; key words are (seed & 0xffffffff, seed >> 32).
        c0, c1, c2, c3: int64 tensors that broadcast against each other, values in [0, 2**32).
    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32), in the order of the Random123
        library (and of Triton's `tl.philox`).
    Errors:
        ValueError if seed is not a 64-bit unsigned integer, or a counter word is no int64 tensor. That the
        words lie in their range is the caller's promise.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3.
    """
    checks.require_seed(seed)
    for name, word in (("c0", c0), ("c1", c1), ("c2", c2), ("c3", c3)):
        checks.require_int64(name, word)
    words = torch.broadcast_tensors(c0, c1, c2, c3)
    if _runs_in_cpp(words):
        # The operator's schema has signed integers only.
        key = seed - 2**64 if seed >= 2**63 else seed
        return torch.ops.vrpo.philox4x32_words(*(word.contiguous() for word in words), key)
    return _by_formula(seed, *words)


def _runs_in_cpp(words: Sequence[Tensor]) -> bool:
    if not all(word.device.type == "cpu" for word in words) or not checks.values_are_checked(words[0].device):
        return False
    return not autograd.is_managed() and extension_loaded() and hasattr(torch.ops.vrpo, "philox4x32_words")


def _by_formula(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification."""
    key_a, key_b = seed & _U32, seed >> 32
    for _ in range(_NUM_ROUNDS):
        high_a, low_a = _multiply_32x32(_MULTIPLIER_A, c0)
        high_b, low_b = _multiply_32x32(_MULTIPLIER_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + _WEYL_A) & _U32, (key_b + _WEYL_B) & _U32
    return c0, c1, c2, c3
