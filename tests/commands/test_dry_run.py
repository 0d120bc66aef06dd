"""--dry_run tells what a training would do, and does none of it."""

import re

import pytest
import torch
from tiny import error_of, train_flags

from vrpo import data
from vrpo.batch import MaskDraw, ResponseBatch
from vrpo.commands.main import main
from vrpo.estimator.packing import pack
from vrpo.models import load_tokenizer
from vrpo.training.dry_run import pack_text


def told(capsys, argv) -> str:
    capsys.readouterr()
    assert main(argv) == 0
    return capsys.readouterr().out


def saved(folder) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".bin")]


def forbid_work(monkeypatch):
    def works(*_, **__):
        raise AssertionError("a dry run did the work")

    monkeypatch.setattr("vrpo.training.packed_trainer.PackedTrainer.training_step", works)
    monkeypatch.setattr("vrpo.training.reference_trainer.precompute", works)


@pytest.mark.parametrize("more", [(), ("--precompute_ref_log_probs",), ("--use_peft", "--lora_r=2")])
def test_train__dry_run_tells_and_trains_nothing(files, model_path, tmp_path, capsys, monkeypatch, more):
    forbid_work(monkeypatch)
    flags = ("--dry_run", "--max_steps=-1", "--num_train_epochs=2", "--gradient_accumulation_steps=2", *more)
    text = told(capsys, train_flags(files, model_path, tmp_path, *flags))
    assert saved(tmp_path) == []
    assert "data       12 of 12 rows; dropped 0: 0 unusable" in text
    # 12 rows are 3 batches of 4; two batches a step
    assert "steps      2 per epoch, 4 in total, of 8 examples" in text
    tokens = re.search(r"([\d,]+) packed per step, ([\d,]+) in total", text)
    rows, _ = data.prepare_pairs(data.load_rows(str(files / "pairs.jsonl")), load_tokenizer(model_path))
    sequences = sum(
        len(row["prompt_ids"]) + len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")
    )
    assert int(tokens[2].replace(",", "")) == 2 * 2 * sequences  # epochs, K
    assert "1.0 micro-batches per batch of a device, 1.0 packs per micro-batch" in text
    prompts = sorted(len(row["prompt_ids"]) for row in rows)
    [line] = re.findall(r"^  prompt +(.+)$", text, re.M)
    assert [float(word) for word in line.split()][:1] == [prompts[0]]
    assert float(line.split()[-2]) == prompts[-1]
    assert "time of the run:" in text and "It fits." in text
    assert text.count("sample 0:") == 2 and "<|mdm_mask|>" in text


def test_train__dry_run_counts_dropped_truncated_and_cut_rows(files, model_path, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text((files / "pairs.jsonl").read_text() + '{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    text = told(
        capsys,
        train_flags(
            files,
            model_path,
            tmp_path / "out",
            "--dry_run",
            f"--dataset_name={path}",
            "--drop_unusable_rows",
            "--max_prompt_length=2",
            "--max_tokens_per_pack=16",
        ),
    )
    assert "data       12 of 13 rows; dropped 1: 1 unusable" in text
    assert "truncated  12 prompts" in text
    packs = re.search(r"([\d.]+) micro-batches per batch of a device, ([\d.]+) packs", text)
    assert float(packs[1]) == 4 and float(packs[2]) > 1  # each of the 4 pairs is cut


def test_sft_and_kto__dry_run_tells_and_trains_nothing(files, model_path, tmp_path, capsys, monkeypatch):
    forbid_work(monkeypatch)
    out = tmp_path / "out"
    text = told(capsys, ["sft", "--config", str(files / "sft.yaml"), "--dry_run", f"--output_dir={out}"])
    assert "completion" in text and "chosen" not in text
    assert text.count("sample 0:") == 1 and "reference" not in text
    path = tmp_path / "labelled.jsonl"
    lines = [
        f'{{"prompt": "What is {n}?", "completion": " {n}.", "label": {"true" if n % 2 else "false"}}}'
        for n in range(8)
    ]
    path.write_text("\n".join(lines) + "\n")
    flags = train_flags(files, model_path, out, "--dry_run", f"--dataset_name={path}")
    text = told(capsys, ["kto", *flags[1:]])
    assert "data       8 of 8 rows" in text and "steps      2 per epoch, 2 in total, of 4 examples" in text
    assert saved(out) == []


def test_pack_text__shows_what_the_model_sees(tokenizer):
    prompt = tokenizer("What is 1 plus 4?")["input_ids"]
    sides = [tokenizer(text)["input_ids"] for text in (" 5.", " 2.")]
    lengths = [len(ids) for ids in sides]
    assert lengths == [2, 2]
    batch = ResponseBatch(
        tokens_U=torch.tensor([token for ids in sides for token in (*prompt, *ids)]),
        prompt_length_R=torch.tensor([len(prompt)] * 2),
        response_length_R=torch.tensor(lengths),
        example_R=torch.tensor([7, 7]),
        side_R=torch.tensor([0, 1]),
        num_sides=2,
    )
    # chosen: the first token, then both; rejected: the second token, then none
    draw = MaskDraw(
        position_N=torch.tensor([0, 0, 1, 1]),
        weight_N=torch.tensor([2.0, 1.0, 1.5, 2.0]),
        offsets_S1=torch.tensor([0, 1, 3, 4, 4]),
        num_samples=2,
        replicate_K=(0, 0),
    )
    mask = "<|mdm_mask|>"
    assert pack_text(tokenizer, batch, pack(batch, draw, tokenizer.mask_token_id)) == (
        f"first pack: 1 examples, {4 * (len(prompt) + 2)} tokens, K = 2\n"
        f"  example 7, prompt of {len(prompt)} tokens\n"
        "    'What is 1 plus 4?'\n"
        "  chosen, 2 tokens\n"
        "    ' 5.'\n"
        "    sample 0: 1 of 2 masked, level 0.500, weight 2\n"
        f"      '{mask}.'\n"
        "    sample 1: 2 of 2 masked, level 1.000, weight 1 to 1.5\n"
        f"      '{mask}{mask}'\n"
        "  rejected, 2 tokens\n"
        "    ' 2.'\n"
        "    sample 0: 1 of 2 masked, level 0.500, weight 2\n"
        f"      ' 2{mask}'\n"
        "    sample 1: 0 of 2 masked, level 0.000, weight none\n"
        "      ' 2.'\n"
    )


REFUSED = {
    "loss without reference": (["--loss_type=simpo"], "does nothing without a loss_type that compares"),
    "shared trunk": (["--share_trunk=true"], "share_trunk=True shares nothing with a precomputed reference"),
    "other masks": (["--seed=1"], "reference ELBOs in .* are of something else; what differs: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_train__dry_run_refuses_what_precomputing_refuses(files, model_path, tmp_path, capsys, name):
    more, message = REFUSED[name]
    cache = ["--precompute_ref_log_probs", f"--ref_log_probs_cache={tmp_path / 'cache'}"]
    flags = train_flags(files, model_path, tmp_path / "out", *cache)
    if name == "other masks":
        assert main([*flags, "--precompute_only"]) == 0
    real, dry = (error_of(capsys, [*flags, *more, *also]) for also in ([], ["--dry_run"]))
    assert re.search(message, dry) and real == dry


def test_train__dry_run_tells_what_precomputing_would_do(files, model_path, tmp_path, capsys):
    cache = ["--precompute_ref_log_probs", f"--ref_log_probs_cache={tmp_path / 'cache'}"]
    flags = train_flags(files, model_path, tmp_path / "out", *cache)
    text = told(capsys, [*flags, "--dry_run", "--precompute_only"])
    assert "steps      none: precompute_only" in text and "in total" not in text
    assert "no estimate of memory and time: precompute_only trains nothing" in text
    assert "ELBOs of 8 examples, each epoch's counted; 8 of them are to be computed" in text
    assert not (tmp_path / "cache").exists()
    assert main([*flags, "--precompute_only"]) == 0
    text = told(capsys, [*flags, "--dry_run"])
    assert "ELBOs of 8 examples, each epoch's counted; 0 of them are to be computed" in text
    assert "2 in total, of 4 examples" in text


def test_train__dry_run_refuses_the_output_dir_of_another_run(files, model_path, tmp_path, capsys):
    flags = train_flags(files, model_path, tmp_path, "--save_strategy=steps", "--save_steps=1")
    assert main(flags) == 0
    real, dry = (error_of(capsys, [*flags, "--seed=1", *also]) for also in ([], ["--dry_run"]))
    assert "holds a checkpoint of another run" in dry and real == dry
    resumed = [*flags, "--seed=1", "--resume_from_checkpoint=true"]
    real, dry = (error_of(capsys, [*resumed, *also]) for also in ([], ["--dry_run"]))
    assert "is of another run" in dry and real == dry
