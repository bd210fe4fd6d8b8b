"""Philox 4x32-10, the counter-based generator behind every draw of this package.

Source of the arithmetic: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11.

One call serves one row (one canvas position). Its four words have fixed uses, so that a sample, a
renoised token and a random confidence drawn under the same seed and offset are independent:

====  ==============================================================
word  use
====  ==============================================================
0     the uniform of `row_stats` (which token is sampled)
1, 2  the token written by `Renoise` (high and low half of 64 bits)
3     random confidence, Bernoulli commits and Gumbel noise of `commit`
====  ==============================================================

The key is the 64-bit seed; the counter is (row low, row high, offset low, offset high).
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
ROUNDS = 10

WORD_SAMPLE = 0
WORD_RENOISE_HIGH = 1
WORD_RENOISE_LOW = 2
WORD_SELECT = 3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # int64 products wrap around, which leaves the low 64 bits right; the shift is arithmetic, so mask it.
    product = b * a
    return (product >> 32) & MASK32, product & MASK32


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox 4x32.

    Args:
        counter: four int64 tensors holding 32-bit words, broadcastable.
        key: two int64 tensors holding 32-bit words, broadcastable.

    Returns:
        Four int64 tensors of values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = (k0 + WEYL_0) & MASK32
        k1 = (k1 + WEYL_1) & MASK32
    return c0, c1, c2, c3


def random_words(seed: Tensor, offset: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """The four words of each row.

    Args:
        seed: 0-d int64.
        offset: 0-d int64, e.g. the number of the denoising step.
        rows: int64, any shape: row numbers (batch * canvas length + position).

    Returns:
        Four int64 tensors of the shape of `rows`, values in [0, 2**32).
    """
    seed = seed.to(rows.device, torch.int64)
    offset = offset.to(rows.device, torch.int64)
    zero = torch.zeros_like(rows)
    counter = (
        rows & MASK32,
        (rows >> 32) & MASK32,
        (offset & MASK32) + zero,
        ((offset >> 32) & MASK32) + zero,
    )
    return philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))


def uniform_from_word(word: Tensor) -> Tensor:
    """A 32-bit word to fp32 in [0, 1): its upper 24 bits times 2**-24, exact in fp32."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def below(high: Tensor, low: Tensor, bound: int) -> Tensor:
    """An integer in [0, bound), bound < 2**31: the upper 64 bits of (64 random bits) * bound."""
    return (high * bound + ((low * bound) >> 32)) >> 32
