"""The whole VRPO objective in plain fp64 PyTorch, sharing no code with the product, nor the model.

It takes the masked positions and weights of each sample as given lists, runs a model (ids (L,) -> logits
(L, V), see plain_llada.py) on one sequence at a time, and returns the loss. Only the draw is not repeated
here; it has tests of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]


def naive_nll(model: Model, prompt: list[int], response: list[int], positions: list[int], mask_id: int):
    """-log p of each masked response token, from one sequence and full logits."""
    corrupted = [mask_id if p in positions else token for p, token in enumerate(response)]
    logits = model(torch.tensor(prompt + corrupted))
    log_p = torch.log_softmax(logits.double(), dim=-1)
    return [-log_p[len(prompt) + p, response[p]] for p in positions]


def naive_elbo(model, prompt, response, samples, mask_id):
    """Mean over samples of sum_i weight_i * log p_i. samples: list of (positions, weights)."""
    total = torch.zeros((), dtype=torch.float64)
    for positions, weights in samples:
        nll = naive_nll(model, prompt, response, positions, mask_id)
        total = total - sum(w * x for w, x in zip(weights, nll, strict=True))
    return total / len(samples)


def naive_loss(policy, reference, pairs, samples, mask_id, beta, sft_weight):
    """Mean over pairs of -log sigmoid(beta * (difference of log-ratios)) + sft_weight * (-B_w / L_w).

    pairs: list of (prompt, chosen, rejected); samples[b][side]: list of (positions, weights).
    """
    losses = []
    for (prompt, *responses), drawn in zip(pairs, samples, strict=True):
        ratio, chosen_elbo = [], None
        for side, response in enumerate(responses):
            policy_elbo = naive_elbo(policy, prompt, response, drawn[side], mask_id)
            with torch.no_grad():
                reference_elbo = naive_elbo(reference, prompt, response, drawn[side], mask_id)
            ratio.append(policy_elbo - reference_elbo)
            chosen_elbo = policy_elbo if side == 0 else chosen_elbo
        score = beta * (ratio[0] - ratio[1])
        losses.append(-torch.log(1 / (1 + torch.exp(-score))) - sft_weight * chosen_elbo / len(responses[0]))
    return torch.stack(losses).mean()
