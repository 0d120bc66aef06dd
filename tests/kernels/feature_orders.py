"""The tolerance policy where a gradient is decided by the rounding of a few logits.

In fp32, with few rows, one logit's last bit decides a whole gradient, and the policy's baseline may be lucky
in it. Its features added up in another order, the baseline itself leaves the policy, and stays within it
against the unluckiest of 32 orders (tests in `test_heads_cpu.py`).
"""

import torch

from vrpo_kernels import testing


def ratios_of(results, inputs, form, order=slice(None)):
    """Policy ratios of (nll, dhidden, dweight, dbias) where the baseline sums the features in this order."""
    nll, dhidden, dweight, dbias = results
    hidden, weight, *others = inputs
    sides = (side[:, order] for side in (dhidden, dweight, hidden, weight))
    return testing.linear_cross_entropy_ratios(nll, *sides, *others, dbias=dbias, **form)


def unluckiest_ratios(results, inputs, form, seed=0):
    """The least ratio of each output over 32 orders, the first of them the given one."""
    size = inputs[0].shape[1]
    generator = torch.Generator().manual_seed(seed)
    ratios = ratios_of(results, inputs, form)
    for _ in range(31):
        again = ratios_of(results, inputs, form, torch.randperm(size, generator=generator))
        ratios = {output: min(ratio, again[output]) for output, ratio in ratios.items()}
    return ratios
