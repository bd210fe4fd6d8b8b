"""How a tile of an expert's weights comes out of memory and becomes an operand of a product, in each of their formats.

Weights in the rows' dtype are loaded (`load_tile`). FP8 numbers are widened in registers (`widen`), which is exact,
and the fp32 scale of their block (`load_scale`) multiplies the fp32 product over the block's columns, or that of their
row the whole product.

NVFP4 weights are loaded by words of eight numbers, the columns 8k to 8k + 7. Numbers j and j + 4 of a word lie 16 bits
apart, so a shift and a mask bring two at once to where a 16-bit float has sign, exponent and mantissa: such a word is
two neighbours of the operand, as matrix instructions want them in a register. So a pass over the columns is four
products, j = 0 to 3, each of a quarter of them, and the other operand has its columns in the order

    j, k, h  of column  8k + j + 4h   (j < 4, h < 2),

in which `by_quarters` brings rows and `quarter_place` the results of a product. The scale of 16 columns multiplies the
numbers before the product, in the rows' dtype: six bits of significand hold that exactly. Numbers and scales are off by
powers of two until the fp32 result is multiplied with the global scale (`load_global_scale`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference.quantization import SCALE_BLOCK as SCALED_BY
from ..reference.quantization import SCALE_GROUP as GROUPED_BY

# Rows and columns of FP8 weights that share a scale; columns of NVFP4 weights that do; NVFP4 weights in a word.
SCALE_BLOCK = tl.constexpr(SCALED_BY)
SCALE_GROUP = tl.constexpr(GROUPED_BY)
IN_WORD = tl.constexpr(8)
# What is left of the powers of two in front of a product of NVFP4 weights.
NVFP4_LEFT = tl.constexpr(256.0)


@triton.jit
def load_tile(p, o_k, left, EVEN: tl.constexpr, UPCAST: tl.constexpr):
    """A tile whose last dimension has `left` columns of its row left."""
    if EVEN:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=(o_k < left)[None, :], other=0.0)
    if UPCAST:
        b = b.to(tl.float32)
    return b


@triton.jit
def widen(b, DTYPE: tl.constexpr, BY_FP16: tl.constexpr):
    """A tile of e4m3 numbers, or of their bytes as int8, in DTYPE: bf16, fp16 and fp32 hold all of them.

    A byte's sign, exponent and mantissa go to their places in fp32; the difference of the biases (127 and 7) is a
    power of two, which brings subnormal numbers out right as well. The code of NaN comes out as 480.
    """
    if b.dtype == tl.int8:
        b_bits = (b.to(tl.int32) << 20) & -0x78100000
        b = b_bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    elif BY_FP16:
        b = b.to(tl.float16).to(tl.float32)
    return b.to(DTYPE)


@triton.jit
def load_weights(
    p, o_k, left, EVEN: tl.constexpr, UPCAST: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
    BY_FP16: tl.constexpr,
):  # fmt: skip
    """A tile of weights in DTYPE that need no scale before the product: "plain" or "fp8_rows"."""
    b = load_tile(p, o_k, left, EVEN, UPCAST and FORMAT == "plain")
    if FORMAT == "fp8_rows":
        b = widen(b, DTYPE, BY_FP16)
    return b


@triton.jit
def load_scale(p, other, o_n, left, WHOLE: tl.constexpr):
    """The scale of a tile's rows o_n: one number, or where the tile crosses a block's border a column of two.

    Two scalars and a selection, since a gather would go through shared memory in every pass of the loop.
    """
    b_s = tl.load(p)
    if not WHOLE:
        b_s = tl.where(o_n < left, b_s, tl.load(other))[:, None]
    return b_s


@triton.jit
def place_pairs(b_w, J: tl.constexpr, MANTISSA: tl.constexpr):
    """Numbers J and J + 4 of each word, as the bits of two floats with so many bits of mantissa.

    The bias of e2m1 is 1, so they are their values times 2^-126 (bf16, MANTISSA 7) or 2^-14 (fp16, 10). 0.5 is a
    subnormal number in both formats.
    """
    SIGN: tl.constexpr = 12 - 4 * J
    SIZE: tl.constexpr = MANTISSA - 1 - 4 * J
    b_size = b_w << SIZE if SIZE >= 0 else b_w >> -SIZE
    return ((b_w << SIGN) & -0x7FFF8000) | (b_size & ((7 << (MANTISSA - 1)) * 0x10001))


@triton.jit
def multiply_pairs(b_w, b_s, DTYPE: tl.constexpr):
    """Both halves of words of two bf16 or fp16: the compiler does not find the instruction for two by itself."""
    if DTYPE == tl.bfloat16:
        # A multiplication of its own begins with sm_90; adding -0 changes nothing.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r", [b_w, b_s], tl.int32, True, 1,
        )  # fmt: skip
    return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [b_w, b_s], tl.int32, True, 1)


@triton.jit
def load_group_scales(p, o_s, left, EVEN: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr):
    """The scale of each word of a tile of NVFP4 weights, [BLOCK_N, words]: fp32, or with PAIRS DTYPE twice in a word.

    p [BLOCK_N, words / 2]: e4m3 as int8. `place_pairs` is off by 2^-126 or 2^-14; scales take of it what their range
    has room for and leave NVFP4_LEFT.
    """
    b = widen(load_tile(p, o_s, left, EVEN, False), tl.float32, False)
    if PAIRS:
        b_one = (b * (64.0 if DTYPE == tl.float16 else 3.3230699894622897e35)).to(DTYPE)
        b_bits = b_one.to(tl.int16, bitcast=True).to(tl.int32)
        b = (b_bits << 16) | (b_bits & 0xFFFF)
    else:
        b = b * 3.3230699894622897e35
    b = tl.broadcast_to(b[:, :, None], [b.shape[0], b.shape[1], 2])
    return tl.reshape(b, [b.shape[0], b.shape[1] * 2])


@triton.jit
def nvfp4_quarter(b_w, b_s, J: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr):
    """[BLOCK_N, words * 2] in DTYPE: numbers J and J + 4 of each word times its scale, over NVFP4_LEFT."""
    if PAIRS:
        b_w = multiply_pairs(place_pairs(b_w, J, 10 if DTYPE == tl.float16 else 7), b_s, DTYPE)
        b = tl.join(b_w.to(tl.int16), (b_w >> 16).to(tl.int16)).to(DTYPE, bitcast=True)
    else:
        # A bf16 is the upper half of an fp32.
        b_w = place_pairs(b_w, J, 7)
        b_low = (b_w << 16).to(tl.float32, bitcast=True) * b_s
        b_high = (b_w & -0x10000).to(tl.float32, bitcast=True) * b_s
        b = tl.join(b_low, b_high).to(DTYPE)
    return tl.reshape(b, [b.shape[0], b.shape[1] * 2])


@triton.jit
def load_quarters(p, o_k, left, QUARTER: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr):
    """Four tiles [BLOCK_K, BLOCK_M] of rows that are in the order of `by_quarters`, a quarter being QUARTER columns."""
    b_0 = load_tile(p, o_k, left, EVEN, UPCAST)
    b_1 = load_tile(p + QUARTER, o_k, left, EVEN, UPCAST)
    b_2 = load_tile(p + 2 * QUARTER, o_k, left, EVEN, UPCAST)
    b_3 = load_tile(p + 3 * QUARTER, o_k, left, EVEN, UPCAST)
    return tl.trans(b_0), tl.trans(b_1), tl.trans(b_2), tl.trans(b_3)


@triton.jit
def nvfp4_dot(b_o, b_w, b_s, b_x, PRECISION: tl.constexpr, PAIRS: tl.constexpr):
    """b_o + weights @ rows^T over the columns of a pass.

    b_w: words of weights. b_s: of `load_group_scales`. b_x: of `load_quarters`.
    """
    # Triton 3.6 to 3.8 multiply words that are 16 deep wrongly (triton-lang/triton, pull request 11691).
    tl.static_assert(not PAIRS or b_x[0].shape[0] >= 32, "a quarter of a pass of pairs is 32 columns or more")
    for j in tl.static_range(4):
        b = nvfp4_quarter(b_w, b_s, j, b_x[j].dtype, PAIRS)
        b_o = tl.dot(b, b_x[j], b_o, input_precision=PRECISION)
    return b_o


@triton.jit
def load_global_scale(p):
    """What the fp32 product with NVFP4 weights is multiplied with."""
    return tl.load(p) * NVFP4_LEFT


@triton.jit
def quarter_place(o, COLUMNS: tl.constexpr):
    """Where `by_quarters` puts column o of COLUMNS."""
    return o % 4 * (COLUMNS // 4) + o // 8 * 2 + o % 8 // 4


def by_quarters(rows: Tensor) -> Tensor:
    """rows [R, E] with their columns in the order that products with NVFP4 weights read; E a multiple of 8."""
    return rows.unflatten(1, (-1, 2, 4)).permute(0, 3, 1, 2).reshape(rows.shape)
