"""EOS fill: a pure function of (seed, epoch, example), its law, its limits, and whom it leaves alone."""

import pytest
import torch
from batches import make_pairs, to_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrpo.estimator.eos_fill import PURPOSE_EOS_FILL, EosFill, fill_lengths, mean_fill
from vrpo.estimator.levels import PURPOSE_LEVELS, PURPOSE_POSITIONS
from vrpo.generation import predict

EOS, EOT = 1, 2


def fill_of(**fields) -> EosFill:
    return EosFill(
        **{"eos_token_id": EOS, "endings": ((EOS,), (EOT,)), "max_fill": 20, "max_length": 64, "seed": 5}
        | fields
    )


def completions(responses: list[list[int]], prompt_length: int = 3, first_example: int = 0):
    rows = [([9] * prompt_length, response) for response in responses]
    return to_batch(rows, example_ids=list(range(first_example, first_example + len(rows))))


def responses_of(batch) -> list[list[int]]:
    pieces = torch.split(batch.tokens_U, batch.length_R.tolist())
    return [piece[n:].tolist() for piece, n in zip(pieces, batch.prompt_length_R.tolist(), strict=True)]


def lengths(count: int, bound: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    example_R = torch.arange(count)
    return fill_lengths(
        seed, epoch, example_R, torch.zeros_like(example_R), torch.full_like(example_R, bound)
    )


@pytest.mark.parametrize("bound", [0, 1, 2, 5, 27, 1000])
def test_fill_lengths__follow_the_stated_law(bound):
    """Each doubling has one chance in J, each length in it the same share: all frequencies within 5 sigma."""
    count = 60_000
    drawn = lengths(count, bound)
    octaves = [range(2**j - 1, min(2 ** (j + 1) - 1, bound + 1)) for j in range((bound + 1).bit_length())]
    probability = torch.tensor([1 / len(octaves) / len(octave) for octave in octaves for _ in octave])
    assert len(probability) == bound + 1
    frequency = torch.bincount(drawn, minlength=bound + 1) / count
    sigma = (probability * (1 - probability) / count).sqrt()
    assert ((frequency - probability).abs() <= 5 * sigma + 1e-12).all()
    expected = (probability.double() * torch.arange(bound + 1)).sum()
    assert mean_fill(bound) == pytest.approx(float(expected), rel=1e-6, abs=1e-12)


def test_fill_lengths__differ_between_epochs_seeds_and_examples():
    one = lengths(500, 1000)
    for other in (lengths(500, 1000, epoch=1), lengths(500, 1000, seed=1), one.roll(1)):
        agreement = torch.corrcoef(torch.stack([one, other]).log1p())[0, 1]
        assert abs(agreement) < 0.2
    assert torch.equal(one, lengths(500, 1000))


def test_fill_lengths__are_committed_integers():
    """A change of the law or of its counters changes every SFT run: it has to be made on purpose."""
    assert lengths(12, 1000, seed=42, epoch=3).tolist() == COMMITTED


COMMITTED = [65, 678, 0, 91, 875, 514, 95, 194, 0, 2, 90, 28]


def test_purpose__is_nobody_elses():
    others = {PURPOSE_POSITIONS, PURPOSE_LEVELS, predict._TOKEN_PURPOSE, predict._ORDER_PURPOSE}
    assert PURPOSE_EOS_FILL not in others and len(others) == 4


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    prompt_length=st.integers(1, 20),
    max_fill=st.integers(0, 100),
    max_length=st.integers(2, 60),
    epoch=st.integers(0, 2**32 - 1),
)
def test_eos_fill__appends_eos_only_and_never_crosses_max_length(
    sizes, prompt_length, max_fill, max_length, epoch
):
    before = completions([[7] * (size - 1) + [EOT] for size in sizes], prompt_length)
    after = fill_of(max_fill=max_fill, max_length=max_length)(before, epoch)
    for old, new, fill, length in zip(
        responses_of(before),
        responses_of(after),
        after.fill_R.tolist(),
        before.length_R.tolist(),
        strict=True,
    ):
        assert new == old + [EOS] * fill
        assert 0 <= fill <= max_fill
        assert length + fill <= max(max_length, length)
    assert torch.equal(after.prompt_length_R, before.prompt_length_R)
    assert torch.equal(after.response_length_R, before.response_length_R + after.fill_R)


def test_eos_fill__leaves_truncated_responses_alone():
    """One whose end is missing would be taught to stop where it was cut."""
    batch = completions([[7, 7, 7], [7, 7, EOS], [7, EOS, 7], [7, 7, EOT]] * 20)
    fill_R = fill_of()(batch, epoch=0).fill_R.view(-1, 4)
    assert (fill_R[:, [0, 2]] == 0).all()
    assert (fill_R[:, [1, 3]].sum(dim=0) > 0).all()


def test_eos_fill__knows_endings_of_several_tokens():
    """ChatML ends an answer by <|im_end|> and a line break: only both together are the end."""
    fill = fill_of(endings=((EOS,), (30, 31)))
    assert fill.is_whole([7, 30, 31]) and fill.is_whole([7, EOS])
    assert not any(map(fill.is_whole, ([7, 31], [7, 30], [31], [30, 31, 7])))


def test_eos_fill__depends_on_the_example_and_not_on_the_batch():
    together = fill_of()(completions([[7, EOS]] * 40), epoch=3)
    alone = [fill_of()(completions([[7, EOS]], first_example=i), epoch=3).fill_R.item() for i in range(40)]
    assert together.fill_R.tolist() == alone
    assert fill_of()(completions([[7] * 9 + [EOS]] * 40), epoch=3).fill_R.tolist() == alone


def test_eos_fill__is_cut_with_its_batch():
    batch = fill_of()(completions([[7, EOS]] * 10), epoch=0)
    part = batch.examples(3, 7)
    assert torch.equal(part.fill_R, batch.fill_R[3:7])
    assert responses_of(part) == responses_of(batch)[3:7]
    assert to_batch(make_pairs([(2, 3, 4)])).examples(0, 1).fill_R is None


def test_eos_fill__refuses_an_epoch_out_of_range():
    with pytest.raises(ValueError, match="epoch must be in"):
        fill_of()(completions([[7, EOS]]), epoch=-1)


@pytest.mark.parametrize("ending", [(30, 31), (8, 8, 8, 30, 31)])
def test_eos_fill__an_ending_lies_in_the_response_alone(ending):
    """Not half in the prompt, nor before the first token of the batch."""
    fill = fill_of(endings=(ending,))
    batch = to_batch([([30], [31])] * 40, example_ids=list(range(40)))
    assert not fill.lengths(batch, 0).any()
    assert not fill.lengths(batch.examples(0, 1), 0).any()
    whole = to_batch([([30], list(ending))] * 40, example_ids=list(range(40)))
    assert fill.lengths(whole, 0).any()
