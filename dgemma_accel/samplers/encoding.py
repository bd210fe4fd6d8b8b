"""What a rule and a write of `commit` come down to: the numbers that kernels read.

csrc/params.h and triton_kernels/commit.py know the values of these enumerations.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from .numbers import Number


class Measure(enum.IntEnum):
    """The score of a position; the highest score is rank 1 and ties go to the lower position."""

    SAMPLE_PROB = 0  # probability of the proposed token
    TOP1_PROB = 1  # probability of the most probable token
    ENTROPY = 2  # minus the entropy
    MARGIN = 3  # top-1 minus top-2 probability
    RANDOM = 4  # a uniform draw (Philox word 3)
    POSITION = 5  # minus the position


# Measures in [0, 1], which a threshold can be compared with.
PROBABILITIES = (Measure.SAMPLE_PROB, Measure.TOP1_PROB, Measure.MARGIN)


class Select(enum.IntEnum):
    """Which candidates are committed, given rank r = 1..n and score c of each."""

    TOP_K = 0  # r <= k
    # r <= k, or c >= value (STRICT: c > value; RELATIVE: value becomes min(value, best c - value2)); with the measure
    # ENTROPY the value is an entropy, which c = minus the entropy is compared with minus of.
    THRESHOLD = 1
    FACTOR = 2  # longest prefix of ranks with c(r) >= 1 - value / (r + 1); rank 1 always
    ENTROPY_BOUND = 3  # exclusive prefix sum of entropy <= value; INCLUSIVE: inclusive < value, at least 1
    BERNOULLI = 4  # uniform draw (Philox word 3) < value, independently
    HIERARCHY = 5  # r <= k, or c > value, or c > value2 and the best of its run of adjacent candidates
    EDIT = 6  # mask tokens: THRESHOLD | STRICT; other candidates: sample differs and c > value2


class Flag(enum.IntFlag):
    NONE = 0
    STRICT = 1
    RELATIVE = 2
    INCLUSIVE = 4
    LAST_RANK_QUIRK = 8  # FACTOR: when the first rank to fail is the last one, commit it too
    GUMBEL = 16  # TOP_K: score / value2 + Gumbel noise (Philox word 3)


class Write(enum.IntEnum):
    """What a candidate that is not committed receives."""

    REMASK = 0
    RENOISE = 1
    KEEP = 2


class EncodedRule(NamedTuple):
    """A rule as numbers: what `commit` runs."""

    measure: Measure
    select: Select
    flags: Flag = Flag.NONE
    k: Number = 0
    value: Number = 0.0
    value2: Number = 0.0
    mask_id: int = -1
