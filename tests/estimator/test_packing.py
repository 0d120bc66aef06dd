"""Packs against a literal construction, and the cut into micro-batches."""

import pytest
import torch
from batches import make_pairs, to_batch

from vrpo.estimator import masking
from vrpo.estimator.packing import pack
from vrpo.step import split_by_tokens

MASK_ID = 7
LENGTHS = [(3, 5, 2), (1, 1, 9), (6, 4, 4)]


def draw(batch, num_samples=3, design="paper"):
    return masking.draw(batch, design=design, num_samples=num_samples, seed=5, epoch=2)


@pytest.mark.parametrize("design", ["paper", "t"])
def test_pack__equals_a_literal_construction(design):
    pairs = make_pairs(LENGTHS)
    # The mask id stands in a prompt and in a response: neither may be taken for a masked position.
    pairs[0][0][1] = MASK_ID
    pairs[2][1][0] = MASK_ID
    batch = to_batch(pairs)
    drawn = draw(batch, design=design)
    packed = pack(batch, drawn, MASK_ID)

    tokens, positions, bounds, rows, targets = [], [], [0], [], []
    segment = 0
    for prompt, *responses in pairs:
        for response in responses:
            for _ in range(drawn.num_samples):
                copy = prompt + response
                for p in drawn.position_N[drawn.offsets_S1[segment] : drawn.offsets_S1[segment + 1]].tolist():
                    rows.append(len(tokens) + len(prompt) + p)
                    targets.append(response[p])
                    copy[len(prompt) + p] = MASK_ID
                tokens += copy
                positions += range(len(copy))
                bounds.append(len(tokens))
                segment += 1
    assert packed.tokens_T.tolist() == tokens
    assert packed.position_T.tolist() == positions
    assert packed.cu_seqlens_S1.tolist() == bounds and packed.cu_seqlens_S1.dtype == torch.int32
    assert packed.row_N.tolist() == rows
    assert packed.target_N.tolist() == targets
    assert packed.max_seqlen == max(len(p) + len(r) for p, *both in pairs for r in both)
    assert torch.equal(packed.weight_N, drawn.weight_N) and packed.num_samples == 3


def test_examples__cuts_out_whole_examples():
    pairs = make_pairs(LENGTHS)
    batch, want = to_batch(pairs).examples(1, 3), to_batch(pairs[1:], example_ids=[1, 2])
    for name in ("tokens_U", "prompt_length_R", "response_length_R", "example_R", "side_R"):
        assert torch.equal(getattr(batch, name), getattr(want, name)), name
    assert batch.num_examples == 2


@pytest.mark.parametrize("max_tokens", [1, 30, 60, 10_000])
@pytest.mark.parametrize("at_least", [1, 2, 3, 4, 9])
def test_split_by_tokens__keeps_order_budget_and_count(max_tokens, at_least):
    pairs = make_pairs([(2, 3, 1), (1, 1, 1), (5, 2, 8), (2, 2, 2), (1, 4, 4)])
    batch = to_batch(pairs)
    parts = list(split_by_tokens(batch, 2, max_tokens, at_least))
    assert torch.cat([part.tokens_U for part in parts]).tolist() == batch.tokens_U.tolist()
    assert torch.cat([part.example_R for part in parts]).tolist() == batch.example_R.tolist()
    assert len(parts) >= min(at_least, len(pairs))
    for part in parts:
        assert part.num_examples == 1 or 2 * int(part.length_R.sum()) <= max_tokens


def test_split_by_tokens__is_one_part_when_all_fits():
    batch = to_batch(make_pairs(LENGTHS))
    assert len(list(split_by_tokens(batch, 1, 1000))) == 1
