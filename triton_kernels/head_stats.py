"""`head_stats`: the lm_head product with the tile statistics of `row_stats` as its epilogue.

A program computes one tile of rows x vocabulary, rounds it to the weight's dtype, stores it, and leaves the tile's
statistics while it still holds it. `merge_kernel` of `row_stats` then finishes the rows, re-reading of the
logits only the tile that holds a row's sample; where no logits are kept, `draw_again` computes that tile anew.
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
    INTERPRET,
    by_value,
    capability,
    int_by_value,
    next_power_of_2,
    on_device,
    rows_within_reach,
    unavailable,
)
from .draw_again import draw_again
from .row_stats import leave_tile_statistics, merge_kernel

__all__ = ["FEATURES", "head_stats", "head_stats_without_logits", "unavailable"]

FEATURES = {
    "device": DEVICES,
    "dtype": frozenset({torch.bfloat16, torch.float16, torch.float32}),
    "compute_capability": CAPABILITIES,
}


@triton.jit(do_not_specialize=["temperature", "stats_temperature", "softcap", "rows", "tiles_m"])
def head_tile_kernel(
    hidden, weight, logits, tile_max, tile_second, tile_z, tile_s, tile_zt, tile_argmax,
    temperature, stats_temperature, softcap,
    rows: tl.int32, vocab: tl.int32, tiles: tl.int32, tiles_m: tl.int32,
    stride_h: tl.int64, stride_w: tl.int64, temperature_stride, stats_stride,
    EMBEDDING: tl.constexpr, TEMPERATURE_POINTER: tl.constexpr, STATS_POINTER: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr, SOFTCAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    KEEP: tl.constexpr = True,
):  # fmt: skip
    # Row tiles vary fastest: the programs that take one tile of the weight run together and share it in L2.
    i_m = tl.program_id(0) % tiles_m
    i_tile = tl.program_id(0) // tiles_m
    # Rows and tokens beyond the end repeat the last: their products are never stored, and no load needs a mask.
    # Offsets inside a tile fit 32 bits (`rows_within_reach`).
    o_r = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - i_m * BLOCK_M)
    o_v = tl.arange(0, BLOCK_N)
    if not EVEN:
        o_v = tl.minimum(o_v, vocab - 1 - i_tile * BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    p_h = (
        hidden + i_m.to(tl.int64) * BLOCK_M * stride_h + (o_r[:, None] * stride_h.to(tl.int32) + o_k[None, :])
    )
    p_w = (
        weight
        + i_tile.to(tl.int64) * BLOCK_N * stride_w
        + (o_v[:, None] * stride_w.to(tl.int32) + o_k[None, :])
    )
    # [BLOCK_M, BLOCK_N]
    b_x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, EMBEDDING, BLOCK_K):
        # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
        if EMBEDDING % BLOCK_K == 0:
            b_h = tl.load(p_h + i_k)
            b_w = tl.load(p_w + i_k)
        else:
            m_k = (i_k + o_k < EMBEDDING)[None, :]
            b_h = tl.load(p_h + i_k, mask=m_k, other=0.0)
            b_w = tl.load(p_w + i_k, mask=m_k, other=0.0)
        if UPCAST:
            b_h = b_h.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_x = tl.dot(b_h, tl.trans(b_w), b_x, input_precision=PRECISION)

    # The model's lm_head rounds here: the statistics are those of the logits that are stored.
    b_logits = b_x.to(weight.dtype.element_ty)
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_v = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r = o_r < rows
    m_v = o_v < vocab
    if KEEP:
        p_x = logits + i_m.to(tl.int64) * BLOCK_M * vocab + i_tile * BLOCK_N
        p_x += tl.arange(0, BLOCK_M)[:, None] * vocab + tl.arange(0, BLOCK_N)[None, :]
        if EVEN:
            tl.store(p_x, b_logits, mask=m_r[:, None])
        else:
            tl.store(p_x, b_logits, mask=m_r[:, None] & m_v[None, :])
    b_x = b_logits.to(tl.float32)
    if not EVEN:
        b_x = tl.where(m_v[None, :], b_x, float("-inf"))
    leave_tile_statistics(
        b_x, o_r, m_r, o_v, i_tile, tile_max, tile_second, tile_z, tile_s, tile_zt, tile_argmax,
        temperature, stats_temperature, softcap, vocab, tiles, temperature_stride, stats_stride,
        TEMPERATURE_POINTER, STATS_POINTER, TWO_TEMPERATURES, SOFTCAP, EVEN, BLOCK_M, POSITIONS=not KEEP,
    )  # fmt: skip


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """Arguments, results and arithmetic: `reference.head_stats`. Writes the logits once and reads one tile per row."""
    arguments = (hidden, weight, temperature, stats_temperature, uniform, seed, offset, softcap)
    return _run(*arguments, keep_logits=True)


def head_stats_without_logits(
    hidden: Tensor,
    weight: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """The seven statistics of `reference.head_stats`; no logits are written but those of each row's sampled tile,
    computed again. Their sums may run in another order than the product's, so a sample whose uniform falls within
    rounding of a boundary can be the neighbour."""
    arguments = (hidden, weight, temperature, stats_temperature, uniform, seed, offset, softcap)
    return _run(*arguments, keep_logits=False)[1:]


def _run(
    hidden, weight, temperature, stats_temperature, uniform, seed, offset, softcap, *, keep_logits: bool
) -> tuple[Tensor, ...]:
    shape, (vocab, embedding) = hidden.shape[:-1], weight.shape
    rows = shape.numel()
    # Without logits two elements stand for them, which `merge_kernel` may read and nothing uses.
    logits = hidden.new_empty(*shape, vocab) if keep_logits else hidden.new_zeros(2)
    integers = [hidden.new_empty(shape, dtype=torch.int64) for _ in range(2)]
    floats = [hidden.new_empty(shape, dtype=torch.float32) for _ in range(5)]
    if rows == 0:
        return (logits, *integers, *floats)
    hidden = hidden.reshape(rows, embedding)
    config = configs.select("head_stats", capability(hidden), bytes=weight.element_size())
    block_m = min(config["block_m"], max(16, next_power_of_2(rows)))
    block_n = min(config["block_n"], max(16, next_power_of_2(vocab)))
    block_k = min(config["block_k"], max(16, next_power_of_2(embedding)))
    hidden, weight = rows_within_reach(hidden, block_m), rows_within_reach(weight, block_n)
    tiles, tiles_m = triton.cdiv(vocab, block_n), triton.cdiv(rows, block_m)
    two = stats_temperature is not None
    partial = hidden.new_empty((5 if two else 4, rows, tiles), dtype=torch.float32)
    partial_argmax = hidden.new_empty((rows, tiles), dtype=torch.int32)
    partials = (*partial[:4], partial[4] if two else partial[2], partial_argmax)

    t, t_pointer, t_stride = by_value(temperature)
    ts, ts_pointer, ts_stride = by_value(stats_temperature, 1.0)
    seed, seed_value, _ = int_by_value(seed)
    offset, offset_value, _ = int_by_value(offset)
    c = 1.0 if softcap is None else softcap
    flags = {
        "TEMPERATURE_POINTER": t_pointer, "STATS_POINTER": ts_pointer, "TWO_TEMPERATURES": two,
        "SOFTCAP": softcap is not None,
    }  # fmt: skip
    with on_device(hidden):
        head_tile_kernel[(tiles_m * tiles,)](
            hidden, weight, logits, *partials, t, ts, c,
            rows, vocab, tiles, tiles_m, hidden.stride(0), weight.stride(0), t_stride, ts_stride,
            EMBEDDING=embedding, EVEN=vocab % block_n == 0,
            PRECISION="ieee" if weight.dtype == torch.float32 else "tf32",
            UPCAST=INTERPRET and weight.dtype == torch.bfloat16,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, KEEP=keep_logits,
            **FUSED, num_warps=config["num_warps"], num_stages=config["num_stages"], **flags,
        )  # fmt: skip
        merge_kernel[(rows,)](
            logits, *partials, *integers, *floats, t, ts, c, uniform, seed, offset,
            seed_value, offset_value, rows, rows,
            # A vocabulary of 2 in rows of no length: no address beyond the two elements is read.
            *((vocab, tiles, 0, vocab) if keep_logits else (min(vocab, 2), tiles, 0, 0)), t_stride, ts_stride,
            UNIFORM=uniform is not None,
            ROWS=1, SPAN=block_n, LANES=min(block_n, 32), TILES=next_power_of_2(tiles),
            POSITIONS=not keep_logits, FLAT=True,
            **FUSED, num_warps=config["merge_warps"], **flags,
        )  # fmt: skip
        if not keep_logits:
            draw_again(
                hidden, weight, partials, integers[1], floats, (t, ts, c, t_stride, ts_stride),
                (uniform, seed, offset, seed_value, offset_value), block_n, config["merge_warps"], flags,
            )  # fmt: skip
    return (logits, *integers, *floats)
