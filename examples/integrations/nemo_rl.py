"""NeMo-RL: the score function of its semi-deterministic ELBO estimator, without logits.

Replaces: the score_fn that is handed to accumulate_elbo_logprobs (nemo_rl/models/policy/dllm/elbo.py of
    NVIDIA-NeMo/RL, pull request 3550 at commit b8b545ffb). The estimator stays as it is. Heads that are
    sharded as DTensors are not covered: gather the weight first.
Faster: the head meets the masked completion tokens only.
Memory: no (B, L, V) logits for any quadrature point, nor their gradient; the points' graphs are kept at once,
    so this counts as often as there are points.
CPU toy, forward + backward: 3.7 times as fast, 85 instead of 265 MiB (results.csv).
"""

from collections.abc import Callable

from torch import Tensor, nn

from vrpo_kernels import last_hidden, token_logps


def score_function(
    model: nn.Module, weight: Tensor, is_completion: Tensor, mask_id: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """score(noisy_ids, clean_ids) -> (B, L) fp32: log p of the clean token at every masked completion token.

    0 elsewhere. A completion that contains the mask token itself is scored there too, as all positions are
    by a score function with logits: the estimator multiplies by what it has masked.

    Args:
        model, weight: the model, wrapped or not, and the weight of its head, (V, D).
        is_completion: (B, L) bool. mask_id: the mask token.
    """

    def score(noisy_ids: Tensor, clean_ids: Tensor) -> Tensor:
        wanted = is_completion & (noisy_ids == mask_id)
        return token_logps(last_hidden(model, noisy_ids), weight, clean_ids, wanted)

    return score
