"""The preference losses by name: which scores of a pair go through which curve.

Names and formulas are TRL's (DPOTrainer; `simpo` is CPOTrainer's), with ELBOs in the place of
log-probabilities. With d_w and d_l the log-ratios B_policy - B_ref of the two responses (sums, nats), L their
lengths in tokens, f = softplus(-s) = -log sigmoid(s) and e = label_smoothing:

    sigmoid            f(s), s = beta (d_w - d_l); with e: (1 - e) f(s) + e f(-s)   2305.18290, cDPO
    sigmoid_jackknife  the same with the first order of its finite-K bias removed    curves.jackknife
    robust             ((1 - e) f(s) - e f(-s)) / (1 - 2 e)                          2403.00409
    exo_pair           KL(Bernoulli(sigmoid(s)) || Bernoulli(1 - e))                 2402.00856 Eq. (16)
    hinge              max(0, 1 - s)                                                 2309.06657 (RSO, SLiC)
    ipo                (d_w / L_w - d_l / L_l - 1 / (2 beta))^2                      2310.12036 Eq. (17)
    sigmoid_norm       f(s), s = beta (d_w / L_w - d_l / L_l); with e as sigmoid     2411.15124 (Tulu 3)
    simpo              f(s - gamma), s = beta (B_w / L_w - B_l / L_l), no reference  2405.14734 Eq. (6)
    apo_zero           sigmoid(-beta d_w) + sigmoid(beta d_l)                        2408.06266 Eq. (7)
    apo_down           sigmoid(beta d_w) + sigmoid(-s)                               2408.06266 Eq. (8)
    nca_pair           f(beta d_w) + f(-beta d_w) / 2 + f(-beta d_l) / 2             2402.05369
    bco_pair           f(beta d_w) + f(-beta d_l)                                    2404.04656, no shift
    sppo_hard          (d_w - 1 / (2 beta))^2 + (d_l + 1 / (2 beta))^2               2405.00675 Eq. (4.7)

What beta multiplies: nats of the whole response in most; nats per token in sigmoid_norm and simpo, so that a
beta as strong as DPO's is about L times as large (Tulu 3 used 5, SimPO 2 to 10); in ipo and sppo_hard it
multiplies nothing and sets the target 1 / (2 beta), in nats per token and in nats. The IPO paper states sums;
TRL divides by the lengths, as its authors did for their results, and so do we.
label_smoothing: TRL's DPOTrainer (1.16) reads it in robust and exo_pair alone; its CPOTrainer also in
sigmoid and simpo, as we do.
Not here, with the reason: aot sorts the batch and is no function of a pair, discopop overflows, sft is
sft_weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from vrpo.objectives.curves import Curve, Hinge, ReverseKL, Sigmoid, Softplus, Square


@dataclass(frozen=True)
class Score:
    """s = scale * (chosen x_w + rejected x_l) - shift of each pair.

    x: the log-ratio to the reference, or without one the policy's ELBO; in nats, per token if `per_token`.
    """

    chosen: float
    rejected: float
    scale: float
    per_token: bool = False
    uses_reference: bool = True
    shift: float = 0.0

    def __call__(self, value_RX: Tensor, length_R: Tensor) -> Tensor:
        """x of R = 2B responses in the order (pair, side), and whatever axes follow -> (B, ...)."""
        if self.per_token:
            value_RX = value_RX / length_R.to(value_RX).view(-1, *[1] * (value_RX.dim() - 1))
        score = self.scale * (self.chosen * value_RX[0::2] + self.rejected * value_RX[1::2])
        return score - self.shift if self.shift else score


@dataclass(frozen=True)
class Term:
    """weight * curve(score), or of its jackknife over replicates (then the curve is a Softplus)."""

    curve: Curve
    score: Score
    weight: float = 1.0
    is_jackknife: bool = False


@dataclass(frozen=True)
class Settings:
    """beta > 0; label_smoothing e in [0, 1/2); simpo_gamma >= 0, the margin that SimPO asks for."""

    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5

    def margin(self, per_token: bool = False) -> Score:
        return Score(1, -1, self.beta, per_token)


def _sigmoid(given: Settings) -> list[Term]:
    return [Term(Softplus(given.label_smoothing), given.margin())]


def _sigmoid_jackknife(given: Settings) -> list[Term]:
    return [Term(Softplus(given.label_smoothing), given.margin(), is_jackknife=True)]


def _robust(given: Settings) -> list[Term]:
    tilt = -given.label_smoothing / (1 - 2 * given.label_smoothing)
    return [Term(Softplus(tilt), given.margin())]


def _exo_pair(given: Settings) -> list[Term]:
    return [Term(ReverseKL(given.label_smoothing), given.margin())]


def _hinge(given: Settings) -> list[Term]:
    return [Term(Hinge(), given.margin())]


def _ipo(given: Settings) -> list[Term]:
    return [Term(Square(1 / (2 * given.beta)), Score(1, -1, 1.0, per_token=True))]


def _sigmoid_norm(given: Settings) -> list[Term]:
    return [Term(Softplus(given.label_smoothing), given.margin(per_token=True))]


def _simpo(given: Settings) -> list[Term]:
    score = Score(1, -1, given.beta, per_token=True, uses_reference=False, shift=given.simpo_gamma)
    return [Term(Softplus(given.label_smoothing), score)]


def _apo_zero(given: Settings) -> list[Term]:
    return [Term(Sigmoid(), Score(-1, 0, given.beta)), Term(Sigmoid(), Score(0, 1, given.beta))]


def _apo_down(given: Settings) -> list[Term]:
    return [Term(Sigmoid(), Score(1, 0, given.beta)), Term(Sigmoid(), Score(-1, 1, given.beta))]


def _nca_pair(given: Settings) -> list[Term]:
    return [
        Term(Softplus(), Score(1, 0, given.beta)),
        Term(Softplus(), Score(-1, 0, given.beta), weight=0.5),
        Term(Softplus(), Score(0, -1, given.beta), weight=0.5),
    ]


def _bco_pair(given: Settings) -> list[Term]:
    return [Term(Softplus(), Score(1, 0, given.beta)), Term(Softplus(), Score(0, -1, given.beta))]


def _sppo_hard(given: Settings) -> list[Term]:
    target = 1 / (2 * given.beta)
    return [Term(Square(target), Score(1, 0, 1.0)), Term(Square(-target), Score(0, 1, 1.0))]


LOSSES: dict[str, Callable[[Settings], list[Term]]] = {
    "sigmoid": _sigmoid,
    "sigmoid_jackknife": _sigmoid_jackknife,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "simpo": _simpo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
}

REFERENCE_FREE = frozenset({"simpo"})
NEEDS_REPLICATES = frozenset({"sigmoid_jackknife"})
_SMOOTHED = ("sigmoid", "sigmoid_jackknife", "robust", "exo_pair", "sigmoid_norm", "simpo")
_ELSEWHERE = {"sft": "sft_weight is the weight of that term"}


def needs_reference(loss_type: Sequence[str]) -> bool:
    """Whether any of the losses looks at the reference's ELBOs."""
    return not REFERENCE_FREE.issuperset(loss_type)


def check_losses(
    loss_type: Sequence[str],
    loss_weights: Sequence[float] | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    sft_weight: float = 0.0,
) -> None:
    """ValueError naming the argument unless these losses exist and every setting does something."""
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not sft_weight >= 0:
        raise ValueError(f"sft_weight must not be negative, got {sft_weight}")
    if not loss_type:
        raise ValueError("loss_type must name at least one loss, got an empty list")
    for name in loss_type:
        if not isinstance(name, str) or name not in LOSSES:
            hint = _ELSEWHERE.get(name) if isinstance(name, str) else None
            raise ValueError(
                f"loss_type must be one or several of {', '.join(LOSSES)}; got {name!r}"
                + (f" ({hint})" if hint else "")
            )
    if len(set(loss_type)) < len(loss_type):
        raise ValueError(f"loss_type names a loss twice: {list(loss_type)}; add up their loss_weights")
    _check_weights(loss_type, loss_weights)
    _check_label_smoothing(loss_type, label_smoothing)
    if not simpo_gamma >= 0:
        raise ValueError(f"simpo_gamma must not be negative, got {simpo_gamma}")


def _check_weights(loss_type: Sequence[str], loss_weights: Sequence[float] | None) -> None:
    if loss_weights is None:
        return
    if len(loss_weights) != len(loss_type):
        raise ValueError(
            f"loss_weights must have one weight for each loss_type: got {len(loss_weights)} weights for "
            f"{len(loss_type)} losses"
        )
    for weight in loss_weights:
        if not isinstance(weight, Real) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"loss_weights must be positive numbers, got {weight!r}")


def _check_label_smoothing(loss_type: Sequence[str], label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), the share of pairs labelled the wrong way round, "
            f"got {label_smoothing}"
        )
    if "exo_pair" in loss_type and label_smoothing == 0:
        raise ValueError("loss_type='exo_pair' needs label_smoothing above 0; its paper recommends 1e-3")
    if label_smoothing and not set(_SMOOTHED) & set(loss_type):
        raise ValueError(
            f"label_smoothing={label_smoothing} does nothing in {', '.join(loss_type)}: only "
            f"{', '.join(_SMOOTHED)} read it"
        )
