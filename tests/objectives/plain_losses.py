"""Every preference loss as its paper or TRL writes it, for one pair of numbers, sharing no code with ours."""

import torch
from torch import Tensor


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x.abs())) + torch.minimum(x, torch.zeros_like(x))


def plain_loss(name, policy, reference, length, *, beta, smoothing, gamma) -> Tensor:
    """policy, reference: (chosen, rejected) ELBOs of one pair, fp64 scalars; length: (L_w, L_l)."""
    won, lost = policy[0] - reference[0], policy[1] - reference[1]
    delta = won - lost
    per_token = won / length[0] - lost / length[1]

    def smoothed(x):
        return -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)

    def sigmoid(x):
        return 1 / (1 + torch.exp(-x))

    if name == "sigmoid":
        return smoothed(beta * delta)
    if name == "robust":
        clean = -(1 - smoothing) * log_sigmoid(beta * delta)
        return (clean + smoothing * log_sigmoid(-beta * delta)) / (1 - 2 * smoothing)
    if name == "exo_pair":
        p, q = sigmoid(beta * delta), sigmoid(-beta * delta)
        return p * torch.log(p / (1 - smoothing)) + q * torch.log(q / smoothing)
    if name == "hinge":
        return torch.maximum(1 - beta * delta, torch.zeros_like(delta))
    if name == "ipo":
        return (per_token - 1 / (2 * beta)) ** 2
    if name == "sigmoid_norm":
        return smoothed(beta * per_token)
    if name == "simpo":
        return smoothed(beta * (policy[0] / length[0] - policy[1] / length[1]) - gamma)
    if name == "apo_zero":
        return 1 - sigmoid(beta * won) + sigmoid(beta * lost)
    if name == "apo_down":
        return sigmoid(beta * won) + 1 - sigmoid(beta * delta)
    if name == "nca_pair":
        return -log_sigmoid(beta * won) - 0.5 * log_sigmoid(-beta * won) - 0.5 * log_sigmoid(-beta * lost)
    if name == "bco_pair":
        return -log_sigmoid(beta * won) - log_sigmoid(-beta * lost)
    if name == "sppo_hard":
        return (won - 0.5 / beta) ** 2 + (lost + 0.5 / beta) ** 2
    raise KeyError(name)
