"""last_hidden on models in the layouts that people load: LLaDA's, Dream's, transformers' and ours."""

import types

import pytest
import torch
import torch.distributed as dist
from original_llada import OriginalLLaDA
from packs import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vrpo_kernels import last_hidden, linear_cross_entropy

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class DreamLike(nn.Module):
    """Dream's outer layout: `model` under `lm_head`, which meets the rows that num_logits_to_keep leaves."""

    def __init__(self, vocab=31, size=8):
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(vocab, size), nn.Linear(size, size), nn.Tanh())
        self.lm_head = nn.Linear(size, vocab, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, num_logits_to_keep=0):
        logits = self.lm_head(self.model(input_ids)[:, -num_logits_to_keep:, :])
        return types.SimpleNamespace(logits=logits.float())


class Tied(DreamLike):
    """LLaDA with weight_tying: the head is the embedding, multiplied in a function."""

    def __init__(self):
        super().__init__()
        del self.lm_head

    def get_output_embeddings(self):
        return self.model[0]

    def forward(self, input_ids):
        return types.SimpleNamespace(logits=nn.functional.linear(self.model(input_ids), self.model[0].weight))


class Functional(DreamLike):
    def forward(self, input_ids):
        return nn.functional.linear(self.model(input_ids), self.lm_head.weight)


class Twice(DreamLike):
    def forward(self, input_ids):
        hidden = self.model(input_ids)
        return torch.cat([self.lm_head(hidden[:, :2]), self.lm_head(hidden[:, 2:])], dim=1)


class ByName(DreamLike):
    def forward(self, input_ids):
        return types.SimpleNamespace(logits=self.lm_head(input=self.model(input_ids)))


class Failing(DreamLike):
    def forward(self, input_ids):
        super().forward(input_ids)
        raise KeyError("after the head")


def ours(folder):
    return tiny_model(dtype=torch.float32)


def original(folder):
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    return OriginalLLaDA(folder)


def llama(folder):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=29, tie_word_embeddings=True, **sizes))


def with_lora(folder):
    model = get_peft_model(original(folder), LoraConfig(target_modules=["q_proj"]))
    nn.init.normal_(model.base_model.model.model.transformer["blocks"][0].q_proj.lora_B["default"].weight)
    return model


def wrapped(folder):
    """The layout of DistributedDataParallel: the model in `.module`, without its methods."""
    return nn.DataParallel(DreamLike())


MODELS = {
    "LLaDA": original,
    "ours": ours,
    "Dream": lambda folder: DreamLike(),
    "Llama-tied": llama,
    "PEFT": with_lora,
    "wrapped": wrapped,
    "by-name": lambda folder: ByName(),
}


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def head_of(model):
    return getattr(model, "module", model).get_output_embeddings()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_last_hidden__times_the_head_is_the_logits(make, tmp_path):
    model = make(tmp_path)
    head = head_of(model)
    calls = []
    watch = head.register_forward_hook(lambda module, given, output: calls.append(output.numel()))
    hidden = last_hidden(model, TOKENS)
    watch.remove()
    assert calls == [0]  # the head ran on nothing
    assert hidden.shape == (2, 5, head.weight.shape[1])
    torch.testing.assert_close(hidden @ head.weight.T, logits_of(model(TOKENS)))
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_last_hidden__gradients_flow_through_the_fused_head(make, tmp_path):
    model = make(tmp_path)
    head = head_of(model)
    head.weight.requires_grad_()
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    want = torch.autograd.grad(
        nn.functional.cross_entropy(logits_of(model(TOKENS)).flatten(0, 1), TOKENS.flatten()), leaves
    )
    nll = linear_cross_entropy(last_hidden(model, TOKENS).flatten(0, 1), head.weight, TOKENS.flatten())
    got = torch.autograd.grad(nll.mean(), leaves)
    for candidate, expected in zip(got, want, strict=True):
        torch.testing.assert_close(candidate, expected, rtol=1e-4, atol=1e-6)


def test_last_hidden__an_adapter_on_the_head_is_added_to_its_weight(tmp_path):
    head_name = "model.transformer.ff_out"
    model = get_peft_model(original(tmp_path), LoraConfig(target_modules=["q_proj", head_name]))
    head = model.get_output_embeddings()
    nn.init.normal_(head.lora_B["default"].weight)
    weight = head.weight + head.get_delta_weight("default")
    want = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten(), reduction="sum")
    got = linear_cross_entropy(last_hidden(model, TOKENS).flatten(0, 1), weight, TOKENS.flatten()).sum()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(loss, leaves) for loss in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_last_hidden__passes_the_arguments_on():
    model = DreamLike()
    last = last_hidden(model, input_ids=TOKENS, num_logits_to_keep=2)
    torch.testing.assert_close(last, last_hidden(model, TOKENS)[:, -2:])


def test_last_hidden__takes_the_head_that_it_is_given():
    model = nn.Sequential(nn.Embedding(31, 8), nn.Linear(8, 8), nn.Linear(8, 31))
    hidden = last_hidden(model, TOKENS, head=model[2])
    torch.testing.assert_close(model[2](hidden), model(TOKENS))


def test_last_hidden__keeps_no_graph_without_gradients():
    with torch.no_grad():
        assert not last_hidden(DreamLike(), TOKENS).requires_grad


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Tied(), {}, "Embedding: with tied weights"),
        (Functional(), {}, "never ran"),
        (Twice(), {}, "must run once"),
        (DreamLike(), {"head": nn.Linear(8, 31)}, "never ran"),
        (DreamLike(), {"head": torch.zeros(31, 8)}, "head must be the module that makes logits, got Tensor"),
        (DreamLike(), {"labels": TOKENS}, "labels must be left out"),
        (nn.Linear(3, 3), {}, "get_output_embeddings"),
        (torch.compile(DreamLike(), backend="eager"), {}, "must not be compiled around its head"),
    ],
    ids=["tied", "functional", "twice", "foreign-head", "tensor", "labels", "no-method", "compiled"],
)
def test_last_hidden__says_why_it_cannot(model, options, message):
    with pytest.raises(ValueError, match=message):
        last_hidden(model, TOKENS, **options)
    head = getattr(model, "lm_head", None)
    assert head is None or not head._forward_pre_hooks


def test_last_hidden__refuses_a_head_on_token_ids():
    model = DreamLike()
    with pytest.raises(ValueError, match="hidden states"):
        last_hidden(model, TOKENS, head=model.model)  # an inner module that the ids go to


def test_last_hidden__removes_its_hook_when_the_model_fails():
    model = Failing()
    with pytest.raises(KeyError, match="after the head"):
        last_hidden(model, TOKENS)
    assert not model.lm_head._forward_pre_hooks


def test_last_hidden__under_ddp_the_gradient_of_the_head_is_reduced_too():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(DreamLike())
        head = model.module.lm_head
        seen = []
        model.register_comm_hook(seen, reduce_by_copy)
        nll = linear_cross_entropy(last_hidden(model, TOKENS).flatten(0, 1), head.weight, TOKENS.flatten())
        nll.sum().backward()
        assert sum(seen) == sum(parameter.numel() for parameter in model.parameters())
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


def reduce_by_copy(seen, bucket):
    """A communication hook of DDP that counts what it is to reduce."""
    seen.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
