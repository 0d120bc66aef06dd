"""One step of the sampler on given logits: tokens, their order, exact at any size."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrpo.generation import SamplerConfig
from vrpo.generation import predict as predict_module
from vrpo.generation.predict import Place, draw_categorical, predict

MASK_ID = 0


def step_on(logits, *, seed=0, step=0, **options):
    """(tokens, keys) of rows of logits; class 0 is the mask token."""
    logits = torch.as_tensor(logits)
    num_rows = len(logits) // (2 if options.get("cfg_scale") else 1)
    place = Place(torch.arange(num_rows), torch.zeros(num_rows, dtype=torch.int64), step)
    config = SamplerConfig(max(num_rows, 1), **options)
    return predict(logits, place, config, mask_token_id=MASK_ID, seed=seed)


def order_of(keys):
    return keys.sort(descending=True, stable=True).indices.tolist()


@pytest.mark.parametrize("base", [0.0, 30.0, 100.0, 1e4, -1e4])
@pytest.mark.parametrize("gap", [4.0, 12.0, 25.0, 60.0, 700.0, 3000.0])
def test_predict__orders_sure_tokens_at_any_logit_size(base, gap):
    """Three positions whose tokens are all but certain, the second a little surer, the third less."""
    nudge = max(0.01, gap * 1e-3) if abs(base) < 1e3 else 1.0
    logits = torch.full((3, 5), base - 5000.0)
    logits[:, 1] = base
    for row, odds in enumerate([gap, gap + nudge, gap - nudge]):
        logits[row, 3] = base - odds
    tokens, keys = step_on(logits)
    assert tokens.tolist() == [1, 1, 1]
    assert order_of(keys) == [1, 0, 2]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_predict__key_is_the_log_odds_of_exact_arithmetic(data):
    """Integer multiples of 1/8 up to 1e4: fp32 holds them, and exact sums of exponentials are at hand."""
    eighths = st.integers(-80_000, 80_000) | st.integers(79_900, 80_000)
    row = [value / 8 for value in data.draw(st.lists(eighths, min_size=3, max_size=7))]
    deferred = data.draw(st.sets(st.integers(1, len(row) - 1), max_size=len(row) - 2))
    (token,), (key,) = step_on([row], defer_ids=tuple(deferred))
    assert token == max(range(1, len(row)), key=lambda v: row[v])
    others = [row[v] - row[token] for v in range(1, len(row)) if v != token and v not in deferred]
    if int(token) in deferred:
        assert key == -math.inf
    elif not others:
        assert key == math.inf
    else:
        top = max(others)
        exact = top + math.log(sum(Fraction(math.exp(v - top)) for v in others))
        assert float(key) == pytest.approx(-exact, rel=1e-14, abs=1e-14)


def test_predict__agrees_with_probabilities_wherever_those_differ():
    """Near ties in fp64: never the other way round than softmax has it."""
    generator = torch.Generator().manual_seed(3)
    for scale, precision in itertools.product((0.1, 1.0, 10.0, 1e3), (torch.float32, torch.float64)):
        row = torch.randn(50, generator=generator, dtype=precision) * scale
        logits = row + 1e-7 * scale * torch.randn(40, 50, generator=generator, dtype=precision)
        tokens, keys = step_on(logits)
        allowed = logits.double().index_fill(1, torch.tensor([MASK_ID]), -torch.inf)
        confidence = allowed.softmax(1).gather(1, tokens[:, None])[:, 0]
        in_our_order = confidence[order_of(keys)]
        rounding = 4 * torch.finfo(torch.float64).eps
        assert (in_our_order[1:] <= in_our_order[:-1] * (1 + rounding)).all()


def test_predict__confidences_are_renormalised_without_deferred_tokens():
    """Token 1 at .5 beside EOS at .5, and token 3 at .6: without EOS the first is surer."""
    eos = 2
    logits = torch.tensor([[-9.0, 1.0, 0.9, -3.0, -3.0], [-9.0, -3.0, -1.0, 0.4, -0.2]])
    assert order_of(step_on(logits)[1]) == [1, 0]
    assert order_of(step_on(logits, defer_ids=(eos,))[1]) == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_predict__deferred_tokens_are_predicted_and_come_last_from_the_left(temperature):
    logits = torch.full((4, 5), -60.0)
    logits[0, 2] = logits[2, 2] = 9.0  # sure of EOS
    logits[3, 4] = 0.0
    logits[1, 3] = logits[1, 4] = 0.0
    tokens, keys = step_on(logits, defer_ids=(2,), temperature=temperature)
    assert tokens[[0, 2, 3]].tolist() == [2, 2, 4]
    assert order_of(keys) == [3, 1, 0, 2]


def test_predict__random_order_does_not_look_at_confidences():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    _, keys = step_on(logits, remasking="random", seed=4)
    for other in (-logits, logits * 100):
        assert torch.equal(keys, step_on(other, remasking="random", seed=4, defer_ids=(2,))[1])


def test_predict__equal_rows_keep_their_order():
    logits = torch.randn(1, 5).expand(6, 5)
    assert order_of(step_on(logits)[1]) == list(range(6))


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_predict__chunks_change_nothing(monkeypatch, cfg_scale, temperature):
    logits = torch.randn(14, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    options = {"cfg_scale": cfg_scale, "temperature": temperature, "defer_ids": (3,)}
    whole = step_on(logits, **options)
    for elements in (1, 20, 45):
        monkeypatch.setattr(predict_module, "_CHUNK_ELEMENTS_CPU", elements)
        for ours, theirs in zip(step_on(logits, **options), whole, strict=True):
            assert torch.equal(ours, theirs)


def test_predict__leaves_the_logits_as_they_were():
    logits = torch.randn(3, 5)
    before = logits.clone()
    step_on(logits, suppress_ids=(1,), defer_ids=(2,))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("column", [MASK_ID, 1, 3], ids=["mask", "suppressed", "usual"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predict__nan_and_infinity_name_the_row(bad, column, remasking, temperature):
    logits = torch.zeros(4, 5)
    logits[2, column] = bad
    with pytest.raises(FloatingPointError, match="logits at row 2 are NaN or infinite"):
        step_on(logits, temperature=temperature, remasking=remasking, suppress_ids=(1,))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_predict__minus_infinity_excludes_tokens_and_not_all(temperature):
    logits = torch.full((2, 5), -torch.inf)
    logits[:, 3] = -7.0
    tokens, keys = step_on(logits, temperature=temperature)
    assert tokens.tolist() == [3, 3]
    assert keys.tolist() == [math.inf, math.inf]
    logits[1, 3] = -torch.inf
    with pytest.raises(FloatingPointError, match="logits at row 1 are -inf for every token allowed"):
        step_on(logits, temperature=temperature)


def test_predict__guidance_keeps_tokens_excluded_that_the_model_excludes():
    logits = torch.zeros(2, 5)
    logits[:, 4] = -torch.inf
    logits[0, 2] = 1.0
    assert step_on(logits, cfg_scale=1.0)[0].tolist() == [2]
    logits[1, 3] = -torch.inf  # excluded without the prompt only: the formula has no value
    with pytest.raises(FloatingPointError, match="row 0"):
        step_on(logits, cfg_scale=1.0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30, 1e-3])
def test_draw_categorical__cold_draws_take_the_largest(temperature):
    logits = torch.tensor([-torch.inf, -1e4, 1e4, 9.9e3]).expand(1, 5, 4)
    uniform = torch.linspace(0, 1 - 2**-53, 5, dtype=torch.float64)[None]
    assert (draw_categorical(logits, temperature, uniform) == 2).all()


@pytest.mark.parametrize("temperature", [1e30, 1e308])
def test_draw_categorical__hot_draws_are_uniform_over_what_is_possible(temperature):
    logits = torch.tensor([-torch.inf, -1e4, 1e4, 0.0]).expand(1, 6, 4)
    uniform = ((torch.arange(6) + 0.5) / 6).double()[None]
    assert draw_categorical(logits, temperature, uniform)[0].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draw_categorical__equal_steps_of_u_give_the_softmax(temperature):
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.5, -3.0])
    n = 20_000
    uniform = (torch.arange(n).double() + 0.5) / n
    tokens = draw_categorical(logits.expand(1, n, -1), temperature, uniform[None])[0]
    frequency = tokens.bincount(minlength=5) / n
    torch.testing.assert_close(frequency, (logits / temperature).softmax(0), atol=2 / n, rtol=0)


def test_draw_categorical__ends_of_the_interval_hit_possible_tokens():
    logits = torch.tensor([[[-torch.inf, 0.3, 0.1, -torch.inf]] * 2])
    uniform = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert draw_categorical(logits, 1.0, uniform).tolist() == [[1, 2]]
