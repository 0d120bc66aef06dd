"""Second moments of what tokens are worth under masks, as functions of the mask levels.

d_i(M) is the value of token i where mask M hides it: log p, or log p_theta - log p_ref. Masks are uniform
given their level t = |M| / L, so a second moment of d depends on levels only. It is fitted, by least squares
over all masks of a response, as a polynomial of the levels: what a level is worth changes smoothly, and a few
draws know a few numbers only. Every response has moments of its own: variances take differences of moments,
and pooled over responses of unequal worth these would differ by which response showed which level.
"""

from dataclasses import dataclass, fields

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
    """Second moments of two responses, or of one with itself: coefficients in `basis`, an A for each level.

    same_BAA, different_BAA: E d_i(M) d_j(M') of two independent masks, at i = j and at i != j, first by the
    level of M. own_BA, own_different_BA: the same of one sample, M' = M, by its level.
    """

    same_BAA: Tensor
    different_BAA: Tensor
    own_BA: Tensor
    own_different_BA: Tensor

    def of(self, part: Tensor) -> "Moments":
        return Moments(*(getattr(self, field.name)[part] for field in fields(self)))


def basis(level: Tensor) -> Tensor:
    """Legendre polynomials, shifted to levels in [0, 1], of the degrees 0 .. DEGREE: one axis A more."""
    x = 2 * level.double() - 1
    values = [torch.ones_like(x), x]
    for n in range(1, DEGREE):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values, dim=-1)


def fit(first: Seen, second: Seen) -> Moments:
    """Moments of two responses whose samples k have a mask in common, and samples k != k' independent ones.

    Two different samples of one response must be independent given their levels.
    """
    # Sums over pairs of positions, and how many there are: in all, and at one position.
    all_BKK = first.value_BKL.sum(2)[:, :, None] * second.value_BKL.sum(2)[:, None]
    num_all_BKK = first.size_BK[:, :, None] * second.size_BK[:, None]
    same_BKK = first.value_BKL @ second.value_BKL.transpose(1, 2)
    num_same_BKK = first.masked_BKL @ second.masked_BKL.transpose(1, 2)
    same = (same_BKK, num_same_BKK)
    different = (all_BKK - same_BKK, num_all_BKK - num_same_BKK)
    apart_KK = ~torch.eye(first.masked_BKL.shape[1], dtype=torch.bool)
    feature_BKKAA = first.basis_BKA[:, :, None, :, None] * second.basis_BKA[:, None, :, None]
    feature_BNF = feature_BKKAA[:, apart_KK].flatten(2)
    degree_A = torch.arange(DEGREE + 1)
    degree_F = (degree_A[:, None] + degree_A).flatten()

    def apart(sum_BKK: Tensor, number_BKK: Tensor) -> Tensor:
        sum_BN, number_BN = sum_BKK[:, apart_KK], number_BKK[:, apart_KK]
        return _least_squares(feature_BNF, degree_F, sum_BN, number_BN).unflatten(1, (DEGREE + 1, -1))

    def own(sum_BKK: Tensor, number_BKK: Tensor) -> Tensor:
        sum_BK, number_BK = (x.diagonal(dim1=1, dim2=2) for x in (sum_BKK, number_BKK))
        return _least_squares(first.basis_BKA, degree_A, sum_BK, number_BK)

    return Moments(apart(*same), apart(*different), own(*same), own(*different))


def _least_squares(feature_BNF: Tensor, degree_F: Tensor, sum_BN: Tensor, number_BN: Tensor) -> Tensor:
    """Fits of the means sum / number, weighted by number: coefficients (B, F), 0 where nothing was seen."""
    gram_BFF = feature_BNF.transpose(1, 2) @ (feature_BNF * number_BN[:, :, None])
    scale_B = gram_BFF.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1.0)
    ridge_BF = _RIDGE * scale_B[:, None] * degree_F.clamp(min=1e-6)
    right_BF = (feature_BNF * sum_BN[:, :, None]).sum(1)
    return torch.linalg.solve(gram_BFF + torch.diag_embed(ridge_BF), right_BF)
