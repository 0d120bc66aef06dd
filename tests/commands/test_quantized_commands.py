"""The commands on a base in 4 or 8 bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import error_of

import vrpo
from vrpo.commands.main import main
from vrpo.models import create_model, load_model
from vrpo.models.checkpoint import load_policy
from vrpo.models.quantized import Quantization, is_quantized, quantization_state
from vrpo.planning import Machine, TrainingSetup, memory_parts
from vrpo.planning.memory import trained_parameters
from vrpo.planning.shape import shape_of

QUICK = [
    "--max_steps=2", "--per_device_train_batch_size=4", "--gradient_accumulation_steps=1", "--warmup_steps=0",
    "--learning_rate=1e-2", "--report_to=none", "--use_cpu=true", "--save_strategy=no",
    "--training_report=false",
]  # fmt: skip
LORA = ["--use_peft", "--lora_r=2", "--lora_target_modules", "q_proj", "ff_proj"]
ROWS = {"train": "pairs", "sft": "sft", "kto": "kto"}

needs_bitsandbytes = pytest.mark.skipif(
    not pytest.importorskip("transformers").utils.is_bitsandbytes_available(), reason="needs bitsandbytes"
)
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of bitsandbytes


@pytest.fixture
def files(tmp_path, monkeypatch, tokenizer, pair_rows, completion_rows):
    """A working folder with a base, pairs.jsonl, sft.jsonl and kto.jsonl, all named relative to it."""
    monkeypatch.chdir(tmp_path)
    create_model(tokenizer, d_model=64, n_layers=2, n_heads=2, init_std=0.2).save_pretrained("base")
    tokenizer.save_pretrained("base")
    labelled = [row | {"label": index % 2 == 0} for index, row in enumerate(completion_rows)]
    for name, rows in {"pairs": pair_rows, "sft": completion_rows, "kto": labelled}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def flags(command, output, *more):
    samples = [] if command == "sft" else ["--num_samples=2"]
    data = f"--dataset_name={ROWS[command]}.jsonl"
    return [command, "--model_name_or_path=base", data, f"--output_dir={output}", *QUICK, *samples, *more]


def elbo(model, *more):
    named = [f"--model_name_or_path={model}", "--dataset_name=sft.jsonl", "--output_file=scores.jsonl"]
    assert main(["score", *named, "--num_samples=4", "--device=cpu", *more]) == 0
    with open("scores.summary.json", encoding="utf-8") as file:
        return json.load(file)["elbo/completion_per_token"]


def losses_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@needs_bitsandbytes
@quiet
@pytest.mark.parametrize(
    ("command", "width"),
    [
        ("train", ["--load_in_4bit"]),
        ("sft", ["--load_in_4bit", "--bnb_4bit_quant_type=fp4", "--use_bnb_nested_quant"]),
        ("kto", ["--load_in_8bit"]),
    ],
)
def test_train__an_adapter_on_a_quantized_base_loads_again(files, command, width):
    assert main(flags(command, "out", *LORA, *width)) == 0
    saved = json.loads((files / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str((files / "base").resolve())
    assert not (files / "out" / "base_model").exists()
    # On the base that it was trained on, and merged into whole weights, which are near but not the same.
    apart, merged, base = elbo("out", *width), elbo("out"), elbo("base", *width)
    assert apart == pytest.approx(merged, rel=0.1) and apart != merged
    assert abs(apart - base) > 1e-3
    named = ["--model_name_or_path=out", "--prompt=What is 2?", "--max_new_tokens=4", "--device=cpu"]
    assert main(["generate", *named, *width]) == 0


@needs_bitsandbytes
@quiet
def test_load_model__quantizes_the_body_and_nothing_else(files):
    model = load_model("base", quantization=Quantization(load_in_4bit=True), dtype="bfloat16")
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    packed = {n for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert {name.rsplit(".", 2)[-2] for name in packed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= kept
    assert kept | packed == {name for name, _ in model.named_parameters()}
    assert not model.training and is_quantized(model)


@needs_bitsandbytes
@quiet
def test_quantization_state__tells_bases_of_equal_codes_apart(files):
    # Twice the weights have the same 4-bit codes under twice the scales.
    model = load_model("base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained("twice")
    one, other = (
        load_model(path, quantization=Quantization(load_in_4bit=True)) for path in ("base", "twice")
    )
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    states = dict(quantization_state(one)), dict(quantization_state(other))
    differing = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert differing == {"model.layers.0.mlp.up_proj.weight.absmax"}


@needs_bitsandbytes
@quiet
def test_train__a_reference_in_4_bits_is_precomputed(files, capsys):
    known = ["--load_in_4bit", *LORA, "--precompute_ref_log_probs", "--ref_log_probs_cache=cache"]
    assert main(flags("train", "first", *known)) == 0
    assert main(flags("train", "again", *known)) == 0
    plain = [flag for flag in known if "ref_log" not in flag]
    assert main(flags("train", "plain", *plain)) == 0
    losses = [losses_of(files / name) for name in ("first", "again", "plain")]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)
    # The same codes of another kind are another reference.
    assert "the architecture of the reference" in error_of(
        capsys, flags("train", "other", *known, "--use_bnb_nested_quant")
    )


@needs_bitsandbytes
@quiet
def test_train__resumes_on_a_quantized_base(files):
    more = ["--load_in_4bit", *LORA, "--save_strategy=steps", "--save_steps=1", "--gradient_checkpointing"]
    assert main(flags("train", "whole", *more)) == 0
    assert main(flags("train", "cut", *more, "--save_total_limit=2")) == 0
    weights = load_policy("cut").state_dict()
    assert main(flags("train", "cut", *more, "--resume_from_checkpoint=cut/checkpoint-1")) == 0
    for folder in ("whole", "cut"):
        assert all(torch.equal(p, weights[n]) for n, p in load_policy(folder).state_dict().items())


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--load_in_4bit"], "load_in_4bit needs use_peft: quantized weights do not train, adapters do"),
        (["--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["--load_in_4bit", "--bnb_4bit_quant_type=nf5"], "bnb_4bit_quant_type must be one of"),
        (["--load_in_8bit", "--bnb_4bit_quant_type=fp4"], "bnb_4bit_quant_type='fp4' does nothing without"),
        (["--use_bnb_nested_quant"], "use_bnb_nested_quant=True does nothing without load_in_4bit"),
    ],
)
def test_train__refuses_what_a_quantized_base_cannot(files, capsys, more, told):
    assert told in error_of(capsys, flags("train", "out", *more))
    assert not (files / "out").exists()


@needs_bitsandbytes
def test_train__refuses_to_quantize_an_adapter_or_a_new_model(files, capsys):
    assert main(flags("train", "first", *LORA)) == 0
    more = [*LORA, "--load_in_4bit", "--model_name_or_path=first"]
    assert "'first' is an adapter: merge it first" in error_of(capsys, flags("train", "out", *more))
    (files / "new.yaml").write_text(
        "new_model: {vocab_size: 300, d_model: 32, n_layers: 1, n_heads: 2, mlp_hidden_size: 64}\n"
    )
    new = [
        "sft",
        "--config=new.yaml",
        "--dataset_name=sft.jsonl",
        "--output_dir=out",
        *LORA,
        "--load_in_4bit",
    ]
    assert "load_in_4bit quantizes a checkpoint; new_model has none" in error_of(capsys, new)


@needs_bitsandbytes
@quiet
@pytest.mark.parametrize(
    "width",
    [{"load_in_4bit": True}, {"load_in_4bit": True, "use_bnb_nested_quant": True}, {"load_in_8bit": True}],
)
def test_plan__knows_the_size_of_a_quantized_base(files, width):
    quantization = Quantization(**width)
    model = load_policy("base", dtype="float32", quantization=quantization, device="cpu")
    # The tables of codes, one each per matrix, are nothing beside a matrix of a real size.
    scales = [state for name, state in quantization_state(model) if not name.endswith("quant_map")]
    held = [*model.parameters(), *scales]
    setup = TrainingSetup(
        lora_rank=2, reference="adapter", quantized_bytes=quantization.bytes_per_weight, compute_bytes=4
    )
    shape = shape_of(model.config.to_dict())
    told = memory_parts(shape, setup, Machine())["weights"] - 4 * trained_parameters(shape, setup)
    assert told == pytest.approx(sum(tensor.nbytes for tensor in held), rel=0.03)


@needs_bitsandbytes
@quiet
def test_dry_run__estimates_a_quantized_base(files, capsys):
    assert main(flags("train", "out", "--load_in_4bit", *LORA, "--dry_run")) == 0
    told = capsys.readouterr().out
    assert "first pack" in told and "It fits." in told
    plan = ["plan", "--model_name_or_path=base", "--output_dir=out", "--load_in_4bit", "--use_peft"]
    assert main([*plan, "--output_file=plan.json"]) == 0
    small = json.loads((files / "plan.json").read_text())["memory_bytes"]["weights"]
    assert main([*plan[:-2], "--use_peft", "--output_file=plan.json"]) == 0
    assert small < json.loads((files / "plan.json").read_text())["memory_bytes"]["weights"]
    capsys.readouterr()
    assert "under fsdp2" in error_of(capsys, [*plan, "--num_gpus=2"])
    assert "load_in_4bit needs use_peft" in error_of(capsys, plan[:-1])


def test_quantization__a_missing_package_is_told_before_work(monkeypatch):
    monkeypatch.setattr("vrpo.models.quantized.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"load_in_8bit needs the package bitsandbytes: pip install"):
        Quantization(load_in_8bit=True)
    Quantization()


@needs_bitsandbytes
def test_train__two_processes_train_on_a_quantized_base_as_one(files):
    more = ["--load_in_4bit", *LORA, "--logging_steps=1", "--optim=sgd"]  # Adam's first steps are signs
    assert main(flags("train", "one", *more)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*flags("train", "two", *more), "--per_device_train_batch_size=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(vrpo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "vrpo", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses_of(files / "two") == pytest.approx(losses_of(files / "one"), rel=1e-5)
