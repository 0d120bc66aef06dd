"""Random ELBOs of three pairs, and objectives on them."""

import torch

from vrpo.objectives.pairs import PairObjective

LENGTHS = torch.tensor([7, 4, 1, 12, 5, 5])


def elbos(seed: int, num_samples: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 6 * torch.randn(len(LENGTHS), num_samples, dtype=torch.float64, generator=generator) - 20


def objective(*loss_type: str, **fields) -> PairObjective:
    given = {"response_length_R": LENGTHS, "replicate_K": (0, 0, 0, 0), "loss_type": loss_type} | fields
    if "exo_pair" in loss_type:
        given.setdefault("label_smoothing", 1e-3)
    if "sigmoid_jackknife" in loss_type and max(given["replicate_K"]) == 0:
        given["replicate_K"] = (0, 0, 1, 1)
    return PairObjective(**given)
