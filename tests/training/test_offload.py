"""activation_offloading: what backward needs waits in other memory, the gradient is the same."""

import copy

import pytest
import torch
from trainers import LORA, config, logged, parameters, trainer_of

from vrpo.training import offload
from vrpo.training.offload import OffloadActivations


@pytest.fixture
def moves_from_cpu(monkeypatch):
    """Tensors of any size move from the CPU to other memory of the CPU; the list tells which did."""
    monkeypatch.setattr(offload, "DEVICE", "cpu")
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    back, moved = offload._unpack, []

    def unpack(packed):
        tensor = back(packed)
        if isinstance(packed, tuple):
            moved.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(offload, "_unpack", unpack)
    return moved


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renamed gradient_checkpointing
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"peft_config": LORA, "gradient_checkpointing": True},
        {"gradient_mode": "replay", "max_tokens_per_pack": 60, "train_top_layers": 1},
    ],
    ids=["full", "lora, checkpointing", "replay, trunk"],
)
def test_train__offloaded_activations_give_the_same_bits(
    tmp_path, tiny_model, tokenizer, pair_rows, moves_from_cpu, fields
):
    runs = []
    for more in ({}, {"activation_offloading": True}):
        model = copy.deepcopy(tiny_model)
        trainer = trainer_of(tmp_path, model, tokenizer, pair_rows, max_steps=3, **fields, **more)
        trainer.train()
        runs.append((logged(trainer, "loss"), parameters(trainer.model)))
        assert bool(moves_from_cpu) == bool(more)
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_offload_activations__leaves_weights_where_they_are(tiny_model, moves_from_cpu):
    weights = {tuple(p.shape) for p in tiny_model.parameters()}
    with OffloadActivations(tiny_model)(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tiny_model(input_ids=torch.arange(1, 14)[None]).logits.float().logsumexp(-1).sum()
    saved = tiny_model(input_ids=torch.arange(1, 14)[None]).logits.float().logsumexp(-1).sum()
    saved.backward()
    assert not moves_from_cpu  # outside of the context nothing moves
    loss.backward()
    assert (1, 13, 32) in moves_from_cpu
    assert not weights & set(moves_from_cpu)


def test_config__refuses_offloading_that_does_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="activation_offloading=True moves activations from a GPU"):
        config(tmp_path, activation_offloading=True)
    monkeypatch.setattr(offload, "DEVICE", "cpu")
    with pytest.raises(ValueError, match="not supported with torch_compile"):
        config(tmp_path, activation_offloading=True, torch_compile=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_offload_activations__frees_memory_of_the_gpu():
    layers = torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(16)]).cuda()
    start = torch.randn(2**22, device="cuda", requires_grad=True)  # 16 MiB
    peaks, gradients = [], []
    for context in (
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        OffloadActivations(layers)(),
    ):
        torch.cuda.reset_peak_memory_stats()
        with context:
            (gradient,) = torch.autograd.grad(layers(start).sum(), start)
        peaks.append(torch.cuda.max_memory_allocated())
        gradients.append(gradient)
    assert torch.equal(*gradients)
    assert peaks[1] < 0.5 * peaks[0]
