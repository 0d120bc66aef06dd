"""Second moments of what tokens are worth under masks, as functions of the mask levels.

d_i(M) is the value of token i where mask M hides it: log p, or log p_theta - log p_ref. Masks are uniform
given their level t = |M| / L, so a second moment of d depends on levels only. It is fitted, by least squares
over all masks and responses, as a polynomial of the levels: what a level is worth changes smoothly, and a few
draws know a few numbers only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DEGREE = 3
"""Of the polynomials, in each level: exact for up to DEGREE + 1 tokens, which have no more levels."""

_RIDGE = 1e-9
"""Per degree: next to nothing, but where levels are too few to tell polynomials apart, the lower is taken."""


@dataclass(frozen=True)
class Seen:
    """What K masks showed of B responses: value_BKL and masked_BKL (1 or 0), both 0 at tokens not masked."""

    value_BKL: Tensor
    masked_BKL: Tensor
    length_B: Tensor

    @property
    def size_BK(self) -> Tensor:
        return self.masked_BKL.sum(2)

    @property
    def basis_BKA(self) -> Tensor:
        return basis(self.size_BK / self.length_B[:, None])


@dataclass(frozen=True)
class Moments:
    """Second moments of two responses, or of one with itself: coefficients in `basis`, A for each level.

    same_AA, different_AA: E d_i(M) d_j(M') of two independent masks at i = j and at i != j, the rows for the
    level of M. own_A, own_different_A: the same of one sample, M' = M, by its level.
    """

    same_AA: Tensor
    different_AA: Tensor
    own_A: Tensor
    own_different_A: Tensor


def basis(level: Tensor) -> Tensor:
    """Legendre polynomials, shifted to levels in [0, 1], of the degrees 0 .. DEGREE: one axis A more."""
    x = 2 * level.double() - 1
    values = [torch.ones_like(x), x]
    for n in range(1, DEGREE):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values, dim=-1)


def fit(first: Seen, second: Seen) -> Moments:
    """Moments of two responses whose samples k have a mask in common, and samples k != k' independent ones.

    Two different samples of one response must be independent given their levels. A response counts by the
    product of its levels and lengths, since so it enters a variance.
    """
    # Sums over pairs of positions, and how many there are: in all, and at one position.
    all_BKK = first.value_BKL.sum(2)[:, :, None] * second.value_BKL.sum(2)[:, None]
    num_all_BKK = first.size_BK[:, :, None] * second.size_BK[:, None]
    same_BKK = first.value_BKL @ second.value_BKL.transpose(1, 2)
    num_same_BKK = first.masked_BKL @ second.masked_BKL.transpose(1, 2)
    # Of L L' pairs only min(L, L') are at one position: as many of these, lest responses of other lengths
    # count in E d_i d_i than in E d_i d_j, which are subtracted.
    scale_B11 = torch.maximum(first.length_B, second.length_B).double()[:, None, None]
    same = (same_BKK * scale_B11, num_same_BKK * scale_B11)
    different = (all_BKK - same_BKK, num_all_BKK - num_same_BKK)
    num_samples = first.masked_BKL.shape[1]
    apart_KK = ~torch.eye(num_samples, dtype=torch.bool)
    feature_BKKAA = first.basis_BKA[:, :, None, :, None] * second.basis_BKA[:, None, :, None]
    feature_NF = feature_BKKAA[:, apart_KK].flatten(2).flatten(0, 1)

    degree_A = torch.arange(DEGREE + 1)
    degree_F = (degree_A[:, None] + degree_A).flatten()

    def apart(sum_BKK: Tensor, number_BKK: Tensor) -> Tensor:
        coefficient_F = _least_squares(feature_NF, degree_F, sum_BKK[:, apart_KK], number_BKK[:, apart_KK])
        return coefficient_F.view(DEGREE + 1, DEGREE + 1)

    def own(sum_BKK: Tensor, number_BKK: Tensor) -> Tensor:
        sum_BK, number_BK = (x.diagonal(dim1=1, dim2=2) for x in (sum_BKK, number_BKK))
        return _least_squares(first.basis_BKA.flatten(0, 1), degree_A, sum_BK, number_BK)

    return Moments(apart(*same), apart(*different), own(*same), own(*different))


def _least_squares(feature_NF: Tensor, degree_F: Tensor, sum_N: Tensor, number_N: Tensor) -> Tensor:
    """Fit of the means sum / number, weighted by number: coefficients (F,), 0 where nothing was seen."""
    gram_FF = feature_NF.T @ (feature_NF * number_N.flatten()[:, None])
    ridge_F = _RIDGE * gram_FF.diagonal().mean().clamp(min=1.0) * degree_F.clamp(min=1e-6)
    return torch.linalg.solve(gram_FF + ridge_F.diag(), feature_NF.T @ sum_N.flatten())
