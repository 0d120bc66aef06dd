"""mask_select: same bits on every backend, exact counts, uniform positions, a function of integers only."""

import itertools
import math

import pytest
import torch
from backends import both_backends, needs_extension
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vrpo_kernels import mask_select
from vrpo_kernels.mask_select import reference
from vrpo_kernels.testing import assert_bitwise_equal, poisoned_empty

U32_END = 2**32
words = st.integers(0, U32_END - 1)
u32_or_end = st.one_of(st.sampled_from([0, 1, U32_END - 1, U32_END]), st.integers(0, U32_END))


def tensors(segments):
    """[(length, counter, first, count)] -> the four arguments."""
    length, counter, first, count = zip(*segments, strict=True)
    return (
        torch.tensor(length),
        torch.tensor(counter).view(-1, 3),
        torch.tensor(first),
        torch.tensor(count),
    )


@st.composite
def ranked_segment(draw):
    length = draw(st.one_of(st.integers(1, 9), st.integers(1, 700)))
    counter = (draw(words), draw(words), draw(words))
    return length, counter, draw(u32_or_end), draw(st.integers(0, length))


@st.composite
def bernoulli_segment(draw):
    counter = (draw(words), draw(words), draw(words))
    return draw(st.integers(1, 300)), counter, draw(u32_or_end), draw(u32_or_end)


def naive(length, counter, first, count, seed, by_rank):
    """One segment in plain Python, from the definition."""
    word = reference.mask_words(torch.tensor([length]), torch.tensor([counter]), seed)[0].tolist()
    if not by_rank:
        return [p for p in range(length) if (word[p] - first) % U32_END < count]
    ranked = sorted(range(length), key=lambda p: (word[p], p))
    return sorted(p for rank, p in enumerate(ranked) if (rank - first) % length < count)


@settings(deadline=None, max_examples=60)
@given(st.lists(ranked_segment(), min_size=1, max_size=4), st.integers(0, 2**64 - 1))
@example([(5, (U32_END - 1,) * 3, 3, 4)], 2**64 - 1)  # the window wraps around
@example([(1, (0, 0, 0), U32_END, 1)], 0)
def test_mask_select__by_rank_equals_the_definition(segments, seed):
    position, offsets = mask_select(*tensors(segments), seed=seed, by_rank=True, backend="reference")
    for s, segment in enumerate(segments):
        assert position[offsets[s] : offsets[s + 1]].tolist() == naive(*segment, seed, True)
        assert offsets[s + 1] - offsets[s] == segment[3]


@settings(deadline=None, max_examples=60)
@given(st.lists(bernoulli_segment(), min_size=1, max_size=4), st.integers(0, 2**64 - 1))
@example([(9, (0, 0, 0), 0, 0), (9, (0, 0, 0), 0, U32_END), (9, (0, 0, 0), U32_END, U32_END)], 1)
def test_mask_select__bernoulli_equals_the_definition(segments, seed):
    position, offsets = mask_select(*tensors(segments), seed=seed, by_rank=False, backend="reference")
    for s, segment in enumerate(segments):
        assert position[offsets[s] : offsets[s + 1]].tolist() == naive(*segment, seed, False)


def assert_backends_agree(segments, seed, by_rank):
    args = tensors(segments)
    expected = mask_select(*args, seed=seed, by_rank=by_rank, backend="reference")
    with poisoned_empty():
        candidate = mask_select(*args, seed=seed, by_rank=by_rank, backend="cpu")
    for got, want, name in zip(candidate, expected, ("position_N", "offsets_S1"), strict=True):
        assert_bitwise_equal(got, want, name)


@needs_extension
@settings(deadline=None, max_examples=150)
@given(st.lists(ranked_segment(), min_size=1, max_size=6), st.integers(0, 2**64 - 1))
@example([(700, (1, 2, 3), 699, 700), (700, (1, 2, 3), 0, 0), (700, (1, 2, 3), 350, 350)], 5)
def test_mask_select__by_rank_has_the_same_bits_in_cpp(segments, seed):
    assert_backends_agree(segments, seed, True)


@needs_extension
@settings(deadline=None, max_examples=100)
@given(st.lists(bernoulli_segment(), min_size=1, max_size=6), st.integers(0, 2**64 - 1))
@example([(9, (0, 0, 0), 0, 0), (9, (0, 0, 0), 0, U32_END), (9, (0, 0, 0), U32_END, U32_END)], 1)
def test_mask_select__bernoulli_has_the_same_bits_in_cpp(segments, seed):
    assert_backends_agree(segments, seed, False)


@needs_extension
@pytest.mark.parametrize("length", [4096, 50_000])
def test_mask_select__long_segments_have_the_same_bits_in_cpp(length):
    segments = [
        (length, (7, 8, 9), first, count)
        for first in (0, 1, length // 3, length - 1)
        for count in (1, length // 2, length - 1)
    ]
    assert_backends_agree(segments, 11, True)


@needs_extension
def test_mask_select__does_not_depend_on_the_number_of_threads():
    segments = [(1000 + s, (s, 1, 2), 5 * s, 400) for s in range(64)]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(mask_select(*tensors(segments), seed=3, by_rank=True, backend="cpu"))
    torch.set_num_threads(before)
    assert_bitwise_equal(results[0][0], results[1][0])


@both_backends
def test_mask_select__a_segment_does_not_depend_on_its_batch(backend):
    segments = [(30 + s, (s, 77, 0), 3, 10) for s in range(8)]
    position, offsets = mask_select(*tensors(segments), seed=1, by_rank=True, backend=backend)
    for s in range(8):
        alone, _ = mask_select(*tensors([segments[s]]), seed=1, by_rank=True, backend=backend)
        assert_bitwise_equal(position[offsets[s] : offsets[s + 1]], alone)


@both_backends
def test_mask_select__windows_of_one_permutation_tile_the_segment(backend):
    sizes = [4, 7, 1, 11]
    starts = [0, 4, 11, 12]
    segments = [(23, (1, 2, 3), 20 + start, size) for start, size in zip(starts, sizes, strict=True)]
    position, _ = mask_select(*tensors(segments), seed=1, by_rank=True, backend=backend)
    assert sorted(position.tolist()) == list(range(23))


@both_backends
@pytest.mark.parametrize("which", ["seed", "c1", "c2", "c3"])
def test_mask_select__every_integer_of_the_key_matters(backend, which):
    changed = {"seed": 0, "c1": 0, "c2": 0, "c3": 0} | {which: 1}
    results = [
        mask_select(
            *tensors([(200, (k["c1"], k["c2"], k["c3"]), 0, 100)]),
            seed=k["seed"],
            by_rank=True,
            backend=backend,
        )[0]
        for k in (dict.fromkeys(changed, 0), changed)
    ]
    common = len(set(results[0].tolist()) & set(results[1].tolist()))
    # Hypergeometric, mean 50, standard deviation 3.5: five of them.
    assert abs(common - 50) <= 18


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_mask_select__each_permutation_masks_its_smallest_words(order, monkeypatch):
    """Given words in any order, the reference masks the count smallest: with all orders equally likely, every
    subset of a size is too."""
    segment, position = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    monkeypatch.setattr(reference, "mask_words", lambda *_: (torch.tensor(order), segment, position))
    for count in range(5):
        args = tensors([(4, (0, 0, 0), 0, count)])
        masked, _ = mask_select(*args, seed=0, by_rank=True, backend="reference")
        assert masked.tolist() == [p for p in range(4) if order[p] < count]


def test_mask_select__equal_words_are_ranked_by_position(monkeypatch):
    word, segment = torch.tensor([5, 3, 5, 3, 5]), torch.zeros(5, dtype=torch.int64)
    monkeypatch.setattr(reference, "mask_words", lambda *_: (word, segment, torch.arange(5)))
    args = tensors([(5, (0, 0, 0), 0, 3)])
    masked, _ = mask_select(*args, seed=0, by_rank=True, backend="reference")
    assert masked.tolist() == [0, 1, 3]


@both_backends
def test_mask_select__every_subset_is_equally_frequent(backend):
    """20,000 draws of 2 of 5 positions: chi-square of the ten subsets, 9 degrees of freedom."""
    draws = 20_000
    segments = [(5, (0, s, 0), 0, 2) for s in range(draws)]
    position, _ = mask_select(*tensors(segments), seed=2026, by_rank=True, backend=backend)
    pairs = position.view(-1, 2)
    counts = torch.bincount(5 * pairs[:, 0] + pairs[:, 1], minlength=25)
    counts = counts[counts > 0].double()
    assert len(counts) == 10
    chi_square = ((counts - draws / 10) ** 2 / (draws / 10)).sum()
    assert chi_square < 27.9  # exceeded with probability 0.001


@both_backends
def test_mask_select__bernoulli_masks_at_its_rate(backend):
    segments = [(1000, (0, s, 0), 0, U32_END // 8) for s in range(100)]
    position, _ = mask_select(*tensors(segments), seed=7, by_rank=False, backend=backend)
    sigma = math.sqrt(100_000 / 8 * 7 / 8)
    assert abs(len(position) - 12_500) < 4 * sigma
    per_position = torch.bincount(position, minlength=1000).double()
    assert abs(per_position.var() / (100 / 8 * 7 / 8) - 1) < 0.2


@both_backends
def test_mask_select__no_segments_give_no_rows(backend):
    empty = torch.zeros(0, dtype=torch.int64)
    position, offsets = mask_select(
        empty, empty.view(0, 3), empty, empty, seed=0, by_rank=True, backend=backend
    )
    assert position.shape == (0,) and offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length_S": [0]}, r"length_S must be in \[1, 2\*\*31\), got 0"),
        ({"counter_S3": [[0, U32_END, 0]]}, r"counter_S3 must be in .*, got 4294967296"),
        ({"first_S": [-1]}, r"first_S must be in .*, got -1"),
        ({"count_S": [6]}, r"count_S must be in \[0, length_S\], got 6"),
        ({"count_S": [1, 2]}, "size S"),
        ({"counter_S3": [[0, 0]]}, "counter words"),
        ({"first_S": [0.0]}, "first_S must be int64"),
        ({"seed": 2**64}, "seed must be"),
        ({"num_rows": 3}, "num_rows must be the total of masked rows, 2, got 3"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mask_select__says_what_is_wrong(change, message):
    arguments = {
        "length_S": [5],
        "counter_S3": [[1, 2, 3]],
        "first_S": [0],
        "count_S": [2],
        "seed": 0,
        "by_rank": True,
        "backend": "reference",
    } | change
    with pytest.raises(ValueError, match=message):
        mask_select(
            **{
                name: torch.tensor(value)
                if name.startswith(("length", "counter", "first", "count"))
                else value
                for name, value in arguments.items()
            }
        )


@both_backends
@pytest.mark.parametrize("num_rows", [None, 70], ids=["unknown", "known"])
def test_mask_select__passes_opcheck(backend, num_rows):
    args = tensors([(100, (s, 0, 0), 9, 10 * (s + 1)) for s in range(3)] + [(40, (3, 0, 0), 9, 10)])
    torch.library.opcheck(torch.ops.vrpo_kernels.mask_select, (*args, 5, True, num_rows, backend))


def test_mask_select__compiles_without_a_graph_break():
    args = tensors([(100, (s, 0, 0), 9, 10) for s in range(3)])

    def twice(*args):
        position, offsets = mask_select(*args, seed=2**64 - 1, by_rank=True, num_rows=30)
        return 2 * position, offsets

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), twice(*args), strict=True):
        assert_bitwise_equal(got, want)
