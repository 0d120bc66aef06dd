"""The generator against the published vectors, in Python and in C++."""

import pytest
import torch
from backends import needs_extension

from vrpo_kernels import philox
from vrpo_kernels.philox import _by_formula, philox4x32
from vrpo_kernels.testing import assert_bitwise_equal

# Philox4x32-10 of the Random123 library's known-answer file: counter, key, words.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_philox4x32__known_answers(name):
    counter, key, words = KNOWN[name]
    out = philox4x32(key[0] | key[1] << 32, *(torch.tensor(c) for c in counter))
    assert tuple(int(word) for word in out) == words


@needs_extension
def test_philox_words__known_answer_in_cpp():
    assert torch.ops.vrpo.philox_words(1, 0, 0, 0, 0).tolist() == [list(KNOWN["zeros"][2])]


@needs_extension
@pytest.mark.parametrize("seed", [0, 1234, 2**31 + 5, 2**40 + 7, 2**63 - 1, 2**63, 2**64 - 1])
def test_philox_words__cpp_equals_python(seed):
    counters = (0xFFFFFFFF, 2**31, 77)
    candidate = torch.ops.vrpo.philox_words(1001, *counters, seed - 2**64 if seed >= 2**63 else seed)
    words = _by_formula(seed, *torch.broadcast_tensors(torch.arange(1001), *map(torch.tensor, counters)))
    assert_bitwise_equal(candidate, torch.stack(words, dim=1))


@needs_extension
@pytest.mark.parametrize("seed", [0, 1234, 2**63 - 1, 2**63, 2**64 - 1])
def test_philox4x32__runs_in_cpp_with_the_bits_of_the_formula(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed % 997)
    drawn = [torch.randint(0, 2**32, shape, generator=generator) for shape in ((7, 1), (1, 9), (), (9,))]
    expected = _by_formula(seed, *torch.broadcast_tensors(*drawn))
    monkeypatch.setattr(philox, "_by_formula", None)  # only C++ is left
    for found, word in zip(philox4x32(seed, *drawn), expected, strict=True):
        assert_bitwise_equal(found, word)


def test_philox4x32__has_the_same_bits_under_vmap():
    words = torch.arange(6).view(2, 3)
    found = torch.func.vmap(lambda c0: torch.stack(philox4x32(5, c0, c0, c0, c0)))(words)
    assert_bitwise_equal(found, torch.stack(philox4x32(5, *(words,) * 4), dim=1))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_philox4x32__rejects_a_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="seed must be"):
        philox4x32(seed, *(torch.tensor(0),) * 4)


def test_philox4x32__leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    philox4x32(3, torch.arange(9), *(torch.tensor(0),) * 3)
    assert torch.equal(before, torch.get_rng_state())
