"""Best linear unbiased row weights under covariance tables estimated on line, from earlier draws alone.

What `bench_variance.py weights` compares the flat model of `vrpo.estimator.row_weights.balanced` with. Exact
for any tables: they come from draws independent of the masks they weigh, and every sample keeps its total.
"""

import torch
from torch import Tensor

from vrpo.batch import MaskDraw
from vrpo.estimator.row_weights import _rows, dense

NUM_BINS = 8
PRIOR = 500.0
"""Token couples that the flat model counts as, in every cell of the tables."""


class OnlineCovariance:
    """Second moments of what two samples say of one token, by their levels: C between samples, O of one."""

    def __init__(self):
        self.cross = torch.zeros(NUM_BINS, NUM_BINS, dtype=torch.float64)
        self.num_cross = torch.zeros_like(self.cross)
        self.own = torch.zeros(NUM_BINS, dtype=torch.float64)
        self.num_own = torch.zeros_like(self.own)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """(C, O), shrunk to the flat model C = s, O = 2 s, and made positive definite."""
        scale = max(float(self.cross.sum() / self.num_cross.sum().clamp(min=1)), 1e-6)
        cross = (self.cross + PRIOR * scale) / (self.num_cross + PRIOR)
        own = (self.own + 2 * PRIOR * scale) / (self.num_own + PRIOR)
        value, vector = torch.linalg.eigh((cross + cross.T) / 2)
        cross = vector * value.clamp(min=0) @ vector.T
        return cross, torch.maximum(own, 1.05 * cross.diagonal())

    def weights(self, draw: MaskDraw, length_R: Tensor) -> Tensor:
        """omega_.i = Sigma_i^-1 lambda, lambda from the totals of the samples; weight_N as in row_weights."""
        base_RKL = dense(draw, length_R, draw.weight_N)
        masked_RLK = (base_RKL > 0).double().transpose(1, 2)
        bin_RK = _bins(base_RKL, length_R)
        cross, own = self._tables()
        sigma_RKK = cross[bin_RK[:, :, None], bin_RK[:, None]]
        sigma_RKK.diagonal(dim1=1, dim2=2).copy_(own[bin_RK])
        both_RLKK = masked_RLK[..., None] * masked_RLK[..., None, :]
        inverse_RLKK = torch.linalg.inv(both_RLKK * sigma_RKK[:, None] + torch.diag_embed(1 - masked_RLK))
        inverse_RLKK = inverse_RLKK * both_RLKK
        gram_RKK = inverse_RLKK.sum(1)
        unused_RK = (masked_RLK.sum(1) == 0).double()
        lambda_RK = torch.linalg.solve(gram_RKK + torch.diag_embed(unused_RK), base_RKL.sum(2))
        return _rows(draw, torch.einsum("rlkj,rj->rkl", inverse_RLKK, lambda_RK))

    def update(self, draw: MaskDraw, length_R: Tensor, value_N: Tensor) -> None:
        """Take in a draw. Values are centred within samples, whose totals no weighting changes."""
        base_RKL = dense(draw, length_R, draw.weight_N)
        masked_RKL = (base_RKL > 0).double()
        value_RKL = dense(draw, length_R, value_N)
        value_RKL = value_RKL - value_RKL.sum(2, keepdim=True) / masked_RKL.sum(2, keepdim=True).clamp(min=1)
        value_RKL = value_RKL * masked_RKL
        bin_RK = _bins(base_RKL, length_R)
        num_samples = draw.num_samples
        for k in range(num_samples):
            self.own.index_add_(0, bin_RK[:, k], value_RKL[:, k].square().sum(1))
            self.num_own.index_add_(0, bin_RK[:, k], masked_RKL[:, k].sum(1))
            for j in range(num_samples):
                if j != k:
                    cell = (bin_RK[:, k], bin_RK[:, j])
                    product_R = (value_RKL[:, k] * value_RKL[:, j]).sum(1)
                    number_R = (masked_RKL[:, k] * masked_RKL[:, j]).sum(1)
                    self.cross.index_put_(cell, product_R, accumulate=True)
                    self.num_cross.index_put_(cell, number_R, accumulate=True)


def _bins(base_RKL: Tensor, length_R: Tensor) -> Tensor:
    level_RK = (base_RKL > 0).sum(2) / length_R[:, None]
    return (level_RK * NUM_BINS).long().clamp(max=NUM_BINS - 1)
