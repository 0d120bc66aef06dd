"""Response batches of random tokens for tests of the pipeline."""

import torch

from vrpo.batch import ResponseBatch


def make_pairs(lengths, vocab_size=40, seed=0, first_example=0):
    """(prompt, chosen, rejected) token lists; lengths: (P, L_chosen, L_rejected) of each pair."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in pair)
        for pair in lengths
    ]


def to_batch(pairs, example_ids=None) -> ResponseBatch:
    """The pairs as the collator would hand them over."""
    example_ids = list(range(len(pairs))) if example_ids is None else example_ids
    tokens, prompt_length, response_length = [], [], []
    for prompt, *responses in pairs:
        for response in responses:
            tokens += prompt + response
            prompt_length.append(len(prompt))
            response_length.append(len(response))
    num_sides = len(pairs[0]) - 1
    return ResponseBatch(
        tokens_U=torch.tensor(tokens),
        prompt_length_R=torch.tensor(prompt_length),
        response_length_R=torch.tensor(response_length),
        example_R=torch.tensor(example_ids).repeat_interleave(num_sides),
        side_R=torch.arange(num_sides).repeat(len(pairs)),
        num_sides=num_sides,
    )
