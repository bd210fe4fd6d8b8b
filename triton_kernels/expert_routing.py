"""Which rows go to which expert, as lists on the device: the host never learns the counts.

`choose` takes the experts of each row from a router's scores. The choices [R, K] are numbered in their own order; such
a number is called a pair (row, choice). `route` sorts the pairs by expert, keeping their order within an expert, and
cuts each expert's stretch into tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FUSED, next_power_of_2

# Choices that one pass of `route_kernel` looks at, and its warps: a canvas has few, a long prompt many, where passes
# that wait for each other's loads are what the time goes to.
FEW = {"BLOCK": 1024, "num_warps": 4}
MANY = {"BLOCK": 4096, "num_warps": 16}
MANY_PAIRS = 8192
TILE_BLOCK = 32
# Rows that a program of `choose_kernel` takes: one for each of its warps.
CHOOSE_ROWS = 4


@triton.jit(do_not_specialize=["rows"])
def choose_kernel(
    scores, expert_scale, index, weights, rows: tl.int32,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """index, weights [rows, TOP_K] of scores [rows, EXPERTS], as `reference.feed_forward.choose`.

    A score and its expert become one key whose order is that of the scores, ties to the lower number and NaN in front,
    where it spoils the row's weights and no address.
    """
    TAKEN: tl.constexpr = -0x8000000000000000
    o_r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_e = tl.arange(0, BINS)
    o_k = tl.arange(0, SLOTS)
    m_r = o_r < rows
    m = m_r[:, None] & (o_e < EXPERTS)[None, :]
    # [ROWS, BINS]
    b_x = tl.load(scores + (o_r * EXPERTS)[:, None] + o_e[None, :], mask=m, other=0.0).to(tl.float32)
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_x == b_x, tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits), 0x7FFFFFFF)
    b_key = (b_bits.to(tl.int64) << 32) | (0x7FFFFFFF - o_e)[None, :].to(tl.int64)
    b_key = tl.where((o_e < EXPERTS)[None, :], b_key, TAKEN)
    # [ROWS, SLOTS]
    b_best = tl.full([ROWS, SLOTS], TAKEN, tl.int64)
    for k in tl.static_range(TOP_K):
        # [ROWS]
        best = tl.max(b_key, 1)
        b_best = tl.where((o_k == k)[None, :], best[:, None], b_best)
        b_key = tl.where(b_key == best[:, None], TAKEN, b_key)
    b_e = 0x7FFFFFFF - (b_best & 0x7FFFFFFF).to(tl.int32)
    b_bits = (b_best >> 32).to(tl.int32)
    b_x = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits).to(tl.float32, bitcast=True)
    # The first choice's is the largest; the softmax's own sum goes out with the division by that of the choices.
    first = tl.sum(tl.where((o_k == 0)[None, :], b_x, 0.0), 1)
    m_k = (o_k < TOP_K)[None, :]
    b_p = tl.where(m_k, tl.exp(b_x - first[:, None]), 0.0)
    m_k = m_r[:, None] & m_k
    b_scale = tl.load(expert_scale + b_e, mask=m_k, other=0.0).to(tl.float32)
    b_w = b_p / tl.sum(b_p, 1)[:, None] * b_scale
    o_o = (o_r * TOP_K)[:, None] + o_k[None, :]
    tl.store(index + o_o, b_e.to(tl.int64), mask=m_k)
    tl.store(weights + o_o, b_w, mask=m_k)


@triton.jit
def chosen(index, o_p, pairs, EXPERTS: tl.constexpr):
    """The experts of the pairs o_p as int32; EXPERTS for what is none: beyond the end, or out of range."""
    b_e = tl.load(index + o_p, mask=o_p < pairs, other=EXPERTS)
    return tl.where((b_e >= 0) & (b_e < EXPERTS), b_e, EXPERTS).to(tl.int32)


@triton.jit(do_not_specialize=["pairs", "tiles_most"])
def route_kernel(
    index, order, tiles, pairs: tl.int32, tiles_most: tl.int32,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per expert, and one more that marks the unused entries of the list of tiles.

    Every program counts all choices: that is less work than waiting for another program's counts.
    """
    i_e = tl.program_id(0)
    o_p = tl.arange(0, BLOCK)
    # [BINS]
    b_counts = tl.zeros([BINS], tl.int32)
    for start in range(0, pairs, BLOCK):
        b_counts += tl.histogram(chosen(index, start + o_p, pairs, EXPERTS), BINS)
    o_e = tl.arange(0, BINS)
    b_tiles = tl.where(o_e < EXPERTS, (b_counts + BLOCK_M - 1) // BLOCK_M, 0)
    begin = tl.sum(tl.where(o_e < i_e, b_counts, 0), 0)
    end = begin + tl.sum(tl.where(o_e == i_e, b_counts, 0), 0)
    first = tl.sum(tl.where(o_e < i_e, b_tiles, 0), 0)
    last = first + tl.sum(tl.where(o_e == i_e, b_tiles, 0), 0)
    last = tl.where(i_e == EXPERTS, tiles_most, last)
    expert = tl.where(i_e == EXPERTS, -1, i_e)
    for tile in range(first, last, TILE_BLOCK):
        o_t = tile + tl.arange(0, TILE_BLOCK)
        m_t = o_t < last
        tl.store(tiles + o_t, tl.zeros([TILE_BLOCK], tl.int32) + expert, mask=m_t)
        tl.store(tiles + tiles_most + o_t, begin + (o_t - first) * BLOCK_M, mask=m_t)
        tl.store(tiles + 2 * tiles_most + o_t, tl.zeros([TILE_BLOCK], tl.int32) + end, mask=m_t)
    if begin < end and i_e < EXPERTS:
        for start in range(0, pairs, BLOCK):
            # [BLOCK]
            m_own = chosen(index, start + o_p, pairs, EXPERTS) == i_e
            b_place = begin + tl.cumsum(m_own.to(tl.int32), 0) - 1
            tl.store(order + b_place, start + o_p, mask=m_own)
            begin += tl.sum(m_own.to(tl.int32), 0)


def choose(scores: Tensor, expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Arguments and results: `reference.feed_forward.choose`; `scores` contiguous."""
    rows, count = scores.shape
    index = torch.empty((rows, top_k), dtype=torch.int64, device=scores.device)
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=scores.device)
    if rows:
        choose_kernel[(triton.cdiv(rows, CHOOSE_ROWS),)](
            scores, expert_scale.contiguous(), index, weights, rows, EXPERTS=count, BINS=next_power_of_2(count),
            TOP_K=top_k, SLOTS=next_power_of_2(top_k), ROWS=CHOOSE_ROWS, **FUSED, num_warps=4,
        )  # fmt: skip
    return index, weights


def most_tiles(pairs: int, experts: int, block_m: int) -> int:
    """The largest number of tiles that any routing of `pairs` choices can need: the size of a launch."""
    return (pairs + min(pairs, experts) * (block_m - 1)) // block_m


def route(index: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Sorts the choices by expert.

    Args:
        index: [R, K] int64, contiguous. Numbers outside [0, experts) belong to no expert and appear nowhere.
        experts: X.
        block_m: pairs in a tile.

    Returns:
        order [R * K] int32: pairs by expert, ascending within an expert; unwritten behind the last expert's.
        tiles [3, T] int32 with T = `most_tiles`: the expert of a tile (-1: unused), its first place in `order`, and
            the end of its expert's places.
    """
    pairs = index.numel()
    total = most_tiles(pairs, experts, block_m)
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    tiles = torch.empty((3, total), dtype=torch.int32, device=index.device)
    route_kernel[(experts + 1,)](
        index, order, tiles, pairs, total, EXPERTS=experts, BINS=next_power_of_2(experts + 1), BLOCK_M=block_m,
        TILE_BLOCK=TILE_BLOCK, **FUSED, **(MANY if pairs > MANY_PAIRS else FEW),
    )  # fmt: skip
    return order, tiles
