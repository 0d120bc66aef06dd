"""The sampler: schedule, blocks, randomness, and equality with a naive decoder."""

import pytest
import torch
from packs import MASK_ID, VOCAB, tiny_model
from torch import nn

from vrpo.generation import SamplerConfig, generate, trim_response
from vrpo.generation.sampler import split_evenly

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [1, 2, 3]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def decode(model, config, prompts=PROMPTS, **options):
    return generate(model, prompts, config, mask_token_id=MASK_ID, progress=False, **options)


def naive_decode(model, prompt, length, block_length, steps, guidance=0.0):
    """Greedy low-confidence decoding of one prompt: full logits, loops, no packs."""
    tokens = torch.tensor([*prompt, *[MASK_ID] * length])
    is_masked = [False] * len(prompt) + [True] * length
    num_blocks = length // block_length
    for block in range(num_blocks):
        block_steps = steps // num_blocks + (block < steps % num_blocks)
        for step in range(block_steps):
            logits = model(input_ids=tokens[None]).logits[0].float()
            if guidance:
                blind = tokens.clone()
                blind[: len(prompt)] = MASK_ID
                without = model(input_ids=blind[None]).logits[0].float()
                logits = without + (guidance + 1) * (logits - without)
            logits[:, MASK_ID] = -torch.inf
            best = logits.softmax(1).max(1)
            first = len(prompt) + block * block_length
            open_positions = [i for i in range(first, first + block_length) if is_masked[i]]
            open_positions.sort(key=lambda i: -best.values[i].item())
            count = block_length // block_steps + (step < block_length % block_steps)
            for i in open_positions[:count]:
                tokens[i], is_masked[i] = best.indices[i], False
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("block_length", "steps", "guidance"),
    [(12, 12, 0.0), (12, 5, 0.0), (4, 12, 0.0), (4, 7, 0.0), (6, 2, 0.0), (4, 7, 1.5)],
)
def test_generate__greedy_equals_a_naive_decoder(model, block_length, steps, guidance):
    config = SamplerConfig(12, block_length, steps, cfg_scale=guidance)
    ours = decode(model, config)
    for response, prompt in zip(ours, PROMPTS, strict=True):
        assert torch.equal(response, naive_decode(model, prompt, 12, block_length, steps, guidance))


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate__leaves_nothing_masked(model, remasking, temperature):
    out = decode(model, SamplerConfig(12, 4, 7, temperature=temperature, remasking=remasking))
    assert out.shape == (len(PROMPTS), 12)
    assert ((out >= 0) & (out < VOCAB) & (out != MASK_ID)).all()


@pytest.mark.parametrize(
    "config",
    [SamplerConfig(12, 4, temperature=1.0), SamplerConfig(12, 4, remasking="random")],
    ids=["temperature", "random-remasking"],
)
def test_generate__is_a_function_of_the_seed(model, config):
    state = torch.get_rng_state()
    first = decode(model, config, seed=5)
    assert torch.equal(first, decode(model, config, seed=5))
    assert not torch.equal(first, decode(model, config, seed=6))
    assert torch.equal(state, torch.get_rng_state())


def test_generate__sample_ids_decide_and_the_batch_does_not(model):
    config = SamplerConfig(12, 4, temperature=1.0)
    together = decode(model, config, sample_ids=[7, 3, 3, 8])
    for i, sample in enumerate([7, 3, 3, 8]):
        alone = decode(model, config, prompts=[PROMPTS[i]], sample_ids=[sample])
        assert torch.equal(together[i], alone[0])
    assert torch.equal(together, decode(model, config, sample_ids=[7, 3, 3, 8], max_pack_tokens=20))


def test_generate__samples_of_one_prompt_differ(model):
    out = decode(model, SamplerConfig(12, temperature=1.0), prompts=[[1, 2]] * 8)
    assert len({tuple(row.tolist()) for row in out}) == 8


class Recorder(nn.Module):
    """Passes calls on and remembers which response positions were asked for."""

    def __init__(self, model, prompt_length):
        super().__init__()
        self.model, self.prompt_length, self.calls = model, prompt_length, []

    def forward(self, **kwargs):
        self.calls.append((kwargs["rows"] - self.prompt_length).tolist())
        return self.model(**kwargs)


def test_generate__asks_only_for_masked_positions_of_the_current_block(model):
    recorder = Recorder(model, prompt_length=3)
    decode(recorder, SamplerConfig(12, 4, 7), prompts=[[1, 2, 3]])
    # 7 calls over 3 blocks: 3, 2, 2; four tokens in 3 calls: 2, 1, 1; in 2 calls: 2, 2.
    assert [len(call) for call in recorder.calls] == [4, 2, 1, 4, 2, 4, 2]
    for call, block in zip(recorder.calls, [0, 0, 0, 1, 1, 2, 2], strict=True):
        assert all(4 * block <= position < 4 * block + 4 for position in call)
    assert set(recorder.calls[1]) < set(recorder.calls[0])


def test_generate__mask_id_in_a_prompt_stays_and_is_not_decoded(model):
    recorder = Recorder(model, prompt_length=3)
    decode(recorder, SamplerConfig(2), prompts=[[1, MASK_ID, 3]])
    assert recorder.calls[0] == [0, 1]


def test_generate__suppressed_tokens_never_appear(model):
    plain = decode(model, SamplerConfig(12))
    banned = tuple(plain.unique().tolist())
    assert not torch.isin(decode(model, SamplerConfig(12, suppress_ids=banned)), torch.tensor(banned)).any()


def test_generate__deferred_tokens_come_last(model):
    """With all tokens but one deferred, the first call keeps a position where that one is predicted,
    though without deferring it keeps another."""
    prompt = PROMPTS[1]
    predicted = decode(model, SamplerConfig(12, steps=1), prompts=[prompt])[0].tolist()

    def kept_first(**options):
        recorder = Recorder(model, prompt_length=len(prompt))
        decode(recorder, SamplerConfig(12, **options), prompts=[prompt])
        (position,) = set(recorder.calls[0]) - set(recorder.calls[1])
        return position

    usual = predicted[kept_first()]
    for favourite in set(predicted) - {usual}:
        others = tuple(token for token in range(VOCAB) if token != favourite)
        assert predicted[kept_first(defer_ids=others)] == favourite
    assert len(set(predicted)) > 2


def test_generate__stopping_early_changes_nothing_before_the_stop(model):
    config = SamplerConfig(24, 4)
    full = decode(model, config)
    stop = full[0, 5].item()
    recorder = Recorder(model, 0)
    stopped = decode(recorder, SamplerConfig(24, 4, stop_ids=(stop,)))
    for a, b in zip(full, stopped, strict=True):
        assert trim_response(a, [stop]) == trim_response(b, [stop])
    assert (stopped[0, 8:] == stop).all()
    assert len(recorder.calls[-1]) < len(recorder.calls[3])


def test_generate__any_stop_id_stops_and_the_first_fills(model):
    full = decode(model, SamplerConfig(24, 4))
    unused = next(i for i in range(VOCAB) if i != MASK_ID and i not in full)
    stop = full[0, 5].item()
    for fill, stop_ids in ((unused, (unused, stop)), (stop, (stop, unused))):
        (stopped,) = decode(model, SamplerConfig(24, 4, stop_ids=stop_ids), prompts=PROMPTS[:1])
        end = 4 * (full[0].tolist().index(stop) // 4 + 1)
        assert torch.equal(stopped[:end], full[0, :end])
        assert end < 24
        assert (stopped[end:] == fill).all()


def test_generate__stops_of_one_response_leave_the_others_alone(model):
    full = decode(model, SamplerConfig(24, 4))
    stop = next(t for t in full[1].tolist() if sum(t in row.tolist() for row in full) < len(PROMPTS))
    stopped = decode(model, SamplerConfig(24, 4, stop_ids=(stop,)))
    for row, cut in zip(full, stopped, strict=True):
        if stop not in row:
            assert torch.equal(row, cut)


def test_generate__restores_the_training_flags(model):
    model.train()
    model.model.norm.eval()
    decode(model, SamplerConfig(2))
    assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]
    model.eval()


def test_generate__no_prompts_give_no_responses(model):
    assert decode(model, SamplerConfig(4), prompts=[]).shape == (0, 4)


def test_split_evenly__remainder_comes_first():
    assert split_evenly(10, 4) == [3, 3, 2, 2]


def test_trim_response__cuts_before_the_first_terminal_token():
    assert trim_response(torch.tensor([5, 6, 2, 7, 1]), [1, 2]) == [5, 6]
    assert trim_response([5, 6], [1]) == [5, 6]
