"""The least score variance that any exact row weights could have, under the covariance that a model shows.

For given masks, weights that keep every sample's total are exact whatever they are (row_weights.py). Those
of least variance among them need the covariance of what samples say of a token, which differs from model to
model; `graded-balanced` assumes a flat one. Here it is the measured one (vrpo.evaluation.moments), jointly
for the two responses of a pair, so that no weights of these masks can do better on this model: x_i = S_i^-1
lambda, with x_i the weights of the samples of both sides that mask position i, S_i their covariance and one
multiplier per sample.
"""

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from vrpo.evaluation import noise
from vrpo.evaluation.moments import Moments
from vrpo.evaluation.noise import Noise, Reweigh, Weights
from vrpo.evaluation.variance import Scheme

MASKS = ("spaced", "graded")
_SMALLEST = 1e-2
"""Least eigenvalue of a fitted covariance, of their mean: a fit need not be positive definite."""


def bound_rows(found: Noise, drift: str, beta: float) -> Iterator[dict]:
    """Rows of kind "bound": the predicted variance of the best weights on the masks of a design."""
    for number in (8, 4):
        for design in MASKS:
            scheme = Scheme(design, number, pair_masks="positions")
            told = noise.predict(found, scheme, beta=beta, num_draws=256, reweigh=best_weights(found))
            row = {"kind": "bound", "drift": drift, "design": design, "pair_masks": "positions"}
            yield row | {"num_samples": number} | {name: float(f"{x:.4g}") for name, x in told.items()}


def best_weights(found: Noise) -> Reweigh:
    """Weights of least variance under the covariance of all pairs together, one table per model."""
    chosen, rejected, both = (pooled(moments) for moments in (found.chosen, found.rejected, found.both))

    def least_variance(first: Weights, second: Weights) -> tuple[Weights, Weights]:
        num_samples = first.omega_BDKL.shape[2]
        across = covariance(both, first.basis_BDKA, second.basis_BDKA)
        block_BDJJ = torch.cat(
            [
                torch.cat([covariance(chosen, first.basis_BDKA, first.basis_BDKA), across], dim=-1),
                torch.cat([across.mT, covariance(rejected, second.basis_BDKA, second.basis_BDKA)], dim=-1),
            ],
            dim=-2,
        )
        value, vector = torch.linalg.eigh(block_BDJJ)
        value = torch.maximum(value, _SMALLEST * value.mean(-1, keepdim=True).clamp(min=1e-12))
        block_BDJJ = (vector * value[..., None, :]) @ vector.mT
        # A difference: the rejected side enters with the other sign.
        omega_BDJL = torch.cat([first.omega_BDKL, -second.omega_BDKL], dim=2)
        masked_BDLJ = (omega_BDJL != 0).double().mT
        seen_BDLJJ = masked_BDLJ[..., :, None] * masked_BDLJ[..., None, :]
        inverse_BDLJJ = torch.linalg.inv(
            seen_BDLJJ * block_BDJJ[:, :, None] + torch.diag_embed(1 - masked_BDLJ)
        )
        inverse_BDLJJ = inverse_BDLJJ * seen_BDLJJ
        unused_BDJ = (masked_BDLJ.sum(2) == 0).double()
        gram_BDJJ = inverse_BDLJJ.sum(2) + torch.diag_embed(unused_BDJ)
        multiplier_BDJ = torch.linalg.solve(gram_BDJJ, omega_BDJL.sum(3))
        best_BDJL = torch.einsum("bdlij,bdj->bdil", inverse_BDLJJ, multiplier_BDJ)
        return (
            replace(first, omega_BDKL=best_BDJL[:, :, :num_samples]),
            replace(second, omega_BDKL=-best_BDJL[:, :, num_samples:]),
        )

    return least_variance


def pooled(moments: Moments) -> Moments:
    """Means over responses, each field without its first axis."""
    return Moments(*(getattr(moments, field.name).mean(0) for field in fields(moments)))


def covariance(pool: Moments, first: Tensor, second: Tensor) -> Tensor:
    """Of what two samples say of a token, (B, D, K, K): C(t, t'), and own - own' where they are one mask."""
    told = torch.einsum("bdka,ae,bdje->bdkj", first, pool.same_BAA - pool.different_BAA, second)
    own = first @ (pool.own_BA - pool.own_different_BA)
    return told - torch.diag_embed(told.diagonal(dim1=2, dim2=3)) + torch.diag_embed(own)
