"""`block_attention` with the prefix read in place: flash attention over one list of tiles, [prefix ; block].

The query heads that share a KV head are packed into the rows of one tile (row = position * group + head), so
each key and value is loaded once for all of them. The tiles of the prefix and those of the block form one
list; a program takes a stretch of it, which gives one loop for both, and a prefix of any length is split
over as many programs as fill the GPU. Splits leave (output, log-sum-exp) and `merge_splits_kernel` joins them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from .common import (
    CAPABILITIES,
    DEVICES,
    FUSED,
    INTERPRET,
    UpTo,
    capability,
    multiprocessors,
    next_power_of_2,
    on_device,
    tanh,
    unavailable,
)
from .sliced_scores import COMPILES, load_sliced, sum_slices

__all__ = ["FEATURES", "block_attention", "unavailable"]

MAX_SPLITS = 64
# Bytes of partial results that splits may leave in all. They fit the L2 cache of an RTX PRO 6000 (128 MB) beside the
# keys on their way, so that they are not written to memory and read back; and they stay small beside a step's logits.
SCRATCH = 96 * 2**20
# Wider than any context and still far enough from 2^31 for sums with it.
NO_WINDOW = 0x7FFF0000

FEATURES = {
    "device": DEVICES,
    "dtype": frozenset({torch.bfloat16, torch.float16, torch.float32}),
    "head_dim": UpTo(512),
    "compute_capability": CAPABILITIES,
}


@triton.jit
def place(i_n, first, last, tiles_prefix, start, end, block_start, block_end, BLOCK_N: tl.constexpr):
    """Tile `i_n` of the list as (whether it is of the prefix, its first slot, the end of the valid slots).

    A tile outside [first, last) has no valid slots.
    """
    from_prefix = i_n < tiles_prefix
    n_first = tl.where(from_prefix, start + i_n * BLOCK_N, block_start + (i_n - tiles_prefix) * BLOCK_N)
    n_end = tl.where(from_prefix, end, block_end)
    return from_prefix, n_first, tl.where((i_n >= first) & (i_n < last), n_end, -2147483648)


@triton.jit
def load_tile(
    p_block, p_prefix, stride_block, stride_prefix, from_prefix, first, end, o_n, o_d, m_d,
    PADDED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_N, BLOCK_D] from `first` on; scalars choose the tensor, so one loop serves both."""
    p = tl.where(from_prefix, p_prefix, p_block)
    stride = tl.where(from_prefix, stride_prefix, stride_block)
    p += first.to(tl.int64) * stride
    mask = (first + o_n < end)[:, None]
    if PADDED:
        mask = mask & m_d[None, :]
    if NARROW:
        o = o_n[:, None] * stride.to(tl.int32) + o_d[None, :]
    else:
        o = o_n.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p + o, mask=mask, other=0.0)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b in fp32; the interpreter knows no bf16 matrix product, so operands are widened for it."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=["scale", "softcap", "length", "prefix_length", "window", "splits"],
    do_not_specialize_on_alignment=["prefix_start", "prefix_end"],
)
def block_attention_kernel(
    query, key, value, prefix_key, prefix_value, prefix_start, prefix_end, output, lse,
    scale, softcap, length: tl.int32, prefix_length: tl.int32, window: tl.int32, splits: tl.int32,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qc: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kc: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vc: tl.int64,
    stride_pkb: tl.int64, stride_pkh: tl.int64, stride_pkc: tl.int64,
    stride_pvb: tl.int64, stride_pvh: tl.int64, stride_pvc: tl.int64,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    START: tl.constexpr, END: tl.constexpr, SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    NARROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICES: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    PADDED: tl.constexpr = HEAD_DIM < BLOCK_D
    TILES_E: tl.constexpr = (HEAD_DIM + BLOCK_E - 1) // BLOCK_E
    rows = length * GROUP
    tiles_m = (rows + BLOCK_M - 1) // BLOCK_M
    # Row tiles vary fastest: programs that run together share keys in the L2 cache.
    i_m = tl.program_id(0)
    if SPLIT or TILES_E > 1:
        i_m = tl.program_id(0) % tiles_m
        i_split = tl.program_id(0) // tiles_m
    if TILES_E > 1:
        i_e = i_split % TILES_E
        i_split = i_split // TILES_E
    i_h = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    o_c = o_m // GROUP
    o_g = o_m % GROUP
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    if TILES_E > 1:
        # This program's columns of the values; its scores are those of the whole head.
        o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
        m_e = o_e < HEAD_DIM
    else:
        o_e = o_d
        m_e = m_d

    p_q = (
        query + i_b * stride_qb + (i_h * GROUP + o_g).to(tl.int64) * stride_qh + o_c.to(tl.int64) * stride_qc
    )
    if SLICES > 1:
        # [SLICES, BLOCK_M, BLOCK_D / SLICES]: the warps share the head's columns, so no score is computed twice.
        WIDTH: tl.constexpr = BLOCK_D // SLICES
        o_s = (tl.arange(0, SLICES) * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None, :]
        b_q = tl.load(p_q[None, :, None] + o_s, mask=m_m[None, :, None] & (o_s < HEAD_DIM), other=0.0)
    else:
        # [BLOCK_M, BLOCK_D]
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)

    p_k = key + i_b * stride_kb + i_h.to(tl.int64) * stride_kh
    p_v = value + i_b * stride_vb + i_h.to(tl.int64) * stride_vh
    p_pk = prefix_key + i_b * stride_pkb + i_h.to(tl.int64) * stride_pkh
    p_pv = prefix_value + i_b * stride_pvb + i_h.to(tl.int64) * stride_pvh
    start = 0
    end = prefix_length
    if START:
        start = tl.minimum(tl.maximum(tl.load(prefix_start + i_b), 0), prefix_length)
    if END:
        end = tl.minimum(tl.load(prefix_end + i_b), prefix_length)
    if CAUSAL:
        # The first position of the tile sees furthest back.
        start = tl.maximum(start, end + (i_m * BLOCK_M // GROUP + 1 - window))
    tiles_prefix = (tl.maximum(end - start, 0) + BLOCK_N - 1) // BLOCK_N
    block_start = 0
    block_end = length
    if CAUSAL:
        block_start = tl.maximum(i_m * BLOCK_M // GROUP + 1 - window, 0)
        # Keys after the tile's last position are seen by none of its rows.
        block_end = tl.minimum(length, (i_m * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    tiles = tiles_prefix + (block_end - block_start + BLOCK_N - 1) // BLOCK_N
    first = 0
    last = tiles
    if SPLIT:
        stretch = (tiles + splits - 1) // splits
        first = i_split * stretch
        last = tl.minimum(first + stretch, tiles)
        if first >= last:
            # A split without tiles weighs nothing: its output stays unwritten, and the merge does not read it.
            m_none = m_m
            if TILES_E > 1:
                m_none = o_m < tl.where(i_e == 0, rows, 0)
            p_none = ((i_b * splits + i_split) * KV_HEADS + i_h) * rows + o_m
            tl.store(lse + p_none, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=m_none)
            return

    LOG2E: tl.constexpr = 1.4426950408889634
    # [BLOCK_M]
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_E]
    b_o = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    # Scores run one tile ahead, so that their matrix product overlaps the softmax of the tile before; carried
    # through the loop, they also keep their own division among warps. The first round consumes no tile.
    b_ahead = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_n in range(first - 1, last):
        # [BLOCK_M, BLOCK_N]
        b_s = b_ahead
        from_prefix, n_first, n_end = place(
            i_n + 1, first, last, tiles_prefix, start, end, block_start, block_end, BLOCK_N
        )
        if SLICES > 1:
            b_k = load_sliced(
                p_k, p_pk, stride_kc, stride_pkc, from_prefix, n_first, n_end, o_n, o_s, o_s < HEAD_DIM,
                NARROW,
            )  # fmt: skip
            b_ahead = sum_slices(product(b_q, tl.trans(b_k, (0, 2, 1)), PRECISION, UPCAST), BLOCK_D == 512)
        else:
            b_k = load_tile(
                p_k, p_pk, stride_kc, stride_pkc, from_prefix, n_first, n_end, o_n, o_d, m_d,
                PADDED, NARROW,
            )  # fmt: skip
            b_ahead = product(b_q, tl.trans(b_k), PRECISION, UPCAST)

        from_prefix, n_first, n_end = place(
            i_n, first, last, tiles_prefix, start, end, block_start, block_end, BLOCK_N
        )
        b_s *= scale
        if SOFTCAP:
            b_s = softcap * tanh(b_s / softcap)
        m_s = (n_first + o_n < n_end)[None, :]
        if CAUSAL:
            # Positions on one scale: the block's from 0 on, the prefix's last slot is -1.
            o_key = (tl.where(from_prefix, n_first - end, n_first) + o_n)[None, :]
            m_s = m_s & (o_key <= o_c[:, None]) & (o_key > o_c[:, None] - window)
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # A row that has seen no key yet keeps -inf, which must not meet itself in a difference.
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        # exp2 of a scaled difference: scaling the scores themselves would round where they are large.
        b_p = tl.exp2((b_s - b_ref[:, None]) * LOG2E)
        b_shrink = tl.exp2((b_max - b_ref) * LOG2E)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_max = b_new
        # [BLOCK_N, BLOCK_E]
        b_v = load_tile(
            p_v, p_pv, stride_vc, stride_pvc, from_prefix, n_first, n_end, o_n, o_e, m_e,
            PADDED, NARROW,
        )  # fmt: skip
        b_p = b_p.to(b_v.dtype)
        if UPCAST:
            b_p = b_p.to(tl.float32)
            b_v = b_v.to(tl.float32)
        b_o = tl.dot(b_p, b_v, b_o * b_shrink[:, None], input_precision=PRECISION)

    b_none = b_sum == 0
    # One division a row: those of all elements would cost registers that the loop does not leave.
    b_o *= (1.0 / tl.where(b_none, 1.0, b_sum))[:, None]
    b_lse = tl.where(b_none, float("-inf"), b_max + tl.log(b_sum))
    HEADS: tl.constexpr = KV_HEADS * GROUP
    m_lse = m_m
    if TILES_E > 1:
        # The programs of a row compute the same log-sum-exp, bit for bit; the first one writes it.
        m_lse = o_m < tl.where(i_e == 0, rows, 0)
    if SPLIT:
        # Partial results, [B, splits, Hkv, rows, (D)] fp32.
        p_part = ((i_b * splits + i_split) * KV_HEADS + i_h) * rows + i_m * BLOCK_M
        o_r = tl.arange(0, BLOCK_M)
        tl.store(lse + p_part + o_r, b_lse, mask=m_lse)
        p_o = output + p_part * HEAD_DIM + o_r * HEAD_DIM
    else:
        p_lse = lse + (i_b * HEADS + i_h * GROUP) * length
        tl.store(p_lse + (o_g * length + o_c), b_lse, mask=m_lse)
        # What the rows of a tile add to an address fits 32 bits: half the registers.
        p_o = output + ((i_b * length + i_m * BLOCK_M // GROUP) * HEADS + i_h * GROUP) * HEAD_DIM
        p_o += ((o_c - i_m * BLOCK_M // GROUP) * HEADS + o_g) * HEAD_DIM
    b_o = b_o.to(output.dtype.element_ty)
    tl.store(p_o[:, None] + o_e[None, :], b_o, mask=m_m[:, None] & m_e[None, :])


@triton.jit(do_not_specialize=["length", "splits"])
def merge_splits_kernel(
    partial, partial_lse, output, lse, length: tl.int32, splits: tl.int32,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = length * GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP
    i_m = tl.program_id(0)
    i_h = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    # [BLOCK_S]
    b_lse = tl.load(
        partial_lse + ((i_b * splits + o_s) * KV_HEADS + i_h) * rows + i_m,
        mask=o_s < splits,
        other=float("-inf"),
    )
    # The block's own keys are in one of the splits, so only scores of -inf leave a row without a maximum: it gets 0
    # and -inf, as without splits.
    top = tl.max(b_lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(b_lse - top), 0)
    divisor = tl.where(total == 0, 1.0, total)
    # [BLOCK_D]
    b_o = tl.zeros([BLOCK_D], tl.float32)
    for i_s in range(splits):
        p_part = ((i_b * splits + i_s) * KV_HEADS + i_h) * rows + i_m
        weight = tl.exp(tl.load(partial_lse + p_part) - top) / divisor
        # Without weight the partial result may never have been written. A weight of NaN still reaches the result.
        m_part = o_d < tl.where(weight > 0, HEAD_DIM, 0)
        b_o += weight * tl.load(partial + p_part * HEAD_DIM + o_d, mask=m_part, other=0.0)
    o_c = i_m // GROUP
    o_h = i_h * GROUP + i_m % GROUP
    tl.store(lse + (i_b * HEADS + o_h) * length + o_c, top + tl.log(total))
    p_o = output + ((i_b * length + o_c) * HEADS + o_h) * HEAD_DIM
    tl.store(p_o + o_d, b_o.to(output.dtype.element_ty), mask=m_d)


@functools.cache
def split_count(
    programs: int, tiles: int, slots: int, merge_tiles: float = 1.0, most: int = MAX_SPLITS
) -> int:
    """Into how many stretches the list of tiles is cut.

    The time of a launch in tiles is waves * longest stretch, a partial result costs what it takes to write and merge
    it, and the launch of the merge about a tile. The count that makes the sum smallest is taken, the smaller one on
    ties.

    Args:
        programs: programs without a split. tiles: tiles of keys each of them walks.
        slots: programs that the GPU runs at a time.
        merge_tiles: what writing and merging one partial result costs, in tiles.
        most: the largest count that is allowed.
    """
    best, best_cost = 1, float(tiles * -(-programs // slots))
    for splits in range(2, min(MAX_SPLITS, tiles, most) + 1):
        waves = -(-programs * splits // slots)
        cost = waves * -(-tiles // splits) + 1.0 + merge_tiles * splits * programs / slots
        if cost < best_cost:
            best, best_cost = splits, cost
    return best


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    prefix_start: Tensor | None,
    prefix_end: Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
    window: int | None = None,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments, results and arithmetic: `reference.block_attention`. A row whose scores are all -inf yields 0.

    Args:
        splits: into how many stretches the keys are cut; None takes the number that fills the GPU.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    if prefix_key is None or prefix_key.shape[2] == 0:
        # An empty prefix is one of no slots, not another kernel; these are not read.
        prefix_key, prefix_value, prefix_start, prefix_end, prefix_length = key, value, None, None, 0
    else:
        prefix_length = prefix_key.shape[2]
        # A bound that is not contiguous (a column, an expanded scalar) is copied: a few bytes.
        prefix_start, prefix_end = (
            None if bound is None else bound.contiguous() for bound in (prefix_start, prefix_end)
        )
    block_d = max(16, next_power_of_2(head_dim))
    config = configs.select(
        "block_attention",
        capability(query),
        head_dim=block_d,
        bytes=query.element_size(),
        softcap=softcap is not None,
        sliced=COMPILES,
    )
    block_m = min(config["block_m"], max(16, next_power_of_2(length * group)))
    block_n = config["block_n"]
    # Value columns of one program: where they are not all, several programs compute the same scores.
    block_e = min(config.get("block_e", block_d), block_d)
    tiles_m, tiles_e = triton.cdiv(length * group, block_m), triton.cdiv(head_dim, block_e)
    if splits is None:
        tiles = triton.cdiv(prefix_length, block_n) + triton.cdiv(length, block_n)
        if window is not None:
            # What the first position of a tile sees behind it, and the tile's own positions.
            tiles = min(tiles, triton.cdiv(window + triton.cdiv(block_m, group), block_n) + 1)
        slots = multiprocessors(query) * config["blocks"]
        # By bytes: a partial result is written and read in fp32, a tile is read in the dtype of the keys.
        partial_bytes = 2 * block_m * block_e * 4
        tile_bytes = block_n * (block_d + block_e) * query.element_size()
        most = SCRATCH // (batch * heads * length * (head_dim + 1) * 4)
        programs = tiles_m * tiles_e * kv_heads * batch
        splits = split_count(programs, tiles, slots, partial_bytes / tile_bytes, most)

    output = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    target, target_lse = output, lse
    if splits > 1:
        target = query.new_empty(batch, splits, kv_heads, length * group, head_dim, dtype=torch.float32)
        target_lse = query.new_empty(batch, splits, kv_heads, length * group, dtype=torch.float32)
    strides = [s for t in (query, key, value, prefix_key, prefix_value) for s in t.stride()[:3]]
    shape = {"KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": block_d}
    with on_device(query):
        block_attention_kernel[(tiles_m * tiles_e * splits, kv_heads, batch)](
            query, key, value, prefix_key, prefix_value, prefix_start, prefix_end, target, target_lse,
            scale, 1.0 if softcap is None else softcap, length, prefix_length,
            NO_WINDOW if window is None else min(window, NO_WINDOW), splits, *strides, **shape,
            START=prefix_start is not None, END=prefix_end is not None,
            SPLIT=splits > 1, CAUSAL=causal, SOFTCAP=softcap is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            UPCAST=INTERPRET and query.dtype == torch.bfloat16,
            # Offsets inside a tile of keys or values take half the registers as 32 bits; wider slots keep 64. The way
            # to the tile, by batch and head, is 64 bits anyway: those strides grow with the context.
            NARROW=max(strides[5::3]) * block_n < 2**31,
            BLOCK_M=block_m, BLOCK_N=block_n, SLICES=config.get("slices", 1), BLOCK_E=block_e,
            **FUSED, num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
        if splits > 1:
            merge_splits_kernel[(length * group, kv_heads, batch)](
                target, target_lse, output, lse, length, splits, **shape,
                BLOCK_S=MAX_SPLITS, **FUSED, num_warps=2,
            )  # fmt: skip
    return output, lse
