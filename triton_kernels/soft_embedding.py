"""`soft_embedding` by slices of the vocabulary: probabilities once, then a product over the tiles that hold mass.

Of each slice `probabilities_kernel` writes the probabilities in the dtype of the weight to a workspace that fits an
L2 cache, and whether a tile of rows x vocabulary holds mass. `choose_tiles_kernel` lists the tiles that do, in
order, and `product_kernel` walks that list alone, cut into stretches that fill the GPU. Each stretch adds its slices up
in an fp32 partial result of its own; `sum_partials_kernel` adds the stretches in order, so results repeat exactly.

A configuration with `"product": "vendor"` multiplies each slice by the vendor's product instead, which leaves no tile
out; a call with a tolerance takes `product_kernel` all the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..native.soft_embedding_chunked import exact_soft_embedding, vendor_product
from .block_attention import split_count
from .common import (
    CAPABILITIES,
    DEVICES,
    FUSED,
    INTERPRET,
    by_value,
    cap,
    capability,
    multiprocessors,
    next_power_of_2,
    on_device,
    rows_within_reach,
    unavailable,
)
from .row_stats import row_pointers
from .softcap import difference, exp2_flushed, rate, reciprocal, scaled_tanh

__all__ = ["FEATURES", "soft_embedding", "unavailable"]

FEATURES = {
    "device": DEVICES,
    "dtype": frozenset({torch.bfloat16, torch.float16, torch.float32}),
    "compute_capability": CAPABILITIES,
}

# fp16 has no normal number below 6e-5, and a flat row holds 4e-6 by token: there probabilities are stored times 2^14.
FP16_SHIFT = 14
# Rows and columns that one pass of `probabilities_kernel` holds in registers; in full fp32 half of the rows.
CHUNK_ROWS = 16
CHUNK_COLUMNS = 512
# Softcap times rate below which one chain of capping and tempering is off by less than the rounding to 16 bits.
LARGEST_CHAIN = tl.constexpr(2048.0)
SUM_BLOCK = 1024
PEAKS_BLOCK = 32
# Rows of one program of `normalise_kernel`: few, so that a canvas of 256 makes 64 programs, whose one round holds all
# 512 groups of a vocabulary of 262,144.
NORMALISED_ROWS = 4


@triton.jit(do_not_specialize=["rows", "inner_rows", "vocab"])
def peaks_kernel(
    logits, argmax, peaks, rows: tl.int32, inner_rows: tl.int32, vocab: tl.int32,
    stride_outer: tl.int64, stride_inner: tl.int64, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest logit of each row, from its place, so that no program of the next kernel waits for two loads."""
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < rows
    # [BLOCK]. A place of other logits reads a wrong value, and no memory outside the row.
    b_place = tl.minimum(tl.maximum(tl.load(argmax + o_r, mask=m_r, other=0), 0), vocab - 1)
    p_row = row_pointers(logits, o_r, inner_rows, stride_outer, stride_inner, FLAT)
    tl.store(peaks + o_r, tl.load(p_row + b_place, mask=m_r, other=0.0).to(tl.float32), mask=m_r)


@triton.jit
def chunk_of_probabilities(
    logits, peaks, top1_prob, probabilities, masses, temperature, softcap, i_m, i_g, i_chunk, b_most,
    rows, inner_rows, vocab, first, tiles_m, stride_outer, stride_inner, temperature_stride,
    TEMPERATURE_POINTER: tl.constexpr, SOFTCAP: tl.constexpr, FULL: tl.constexpr, CHAIN: tl.constexpr,
    SHIFT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Stores what `probabilities_kernel` does of ROWS rows. Returns b_most [PARTS] with their masses in it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    o_c = i_g * PARTS * BLOCK_V + tl.arange(0, PARTS * BLOCK_V)
    m_v = first + o_c < vocab
    o_r = i_m * BLOCK_M + i_chunk * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    # [ROWS]
    b_top = tl.load(top1_prob + o_r, mask=m_r, other=0.0)
    b_peak = tl.load(peaks + o_r, mask=m_r, other=0.0)
    m_valid = b_top > 0.0
    b_t = tl.zeros([ROWS], tl.float32)
    if TEMPERATURE_POINTER:
        b_t += tl.load(temperature + o_r * temperature_stride, mask=m_r, other=1.0)
    else:
        b_t += temperature
    p_row = row_pointers(logits, o_r, inner_rows, stride_outer, stride_inner, FLAT) + first
    # [ROWS, PARTS * BLOCK_V]
    m_x = m_valid[:, None] & m_v[None, :]
    b_x = tl.load(p_row[:, None] + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    if FULL:
        b_x = cap(b_x, softcap, 1.0 / softcap, SOFTCAP)
        b_peak = cap(b_peak, softcap, 1.0 / softcap, SOFTCAP)
        b_d = tl.minimum(difference(b_x, b_peak[:, None]), 0.0) / b_t[:, None]
        b_p = b_top[:, None] * tl.exp2(b_d * LOG2E)
    else:
        b_k = rate(b_t)
        b_c = SHIFT + tl.log2(b_top)
        if SOFTCAP and CHAIN:
            # tanh(x / c) = 1 - 2 / (e^(2x / c) + 1): its cancellation near 0 is absolute, so an exponent bears it.
            b_r = reciprocal(exp2_flushed(b_x * (2.0 * LOG2E / softcap)) + 1.0)
            b_rp = reciprocal(exp2_flushed(b_peak * (2.0 * LOG2E / softcap)) + 1.0)
            b_d = tl.minimum(b_rp[:, None] - b_r, 0.0) * (2.0 * softcap * b_k)[:, None]
        elif SOFTCAP:
            # The difference is one of capped logits, finite whatever softcap and temperature are.
            b_x = scaled_tanh(b_x * (1.0 / softcap), softcap)
            b_peak = scaled_tanh(b_peak * (1.0 / softcap), softcap)
            b_d = tl.minimum(difference(b_x, b_peak[:, None]), 0.0) * b_k[:, None]
        else:
            b_d = (b_x - b_peak[:, None]) * b_k[:, None]
        b_p = exp2_flushed(b_d + b_c[:, None])
    b_p = tl.where(m_x, b_p, 0.0)
    b_rounded = b_p.to(probabilities.dtype.element_ty)
    tl.store(probabilities + o_r.to(tl.int64)[:, None] * COLUMNS + o_c[None, :], b_rounded)
    # Of what the product would take, so that a tile without mass adds exactly nothing: [ROWS, PARTS].
    b_sum = tl.sum(tl.reshape(b_rounded.to(tl.float32), [ROWS, PARTS, BLOCK_V]), 2)
    p_mass = masses + (first // (PARTS * BLOCK_V) + i_g).to(tl.int64) * (tiles_m * BLOCK_M) + o_r
    tl.store(p_mass, tl.sum(b_sum, 1))
    return tl.maximum(b_most, tl.max(b_sum, 0))


# `first` is specialised: a multiple of the slice is one of 16, as 0 is, and that makes loads of logits 16 bytes wide.
@triton.jit(do_not_specialize="temperature softcap tolerance rows inner_rows tiles_m".split())
def probabilities_kernel(
    logits, peaks, top1_prob, probabilities, masses, holds, temperature, softcap, tolerance,
    rows: tl.int32, inner_rows: tl.int32, vocab: tl.int32, first: tl.int32, tiles_m: tl.int32,
    stride_outer: tl.int64, stride_inner: tl.int64, temperature_stride,
    TEMPERATURE_POINTER: tl.constexpr, SOFTCAP: tl.constexpr, FULL: tl.constexpr, SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Probabilities times 2^SHIFT of the slice's rows x COLUMNS from `first` on, and which tiles hold mass.

    A probability is top1_prob * e^((x - the row's largest) / temperature): a logsumexp would be of the size of x /
    temperature, and its last place no longer small where the temperature is. masses [groups of PARTS tiles, rows] gets
    the sum of a row's rounded probabilities, by which the result is divided in the end.
    FULL computes every step in fp32 as the specification does. Otherwise the result is rounded to 16 bits, and
    capping and tempering are one chain of two exponentials, off by a few 1e-5 relative, unless the softcap is so large,
    or a temperature so low, that this no longer holds.
    """
    i_m = tl.program_id(0) % tiles_m
    i_g = tl.program_id(0) // tiles_m
    # [PARTS]
    b_most = tl.zeros([PARTS], tl.float32)
    largest = 0.0
    if SOFTCAP and not FULL:
        if TEMPERATURE_POINTER:
            o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
            b_t = tl.load(temperature + o_r * temperature_stride, mask=o_r < rows, other=float("inf"))
            largest = softcap * tl.max(rate(b_t), 0)
        else:
            largest = softcap * rate(temperature)
    if largest < LARGEST_CHAIN:
        for i_chunk in range(BLOCK_M // ROWS):
            b_most = chunk_of_probabilities(
                logits, peaks, top1_prob, probabilities, masses, temperature, softcap, i_m, i_g, i_chunk, b_most,
                rows, inner_rows, vocab, first, tiles_m, stride_outer, stride_inner, temperature_stride,
                TEMPERATURE_POINTER, SOFTCAP, FULL, True, SHIFT, COLUMNS, BLOCK_M, BLOCK_V, ROWS, PARTS, FLAT,
            )  # fmt: skip
    else:
        # Fewer rows at once: what the other formula takes would cost every call registers.
        for i_chunk in range(BLOCK_M // ROWS * 4):
            b_most = chunk_of_probabilities(
                logits, peaks, top1_prob, probabilities, masses, temperature, softcap, i_m, i_g, i_chunk, b_most,
                rows, inner_rows, vocab, first, tiles_m, stride_outer, stride_inner, temperature_stride,
                TEMPERATURE_POINTER, SOFTCAP, FULL, False, SHIFT, COLUMNS, BLOCK_M, BLOCK_V, ROWS // 4, PARTS, FLAT,
            )  # fmt: skip
    # Rounding may carry the mass of a settled row over 1.
    ONE: tl.constexpr = 2.0**SHIFT
    b_holds = tl.minimum(b_most, ONE) > tolerance * ONE
    p_holds = holds + i_m * (COLUMNS // BLOCK_V) + i_g * PARTS + tl.arange(0, PARTS)
    tl.store(p_holds, b_holds.to(tl.int32))


@triton.jit
def choose_tiles_kernel(holds, chosen, counts, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """For each tile of rows, the tiles of the slice that hold mass, in order, and how many there are."""
    i_m = tl.program_id(0)
    o_t = tl.arange(0, BLOCK)
    # [BLOCK]
    b_holds = tl.load(holds + i_m * TILES + o_t, mask=o_t < TILES, other=0)
    b_place = tl.cumsum(b_holds, 0) - 1
    tl.store(chosen + i_m * TILES + b_place, o_t, mask=b_holds != 0)
    tl.store(counts + i_m, tl.sum(b_holds, 0))


@triton.jit(do_not_specialize=["splits", "first", "tiles_m"])
def product_kernel(
    probabilities, weight, chosen, counts, partial,
    vocab: tl.int32, first: tl.int32, tiles_m: tl.int32, splits: tl.int32, stride_w: tl.int64,
    EMBEDDING: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, LATER: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds probabilities @ weight over one stretch of the chosen tiles to partial [splits, rows, EMBEDDING] fp32.

    EVEN: no tile of the weight crosses its edge. LATER: the partial result already holds slices.
    """
    TILES_E: tl.constexpr = (EMBEDDING + BLOCK_E - 1) // BLOCK_E
    TILES_V: tl.constexpr = COLUMNS // BLOCK_V
    # Row tiles vary fastest: the programs that take the same part of the weight run together and share it in L2.
    i_m = tl.program_id(0) % tiles_m
    i_e = tl.program_id(0) // tiles_m % TILES_E
    i_s = tl.program_id(0) // tiles_m // TILES_E

    count = tl.load(counts + i_m)
    stretch = (count + splits - 1) // splits
    begin = tl.minimum(i_s * stretch, count)
    end = tl.minimum(begin + stretch, count)
    if LATER:
        if begin >= end:
            return

    # Offsets inside a tile fit 32 bits (`rows_within_reach`).
    o_m = tl.arange(0, BLOCK_M)
    o_v = tl.arange(0, BLOCK_V)
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < EMBEDDING
    p_p = probabilities + i_m.to(tl.int64) * BLOCK_M * COLUMNS + (o_m[:, None] * COLUMNS + o_v[None, :])
    p_w = weight + (o_v[:, None] * stride_w.to(tl.int32) + o_e[None, :])
    # [BLOCK_M, BLOCK_E]
    b_o = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    # Read one round ahead: an address that waits for a load of its own round would shorten the pipeline of the tiles.
    # The last round reads one entry too many, which is the next row's or a count.
    p_chosen = chosen + i_m * TILES_V
    i_v = tl.load(p_chosen + begin)
    for i in range(begin, end):
        start = i_v * BLOCK_V
        i_v = tl.load(p_chosen + i + 1)
        # [BLOCK_M, BLOCK_V], [BLOCK_V, BLOCK_E]
        b_p = tl.load(p_p + start)
        p_tile = p_w + (first + start).to(tl.int64) * stride_w
        if EVEN:
            b_w = tl.load(p_tile)
        else:
            b_w = tl.load(p_tile, mask=(first + start + o_v < vocab)[:, None] & m_e[None, :], other=0.0)
        if UPCAST:
            b_p = b_p.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_o = tl.dot(b_p, b_w, b_o, input_precision=PRECISION)
    p_o = partial + (i_s * tiles_m + i_m).to(tl.int64) * BLOCK_M * EMBEDDING
    p_o += o_m[:, None] * EMBEDDING + o_e[None, :]
    if LATER:
        # Adds without loading, which registers would not hold. Only this program adds here: the order is fixed.
        tl.atomic_add(p_o, b_o, mask=m_e[None, :], sem="relaxed")
    else:
        tl.store(p_o, b_o, mask=m_e[None, :])


@triton.jit(do_not_specialize=["groups", "padded"])
def normalise_kernel(
    masses, factors, groups: tl.int32, padded: tl.int32, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One over the mass of a row: of all its rounded probabilities, those of tiles that are left out included.

    In a settled row one probability near 1 carries the whole row, and its rounding error with it: this takes that out
    again, and whatever the capping or top1_prob were off by. Mass that is left out stays left out.
    """
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_g = tl.arange(0, BLOCK)
    # [BLOCK, ROWS]
    b_mass = tl.zeros([BLOCK, ROWS], tl.float32)
    for i_g in range(0, groups, BLOCK):
        m_g = (i_g + o_g < groups)[:, None]
        b_mass += tl.load(
            masses + (i_g + o_g).to(tl.int64)[:, None] * padded + o_r[None, :], mask=m_g, other=0.0
        )
    # [ROWS]
    b_total = tl.sum(b_mass, 0)
    tl.store(factors + o_r, tl.where(b_total > 0, 1.0 / b_total, 0.0))


@triton.jit(do_not_specialize=["splits"])
def sum_partials_kernel(
    partial, factors, top1_prob, output, splits: tl.int32, size: tl.int64, stride_split: tl.int64,
    EMBEDDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    # [BLOCK]
    b_o = tl.zeros([BLOCK], tl.float32)
    for i_s in range(splits):
        b_o += tl.load(partial + i_s * stride_split + o, mask=m, other=0.0)
    b_o *= tl.load(factors + o // EMBEDDING, mask=m, other=0.0)
    # A row without a distribution yields zeros, whatever the weight holds: 0 * NaN or infinity came this far as NaN.
    b_o = tl.where(tl.load(top1_prob + o // EMBEDDING, mask=m, other=0.0) > 0.0, b_o, 0.0)
    tl.store(output + o, b_o.to(output.dtype.element_ty), mask=m)


def soft_embedding(
    logits: Tensor,
    argmax: Tensor,
    top1_prob: Tensor,
    weight: Tensor,
    temperature: Tensor,
    softcap: float | None,
    tolerance: float = 0.0,
    exact: bool = False,
    *,
    splits: int | None = None,
) -> Tensor:
    """Arguments and result: `reference.soft_embedding`.

    The probabilities are computed in fp32 and rounded to the dtype of `weight` for the product, which accumulates in
    fp32; a row's result is divided by the mass of its rounded probabilities. Tiles of rows x vocabulary (`block_m` x
    `block_v` of the configuration) in which no row holds more than `tolerance` are left out; at a tolerance of 0 the
    configuration may choose the vendor's product, which takes them all. exact=True takes the reference's own
    roundings, in slices, by PyTorch.

    Args:
        splits: into how many stretches the chosen tiles of a slice are cut; None takes the number that fills the GPU.
    """
    if exact:
        return exact_soft_embedding(logits, top1_prob, weight, temperature, softcap)
    shape, (vocab, embedding) = logits.shape[:-1], weight.shape
    rows = shape.numel()
    output = weight.new_empty(*shape, embedding)
    if output.numel() == 0:
        return output
    config = configs.select("soft_embedding", capability(logits), bytes=weight.element_size())
    block_m = min(config["block_m"], max(16, next_power_of_2(rows)))
    block_e = min(config["block_e"], max(16, next_power_of_2(embedding)))
    block_v = config["block_v"]
    weight = rows_within_reach(weight, block_v)
    width = min(max(CHUNK_COLUMNS, block_v), max(block_v, next_power_of_2(vocab)))
    columns = min(config["slice"], triton.cdiv(vocab, width) * width)
    tiles_m, tiles_e, tiles_v = (
        triton.cdiv(rows, block_m),
        triton.cdiv(embedding, block_e),
        columns // block_v,
    )
    full = weight.dtype == torch.float32
    vendor = config.get("product") == "vendor" and tolerance == 0 and not full
    if vendor:
        # A partial result by slice: the sum that the stretches need adds the slices, and no product reads another's.
        splits = triton.cdiv(vocab, columns)
    elif splits is None:
        slots = multiprocessors(logits) * config["blocks"]
        splits = split_count(tiles_m * tiles_e, tiles_v, slots)

    probabilities = weight.new_empty(tiles_m * block_m, columns)
    integers = weight.new_empty((2 * tiles_v + 1, tiles_m), dtype=torch.int32).view(-1)
    holds, chosen, counts = integers.split([tiles_m * tiles_v, tiles_m * tiles_v, tiles_m])
    padded, groups = tiles_m * block_m, triton.cdiv(vocab, columns) * (columns // width)
    masses = weight.new_empty((groups, padded), dtype=torch.float32)
    peaks, factors = weight.new_empty((2, padded), dtype=torch.float32)
    argmax, top1_prob = argmax.contiguous(), top1_prob.contiguous()
    partial = weight.new_empty((splits, tiles_m * block_m, embedding), dtype=torch.float32)
    t, t_pointer, t_stride = by_value(temperature)
    flat = shape[0] == 1 or logits.stride(0) == shape[1] * logits.stride(1)
    shift = FP16_SHIFT if weight.dtype == torch.float16 else 0
    with on_device(logits):
        peaks_kernel[(triton.cdiv(rows, PEAKS_BLOCK),)](
            logits, argmax, peaks, rows, shape[1], vocab, logits.stride(0), logits.stride(1),
            FLAT=flat, BLOCK=PEAKS_BLOCK, **FUSED, num_warps=1,
        )  # fmt: skip
        for first in range(0, vocab, columns):
            probabilities_kernel[(tiles_m * (columns // width),)](
                logits, peaks, top1_prob, probabilities, masses, holds,
                t, 1.0 if softcap is None else softcap, tolerance,
                rows, shape[1], vocab, first, tiles_m, logits.stride(0), logits.stride(1), t_stride,
                TEMPERATURE_POINTER=t_pointer, SOFTCAP=softcap is not None, FULL=full, SHIFT=shift,
                COLUMNS=columns, BLOCK_M=block_m, BLOCK_V=block_v,
                ROWS=min(CHUNK_ROWS // 2 if full else CHUNK_ROWS, block_m), PARTS=width // block_v, FLAT=flat,
                **FUSED, num_warps=8,
            )  # fmt: skip
            if vendor:
                last = min(first + columns, vocab)
                out = partial[first // columns, :rows]
                vendor_product(probabilities[:rows, : last - first], weight[first:last], out)
                continue
            choose_tiles_kernel[(tiles_m,)](
                holds, chosen, counts, TILES=tiles_v, BLOCK=next_power_of_2(tiles_v), **FUSED, num_warps=4
            )
            product_kernel[(tiles_m * tiles_e * splits,)](
                probabilities, weight, chosen, counts, partial,
                vocab, first, tiles_m, splits, weight.stride(0), EMBEDDING=embedding, COLUMNS=columns,
                EVEN=vocab % columns == 0 and embedding % block_e == 0, LATER=first > 0,
                PRECISION="ieee" if full else "tf32", UPCAST=INTERPRET and weight.dtype == torch.bfloat16,
                BLOCK_M=block_m, BLOCK_E=block_e, BLOCK_V=block_v,
                **FUSED, num_warps=config["num_warps"], num_stages=config["num_stages"],
            )  # fmt: skip
        normalise_kernel[(padded // NORMALISED_ROWS,)](
            masses, factors, groups, padded, ROWS=NORMALISED_ROWS, BLOCK=512, **FUSED, num_warps=4
        )
        sum_partials_kernel[(triton.cdiv(output.numel(), SUM_BLOCK),)](
            partial, factors, top1_prob, output, splits, output.numel(), partial.stride(0),
            EMBEDDING=embedding, BLOCK=SUM_BLOCK, **FUSED, num_warps=4,
        )  # fmt: skip
    return output
