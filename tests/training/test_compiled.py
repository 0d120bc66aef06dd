"""torch_compile: the layers one by one, for packs of every length."""

import copy

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from torch._dynamo.utils import counters
from trainers import LORA, config, logged, parameters, trainer_of
from transformers import TrainerCallback

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer
from vrpo.models import create_model

# Of torch.compile itself, and of transformers' checkpointing.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(scope="module")
def uneven_rows() -> Dataset:
    """No two batches have packs of one length."""
    rows = [("What " + "is " * (n % 5) + str(n), " 1" * (n % 7 + 1), " 2") for n in range(24)]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


class CountGraphs(TrainerCallback):
    def __init__(self):
        self.after_step = []

    def on_step_end(self, args, state, control, **kwargs):
        self.after_step.append(counters["stats"]["unique_graphs"])


def test_train__compiled_layers_are_the_eager_ones(tmp_path, tiny_model, tokenizer, uneven_rows):
    # This backend runs the captured operations as they are: the same bits.
    losses, weights, counts = [], [], CountGraphs()
    for more in ({}, {"torch_compile": True, "torch_compile_backend": "eager", "callbacks": [counts]}):
        trainer = trainer_of(
            tmp_path,
            copy.deepcopy(tiny_model),
            tokenizer,
            uneven_rows,
            peft_config=LORA,
            train_top_layers=1,
            gradient_mode="replay",
            max_tokens_per_pack=60,
            gradient_checkpointing=True,
            max_steps=5,
            **more,
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
        weights.append(parameters(trainer.model))
    assert losses[0] == losses[1]
    assert torch.equal(*weights)
    assert counts.after_step[0] > 0
    assert counts.after_step[-1] == counts.after_step[0]  # no pack is compiled anew
    # Nor does accelerate compile the model as a whole, in this trainer or in a later one.
    assert trainer.accelerator.state.dynamo_plugin.backend == "NO"


def test_train__every_form_of_a_layer_is_compiled(tmp_path, tiny_model, tokenizer, uneven_rows):
    """Frozen and adapted layers, the last one, policy, reference and evaluation: more than torch's eight."""
    model = create_model(tokenizer, d_model=32, n_layers=4, n_heads=2, init_std=0.2)
    trainer = trainer_of(
        tmp_path,
        model,
        tokenizer,
        uneven_rows,
        eval_dataset=uneven_rows.select(range(4)),
        peft_config=LORA,
        train_top_layers=2,
        share_trunk=False,
        gradient_mode="replay",
        max_tokens_per_pack=60,
        max_steps=2,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer.train()
        trainer.evaluate()


def test_train__inductor_gives_the_gradient_of_eager_layers(tmp_path, tokenizer, completion_rows):
    norms, weights = [], []
    start = create_model(tokenizer, d_model=32, n_layers=1, n_heads=2, init_std=0.2, dtype="float64")
    for more in ({}, {"torch_compile": True}):
        args = config(
            tmp_path, DiffusionSFTConfig, max_steps=2, optim="sgd", max_grad_norm=0.0, max_eos_fill=3, **more
        )
        trainer = DiffusionSFTTrainer(
            copy.deepcopy(start), args=args, train_dataset=completion_rows, processing_class=tokenizer
        )
        trainer.train()
        norms.append(logged(trainer, "grad_norm"))
        weights.append(parameters(trainer.model))
    assert counters["stats"]["unique_graphs"] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-9) and min(norms[0]) > 1e-3
    moved = (weights[0] - parameters(start)).norm()
    assert (weights[1] - weights[0]).norm() < 1e-9 * moved


def test_train__compiled_saves_plain_names_and_resumes(tmp_path, tiny_model, tokenizer, completion_rows):
    out = tmp_path / "out"

    def run(resume=None):
        args = config(
            tmp_path,
            DiffusionSFTConfig,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            torch_compile=True,
            torch_compile_backend="eager",
            max_eos_fill=0,
        )
        trainer = DiffusionSFTTrainer(
            copy.deepcopy(tiny_model), args=args, train_dataset=completion_rows, processing_class=tokenizer
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight, resumed = run(), run(resume=str(out / "checkpoint-1"))
    assert torch.equal(parameters(straight.model), parameters(resumed.model))
    resumed.save_model()
    tiny_model.save_pretrained(tmp_path / "plain")
    saved = [folder / "model.safetensors" for folder in (out, out / "checkpoint-2", tmp_path / "plain")]
    names = [set(safe_open(file, framework="pt").keys()) for file in saved]
    assert names[0] == names[1] == names[2]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"torch_compile_mode": "reduce-overhead"}, "record a CUDA graph for every length"),
        ({"torch_compile_backend": "nonsense"}, "torch_compile=True: the backend 'nonsense' does not work"),
    ],
)
def test_init__refuses_compilers_that_do_not_work(tmp_path, tiny_model, tokenizer, pair_rows, fields, told):
    with pytest.raises(ValueError, match=told) as error:
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, torch_compile=True, **fields)
    assert "\n" not in str(error.value)


def test_config__refuses_a_compilation_that_accelerate_would_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="set torch_compile=True instead"):
        config(tmp_path)
    assert config(tmp_path, torch_compile=True).torch_compile_backend == "inductor"
