"""`row_stats` from tile statistics: one read of the logits, then a merge that finishes inside one tile.

`tile_stats_kernel` runs once per tile of the vocabulary and leaves six numbers. `merge_kernel` runs once per
row: it merges the tiles, picks the sample's tile by mass, and re-reads that tile alone.
With x the softcapped logits, a tile holds, relative to its own maximum M:

    z = sum e^((x - M) / Ts)    s = sum (x - M) e^((x - M) / Ts)    zt = sum e^((x - M) / T)

the largest and second largest raw logit and the position of the largest. Two tiles merge by shifting both to the
common maximum. The maximum is taken over raw logits, so argmax is exact whatever tanh rounds to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from .common import (
    CAPABILITIES,
    DEVICES,
    FUSED,
    by_value,
    cap,
    capability,
    int_by_value,
    int_parameter,
    next_power_of_2,
    on_device,
    philox,
    unavailable,
    uniform_from_word,
)
from .pairs import larger, largest_of_two, smaller, sums_of_two, widened
from .softcap import (
    coefficients_below_1,
    coefficients_below_half,
    difference,
    exp2_flushed,
    odd_polynomial,
    polynomial_serves,
    rate,
    scale_at,
    scaled_tanh,
)

__all__ = ["FEATURES", "row_stats", "unavailable"]

FEATURES = {
    "device": DEVICES,
    "dtype": frozenset({torch.bfloat16, torch.float16, torch.float32}),
    "compute_capability": CAPABILITIES,
}

# A difference x - M is kept above this, so that -inf contributes 0 * finite instead of 0 * inf.
FLOOR = tl.constexpr(-1.0e30)
# The same for the exponents of a tile, which are multiplied with Ts / T. The two together leave less than -300, whose
# power is 0: so no lane that is -inf draws, however much larger T is than Ts, and no lane has to be asked.
LOWEST_EXPONENT = tl.constexpr(-3.0e38)
LOWEST_RATIO = tl.constexpr(1.0e-36)


# Tokens of a piece of a tile at least.
LEAST_WIDTH = 128
# Rows that one program of `merge_kernel` finishes at most.
MERGE_ROWS = 4


@triton.jit
def sampling_and_stats_temperature(
    temperature, stats_temperature, o_r, m_r, TEMPERATURE_STRIDE, STATS_STRIDE,
    TEMPERATURE_POINTER: tl.constexpr, STATS_POINTER: tl.constexpr, TWO_TEMPERATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Whether a row is greedy, its sampling temperature and its stats temperature, each [ROWS] fp32."""
    b_t = tl.zeros([ROWS], tl.float32)
    if TEMPERATURE_POINTER:
        b_t += tl.load(temperature + o_r * TEMPERATURE_STRIDE, mask=m_r, other=1.0)
    else:
        b_t += temperature
    b_greedy = b_t == 0
    b_t = tl.where(b_greedy, 1.0, b_t)
    b_ts = b_t
    if TWO_TEMPERATURES:
        b_ts = tl.zeros([ROWS], tl.float32)
        if STATS_POINTER:
            b_ts += tl.load(stats_temperature + o_r * STATS_STRIDE, mask=m_r, other=1.0)
        else:
            b_ts += stats_temperature
    return b_greedy, b_t, b_ts


@triton.jit
def leave_tile_statistics(
    b_raw, o_r, m_r, o_v, i_tile, tile_max, tile_second, tile_z, tile_s, tile_zt, tile_argmax,
    temperature, stats_temperature, softcap, vocab, tiles, temperature_stride, stats_stride,
    TEMPERATURE_POINTER: tl.constexpr, STATS_POINTER: tl.constexpr, TWO_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr = True,
):  # fmt: skip
    """Computes and stores the statistics of a tile of raw logits that a kernel has at hand.

    Args: b_raw [ROWS, SPAN] fp32, -inf outside the vocabulary; o_r and m_r [ROWS]; o_v [SPAN]. EVEN: no tile
    crosses the end of the vocabulary. POSITIONS: store the position of the largest logit and the second largest, for
    a merge that cannot read the logits again.
    """
    # [ROWS]
    b_max = tl.max(b_raw, 1)
    p_tile = o_r.to(tl.int64) * tiles + i_tile
    tl.store(tile_max + p_tile, b_max, mask=m_r)
    if POSITIONS:
        b_argmax = tl.min(tl.where(b_raw == b_max[:, None], o_v[None, :], 2147483647), 1)
        b_second = tl.max(tl.where(o_v[None, :] == b_argmax[:, None], float("-inf"), b_raw), 1)
        tl.store(tile_second + p_tile, b_second, mask=m_r)
        tl.store(tile_argmax + p_tile, b_argmax, mask=m_r)

    _, b_t, b_ts = sampling_and_stats_temperature(
        temperature, stats_temperature, o_r, m_r, temperature_stride, stats_stride,
        TEMPERATURE_POINTER, STATS_POINTER, TWO_TEMPERATURES, ROWS,
    )  # fmt: skip
    b_k = rate(b_ts)
    # b_d [ROWS, SPAN]: exponents of 2 relative to the tile's maximum. One formula makes those of the tile and of its
    # maximum, so that the maximum's is exactly 0. NaN has to survive: it is how a row without a distribution is known.
    if SOFTCAP:
        b_scale = scale_at(b_k, softcap)[:, None]
        inverse_softcap = 1.0 / softcap
        b_u = b_raw * inverse_softcap
        b_top = (b_max * inverse_softcap)[:, None]
        b_d = difference(scaled_tanh(b_u, b_scale), scaled_tanh(b_top, b_scale))
        if not EVEN:
            b_d = tl.where((o_v < vocab)[None, :], b_d, LOWEST_EXPONENT)
    else:
        b_top = tl.where(b_max == float("-inf"), 0.0, b_max)[:, None]
        b_d = tl.maximum((b_raw - b_top) * b_k[:, None], LOWEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)

    b_e = exp2_flushed(b_d)
    tl.store(tile_z + p_tile, tl.sum(b_e, 1), mask=m_r)
    tl.store(tile_s + p_tile, tl.sum(b_d * b_e, 1) / b_k, mask=m_r)
    if TWO_TEMPERATURES:
        b_ratio = tl.maximum(rate(b_t) / b_k, LOWEST_RATIO)
        tl.store(tile_zt + p_tile, tl.sum(exp2_flushed(b_d * b_ratio[:, None]), 1), mask=m_r)


@triton.jit
def row_pointers(logits, o_r, inner_rows, stride_outer, stride_inner, FLAT: tl.constexpr):
    """Where the rows begin. FLAT: all rows are `stride_inner` apart, which spares two divisions a thread."""
    if FLAT:
        return logits + o_r.to(tl.int64) * stride_inner
    else:
        p_outer = logits + (o_r // inner_rows).to(tl.int64) * stride_outer
        return p_outer + (o_r % inner_rows).to(tl.int64) * stride_inner


@triton.jit
def cutoffs(cutoff, o_r, m_r, CUTOFF: tl.constexpr, ROWS: tl.constexpr):
    """Those of the rows, [ROWS] fp32."""
    b_cutoff = tl.zeros([ROWS], tl.float32)
    if CUTOFF:
        b_cutoff += tl.load(cutoff + o_r, mask=m_r, other=0.0)
    return b_cutoff


@triton.jit
def keep(values, b_x, b_cutoff, otherwise, CUTOFF: tl.constexpr):
    """`values` but for raw logits `b_x` below the cutoff, which NaN are not."""
    if CUTOFF:
        values = tl.where(b_x < b_cutoff, otherwise, values)
    return values


@triton.jit
def add_powers(
    b_z, b_s, b_zt, b_d, b_x, b_cutoff, b_ratio, TWO_TEMPERATURES: tl.constexpr, CUTOFF: tl.constexpr
):
    """The sums with the powers of one more piece's exponents added, but for logits `b_x` below the cutoff."""
    b_d = keep(b_d, b_x, b_cutoff, LOWEST_EXPONENT, CUTOFF)
    b_e = exp2_flushed(b_d)
    b_z += b_e
    b_s = tl.fma(b_d, b_e, b_s)
    if TWO_TEMPERATURES:
        b_zt += exp2_flushed(b_d * b_ratio)
    return b_z, b_s, b_zt


@triton.jit
def sum_polynomial_powers(
    raw,
    c,
    b_max,
    b_z,
    b_s,
    b_zt,
    b_cutoff,
    b_ratio,
    TERMS: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr,
    CUTOFF: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The sums with the powers of all pieces added, whose exponents are a polynomial of the logits."""
    b_top = odd_polynomial(b_max[:, None], c, TERMS)
    for i in tl.static_range(PIECES):
        b_x = widened(raw[i])
        b_d = difference(odd_polynomial(b_x, c, TERMS), b_top)
        b_z, b_s, b_zt = add_powers(b_z, b_s, b_zt, b_d, b_x, b_cutoff, b_ratio, TWO_TEMPERATURES, CUTOFF)
    return b_z, b_s, b_zt


@triton.jit(do_not_specialize=["temperature", "stats_temperature", "softcap", "rows", "inner_rows", "cutoff"])
def tile_stats_kernel(
    logits, tile_max, tile_second, tile_z, tile_s, tile_zt, tile_argmax,
    temperature, stats_temperature, softcap,
    rows: tl.int32, inner_rows: tl.int32, vocab: tl.int32, tiles: tl.int32,
    stride_outer: tl.int64, stride_inner: tl.int64, temperature_stride, stats_stride,
    TEMPERATURE_POINTER: tl.constexpr, STATS_POINTER: tl.constexpr, TWO_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, PIECES: tl.constexpr,
    FLAT: tl.constexpr, cutoff=None, CUTOFF: tl.constexpr = False,
):  # fmt: skip
    """The statistics of a tile, which is held as PIECES of [ROWS, SPAN / PIECES]: 16 bytes of each by thread."""
    WIDTH: tl.constexpr = SPAN // PIECES
    i_row = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    o_r = i_row * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    o_v = i_tile * SPAN + tl.arange(0, WIDTH)
    p_row = row_pointers(logits, o_r, inner_rows, stride_outer, stride_inner, FLAT)
    raw = ()
    for i in tl.static_range(PIECES):
        # [ROWS, WIDTH]
        p_x = p_row[:, None] + (o_v + i * WIDTH)[None, :]
        if EVEN and ROWS == 1:
            raw = raw + (tl.load(p_x),)
        elif EVEN:
            raw = raw + (tl.load(p_x, mask=m_r[:, None], other=float("-inf")),)
        else:
            m_x = m_r[:, None] & (o_v + i * WIDTH < vocab)[None, :]
            raw = raw + (tl.load(p_x, mask=m_x, other=float("-inf")),)

    _, b_t, b_ts = sampling_and_stats_temperature(
        temperature, stats_temperature, o_r, m_r, temperature_stride, stats_stride,
        TEMPERATURE_POINTER, STATS_POINTER, TWO_TEMPERATURES, ROWS,
    )  # fmt: skip
    b_k = rate(b_ts)
    b_ratio = tl.maximum(rate(b_t) / b_k, LOWEST_RATIO)[:, None]
    b_cutoff = cutoffs(cutoff, o_r, m_r, CUTOFF, ROWS)[:, None]

    b_largest = raw[0]
    b_smallest = raw[0]
    for i in tl.static_range(1, PIECES):
        b_largest = larger(b_largest, raw[i])
        b_smallest = smaller(b_smallest, raw[i])
    b_largest = widened(b_largest)
    b_magnitude = tl.maximum(b_largest, -widened(b_smallest))
    # [ROWS]. What lies above a kept logit is kept: the largest is one of them, or else the tile has no mass.
    b_max, b_magnitude = largest_of_two(b_largest, b_magnitude)
    p_tile = o_r.to(tl.int64) * tiles + i_tile
    tl.store(tile_max + p_tile, b_max, mask=m_r)

    # Exponents of 2 relative to the tile's maximum. One formula makes those of the tile and of its maximum, so that the
    # maximum's is exactly 0. NaN has to survive: it is how a row without a distribution is known. Most tiles lie inside
    # the vocabulary and hold no logit beyond the softcap; there it is a polynomial of the logit itself.
    b_z = tl.zeros([ROWS, WIDTH], tl.float32)
    b_s = tl.zeros([ROWS, WIDTH], tl.float32)
    b_zt = tl.zeros([ROWS, WIDTH], tl.float32)
    if SOFTCAP:
        inverse_softcap = 1.0 / softcap
        b_relative = tl.where(
            polynomial_serves(b_k, inverse_softcap), b_magnitude * inverse_softcap, float("inf")
        )
        relative = tl.max(tl.where(m_r, b_relative, 0.0), 0)
        if relative < 0.5:
            c = coefficients_below_half(b_k[:, None], inverse_softcap)
            b_z, b_s, b_zt = sum_polynomial_powers(
                raw, c, b_max, b_z, b_s, b_zt, b_cutoff, b_ratio, 5, TWO_TEMPERATURES, CUTOFF, PIECES
            )
        elif relative < 1.0:
            c = coefficients_below_1(b_k[:, None], inverse_softcap)
            b_z, b_s, b_zt = sum_polynomial_powers(
                raw, c, b_max, b_z, b_s, b_zt, b_cutoff, b_ratio, 7, TWO_TEMPERATURES, CUTOFF, PIECES
            )
        else:
            b_scale = scale_at(b_k, softcap)[:, None]
            b_top = scaled_tanh((b_max * inverse_softcap)[:, None], b_scale)
            for i in tl.static_range(PIECES):
                b_x = widened(raw[i])
                b_d = difference(scaled_tanh(b_x * inverse_softcap, b_scale), b_top)
                if not EVEN:
                    b_d = tl.where((o_v + i * WIDTH < vocab)[None, :], b_d, LOWEST_EXPONENT)
                b_z, b_s, b_zt = add_powers(
                    b_z, b_s, b_zt, b_d, b_x, b_cutoff, b_ratio, TWO_TEMPERATURES, CUTOFF
                )
    else:
        b_top = tl.where(b_max == float("-inf"), 0.0, b_max)[:, None]
        for i in tl.static_range(PIECES):
            b_x = widened(raw[i])
            b_d = (b_x - b_top) * b_k[:, None]
            b_d = tl.maximum(b_d, LOWEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)
            b_z, b_s, b_zt = add_powers(b_z, b_s, b_zt, b_d, b_x, b_cutoff, b_ratio, TWO_TEMPERATURES, CUTOFF)

    b_z, b_s = sums_of_two(b_z, b_s)
    tl.store(tile_z + p_tile, b_z, mask=m_r)
    tl.store(tile_s + p_tile, b_s / b_k, mask=m_r)
    if TWO_TEMPERATURES:
        tl.store(tile_zt + p_tile, tl.sum(b_zt, 1), mask=m_r)


@triton.jit
def first_beyond(b_mass, b_target, o, NONE: tl.constexpr):
    """Per row, the first index at which the running sum of `b_mass` exceeds the target, never one without mass.

    Args: b_mass [ROWS, N] and b_target [ROWS], both fp64. Returns the index and the sum before it, each [ROWS].
    """
    b_sum = tl.cumsum(b_mass, 1)
    m_mass = b_mass > 0
    b_first = tl.min(tl.where(m_mass & (b_sum > b_target[:, None]), o[None, :], NONE), 1)
    # Rounding can leave the target at or beyond the total: then the last index with mass.
    b_last = tl.maximum(tl.max(tl.where(m_mass, o[None, :], -1), 1), 0)
    b_index = tl.minimum(b_first, b_last)
    b_before = tl.sum(tl.where(o[None, :] < b_index[:, None], b_mass, 0.0), 1)
    return b_index, b_before


@triton.jit(
    do_not_specialize="temperature stats_temperature softcap seed_value offset_value rows inner_rows cutoff".split(),
    do_not_specialize_on_alignment=["seed", "offset"],
)
def merge_kernel(
    logits, tile_max, tile_second, tile_z, tile_s, tile_zt, tile_argmax,
    argmax, sample, entropy, logsumexp, top1_prob, top2_prob, sample_prob,
    temperature, stats_temperature, softcap, uniform, seed, offset, seed_value: tl.int64, offset_value: tl.int64,
    rows: tl.int32, inner_rows: tl.int32, vocab: tl.int32, tiles: tl.int32,
    stride_outer: tl.int64, stride_inner: tl.int64, temperature_stride, stats_stride,
    TEMPERATURE_POINTER: tl.constexpr, STATS_POINTER: tl.constexpr, TWO_TEMPERATURES: tl.constexpr,
    UNIFORM: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr,
    POSITIONS: tl.constexpr = True, FLAT: tl.constexpr = False, cutoff=None, CUTOFF: tl.constexpr = False,
):  # fmt: skip
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b_greedy, b_t, b_ts = sampling_and_stats_temperature(
        temperature, stats_temperature, o_r, m_r, temperature_stride, stats_stride,
        TEMPERATURE_POINTER, STATS_POINTER, TWO_TEMPERATURES, ROWS,
    )  # fmt: skip
    b_k = rate(b_ts)
    b_kt = rate(b_t)
    b_cutoff = cutoffs(cutoff, o_r, m_r, CUTOFF, ROWS)
    inverse_softcap = 1.0 / softcap

    o_t = tl.arange(0, TILES)
    m_t = m_r[:, None] & (o_t < tiles)[None, :]
    p_tile = o_r.to(tl.int64)[:, None] * tiles + o_t[None, :]
    # [ROWS, TILES]
    b_tmax = tl.load(tile_max + p_tile, mask=m_t, other=float("-inf"))
    b_tz = tl.load(tile_z + p_tile, mask=m_t, other=0.0)
    b_ts_sum = tl.load(tile_s + p_tile, mask=m_t, other=0.0)
    p_row = row_pointers(logits, o_r, inner_rows, stride_outer, stride_inner, FLAT)
    # A tile is read as runs of LANES tokens: [1, SPAN / LANES, LANES].
    SUBS: tl.constexpr = SPAN // LANES
    o_sub = tl.arange(0, SUBS)
    o_lane = tl.arange(0, LANES)
    o_s = (o_sub[:, None] * LANES + o_lane[None, :])[None, :, :]

    # [ROWS]. The second largest of the row: the second of the argmax's tile, or the first of another.
    b_max = tl.max(b_tmax, 1)
    if POSITIONS:
        b_tsecond = tl.load(tile_second + p_tile, mask=m_t, other=float("-inf"))
        b_targmax = tl.load(tile_argmax + p_tile, mask=m_t, other=2147483647)
        b_argmax = tl.min(tl.where((b_tmax == b_max[:, None]) & m_t, b_targmax, 2147483647), 1)
        m_own = b_targmax == b_argmax[:, None]
        b_second = tl.max(tl.where(m_own, b_tsecond, b_tmax), 1)
    else:
        # Looking the position up in one tile of the row is cheaper than keeping track of it in all of them.
        b_first = tl.min(tl.where((b_tmax == b_max[:, None]) & m_t, o_t[None, :], TILES), 1)
        b_first = tl.minimum(b_first, tiles - 1)
        b_start = b_first * SPAN
        m_v = m_r[:, None, None] & (o_s < (vocab - b_start)[:, None, None])
        b_x = tl.load((p_row + b_start)[:, None, None] + o_s, mask=m_v, other=float("-inf")).to(tl.float32)
        b_in_tile = tl.min(tl.min(tl.where(b_x == b_max[:, None, None], o_s, 2147483647), 2), 1)
        b_rest = tl.where(o_s == b_in_tile[:, None, None], float("-inf"), b_x)
        b_second = tl.max(tl.max(b_rest, 2), 1)
        b_argmax = b_start + b_in_tile
        b_others = tl.max(tl.where(o_t[None, :] == b_first[:, None], float("-inf"), b_tmax), 1)
        b_second = tl.maximum(b_second, b_others)

    b_top = cap(b_max, softcap, inverse_softcap, SOFTCAP)
    b_ref = tl.where(b_top == float("-inf"), 0.0, b_top)
    # [ROWS, TILES]
    b_ttop = tl.where(m_t, cap(b_tmax, softcap, inverse_softcap, SOFTCAP), float("-inf"))
    b_shift = tl.maximum(difference(b_ttop, b_ref[:, None]), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    b_w = tl.exp2(b_shift * b_k[:, None])
    b_z = tl.sum(b_tz * b_w, 1)
    b_s = tl.sum((b_ts_sum + b_shift * b_tz) * b_w, 1)

    b_log_z = tl.log(b_z)
    b_lse = b_ref / b_ts + b_log_z
    b_entropy = tl.maximum(b_log_z - b_s / (b_z * b_ts), 0.0)
    m_valid = (tl.abs(b_lse) < float("inf")) & (b_top > float("-inf"))
    b_top1 = 1.0 / b_z
    b_xsecond = cap(b_second, softcap, inverse_softcap, SOFTCAP)
    b_top2 = tl.where(vocab > 1, tl.exp2(difference(b_xsecond, b_ref) * b_k) / b_z, 0.0)
    b_top2 = keep(b_top2, b_second, b_cutoff, 0.0, CUTOFF)

    b_u = tl.zeros([ROWS], tl.float32)
    if UNIFORM:
        b_u += tl.load(uniform + o_r, mask=m_r, other=0.0)
    else:
        s = int_parameter(seed, seed_value, 0, 0)
        f = int_parameter(offset, offset_value, 0, 0)
        b_word, _, _, _ = philox(s, f, o_r.to(tl.int64))
        b_u += uniform_from_word(b_word)

    # The tile: [ROWS, TILES], fp64 because the target is compared with sums of all tiles.
    if TWO_TEMPERATURES:
        b_tzt = tl.load(tile_zt + p_tile, mask=m_t, other=0.0)
    else:
        b_tzt = b_tz
    b_wt = tl.exp2(b_shift * b_kt[:, None])
    b_mass = tl.where(m_valid[:, None], (b_tzt * b_wt).to(tl.float64), 0.0)
    b_target = b_u.to(tl.float64) * tl.sum(b_mass, 1)
    b_tile, b_before = first_beyond(b_mass, b_target, o_t, 2147483647)
    b_target -= b_before

    # Inside the tile: sums of runs of LANES tokens, [ROWS, SPAN / LANES, LANES].
    o_v = b_tile[:, None, None] * SPAN + o_s
    m_v = m_r[:, None, None] & (o_v < vocab)
    b_raw = tl.load(p_row[:, None, None] + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    b_x = tl.where(m_v, cap(b_raw, softcap, inverse_softcap, SOFTCAP), float("-inf"))
    b_x = keep(b_x, b_raw, b_cutoff[:, None, None], float("-inf"), CUTOFF)
    b_e = tl.exp2(difference(b_x, b_ref[:, None, None]) * b_kt[:, None, None])
    b_run = tl.where(m_valid[:, None], tl.sum(b_e, 2).to(tl.float64), 0.0)
    b_sub, b_before = first_beyond(b_run, b_target, o_sub, 2147483647)
    b_target -= b_before

    # Inside the run: [ROWS, LANES].
    o_v = (b_tile * SPAN + b_sub * LANES)[:, None] + o_lane[None, :]
    m_v = m_r[:, None] & (o_v < vocab)
    b_raw = tl.load(p_row[:, None] + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    b_x = tl.where(m_v, cap(b_raw, softcap, inverse_softcap, SOFTCAP), float("-inf"))
    b_x = keep(b_x, b_raw, b_cutoff[:, None], float("-inf"), CUTOFF)
    b_e = tl.exp2(difference(b_x, b_ref[:, None]) * b_kt[:, None])
    b_e = tl.where(m_valid[:, None], b_e, 0.0)
    b_lane, b_before = first_beyond(b_e.to(tl.float64), b_target, o_lane, 2147483647)
    b_xsample = tl.max(tl.where(o_lane[None, :] == b_lane[:, None], b_x, float("-inf")), 1)

    b_sample = b_tile * SPAN + b_sub * LANES + b_lane
    b_sample = tl.where(b_greedy, b_argmax, b_sample)
    b_xsample = tl.where(b_greedy, b_ref, b_xsample)
    b_psample = tl.exp2(difference(b_xsample, b_ref) * b_k) / b_z

    tl.store(argmax + o_r, tl.where(m_valid, b_argmax, 0).to(tl.int64), mask=m_r)
    tl.store(sample + o_r, tl.where(m_valid, b_sample, 0).to(tl.int64), mask=m_r)
    tl.store(entropy + o_r, tl.where(m_valid, b_entropy, float("inf")), mask=m_r)
    tl.store(logsumexp + o_r, tl.where(m_valid, b_lse, float("nan")), mask=m_r)
    tl.store(top1_prob + o_r, tl.where(m_valid, b_top1, 0.0), mask=m_r)
    tl.store(top2_prob + o_r, tl.where(m_valid, b_top2, 0.0), mask=m_r)
    tl.store(sample_prob + o_r, tl.where(m_valid, b_psample, 0.0), mask=m_r)


def tiling(rows: int, vocab: int, config: dict) -> tuple[int, int, int]:
    """(rows per program, tokens per tile, tiles): short rows share a program, long ones are cut."""
    span = min(config["span"], next_power_of_2(vocab))
    rows_per_program = max(1, min(config["span"] // span, next_power_of_2(rows)))
    return rows_per_program, span, triton.cdiv(vocab, span)


def row_stats(
    logits: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
    cutoff: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Arguments, results and arithmetic: `reference.row_stats`. Reads the logits once, and one tile per row again."""
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = shape.numel()
    integers = [logits.new_empty(shape, dtype=torch.int64) for _ in range(2)]
    floats = [logits.new_empty(shape, dtype=torch.float32) for _ in range(5)]
    if rows == 0:
        return (*integers, *floats)
    config = configs.select("row_stats", capability(logits), bytes=logits.element_size())
    rows_per_program, span, tiles = tiling(rows, vocab, config)
    # Short rows are held in fewer pieces, so a thread has more sums at once.
    warps = config["num_warps"] * (1 if rows_per_program == 1 else 2)
    pieces = max(1, min(span // LEAST_WIDTH, span * logits.element_size() // (warps * 32 * 16)))
    two = stats_temperature is not None
    partial = logits.new_empty((4 if two else 3, rows, tiles), dtype=torch.float32)
    largest, z, s = partial[:3]
    # Second largest and position are looked up by the merge; the largest stands where nothing is left or read.
    partials = (largest, largest, z, s, partial[3] if two else z, largest)

    t, t_pointer, t_stride = by_value(temperature)
    ts, ts_pointer, ts_stride = by_value(stats_temperature, 1.0)
    seed, seed_value, _ = int_by_value(seed)
    offset, offset_value, _ = int_by_value(offset)
    c = 1.0 if softcap is None else softcap
    geometry = (rows, shape[1], vocab, tiles, logits.stride(0), logits.stride(1), t_stride, ts_stride)
    flat = shape[0] == 1 or logits.stride(0) == shape[1] * logits.stride(1)
    programs = triton.cdiv(rows, rows_per_program)
    with on_device(logits):
        tile_stats_kernel[(programs * tiles,)](
            logits, *partials, t, ts, c, *geometry,
            TEMPERATURE_POINTER=t_pointer, STATS_POINTER=ts_pointer, TWO_TEMPERATURES=two,
            SOFTCAP=softcap is not None, EVEN=vocab % span == 0, ROWS=rows_per_program, SPAN=span,
            PIECES=pieces, FLAT=flat, cutoff=cutoff, CUTOFF=cutoff is not None, **FUSED, num_warps=warps,
        )  # fmt: skip
        # More rows of fp64 masses than these do not fit the registers.
        merge_rows = min(rows_per_program, MERGE_ROWS)
        merge_kernel[(triton.cdiv(rows, merge_rows),)](
            logits, *partials, *integers, *floats, t, ts, c, uniform, seed, offset,
            seed_value, offset_value, *geometry,
            TEMPERATURE_POINTER=t_pointer, STATS_POINTER=ts_pointer, TWO_TEMPERATURES=two,
            UNIFORM=uniform is not None, SOFTCAP=softcap is not None, ROWS=merge_rows, SPAN=span,
            LANES=min(span, 128), TILES=next_power_of_2(tiles), POSITIONS=False, FLAT=flat,
            cutoff=cutoff, CUTOFF=cutoff is not None, **FUSED, num_warps=config["merge_warps"],
        )  # fmt: skip
    return (*integers, *floats)
