"""KTO's losses against plain formulas and TRL's trainer, its center, its noise."""

from types import SimpleNamespace

import pytest
import torch
from objectives_support import elbos

from vrpo.objectives.unpaired import KTOObjective

DESIRABLE = torch.tensor([True, False, False, True, True, False])
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}


def objective(replicate_K=(0, 0, 1, 1), **fields):
    return KTOObjective(DESIRABLE, replicate_K, **{"beta": 0.3, **WEIGHTS} | fields)


def plain(policy_RK, reference_RK, loss_type, beta=0.3):
    ratio = policy_RK.mean(1) - reference_RK.mean(1)
    center = torch.zeros(()) if loss_type != "kto" else max(ratio.detach().mean(), torch.zeros(()))
    losses = []
    for r, is_desirable in zip(ratio, DESIRABLE.tolist(), strict=True):
        if is_desirable:
            losses.append(1.3 * (1 - 1 / (1 + torch.exp(-beta * (r - center)))))
        else:
            losses.append(0.6 * (1 - 1 / (1 + torch.exp(-beta * (center - r)))))
    return torch.stack(losses)


@pytest.mark.parametrize("shift", [3.0, -3.0], ids=["center above 0", "center at 0"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_objective__matches_the_plain_formula_and_its_gradient(loss_type, shift):
    upstream_B = torch.tensor([-3.0, 0.01, 250.0, 1.0, 2.0, -7.0], dtype=torch.float64)
    found = []
    for formula in (objective(loss_type=loss_type), lambda *sides: plain(*sides, loss_type)):
        policy_RK = (elbos(seed=1) / 10 + shift).requires_grad_()
        loss_B = formula(policy_RK, elbos(seed=2) / 10)
        loss_B.backward(upstream_B)
        found.append((loss_B.detach(), policy_RK.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=1e-15)
    assert found[0][1].abs().max() > 0


def test_kto_objective__starts_at_half_the_weights_and_is_finite_far_away():
    policy_RK = elbos(seed=1).float()
    want_B = torch.where(DESIRABLE, 0.65, 0.3)
    assert objective()(policy_RK, policy_RK).tolist() == want_B.tolist()
    for size in (1e3, 1e8, -1e8):
        far_RK = (policy_RK + size).requires_grad_()
        loss_B = objective()(far_RK, policy_RK)
        loss_B.sum().backward()
        assert torch.isfinite(loss_B).all() and torch.isfinite(far_RK.grad).all()
        assert (loss_B >= 0).all() and (loss_B <= 1.3).all()


def test_center__is_that_of_all_processes():
    """Two processes with 4 and 2 responses have the losses of one with 6."""
    policy_RK, reference_RK = elbos(seed=3) + 4, elbos(seed=4)
    whole_B = objective()(policy_RK, reference_RK)
    ratio_R = (policy_RK - reference_RK).mean(1)
    total = torch.stack([ratio_R.sum(), torch.tensor(6.0, dtype=torch.float64)])
    assert objective().center(ratio_R) == pytest.approx(float(ratio_R.mean().clamp(min=0)))
    for rows in (slice(0, 4), slice(4, 6)):
        seen = []

        def summed(local, seen=seen):
            seen.append(local)
            return total

        part = KTOObjective(DESIRABLE[rows], (0, 0, 1, 1), beta=0.3, sum_over_processes=summed, **WEIGHTS)
        torch.testing.assert_close(part(policy_RK[rows], reference_RK[rows]), whole_B[rows])
        assert seen[0].tolist() == pytest.approx([float(ratio_R[rows].sum()), rows.stop - rows.start])


@pytest.mark.parametrize("skew", [0.5, 0.1])
@pytest.mark.parametrize("score", [-3.0, -0.4, 2.0])
def test_noise__bias_is_that_of_the_loss_over_every_outcome(score, skew):
    """Two replicates with two-point noise: four outcomes, each a response of its own; z0 is held at 0."""
    std, beta = 0.05, 0.5
    up, down = std * ((1 - skew) / skew) ** 0.5, -std * (skew / (1 - skew)) ** 0.5
    outcomes = torch.tensor([[a, b] for a in (up, down) for b in (up, down)], dtype=torch.float64)
    chance_B = torch.tensor([skew**2, skew * (1 - skew), skew * (1 - skew), (1 - skew) ** 2]).double()
    for is_desirable in (True, False):
        given = KTOObjective(
            torch.tensor([is_desirable] * 4), (0, 1), loss_type="apo_zero_unpaired", beta=beta, **WEIGHTS
        )
        policy_RK, zeros_RK = outcomes + score / beta, torch.zeros_like(outcomes)
        exact_RK = torch.full_like(outcomes, score / beta)
        true_bias = chance_B @ (given(policy_RK, zeros_RK) - given(exact_RK, zeros_RK))
        told = given.noise(policy_RK, zeros_RK, torch.zeros((), dtype=torch.float64))
        assert chance_B @ told["loss_bias"] == pytest.approx(float(true_bias), rel=0.15)
        assert abs(true_bias) <= 1.3 * min(beta * std / 2**0.5 / 8, beta**2 * std**2 / 2 / (12 * 3**0.5))


def test_noise__says_nothing_without_replicates():
    policy_RK = elbos(seed=1)
    assert objective(replicate_K=(0,) * 4).noise(policy_RK, policy_RK, torch.zeros(())) == {}
    told = objective().noise(policy_RK, policy_RK, torch.zeros((), dtype=torch.float64))
    assert told["score_std"].tolist() == told["loss_bias"].tolist() == [0.0] * 6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_objective__agrees_with_trl(loss_type):
    """TRL's KTOTrainer._compute_loss, with the batch itself as its KL completions."""
    module = pytest.importorskip("trl.trainer.kto_trainer")
    policy_RK, reference_RK = elbos(seed=5) / 10 + 1, elbos(seed=6) / 10
    policy_R, reference_R = policy_RK.mean(1), reference_RK.mean(1)
    outputs = SimpleNamespace(
        log_probs=policy_R[:, None],
        entropy=torch.zeros(6, 1),
        mean_logits=torch.zeros(6, 1),
    )
    same = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=same,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda model, batch: policy_R,
        loss_type=loss_type,
        beta=0.3,
        _metrics={"train": module.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **WEIGHTS,
    )
    inputs = {
        "input_ids": torch.zeros(6, 2, dtype=torch.long),
        "attention_mask": torch.ones(6, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * 6),
        "label": DESIRABLE,
        "ref_logps": reference_R,
        "ref_KL_logps": reference_R,
    }
    want = module.KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    loss_B = objective(loss_type=loss_type)(policy_RK, reference_RK)
    assert loss_B.mean().item() == pytest.approx(want.item(), rel=1e-6)
    if loss_type == "kto":
        center = objective().center(policy_R - reference_R)
        assert center.item() == pytest.approx(trainer._metrics["train"]["kl"][0], rel=1e-6)
