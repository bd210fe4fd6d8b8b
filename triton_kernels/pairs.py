"""Maxima of 16-bit numbers two at a time, and reductions of two tensors in one pass over shared memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .softcap import INTERPRETED


@triton.jit
def larger(a, b):
    """The larger of two numbers of one dtype; of NaN and a number the number."""
    if INTERPRETED:
        return tl.maximum(a.to(tl.float32), b.to(tl.float32)).to(a.dtype)
    elif a.dtype == tl.float32:
        return tl.maximum(a, b)
    elif a.dtype == tl.bfloat16:
        # The compiler's own maximum of 16-bit numbers is that of fp32.
        return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.float16, True, 2)


@triton.jit
def smaller(a, b):
    """The smaller of two numbers of one dtype; of NaN and a number the number."""
    if INTERPRETED:
        return tl.minimum(a.to(tl.float32), b.to(tl.float32)).to(a.dtype)
    elif a.dtype == tl.float32:
        return tl.minimum(a, b)
    elif a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.float16, True, 2)


@triton.jit
def widened(x):
    """The same numbers in fp32."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        # The compiler takes a pair apart before it widens either half.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], tl.float32, True, 2
        )


@triton.jit
def _larger_of_each(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _sum_of_each(a, b, c, d):
    return a + c, b + d


@triton.jit
def largest_of_two(a, b):
    """The largest numbers of the rows of two fp32 tensors; NaN counts only where there is nothing else."""
    # The interpreter walks a reduction of two tensors element by element.
    if INTERPRETED:
        return tl.max(a, 1), tl.max(b, 1)
    else:
        return tl.reduce((a, b), 1, _larger_of_each)


@triton.jit
def sums_of_two(a, b):
    """The sums of the rows of two fp32 tensors."""
    if INTERPRETED:
        return tl.sum(a, 1), tl.sum(b, 1)
    else:
        return tl.reduce((a, b), 1, _sum_of_each)
