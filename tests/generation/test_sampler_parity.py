"""Decisions of `generate` against LLaDA's rule in plain loops, and independence of what shares a pack."""

import itertools
import random

import pytest
import torch
from packs import MASK_ID, VOCAB, tiny_model
from plain_llada import PlainLLaDA
from plain_sampler import PlainSettings, plain_decode

from vrpo.generation import SamplerConfig, generate

LENGTH = 12
SCHEDULES = [(12, 12), (12, 5), (4, 12), (4, 7), (6, 2)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def frequent(model):
    """Two ids that the model predicts often, to stand for EOS and EoT."""
    prompts = [[i, i + 1, i + 2] for i in range(40)]
    tokens = generate(model, prompts, SamplerConfig(LENGTH), mask_token_id=MASK_ID, progress=False)
    return tuple(tokens.flatten().bincount().argsort(descending=True)[:2].tolist())


def all_logits(model):
    return lambda tokens: model(input_ids=tokens[None]).logits[0]


def cases():
    """Every combination of options twice, with a schedule, prompt and seed of its own: 192 decodings."""
    dealer = random.Random(5)
    for temperature, remasking, cfg_scale, ending, _ in itertools.product(
        (0.0, 0.6, 1.3),
        ("low_confidence", "random"),
        (0.0, 1.5),
        ("", "logits", "confidence", "both"),
        (0, 1),
    ):
        block_length, steps = dealer.choice(SCHEDULES)
        prompt = [dealer.randrange(MASK_ID) for _ in range(dealer.randint(1, 9))]
        yield (
            prompt,
            dealer.randrange(2**64),
            dealer.randrange(2**32),
            ending,
            {
                "block_length": block_length,
                "steps": steps,
                "temperature": temperature,
                "cfg_scale": cfg_scale,
                "remasking": remasking,
            },
        )


@torch.no_grad()
def test_generate__makes_every_decision_of_llada(model, frequent):
    eos, _ = frequent
    differ_without_deferring = 0
    for prompt, seed, sample, ending, options in cases():
        banned = (eos,) if ending in ("logits", "both") else ()
        deferred = frequent if ending in ("confidence", "both") else ()
        plain = plain_decode(
            all_logits(model),
            prompt,
            PlainSettings(LENGTH, logits_eos_inf=banned, confidence_eos_eot_inf=deferred, **options),
            mask_id=MASK_ID,
            seed=seed,
            sample=sample,
        )

        def ours(defer_ids, prompt=prompt, seed=seed, sample=sample, banned=banned, options=options):
            config = SamplerConfig(LENGTH, suppress_ids=banned, defer_ids=defer_ids, **options)
            (response,) = generate(
                model, [prompt], config, mask_token_id=MASK_ID, seed=seed, sample_ids=[sample], progress=False
            )
            return response.tolist()

        assert ours(deferred) == plain, (prompt, seed, sample, ending, options)
        if deferred and options["remasking"] == "low_confidence":
            differ_without_deferring += ours(()) != plain
    assert differ_without_deferring > 5


@torch.no_grad()
@pytest.mark.parametrize(("temperature", "cfg_scale"), [(0.0, 0.0), (0.0, 1.5), (1.0, 0.5)])
def test_generate__equals_the_plain_sampler_on_the_plain_model(model, frequent, temperature, cfg_scale):
    """Nothing of the product on the other side: neither the model's class nor the sampler."""
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    options = {"temperature": temperature, "cfg_scale": cfg_scale}
    ours = generate(
        model,
        prompts,
        SamplerConfig(LENGTH, 6, 8, defer_ids=frequent, **options),
        mask_token_id=MASK_ID,
        seed=11,
        progress=False,
    )
    settings = PlainSettings(LENGTH, 6, 8, confidence_eos_eot_inf=frequent, **options)
    for sample, prompt in enumerate(prompts):
        plain = plain_decode(
            PlainLLaDA.like(model), prompt, settings, mask_id=MASK_ID, seed=11, sample=sample
        )
        assert ours[sample].tolist() == plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_generate__what_shares_a_pack_does_not_matter(model, frequent, temperature, cfg_scale):
    dealer = random.Random(7)
    prompts = [[dealer.randrange(VOCAB) for _ in range(dealer.randint(1, 20))] for _ in range(8)]
    samples = [dealer.randrange(2**32) for _ in prompts]
    config = SamplerConfig(
        LENGTH, 4, 9, temperature=temperature, cfg_scale=cfg_scale, defer_ids=frequent, stop_ids=frequent[1:]
    )

    def decode(indices, max_pack_tokens=16384):
        return generate(
            model,
            [prompts[i] for i in indices],
            config,
            mask_token_id=MASK_ID,
            seed=3,
            sample_ids=[samples[i] for i in indices],
            max_pack_tokens=max_pack_tokens,
            progress=False,
        )

    together = decode(range(8))
    for size in (1, 90):
        assert torch.equal(together, decode(range(8), size))
    order = dealer.sample(range(8), 8)
    assert torch.equal(together[order], decode(order))
    for i in range(0, 8, 3):
        assert torch.equal(together[[i]], decode([i]))
