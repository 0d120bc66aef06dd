"""A reference that follows the policy: TR-DPO's formula, saved with the run, refused where it cannot be."""

import copy

import pytest
import torch
from datasets import Dataset
from trainers import LORA, logged, parameters, trainer_of

from vrpo.training.sync_reference import REFERENCE_FILE, mix

SYNC = {
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
    "ref_model_mixup_alpha": 0.3,
    "num_train_epochs": 2,
}


@pytest.fixture
def make(tmp_path, tiny_model, tokenizer, pair_rows):
    def build(**fields):
        return trainer_of(tmp_path, copy.deepcopy(tiny_model), tokenizer, pair_rows, **SYNC | fields)

    return build


def by_hand(start: torch.Tensor, policies: list[torch.Tensor]) -> torch.Tensor:
    for policy in policies:
        start = 0.3 * policy + 0.7 * start
    return start


def test_sync__mixes_every_n_steps(make, monkeypatch):
    from vrpo.training import sync_reference

    seen = []

    def record(policy, reference, alpha):
        seen.append(parameters(policy).clone())
        mix(policy, reference, alpha)

    monkeypatch.setattr(sync_reference, "mix", record)
    trainer = make()
    start = parameters(trainer.model).clone()
    trainer.train()
    assert trainer.state.global_step == 6 and len(seen) == 3
    torch.testing.assert_close(parameters(trainer.ref_model), by_hand(start, seen), rtol=1e-6, atol=1e-7)
    assert not torch.equal(parameters(trainer.ref_model), start)
    assert logged(trainer, "rewards/margins")[0] == 0.0


def test_mix__is_trls(tiny_model):
    callbacks = pytest.importorskip("trl.trainer.callbacks", reason="TRL is the peer, and no dependency")
    theirs, ours = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    policy = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))
    callbacks.SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
    mix(policy, ours, 0.6)
    assert torch.equal(parameters(ours), parameters(theirs))


def test_mix__leaves_shared_weights_of_the_policy_alone(make):
    trainer = make(train_top_layers=1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert before and all(torch.equal(now[name], weight) for name, weight in before.items())


def test_train__resumes_the_reference_bit_for_bit(make, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    straight = make(**saving)
    straight.train()
    ends = parameters(straight.model), parameters(straight.ref_model)
    resumed = make(**saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    assert torch.equal(parameters(resumed.model), ends[0])
    assert torch.equal(parameters(resumed.ref_model), ends[1])


def test_train__refuses_a_checkpoint_whose_reference_did_not_follow(make, tmp_path):
    without = {"sync_ref_model": False, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}
    make(save_strategy="steps", save_steps=3, **without).train()
    with pytest.raises(ValueError, match=f"has no {REFERENCE_FILE}: it is of a run without sync_ref_model"):
        make(save_strategy="steps", save_steps=3).train(
            resume_from_checkpoint=str(tmp_path / "out/checkpoint-3")
        )


def test_sync__is_refused_where_no_second_model_can_follow(make, tiny_model, tokenizer):
    from vrpo.models import create_model

    other = create_model(tokenizer, d_model=16, n_layers=1, n_heads=2, seed=0)
    for fields, told in (
        ({"peft_config": LORA}, "needs a second model that can follow"),
        ({"precompute_ref_log_probs": True}, "exclude each other"),
        ({"ref_model_mixup_alpha": 0.0}, r"in \(0, 1\]"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be at least 1"),
        ({"ref_model": other}, "other weights or shapes"),
        ({"loss_type": "simpo"}, "does nothing without a loss_type that compares with a reference"),
    ):
        with pytest.raises(ValueError, match=told):
            make(**fields)


def test_sync__evaluates_against_the_reference_of_the_best_checkpoint(make, pair_rows):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    trainer = make(**best, eval_steps=2, save_steps=2, eval_dataset=Dataset.from_list(list(pair_rows)))
    trainer.train()
    expected = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
