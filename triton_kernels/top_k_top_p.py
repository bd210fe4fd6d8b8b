"""`top_k_top_p` in one launch: a program narrows down the cutoff of its row in a few passes over it.

Top-k and top-p are one search. With W(v) the sum of the weights of the logits above v, the cutoff is the least logit v
with W(v) <= target: for top-k a weight is 1 and the target k - 1, for top-p it is e^x and the target the share p of
their sum. W falls with v, so a pass that learns W at four places leaves a fifth of an interval.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import CAPABILITIES, DEVICES, FUSED, UpTo, by_value, cap, next_power_of_2, on_device, unavailable
from .row_stats import row_pointers
from .softcap import exp2_flushed, rate

__all__ = ["FEATURES", "top_k_top_p", "unavailable"]

FEATURES = {
    "device": DEVICES,
    "dtype": frozenset({torch.bfloat16, torch.float16, torch.float32}),
    "compute_capability": CAPABILITIES,
    "vocab": UpTo(2**31 - 2**16),
}

# Tokens that a program takes at a time, and its warps where a row is as long.
MOST = 4096
WARPS = 16
LOWEST = tl.constexpr(-2147483648)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def ordered(x):
    """fp32 as int32 in the same order; both zeros are 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def from_ordered(key):
    return tl.where(key < 0, -key | LOWEST, key).to(tl.float32, bitcast=True)


@triton.jit
def add_above(b_sum, b_l, b_w, pivot):
    return b_sum + tl.where(b_l > pivot, b_w, 0)


@triton.jit
def narrowed(low, high, least, pivot, b_above, target):
    """The interval (low, high] with W at one of its places known; below `least` it has no logit."""
    is_low = (tl.sum(b_above, 0) > target) | (pivot < least)
    return tl.where(is_low, tl.maximum(low, pivot), low), tl.where(is_low, high, tl.minimum(high, pivot))


@triton.jit
def place(low, high, share, below, number):
    """Where pass `number` asks for W: first a few nats below the largest logit, then by turns evenly by value and
    evenly among the fp32 numbers of the interval. The one is quick, the other ends whatever the values are."""
    # Under a softcap the largest may be infinite.
    even = low * (1.0 - share) + tl.minimum(high, LARGEST_FLOAT) * share
    key_low = ordered(low).to(tl.int64)
    between = ((ordered(high).to(tl.int64) - key_low).to(tl.float32) * share).to(tl.int64)
    turn = tl.where(number % 2 == 0, from_ordered((key_low + between).to(tl.int32)), even)
    return tl.where(number == 0, high - below, turn)


@triton.jit
def search(
    p_row, vocab, low, high, top_k, top_p, least_weighed, infinite, top, t, softcap, inverse_softcap,
    COUNT: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cutoff of a row between `low`, below which is no logit but -inf, and the largest, `high`.

    COUNT: top-k, of at least k logits above -inf; else top-p of the logits that are not below `least_weighed`.
    infinite: how many logits of -inf are weighed. top: `high` under the softcap. t: the temperature.
    """
    DTYPE: tl.constexpr = tl.int32 if COUNT else tl.float32
    k = rate(t)
    number = 0
    going = True
    while going:
        place_0 = place(low, high, 0.2, 12.0 * t, number)
        place_1 = place(low, high, 0.4, 5.0 * t, number)
        place_2 = place(low, high, 0.6, 2.0 * t, number)
        place_3 = place(low, high, 0.8, 0.5 * t, number)
        b_above_0 = tl.zeros([BLOCK], DTYPE)
        b_above_1 = tl.zeros([BLOCK], DTYPE)
        b_above_2 = tl.zeros([BLOCK], DTYPE)
        b_above_3 = tl.zeros([BLOCK], DTYPE)
        b_all = tl.zeros([BLOCK], DTYPE)
        b_least = tl.full([BLOCK], float("inf"), tl.float32)
        b_most = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            o_v = start + tl.arange(0, BLOCK)
            m_v = o_v < vocab
            b_l = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
            if COUNT:
                b_w = tl.full([BLOCK], 1, tl.int32)
            else:
                b_w = exp2_flushed((cap(b_l, softcap, inverse_softcap, SOFTCAP) - top) * k)
                b_w = tl.where((b_l >= least_weighed) & m_v, b_w, 0.0)
                b_all += b_w
            b_above_0 = add_above(b_above_0, b_l, b_w, place_0)
            b_above_1 = add_above(b_above_1, b_l, b_w, place_1)
            b_above_2 = add_above(b_above_2, b_l, b_w, place_2)
            b_above_3 = add_above(b_above_3, b_l, b_w, place_3)
            b_least = tl.minimum(b_least, tl.where(b_l > low, b_l, float("inf")))
            b_most = tl.maximum(b_most, tl.where(b_l <= high, b_l, float("-inf")))
        if COUNT:
            target = top_k - 1
        else:
            target = top_p * tl.sum(b_all, 0)
        least = tl.min(b_least, 0)
        high = tl.max(b_most, 0)
        going = least < high
        low, high = narrowed(low, high, least, place_0, b_above_0, target)
        low, high = narrowed(low, high, least, place_1, b_above_1, target)
        low, high = narrowed(low, high, least, place_2, b_above_2, target)
        low, high = narrowed(low, high, least, place_3, b_above_3, target)
        if SOFTCAP and not COUNT:
            # There -inf has mass, of which top-p may have to keep some.
            lowest = tl.exp2((-softcap - top) * k) * infinite
            if lowest >= (1.0 - top_p) * tl.sum(b_all, 0):
                high = float("-inf")
                going = False
        number += 1
    return high


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "softcap", "inner_rows"])
def top_k_top_p_kernel(
    logits, cutoff, temperature, top_k: tl.int32, top_p, softcap,
    inner_rows: tl.int32, vocab: tl.int32, stride_outer: tl.int64, stride_inner: tl.int64, temperature_stride,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, TOP_K_FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
    TEMPERATURE_POINTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0)
    p_row = row_pointers(logits, i_r, inner_rows, stride_outer, stride_inner, False)
    t = 0.0
    if TEMPERATURE_POINTER:
        t += tl.load(temperature + i_r * temperature_stride)
    else:
        t += temperature
    t = tl.where(t == 0, 1.0, t)
    inverse_softcap = 1.0 / softcap

    b_largest = tl.full([BLOCK], float("-inf"), tl.float32)
    b_smallest = tl.full([BLOCK], float("inf"), tl.float32)
    b_nan = tl.zeros([BLOCK], tl.int32)
    b_infinite = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_l = tl.load(p_row + o_v, mask=o_v < vocab, other=float("-inf")).to(tl.float32)
        b_largest = tl.maximum(b_largest, b_l)
        m_infinite = b_l == float("-inf")
        b_smallest = tl.minimum(b_smallest, tl.where(m_infinite, float("inf"), b_l))
        b_infinite += (m_infinite & (o_v < vocab)).to(tl.int32)
        b_nan |= (b_l != b_l).to(tl.int32)
    largest = tl.max(b_largest, 0)
    top = cap(largest, softcap, inverse_softcap, SOFTCAP)
    valid = (tl.max(b_nan, 0) == 0) & (tl.abs(top / t) < float("inf")) & (largest > float("-inf"))
    result = float("-inf")
    if valid:
        # Just below all logits but -inf.
        low = from_ordered(ordered(tl.min(b_smallest, 0)) - 1)
        infinite = tl.sum(b_infinite, 0)
        if TOP_K:
            if vocab - infinite >= top_k:
                result = search(
                    p_row, vocab, low, largest, top_k, top_p, float("-inf"), infinite, top, t, softcap,
                    inverse_softcap, True, SOFTCAP, BLOCK,
                )  # fmt: skip
                # What top-k drops no top-p has to find.
                low = from_ordered(ordered(result) - 1)
        if TOP_P:
            least_weighed = float("-inf")
            if TOP_K_FIRST:
                least_weighed = result
                infinite = tl.where(result > float("-inf"), 0, infinite)
            result = tl.maximum(result, search(
                p_row, vocab, low, largest, top_k, top_p, least_weighed, infinite, top, t, softcap,
                inverse_softcap, False, SOFTCAP, BLOCK,
            ))  # fmt: skip
    tl.store(cutoff + i_r, result)


def top_k_top_p(
    logits: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    top_k_first: bool,
    softcap: float | None,
) -> Tensor:
    """Arguments, result and arithmetic: `reference.top_k_top_p`. Reads a row once, and again for each pass."""
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    cutoff = logits.new_empty(shape, dtype=torch.float32)
    by_k, by_p = 0 < top_k <= vocab, top_p < 1
    if not (by_k or by_p):
        return cutoff.fill_(float("-inf"))
    if cutoff.numel():
        t, t_pointer, t_stride = by_value(temperature)
        block = min(MOST, next_power_of_2(vocab))
        with on_device(logits):
            top_k_top_p_kernel[(cutoff.numel(),)](
                logits, cutoff, t, top_k if by_k else 0, top_p, 1.0 if softcap is None else softcap,
                shape[1], vocab, logits.stride(0), logits.stride(1), t_stride,
                TOP_K=by_k, TOP_P=by_p, TOP_K_FIRST=by_k and by_p and top_k_first, SOFTCAP=softcap is not None,
                TEMPERATURE_POINTER=t_pointer, BLOCK=block, **FUSED, num_warps=min(WARPS, max(1, block // 256)),
            )  # fmt: skip
    return cutoff
