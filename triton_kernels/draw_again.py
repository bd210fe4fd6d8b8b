"""The sample of rows whose logits were not kept: its tile is found by mass, computed again, and drawn from.

A row costs the product of its hidden state with one tile of the weight, 256 tokens of 262,144; settled rows that
chose one token share theirs in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FUSED, cap, int_parameter, next_power_of_2, philox, uniform_from_word
from .row_stats import FLOOR, first_beyond, rate, sampling_and_stats_temperature
from .softcap import difference

# Tokens that one program computes again, and how much of E it holds at a time.
TOKENS = 32
DEPTH = 128


@triton.jit(
    do_not_specialize="temperature stats_temperature softcap seed_value offset_value rows".split(),
    do_not_specialize_on_alignment=["seed", "offset"],
)
def choose_sample_tile_kernel(
    tile_max, tile_mass, logsumexp, chosen, remaining,
    temperature, stats_temperature, softcap, uniform, seed, offset, seed_value: tl.int64, offset_value: tl.int64,
    rows: tl.int32, tiles: tl.int32, temperature_stride, stats_stride,
    TEMPERATURE_POINTER: tl.constexpr, STATS_POINTER: tl.constexpr, TWO_TEMPERATURES: tl.constexpr,
    UNIFORM: tl.constexpr, SOFTCAP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Which tile holds a row's sample, and how much mass inside it lies before the sample, relative to the row's
    largest logit: the arithmetic of `merge_kernel`."""
    o_r = tl.program_id(0) + tl.arange(0, 1)
    m_r = o_r < rows
    _, b_t, _ = sampling_and_stats_temperature(
        temperature, stats_temperature, o_r, m_r, temperature_stride, stats_stride,
        TEMPERATURE_POINTER, STATS_POINTER, TWO_TEMPERATURES, 1,
    )  # fmt: skip
    o_t = tl.arange(0, TILES)
    m_t = m_r[:, None] & (o_t < tiles)[None, :]
    p_tile = o_r.to(tl.int64)[:, None] * tiles + o_t[None, :]
    # [1, TILES]
    b_tmax = tl.load(tile_max + p_tile, mask=m_t, other=float("-inf"))
    b_tz = tl.load(tile_mass + p_tile, mask=m_t, other=0.0)
    inverse_softcap = 1.0 / softcap
    b_top = cap(tl.max(b_tmax, 1), softcap, inverse_softcap, SOFTCAP)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_ttop = tl.where(m_t, cap(b_tmax, softcap, inverse_softcap, SOFTCAP), float("-inf"))
    b_shift = tl.maximum(difference(b_ttop, b_top[:, None]), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    b_lse = tl.load(logsumexp + o_r, mask=m_r, other=float("nan"))
    b_mass = (b_tz * tl.exp2(b_shift * rate(b_t)[:, None])).to(tl.float64)
    b_mass = tl.where((b_lse == b_lse)[:, None], b_mass, 0.0)
    b_u = tl.zeros([1], tl.float32)
    if UNIFORM:
        b_u += tl.load(uniform + o_r, mask=m_r, other=0.0)
    else:
        s = int_parameter(seed, seed_value, 0, 0)
        f = int_parameter(offset, offset_value, 0, 0)
        b_word, _, _, _ = philox(s, f, o_r.to(tl.int64))
        b_u += uniform_from_word(b_word)
    b_target = b_u.to(tl.float64) * tl.sum(b_mass, 1)
    b_tile, b_before = first_beyond(b_mass, b_target, o_t, 2147483647)
    tl.store(chosen + o_r, b_tile, mask=m_r)
    tl.store(remaining + o_r, b_target - b_before, mask=m_r)


@triton.jit
def sample_tile_logits_kernel(
    hidden, weight, chosen, again, vocab: tl.int32, stride_h: tl.int64, stride_w: tl.int64,
    EMBEDDING: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """again [rows, SPAN] in the dtype of the weight: each row's logits in its chosen tile."""
    i_r = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = tl.minimum(tl.load(chosen + i_r) * SPAN + o_n, vocab - 1).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    # [BLOCK_N, BLOCK_K]: summed at the end, so that a round waits for no other thread.
    b_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for i_k in range(0, EMBEDDING, BLOCK_K):
        m_k = i_k + o_k < EMBEDDING
        b_h = tl.load(hidden + i_r * stride_h + i_k + o_k, mask=m_k, other=0.0).to(tl.float32)
        p_w = weight + o_v[:, None] * stride_w + (i_k + o_k)[None, :]
        b_w = tl.load(p_w, mask=m_k[None, :], other=0.0).to(tl.float32)
        b_sum += b_h[None, :] * b_w
    tl.store(again + i_r * SPAN + o_n, tl.sum(b_sum, 1).to(again.dtype.element_ty))


@triton.jit(do_not_specialize=["temperature", "stats_temperature", "softcap", "rows"])
def draw_in_tile_kernel(
    again, chosen, remaining, tile_max, top1_prob, sample, sample_prob,
    temperature, stats_temperature, softcap, rows: tl.int32, vocab: tl.int32, tiles: tl.int32,
    temperature_stride, stats_stride,
    TEMPERATURE_POINTER: tl.constexpr, STATS_POINTER: tl.constexpr, TWO_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr, SPAN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Overwrites sample and sample_prob of the rows that have a distribution and are not greedy."""
    o_r = tl.program_id(0) + tl.arange(0, 1)
    m_r = o_r < rows
    b_greedy, b_t, b_ts = sampling_and_stats_temperature(
        temperature, stats_temperature, o_r, m_r, temperature_stride, stats_stride,
        TEMPERATURE_POINTER, STATS_POINTER, TWO_TEMPERATURES, 1,
    )  # fmt: skip
    o_t = tl.arange(0, TILES)
    m_t = m_r[:, None] & (o_t < tiles)[None, :]
    p_tile = o_r.to(tl.int64)[:, None] * tiles + o_t[None, :]
    b_max = tl.max(tl.load(tile_max + p_tile, mask=m_t, other=float("-inf")), 1)
    inverse_softcap = 1.0 / softcap
    b_top = cap(b_max, softcap, inverse_softcap, SOFTCAP)
    b_tile = tl.load(chosen + o_r, mask=m_r, other=0)
    b_ttop = tl.load(tile_max + o_r.to(tl.int64) * tiles + b_tile, mask=m_r, other=float("-inf"))
    b_ttop = cap(b_ttop, softcap, inverse_softcap, SOFTCAP)
    b_target = tl.load(remaining + o_r, mask=m_r, other=0.0)
    o_n = tl.arange(0, SPAN)
    m_v = m_r[:, None] & (b_tile[:, None] * SPAN + o_n[None, :] < vocab)
    # [1, SPAN]
    b_x = tl.load(again + o_r.to(tl.int64)[:, None] * SPAN + o_n[None, :], mask=m_v, other=float("-inf"))
    b_x = tl.where(m_v, cap(b_x.to(tl.float32), softcap, inverse_softcap, SOFTCAP), float("-inf"))
    # Mass relative to the tile's largest logit as it came out this time: the product's may differ in its last place,
    # of which a low temperature makes all or nothing.
    b_own = tl.max(b_x, 1)
    b_e = tl.where(m_v, tl.exp2(difference(b_x, b_own[:, None]) * rate(b_t)[:, None]), 0.0)
    b_target *= tl.exp2(difference(b_top, b_ttop) * rate(b_t)).to(tl.float64)
    b_place, _ = first_beyond(b_e.to(tl.float64), b_target, o_n, 2147483647)
    b_xsample = tl.max(tl.where(o_n[None, :] == b_place[:, None], b_x, float("-inf")), 1)
    b_top1 = tl.load(top1_prob + o_r, mask=m_r, other=0.0)
    m_draw = m_r & (b_greedy == 0) & (b_top1 > 0.0)
    b_prob = b_top1 * tl.exp2((difference(b_xsample, b_own) + difference(b_ttop, b_top)) * rate(b_ts))
    tl.store(sample + o_r, (b_tile * SPAN + b_place).to(tl.int64), mask=m_draw)
    tl.store(sample_prob + o_r, b_prob, mask=m_draw)


def draw_again(
    hidden: Tensor,
    weight: Tensor,
    partials: tuple[Tensor, ...],
    sample: Tensor,
    floats: list[Tensor],
    numbers: tuple,
    draws: tuple,
    span: int,
    warps: int,
    flags: dict,
) -> None:
    """Writes the sample and its probability, given what `head_stats` passed to `merge_kernel`.

    Args:
        hidden: [rows, E]. weight: [V, E]. partials: tile_max, second, z, s, zt (zt may stand for z), argmax.
        sample, floats: results of `merge_kernel`.
        numbers: temperature, stats temperature, softcap, strides of the two temperatures.
        draws: uniform, seed, offset, seed_value, offset_value. span: tokens by tile.
    """
    (rows, embedding), vocab = hidden.shape, weight.shape[0]
    tile_max, tiles = partials[0], partials[0].shape[1]
    mass = partials[4] if flags["TWO_TEMPERATURES"] else partials[2]
    t, ts, softcap, t_stride, ts_stride = numbers
    uniform, seed, offset, seed_value, offset_value = draws
    logsumexp, top1_prob, sample_prob = floats[1], floats[2], floats[4]
    chosen = hidden.new_empty(rows, dtype=torch.int32)
    remaining = hidden.new_empty(rows, dtype=torch.float64)
    again = hidden.new_empty(rows, span)
    padded = next_power_of_2(tiles)
    choose_sample_tile_kernel[(rows,)](
        tile_max, mass, logsumexp, chosen, remaining, t, ts, softcap, uniform, seed, offset, seed_value, offset_value,
        rows, tiles, t_stride, ts_stride, UNIFORM=uniform is not None, TILES=padded, **FUSED, num_warps=warps, **flags,
    )  # fmt: skip
    tokens = min(TOKENS, span)
    sample_tile_logits_kernel[(rows, span // tokens)](
        hidden, weight, chosen, again, vocab, hidden.stride(0), weight.stride(0),
        EMBEDDING=embedding, SPAN=span, BLOCK_N=tokens, BLOCK_K=DEPTH, **FUSED, num_warps=4,
    )  # fmt: skip
    draw_in_tile_kernel[(rows,)](
        again, chosen, remaining, tile_max, top1_prob, sample, sample_prob, t, ts, softcap,
        rows, vocab, tiles, t_stride, ts_stride, SPAN=span, TILES=padded, **FUSED, num_warps=warps, **flags,
    )  # fmt: skip
