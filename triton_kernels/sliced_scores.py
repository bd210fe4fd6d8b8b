"""Scores of `block_attention` as a batch of products over slices of the head.

With mma.sync the warps that share P V by columns find too few keys to share Q K^T by, and compute the same scores
several times. Cut in slices, each group of warps multiplies its own columns of the head, and their shares are added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import SINCE_3_9

# Triton before 3.9 divides the warps of a batched product otherwise: it spills, and shared memory may not suffice.
COMPILES = SINCE_3_9


@triton.jit
def load_sliced(
    p_block, p_prefix, stride_block, stride_prefix, from_prefix, first, end, o_n, o_s, m_s,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Keys [SLICES, BLOCK_N, BLOCK_D / SLICES] from `first` on; o_s, m_s are [SLICES, 1, BLOCK_D / SLICES]."""
    p = tl.where(from_prefix, p_prefix, p_block)
    stride = tl.where(from_prefix, stride_prefix, stride_block)
    p += first.to(tl.int64) * stride
    mask = (first + o_n < end)[None, :, None] & m_s
    if NARROW:
        o = o_n[None, :, None] * stride.to(tl.int32) + o_s
    else:
        o = o_n.to(tl.int64)[None, :, None] * stride + o_s
    return tl.load(p + o, mask=mask, other=0.0)


@triton.jit
def sum_slices(b_s, IN_TURNS: tl.constexpr):
    """[SLICES, M, N] summed over the slices.

    Warps exchange their shares through shared memory; in turns, a quarter of the tile at a time, they need less of it.
    """
    if IN_TURNS:
        SLICES: tl.constexpr = b_s.shape[0]
        M: tl.constexpr = b_s.shape[1] // 16
        N: tl.constexpr = b_s.shape[2] // 2
        # Rows r and r + 8 and both halves of the columns are a thread's own: splitting them moves nothing.
        b_s = tl.permute(tl.reshape(b_s, [SLICES, M, 2, 8, 2, N]), (0, 1, 3, 5, 4, 2))
        b_upper, b_lower = tl.split(b_s)
        b_0, b_1 = tl.split(b_upper)
        b_2, b_3 = tl.split(b_lower)
        # [M, 8, N, 2], then [M, 8, N, 2, 2]
        b_upper = tl.join(tl.sum(b_0, 0), tl.sum(b_1, 0))
        b_lower = tl.join(tl.sum(b_2, 0), tl.sum(b_3, 0))
        result = tl.reshape(tl.permute(tl.join(b_upper, b_lower), (0, 4, 1, 3, 2)), [M * 16, N * 2])
    else:
        result = tl.sum(b_s, 0)
    return result
