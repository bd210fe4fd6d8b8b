"""Philox 4x32-10 against the known answers of its authors' library (Random123, kat_vectors)."""

import pytest
import torch

from dgemma_accel.reference.philox import below, philox4x32, random_words, uniform_from_word

ALL = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter, key, words):
    def tensors(values):
        return tuple(torch.tensor(value) for value in values)

    assert tuple(int(word) for word in philox4x32(tensors(counter), tensors(key))) == words


def test_layout_of_key_and_counter():
    seed, offset, row = 0x299F31D0_A4093822 >> 1, 0x0370734413198A2E, 0x05A308D3_243F6A88
    words = random_words(torch.tensor(seed), torch.tensor(offset), torch.tensor([row]))
    counter = (row & ALL, row >> 32, offset & ALL, offset >> 32)
    key = (seed & ALL, seed >> 32)
    expected = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in words] == [int(word) for word in expected]


def test_uniform_is_below_one_and_exact():
    words = torch.tensor([0, 255, 256, ALL])
    assert uniform_from_word(words).tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]


def test_below_is_the_high_half_of_the_product():
    generator = torch.Generator().manual_seed(0)
    high, low = torch.randint(0, 2**32, (2, 1000), generator=generator)
    for bound in (1, 2, 3, 126_464, 262_144, 2**31 - 1):
        expected = [((h << 32 | l) * bound) >> 64 for h, l in zip(high.tolist(), low.tolist())]
        assert below(high, low, bound).tolist() == expected
