"""Reference ELBOs computed beforehand: those of the step, made once, kept whole, never taken for others."""

import copy
import errno
import json
import math
import os

import pytest
import torch
from datasets import Dataset
from trainers import LORA, config, logged, parameters, trainer_of

from vrpo import DiffusionKTOConfig, DiffusionKTOTrainer, VRPOTrainer, data
from vrpo.estimator.elbo import elbo
from vrpo.estimator.masking import EVALUATION_EPOCH
from vrpo.training import precomputed, reference, reference_cache
from vrpo.training.packed_trainer import ModelNLL
from vrpo.training.precomputed import FOLDER
from vrpo.training.reference_cache import Part
from vrpo.training.resume import RUN_FILE
from vrpo.training.used_rows import num_train_epochs, rows_of_training

PRECOMPUTED = {"precompute_ref_log_probs": True}
LONG = Dataset.from_list(
    [{"prompt": f"What is {n}?", "chosen": "one " * (1 + n % 7), "rejected": f"two {n}"} for n in range(12)]
)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 5 examples, so that twelve rows are three of them."""
    monkeypatch.setattr(reference_cache, "PART_EXAMPLES", 5)


@pytest.fixture
def make(tmp_path, tiny_model, tokenizer):
    """Gives trainers that start from the same weights, with precomputed references unless told otherwise."""
    start = copy.deepcopy(tiny_model)

    def build(rows=LONG, scale=1.0, **fields):
        model = copy.deepcopy(start)
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        return trainer_of(tmp_path, model, tokenizer, rows, **PRECOMPUTED | fields)

    return build


def files(tmp_path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(tmp_path)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(tmp_path.glob(f"**/{FOLDER}/**/*.arrow"))
    }


def forbid(monkeypatch, module, name: str) -> None:
    def fail(*args, **kwargs):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(module, name, fail)


@pytest.mark.parametrize("kind", ["full", "adapter", "given", "bf16"])
def test_train__starts_at_ln_2_and_ends_like_the_plain_run(make, tmp_path, kind, tiny_model):
    settings = {"num_train_epochs": 2, "sft_weight": 0.0, "eval_strategy": "epoch", "eval_dataset": LONG}
    settings |= {"peft_config": LORA if kind == "adapter" else None, "bf16": kind == "bf16"}
    given = [copy.deepcopy(tiny_model) if kind == "given" else None for _ in range(2)]
    known = make(ref_model=given[0], **settings)
    known.train()
    plain = make(ref_model=given[1], **settings, precompute_ref_log_probs=False)
    plain.train()
    assert known.ref_model is None and known._given_reference is None
    # On a CPU a response's ELBO has the same bits in whatever pack, so the two runs have, too.
    assert known.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert logged(known, "rewards/margins")[0] == 0.0
    torch.testing.assert_close(parameters(known.model), parameters(plain.model), rtol=1e-5, atol=1e-6)
    for key in ("loss", "eval_loss", "rewards/margins", "elbo/ref_chosen", "eval_elbo/ref_rejected"):
        assert logged(known, key) == pytest.approx(logged(plain, key), rel=1e-5, abs=1e-5), key


def test_precompute__makes_no_copy_of_the_model(make, monkeypatch):
    forbid(monkeypatch, reference, "frozen_copy")
    forbid(monkeypatch, precomputed, "build_reference")
    trainer = make()
    assert trainer.ref_model is None
    assert "_original_forward" not in trainer.model.__dict__  # it gets the precision of training from train()


@pytest.mark.parametrize("fields", [{}, {"precompute_ref_batch_size": 1}, {"max_tokens_per_pack": 40}])
def test_precompute__stores_what_the_step_computes(make, small_parts, fields):
    trainer = make(num_train_epochs=3, num_samples=4, eval_dataset=LONG, **fields)
    rows = list(trainer.train_dataset)
    trainer.model.eval()
    for epoch in (0, 1, 2, EVALUATION_EPOCH):
        batch = data.PairCollator()(rows)["responses"]
        stored_RK = trainer._known_reference(batch, epoch)
        pack = trainer.estimator.pack(batch, epoch, "cpu")
        with torch.no_grad():
            expected_RK = elbo(ModelNLL(trainer.model)(pack), pack)
        assert stored_RK.dtype == torch.float32
        torch.testing.assert_close(stored_RK, expected_RK, rtol=1e-6, atol=1e-6)
        backwards = data.PairCollator()(rows[::-1])["responses"]  # found by what they are, in any order
        found_RK = trainer._known_reference(backwards, epoch)
        assert torch.equal(found_RK.view(12, 2, -1), stored_RK.view(12, 2, -1).flip(0))
    with pytest.raises(ValueError, match="nothing was computed for epoch 3"):
        trainer._known_reference(batch, 3)


def test_precompute__goes_on_where_it_was_killed(make, small_parts, tmp_path, monkeypatch):
    make(num_train_epochs=2)
    whole = files(tmp_path)
    assert len(whole) == 6
    for name in list(whole)[2:]:
        (tmp_path / name).unlink()
    half = tmp_path / list(whole)[2]
    half.with_name(f"{half.name}.tmp").write_bytes(whole[list(whole)[2]][0][:100])
    make(num_train_epochs=2)
    again = files(tmp_path)
    assert {name: content for name, (content, _) in again.items()} == {
        name: content for name, (content, _) in whole.items()
    }
    kept = [name for name in whole if again[name] == whole[name]]
    assert kept == list(whole)[:2]  # what was finished is not computed again
    assert not list(tmp_path.glob("**/*.tmp"))


def test_precompute__is_shared_by_runs_that_differ_elsewhere(make, tmp_path, monkeypatch):
    cache = {"ref_log_probs_cache": str(tmp_path / FOLDER)}
    first = make(**cache, num_train_epochs=2)
    before = files(tmp_path)
    forbid(monkeypatch, precomputed, "_compute")
    changes = {
        "beta": 0.5,
        "learning_rate": 1e-3,
        "loss_type": "sigmoid",
        "output_dir": str(tmp_path / "other"),
    }
    second = make(**cache, **changes, peft_config=LORA, max_tokens_per_pack=500)
    assert files(tmp_path) == before
    assert second.known_reference.digest == first.known_reference.digest


def test_precompute__computes_only_the_epochs_that_are_missing(make, tmp_path):
    make()
    before = files(tmp_path)
    make(num_train_epochs=2)
    after = files(tmp_path)
    assert len(after) == 2 * len(before) and before.items() <= after.items()


@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": 1},
        {"max_steps": 3, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 1.5, "per_device_train_batch_size": 2},
        {"num_train_epochs": 1.4, "train_sampling_strategy": "sequential", "data_seed": 3},
        {"max_steps": 3, "per_device_train_batch_size": 5, "dataloader_drop_last": True},
    ],
    ids=str,
)
def test_rows_of_training__are_those_that_training_takes(make, fields):
    trainer = make(precompute_ref_log_probs=False, **fields)
    wanted = {epoch: set(rows) for epoch, rows in rows_of_training(trainer).items()}
    taken, responses = {}, trainer._responses

    def spy(inputs, model):
        batch = responses(inputs, model)
        taken.setdefault(trainer._draw_epoch(model), set()).update(batch.example_R.tolist())
        return batch

    trainer._responses = spy
    trainer.train()
    last = max(wanted)
    assert taken.keys() == wanted.keys() and taken[last] == wanted[last] and len(taken[last]) < 12
    assert all(taken[epoch] <= wanted[epoch] for epoch in taken)


def test_rows_of_training__are_all_where_the_order_is_not_known(make):
    for skips in (True, False):
        trainer = make(precompute_ref_log_probs=False, max_steps=1, ignore_data_skip=skips)
        trainer.args.accelerator_config.use_seedable_sampler = skips  # false in no configuration
        assert list(rows_of_training(trainer)[0]) == list(range(12))


def test_precompute__computes_the_examples_of_its_steps_alone(make, small_parts, tmp_path):
    trainer = make(max_steps=2)
    (split,) = trainer.known_reference.splits
    assert len(split.rows[0]) == 8  # two steps of four of twelve
    before = files(tmp_path)
    stored = sum(len(split.cache.read(part)[0]) for part in split.cache.parts(0, range(12)))
    assert stored == 16
    trainer.args.max_steps = 3
    with pytest.raises(ValueError, match=r"takes 12 examples of epoch 0, but .* of 4 of them were not prec"):
        trainer.train()
    whole = make(save_strategy="steps", save_steps=1)
    after = files(tmp_path)
    assert before.items() < after.items()
    assert sum(len(split.cache.read(part)[0]) for part in split.cache.parts(0, range(12))) == 24
    whole.train()
    plain = make(precompute_ref_log_probs=False)
    plain.train()
    assert logged(whole, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    short = make(max_steps=2, ref_log_probs_cache=str(tmp_path / FOLDER))
    short.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert logged(short, "loss")[1] == logged(whole, "loss")[1]


def test_precompute__names_a_file_that_is_no_part(make, small_parts, tmp_path):
    make(max_steps=2)
    (place,) = {path.parent for path in tmp_path.glob(f"**/{FOLDER}/**/*.arrow")}
    (place / "part-00000-old.arrow").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"part-00000-old.arrow cannot be used \(its name is not one of ours"
    ):
        make()


OTHER = Dataset.from_list([{**row, "chosen": "three"} for row in LONG])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scale": 1.001}, "the weights of the reference"),
        ({"seed": 1}, r"the mask draw \(.*seed 42 -> 1"),
        ({"num_samples": 4}, r"the mask draw \(.*num_samples 2 -> 4"),
        ({"mask_design": "paper"}, "the mask draw .*mask_design graded-balanced -> paper"),
        ({"pair_masks": "levels"}, "the mask draw .*pair_masks positions -> levels"),
        ({"mask_token_id": 7}, "the mask draw .*mask_token_id .* -> 7"),
        ({"rows": OTHER}, "the token ids or example ids"),
        ({"max_length": 8}, "the token ids or example ids"),
        ({"bf16": True}, r"the precision it is run in \(mixed_precision no -> bf16 by autocast"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_precompute__refuses_what_was_computed_for_something_else(make, tmp_path, change, told):
    make()
    before = files(tmp_path)
    with pytest.raises(ValueError, match=told) as error:
        make(**change)
    assert "remove the folder to compute them again" in str(error.value)
    assert files(tmp_path) == before


def test_precompute__notices_one_changed_weight(make):
    trainer = make()
    with torch.no_grad():  # a value that a sample of the tensor would pass over
        trainer.model.lm_head.weight.view(-1)[1234] += 1e-3
    with pytest.raises(ValueError, match="the weights of the reference"):
        precomputed.precompute(trainer, None)


def test_precompute__notices_another_draw_of_the_same_settings(make, monkeypatch):
    trainer = make()
    packs = type(trainer.estimator).pack
    monkeypatch.setattr(
        type(trainer.estimator),
        "pack",
        lambda self, batch, epoch, device: packs(self, batch, epoch ^ 1, device),
    )
    with pytest.raises(ValueError, match=r"the mask draw \(masks "):
        precomputed.precompute(trainer, None)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_precompute__refuses_a_damaged_part_by_name_until_it_is_removed(make, tmp_path, damage):
    make()
    (path,) = tmp_path.glob(f"**/{FOLDER}/**/*.arrow")
    content = bytearray(path.read_bytes())
    place = content.find(
        bytes(reference_cache.keys(data.PairCollator()(list(make().train_dataset))["responses"]).numpy())
    )
    assert place > 0
    content[place + 3] ^= 1
    path.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"{path.name} cannot be used .*remove the file"):
        make().train()
    path.unlink()
    make().train()


def test_precompute__refuses_values_that_the_reference_does_not_give(make):
    trainer = make()
    batch = data.PairCollator()(list(trainer.train_dataset))["responses"]
    cache = trainer.known_reference.splits[0].cache
    part = Part(epoch=0, block=0, mask=2**12 - 1)
    cache.write(part, batch, cache.read(part)[1] * 1.01)
    with pytest.raises(ValueError, match=r"differ from the reference now by 9\.9e-03"):
        make()
    with pytest.raises(ValueError, match=r"differ from the policy before its first step by 9\.9e-03"):
        trainer.train()


def test_known_reference__does_not_take_a_row_for_another_of_its_number(make):
    trainer = make(eval_dataset={"a": LONG, "b": OTHER.select(range(5))})
    parts = trainer.evaluate()
    assert parts["eval_a_rewards/margins"] == 0.0 and parts["eval_b_rewards/margins"] == 0.0
    with pytest.raises(ValueError, match="not of the datasets that the trainer was made with"):
        trainer.evaluate(Dataset.from_list([{**row, "chosen": "four"} for row in LONG]))


def test_known_reference__refuses_another_draw_and_longer_training(make):
    trainer = make()
    trainer.args.num_train_epochs = 2
    with pytest.raises(
        ValueError, match="training takes 2 epochs, but the reference ELBOs were precomputed for 1"
    ):
        trainer.train()
    trainer.args.num_train_epochs, trainer.args.num_samples = 1, 4
    with pytest.raises(ValueError, match="make a new trainer with the new arguments"):
        trainer.train()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12, 20])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
@pytest.mark.parametrize("drop_last", [False, True])
def test_num_train_epochs__is_the_trainers(tmp_path, batch_size, accumulation, drop_last):
    from torch.utils.data import DataLoader
    from transformers import Trainer

    class Bare:  # what set_initial_training_values asks of a trainer
        get_total_train_batch_size = Trainer.get_total_train_batch_size
        num_examples = Trainer.num_examples

        def get_sp_size(self):
            return 1

        get_tp_size = get_cp_size = get_sp_size

    loader = DataLoader(range(12), batch_size=batch_size, drop_last=drop_last)
    if not len(loader):
        return
    for max_steps, epochs in [(-1, 1.0), (-1, 2.5), (1, 1.0), (3, 1.0), (12, 1.0), (13, 9.0)]:
        args = config(
            tmp_path,
            max_steps=max_steps,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            dataloader_drop_last=drop_last,
        )
        bare = Bare()
        bare.args, bare._train_batch_size = args, args.train_batch_size
        expected = Trainer.set_initial_training_values(bare, args, loader)[0]
        accelerator = type("Accelerator", (), {"split_batches": False, "even_batches": True})
        assert num_train_epochs(args, 12, accelerator) == expected, (max_steps, epochs)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "adapter"])
def test_train__stopped_and_resumed_equals_the_straight_run(make, tmp_path, peft_config):
    saving = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "peft_config": peft_config}
    straight = make(**saving)
    straight.train()
    end = parameters(straight.model)
    run = json.loads((tmp_path / "out/checkpoint-4" / RUN_FILE).read_text())
    assert run["reference_elbos"] == straight.known_reference.digest
    resumed = make(**saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))  # inside the second epoch
    assert torch.equal(parameters(resumed.model), end)


def test_precompute__refuses_a_cache_that_another_run_writes(make, tmp_path):
    from filelock import FileLock

    make()
    with (
        FileLock(tmp_path / "out" / FOLDER / ".lock"),
        pytest.raises(ValueError, match="another run is computing reference ELBOs"),
    ):
        make()


def test_config__refuses_what_does_nothing_or_contradicts(tmp_path):
    (tmp_path / "file").write_text("")
    for fields, told in (
        ({"precompute_ref_batch_size": 2}, "does nothing without precompute_ref_log_probs"),
        ({"ref_log_probs_cache": "x"}, "does nothing without precompute_ref_log_probs"),
        ({**PRECOMPUTED, "ref_log_probs_cache": str(tmp_path / "file")}, "must be a folder"),
        ({**PRECOMPUTED, "precompute_ref_batch_size": 0}, "precompute_ref_batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            config(tmp_path, **fields)


def test_precompute__refuses_a_stream(make):
    with pytest.raises(ValueError, match="precompute_ref_log_probs needs all rows beforehand"):
        make(rows=LONG.to_iterable_dataset(), max_steps=3)


def test_precompute__serves_single_responses_too(tmp_path, tiny_model, tokenizer):
    rows = Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": row["chosen" if n % 2 else "rejected"],
                "label": n % 2 == 1,
            }
            for n, row in enumerate(LONG)
        ]
    )
    ends = []
    for known in (True, False):
        trainer = DiffusionKTOTrainer(
            copy.deepcopy(tiny_model),
            args=config(tmp_path, DiffusionKTOConfig, precompute_ref_log_probs=known, num_train_epochs=2),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
        ends.append((parameters(trainer.model), trainer.evaluate()["eval_loss"]))
        assert (trainer.ref_model is None) == known
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-6)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)


def test_train__trains_nothing_where_only_references_are_wanted(make, tmp_path):
    trainer = make(precompute_only=True)
    assert files(tmp_path)
    with pytest.raises(ValueError, match="precompute_only=True trains nothing"):
        trainer.train()
    assert config(tmp_path, precompute_only=True).precompute_ref_log_probs  # it needs no other word


def test_precompute__refuses_model_init_and_a_trunk_to_share(tmp_path, make, tiny_model, tokenizer):
    with pytest.raises(ValueError, match="does not work with model_init"):
        trainer_of(
            tmp_path, None, tokenizer, LONG, model_init=lambda: copy.deepcopy(tiny_model), **PRECOMPUTED
        )
    with pytest.raises(ValueError, match="shares nothing with a precomputed reference"):
        make(share_trunk=True)


def test_precompute__names_the_folder_that_cannot_be_written(make, tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "blocked").write_text("")
        place = tmp_path / "blocked" / "cache"
    else:
        (tmp_path / "blocked").mkdir(mode=0o500)
        place = tmp_path / "blocked" / "cache"
    with pytest.raises(OSError, match="blocked"):
        make(ref_log_probs_cache=str(place))


def test_vrpo_trainer__without_precomputing_asks_for_no_known_reference(make):
    trainer = make(precompute_ref_log_probs=False)
    assert isinstance(trainer, VRPOTrainer) and trainer.known_reference is None


def test_precompute__names_the_examples_whose_reference_is_not_finite(make, tmp_path):
    with pytest.raises(FloatingPointError, match=r"ELBO of the examples \[0, 1, 2, 3, 4\] is not finite"):
        make(scale=math.nan)
    assert not files(tmp_path)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_precompute__a_disk_that_refuses_a_part_is_told_by_name_and_the_others_stay(
    make, small_parts, tmp_path, monkeypatch, error
):
    sync, count = os.fsync, []

    def refuse(descriptor):
        count.append(descriptor)
        if len(count) > 6:  # fingerprint and two parts, each with its folder
            raise OSError(error, os.strerror(error))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=rf"{os.strerror(error)}: .*part-00002.arrow'$"):
        make()
    monkeypatch.undo()
    before = files(tmp_path)
    assert len(before) == 2 and not list(tmp_path.glob("**/*.tmp"))
    monkeypatch.setattr(reference_cache, "PART_EXAMPLES", 5)
    make()
    after = files(tmp_path)
    assert len(after) == 3 and before.items() <= after.items()
