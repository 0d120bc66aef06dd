"""pack_masked and token_weight_sums: values by a plain loop, same bits in C++, mask ids inside the text."""

import pytest
import torch
from backends import both_backends, needs_extension
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vrpo_kernels import pack_masked, token_weight_sums
from vrpo_kernels.testing import assert_bitwise_equal, poisoned_empty

MASK = 3


@st.composite
def batches(draw):
    """Prompts, responses (both may contain MASK) and, for each of K samples, sorted masked positions."""
    num_samples = draw(st.integers(1, 3))
    tokens = st.integers(0, 5)
    batch = []
    for _ in range(draw(st.integers(0, 4))):
        prompt = draw(st.lists(tokens, max_size=4))
        response = draw(st.lists(tokens, max_size=6))
        positions = st.sets(st.integers(0, len(response) - 1)) if response else st.just(set())
        batch.append((prompt, response, [sorted(draw(positions)) for _ in range(num_samples)]))
    return num_samples, batch


def tensors(batch):
    """(tokens_U, prompt_length_R, response_length_R, position_N, offsets_S1)."""
    lists = (
        [token for prompt, response, _ in batch for token in prompt + response],
        [len(prompt) for prompt, _, _ in batch],
        [len(response) for _, response, _ in batch],
        [p for _, _, samples in batch for positions in samples for p in positions],
        [0] + [len(positions) for _, _, samples in batch for positions in samples],
    )
    out = [torch.tensor(values, dtype=torch.int64) for values in lists]
    out[4] = out[4].cumsum(0)
    return out


def naive_pack(batch):
    tokens, position, cu_seqlens, rows, targets = [], [], [0], [], []
    for prompt, response, samples in batch:
        for positions in samples:
            start = len(tokens)
            tokens += prompt + [MASK if i in positions else t for i, t in enumerate(response)]
            position += range(len(prompt) + len(response))
            cu_seqlens.append(len(tokens))
            rows += [start + len(prompt) + i for i in positions]
            targets += [response[i] for i in positions]
    return tokens, position, cu_seqlens, rows, targets


@settings(deadline=None, max_examples=100)
@given(batches())
@example((2, [([MASK, 1], [MASK, 2, MASK], [[1], []]), ([], [4], [[0], [0]])]))
def test_pack_masked__equals_a_plain_loop(case):
    num_samples, batch = case
    pack = pack_masked(*tensors(batch), num_samples=num_samples, mask_token_id=MASK, backend="reference")
    for got, want, name in zip(pack, naive_pack(batch), pack._fields, strict=True):
        assert got.tolist() == want, name
    assert pack.cu_seqlens_S1.dtype is torch.int32


@needs_extension
@settings(deadline=None, max_examples=150)
@given(batches(), st.integers(0, 2**31))
def test_pack_masked__has_the_same_bits_in_cpp(case, seed):
    num_samples, batch = case
    args = tensors(batch)
    options = {"num_samples": num_samples, "mask_token_id": MASK}
    expected = pack_masked(*args, **options, backend="reference")
    with poisoned_empty():
        candidate = pack_masked(*args, **options, backend="cpu")
    for got, want, name in zip(candidate, expected, expected._fields, strict=True):
        assert_bitwise_equal(got, want, name)

    _, _, lengths, position, offsets = args
    weight = torch.randn(len(position), generator=torch.Generator().manual_seed(seed))
    options = {"num_samples": num_samples, "num_tokens": int(lengths.sum())}
    expected = token_weight_sums(weight, position, offsets, lengths, **options, backend="reference")
    with poisoned_empty():
        candidate = token_weight_sums(weight, position, offsets, lengths, **options, backend="cpu")
    for got, want in zip(candidate, expected, strict=True):
        assert_bitwise_equal(got, want)


@both_backends
def test_pack_masked__a_mask_token_in_the_text_is_a_token(backend):
    """Prompt and response are made of mask tokens; the rows are still exactly the drawn ones."""
    batch = [([MASK, MASK], [MASK, MASK, MASK], [[1], [0, 2]])]
    pack = pack_masked(*tensors(batch), num_samples=2, mask_token_id=MASK, backend=backend)
    assert pack.row_N.tolist() == [3, 7, 9]
    assert pack.target_N.tolist() == [MASK] * 3
    assert pack.tokens_T.tolist() == [MASK] * 10


@both_backends
def test_token_weight_sums__adds_the_samples_that_mask_a_token(backend):
    batch = [([1], [5, 6, 7], [[0, 1], [1], []]), ([], [8, 9], [[1], [1], [0, 1]])]
    _, _, lengths, position, offsets = tensors(batch)
    weight = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    sums, row_sums = token_weight_sums(
        weight, position, offsets, lengths, num_samples=3, num_tokens=5, backend=backend
    )
    assert sums.tolist() == [1, 6, 0, 32, 88]
    assert row_sums.tolist() == [1, 6, 6, 88, 88, 32, 88]


def changed(**change):
    """A valid call of pack_masked with some arguments replaced."""
    names = ("tokens_U", "prompt_length_R", "response_length_R", "position_N", "offsets_S1")
    batch = [([1], [5, 6, 7], [[0, 1], [1]])]
    arguments = dict(zip(names, tensors(batch), strict=True))
    return arguments | {"num_samples": 2, "mask_token_id": MASK, "backend": "reference"} | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_N": torch.tensor([0, 3, 1])}, r"position_N must lie in \[0, response length\)"),
        ({"position_N": torch.tensor([1, 0, 1])}, "strictly ascending"),
        ({"position_N": torch.tensor([1, 1, 1])}, "strictly ascending"),
        ({"offsets_S1": torch.tensor([0, 2, 4])}, "offsets_S1 must run from 0"),
        ({"offsets_S1": torch.tensor([0, 4, 3])}, "offsets_S1 must not decrease"),
        ({"num_samples": 3}, "num_samples"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"tokens_U": torch.arange(5)}, "tokens_U"),
        ({"prompt_length_R": torch.tensor([-1])}, "must not be negative"),
        ({"tokens_U": torch.zeros(4)}, "tokens_U must be int64"),
        ({"backend": "triton"}, "backend 'triton' cannot run because"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pack_masked__says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        pack_masked(**changed(**change))


@both_backends
def test_pack_masked__passes_opcheck(backend):
    args = list(changed(backend=backend).values())
    torch.library.opcheck(torch.ops.vrpo_kernels.pack_masked, tuple(args))
    _, _, lengths, position, offsets = args[:5]
    args = (torch.rand(3), position, offsets, lengths, 2, 3, backend)
    torch.library.opcheck(torch.ops.vrpo_kernels.token_weight_sums, args)


def test_pack_masked__compiles_without_a_graph_break():
    arguments = changed()
    compiled = torch.compile(lambda **kw: pack_masked(**kw).row_N + 1, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(**arguments), pack_masked(**arguments).row_N + 1)
