"""The whole step on a GPU: score 0 at the start, the naive objective's gradient, repeats, a short run.

Runs without the suite's conftest (`pytest --noconftest`), so that a bare CUDA machine can run it; what needs
a package that is missing there is skipped.
"""

import contextlib
import copy
import importlib.util
import math
import os
from itertools import pairwise

# cuBLAS reads the first, once, before its first product; huggingface_hub the second when it is imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

pytest.importorskip("transformers")  # before what imports it

from batches import make_pairs, to_batch
from naive import naive_loss
from plain_llada import PlainLLaDA

from vrpo.commands.new_model import NewModel, build_model, train_tokenizer
from vrpo.estimator import masking
from vrpo.models import LLaDAConfig, LLaDAForMaskedDiffusion
from vrpo.models.adapters import add_adapter
from vrpo.step import Estimator, preference_step
from vrpo.training.packed_trainer import ModelNLL
from vrpo.training.precision import leave_adapter_inputs_to_autocast
from vrpo_kernels.testing import ROUNDOFF, assert_bitwise_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    # What a newer or older library deprecates is reported and no fault of the results.
    pytest.mark.filterwarnings("default"),
]
DEVICE = "cuda"
CLASSES, MASK = 5000, 4999
LENGTHS = [(3, 50, 21), (40, 1, 90), (6, 64, 64)]
DTYPES = [torch.bfloat16, torch.float32]
LN_TWO = torch.tensor(math.log(2)).item()  # as float32 has it


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"package {package} is not installed")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_model(dtype, seed=0):
    """Two layers, made on the device, weights large enough that a rounding anywhere shows in the score."""
    config = LLaDAConfig(
        d_model=256,
        n_layers=2,
        n_heads=4,
        mlp_hidden_size=512,
        embedding_size=CLASSES,
        max_sequence_length=1024,
        rope_theta=500000.0,
        mask_token_id=MASK,
        attn_implementation="vrpo",
    )
    with torch.device("meta"):
        model = LLaDAForMaskedDiffusion(config).to(dtype)
    model.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.06, generator=generator)
    return model.eval()


def estimator(num_samples=4):
    return Estimator(MASK, num_samples, "paper", 1, seed=11)


def random_pairs():
    return make_pairs(LENGTHS, vocab_size=MASK)


def step(policy, reference, num_samples=4, **options):
    settings = {"beta": 0.2, "sft_weight": 0.0, "epoch": 0, "device": DEVICE} | options
    batch = to_batch(random_pairs())
    return preference_step(batch, policy, reference, estimator=estimator(num_samples), **settings)


def assert_starts_at_ln_two(result):
    assert result.score_B.tolist() == [0.0] * len(LENGTHS)
    assert result.loss_B.tolist() == [LN_TWO] * len(LENGTHS)
    assert torch.equal(result.policy_B2, result.reference_B2)
    assert result.policy_B2.isfinite().all() and (result.policy_B2 < 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_step__policy_equal_to_a_copy_scores_exactly_zero(dtype):
    policy = make_model(dtype).train()
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    result = step(ModelNLL(policy), ModelNLL(reference))
    assert_starts_at_ln_two(result)
    result.loss_B.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters()]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def lora(model):
    from peft import LoraConfig

    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return add_adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules=layers), seed=0)


@needs("peft")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_step__new_lora_scores_exactly_zero_and_learns(dtype, autocast, checkpointing):
    model = lora(make_model(dtype)).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    context = torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext()

    def policy(pack):
        with context:
            return ModelNLL(model)(pack)

    def reference(pack):
        with context, model.disable_adapter():
            return ModelNLL(model)(pack)

    result = step(policy, reference)
    assert_starts_at_ln_two(result)
    before = result.loss_B.sum()
    before.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.isfinite().all() for parameter in trained)
    torch.optim.AdamW(trained, lr=1e-3).step()
    after = step(policy, reference).loss_B.sum()
    print(f"loss {before.item()} -> {after.item()}")
    # By much more than what 16-bit activations blur: 0.01 in an NLL is 0.1 in a score.
    assert after < 0.8 * before


@needs("peft")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_step__adapter_inputs_left_to_autocast_change_no_bit(checkpointing, deterministic):
    widening = lora(make_model(torch.bfloat16)).train()
    for name, parameter in widening.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator(DEVICE).manual_seed(5))
    sparing = copy.deepcopy(widening)
    leave_adapter_inputs_to_autocast(sparing)
    results = []
    for model in (widening, sparing):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        seen = []
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.lora_A.default")
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].dtype))
        with torch.autocast(DEVICE, torch.bfloat16):
            result = step(ModelNLL(model), ModelNLL(model))
        result.loss_B.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append(({"policy": result.policy_B2.detach(), **gradients}, set(seen)))
    assert [kinds for _, kinds in results] == [{torch.float32}, {torch.bfloat16}]
    for name, expected in results[0][0].items():
        assert_bitwise_equal(results[1][0][name], expected, name)


def naive(policy, reference, pairs, dtype):
    """(loss, PlainLLaDA with gradients) of the naive objective in this dtype, on the same masks."""
    drawn = masking.draw(to_batch(pairs), design="paper", num_samples=4, masks_per_level=1, seed=11, epoch=0)
    segments = [
        (drawn.position_N[a:b].tolist(), drawn.weight_N[a:b].tolist())
        for a, b in pairwise(drawn.offsets_S1.tolist())
    ]
    samples = [
        [segments[8 * b + 4 * side : 8 * b + 4 * side + 4] for side in (0, 1)] for b in range(len(pairs))
    ]
    plain = PlainLLaDA.like(policy, dtype)
    with torch.device(DEVICE):
        loss = naive_loss(
            plain, PlainLLaDA.like(reference, dtype), pairs, samples, MASK, beta=0.02, sft_weight=0.05
        )
    loss.backward()
    return loss.item(), plain


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_step__gradient_against_the_naive_objective_in_float64(dtype):
    """Errors are allowed to be twice those of the naive objective with a model of the same dtype."""
    policy, reference = make_model(dtype), make_model(dtype, seed=1)
    pairs = random_pairs()
    loss = step(ModelNLL(policy), ModelNLL(reference), beta=0.02, sft_weight=0.05).loss_B.mean()
    loss.backward()
    truth, exact = naive(policy, reference, pairs, torch.float64)
    baseline, plain = naive(policy, reference, pairs, dtype)
    # An ELBO is a sum of some hundred NLLs of about 10 nats, here to 5e-6 each where they are rounded in
    # float32; times beta.
    assert abs(loss.item() - truth) <= 2 * abs(baseline - truth) + 0.02 * 4 * 500 * 10 * 5e-6
    for name, parameter in policy.named_parameters():
        expected = exact.gradient_of(name)
        wrong, usual = (
            ((gradient - expected).norm() / expected.norm()).item()
            for gradient in (parameter.grad, plain.gradient_of(name))
        )
        # torch adds up an embedding's gradient in the dtype of its weights, row by row of the pack; the mask
        # token's is a sum of hundreds.
        extra = 16 if name == "model.embed_tokens.weight" else 4
        assert 0 < wrong <= 2 * usual + extra * ROUNDOFF[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_step__repeats_bit_for_bit(dtype, deterministic):
    policy, reference = make_model(dtype), make_model(dtype, seed=1)
    results = []
    for _ in range(3):
        policy.zero_grad()
        result = step(ModelNLL(policy), ModelNLL(reference))
        result.loss_B.sum().backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
        results.append({"loss": result.loss_B.detach(), "score": result.score_B, **gradients})
    for found in results[1:]:
        for name, tensor in found.items():
            assert_bitwise_equal(tensor, results[0][name], name)


def test_step__a_pair_alone_has_the_loss_it_has_in_a_batch():
    """Matrix products of other shapes add in another order, so not bit for bit."""
    policy, reference = make_model(torch.float32), make_model(torch.float32, seed=1)
    pairs = random_pairs()
    together = step(ModelNLL(policy), ModelNLL(reference)).policy_B2
    for index, pair in enumerate(pairs):
        alone = preference_step(
            to_batch([pair], [index]),
            ModelNLL(policy),
            ModelNLL(reference),
            estimator=estimator(),
            beta=0.2,
            sft_weight=0.0,
            epoch=0,
            device=DEVICE,
        )
        torch.testing.assert_close(alone.policy_B2[0], together[index], rtol=1e-5, atol=0)


def sums(first, last):
    """Pairs of a right and a wrong sum."""
    return [
        {"prompt": f"What is {n} plus {n + 3}?", "chosen": f" {2 * n + 3}.", "rejected": f" {2 * n}."}
        for n in range(first, last)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for row in sums(0, 60) for text in row.values()], vocab_size=300)


def train(folder, tokenizer, *, with_lora, resume=None, **fields):
    """A trainer after a run of three steps on twelve pairs, with every default of a GPU run."""
    from datasets import Dataset

    from vrpo import VRPOConfig, VRPOTrainer

    sizes = NewModel(vocab_size=300, d_model=64, n_layers=2, n_heads=4, mlp_hidden_size=128)
    model = build_model(sizes, tokenizer, max_length=64, seed=0)
    extra = {}
    if with_lora:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    settings = {
        "output_dir": str(folder),
        "num_samples": 4,
        "sft_weight": 0.0,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = VRPOTrainer(
        model,
        args=VRPOConfig(**settings | fields),
        train_dataset=Dataset.from_list(sums(0, 12)),
        processing_class=tokenizer,
        **extra,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@needs("datasets")
@pytest.mark.parametrize(
    "with_lora", [False, pytest.param(True, marks=needs("peft"))], ids=["all weights", "lora"]
)
def test_train__starts_at_ln_two_and_goes_on_from_its_checkpoint_bitwise(
    tmp_path, tokenizer, with_lora, deterministic
):
    options = {"with_lora": with_lora, "gradient_checkpointing": with_lora}
    straight = train(tmp_path / "run", tokenizer, **options)
    assert straight.args.bf16 and straight.args.device.type == DEVICE
    log = [entry for entry in straight.state.log_history if "rewards/margins" in entry]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert log[0]["rewards/margins"] == log[0]["rewards/chosen"] == log[0]["rewards/rejected"] == 0.0
    assert log[2]["rewards/margins"] != 0.0 and math.isfinite(log[2]["loss"])
    end = {name: p.detach().clone() for name, p in straight.model.named_parameters()}
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = train(tmp_path / "run", tokenizer, resume=checkpoint, **options)
    assert resumed.state.global_step == 3
    for name, parameter in resumed.model.named_parameters():
        assert_bitwise_equal(parameter, end[name], name)


@needs("datasets")
@needs("peft")
@pytest.mark.parametrize("with_lora", [False, True], ids=["all weights", "lora"])
def test_train__a_shared_trunk_and_a_replay_start_at_zero_and_keep_the_bits(
    tmp_path, tokenizer, with_lora, deterministic
):
    options = {"with_lora": with_lora, "train_top_layers": 1, "save_strategy": "no"}
    ends = []
    for name, fields in {
        "apart": {"share_trunk": False},
        "shared": {"share_trunk": True},
        "replayed": {"share_trunk": True, "gradient_mode": "replay", "max_tokens_per_pack": 200},
    }.items():
        trainer = train(tmp_path / name, tokenizer, **options, **fields)
        log = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
        assert log[0]["rewards/margins"] == 0.0, name
        assert log[0].get("vrpo/replay_drift") == (0.0 if name == "replayed" else None), name
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    for apart, shared in zip(*ends[:2], strict=True):
        assert_bitwise_equal(shared, apart, "a weight after three steps")
