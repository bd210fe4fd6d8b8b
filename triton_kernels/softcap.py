"""softcap / temperature * tanh(logits / softcap) in few instructions, for kernels that issue decides.

Logits come by the ten million; what counts is instructions a logit. So the factor log2(e) / temperature rides on
the coefficients of the polynomial, and the two hardware instructions are asked for by name.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INTERPRET

INTERPRETED = tl.constexpr(INTERPRET)
# Beyond it a temperature is the limit of a one-hot distribution, and its exponents stay finite.
LARGEST_RATE = tl.constexpr(1.0e30)
# Exponents up to it have finite differences.
LARGEST_SCALE = tl.constexpr(1.0e38)


@triton.jit
def exp2_flushed(x):
    """2^x, exactly 0 where that is not a normal number."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        # The compiler's own exp2 keeps subnormal results, at three more instructions.
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def reciprocal(x):
    """1 / x for |x| >= 1, within about one unit in the last place; 0 at infinity."""
    if INTERPRETED:
        return 1.0 / x
    else:
        # A division keeps subnormal operands, at seven more instructions.
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def difference(x, reference):
    """x - reference, with x rounded before: exactly 0 where both come of one formula and one operand.

    Left to the compiler, a product in `x` and the subtraction become one fused operation, which does not round the
    product as that of the reference was; at a low temperature what is left over is no longer small.
    """
    if INTERPRETED:
        return x - reference
    else:
        # An instruction with an explicit rounding is never contracted.
        return tl.inline_asm_elementwise(
            "sub.rn.f32 $0, $1, $2;", "=f,f,f", [x, reference], tl.float32, True, 1
        )


@triton.jit
def rate(b_t):
    """The factor that turns a difference of logits into an exponent of 2 at temperature `b_t`."""
    return tl.minimum(1.4426950408889634 / b_t, LARGEST_RATE)


@triton.jit
def scale_at(b_k, softcap):
    """What multiplies tanh in an exponent of 2 at rate `b_k`: finite, for any softcap and temperature."""
    return tl.minimum(b_k * softcap, LARGEST_SCALE)


@triton.jit
def scaled_tanh_near_0(u, scale):
    """scale * tanh(u) where |u| < 1: an odd polynomial, a minimax fit of relative error 4.7e-9."""
    w = u * u
    p = tl.fma(scale * -0.0003584478981792927, w, scale * 0.002301350701600313)
    p = tl.fma(p, w, scale * -0.00794608798)
    p = tl.fma(p, w, scale * 0.021486645564436913)
    p = tl.fma(p, w, scale * -0.05387979745864868)
    p = tl.fma(p, w, scale * 0.13332344591617584)
    p = tl.fma(p, w, scale * -0.33333295583724976)
    return u * tl.fma(p, w, scale)


@triton.jit
def scaled_tanh(u, scale):
    """scale * tanh(u) for any u; 1 - 2 / (e^2u + 1) cancels near 0, so there the polynomial takes its place."""
    far = tl.fma(reciprocal(exp2_flushed(u * 2.8853900817779268) + 1.0), -2.0 * scale, scale)
    return tl.where(tl.abs(u) < 0.7, scaled_tanh_near_0(u, scale), far)


@triton.jit
def polynomial_serves(b_k, inverse_softcap):
    """Whether the polynomials below serve at rate `b_k`: their coefficients are normal numbers.

    The last of them has the twelfth power of the softcap in it.
    """
    square = inverse_softcap * inverse_softcap
    sixth = square * square * square
    last = b_k * sixth * sixth
    return (b_k > 1.0e-30) & (b_k < LARGEST_RATE) & (last > 1.0e-34) & (last < 1.0e30)


@triton.jit
def coefficients_below_half(b_k, inverse_softcap):
    """Those of odd powers of x in b_k * softcap * tanh(x / softcap) where |x| < softcap / 2.

    A minimax fit, relative error 1.3e-8. Rate and softcap are in them, so that a logit takes no operation for either.
    """
    w = inverse_softcap * inverse_softcap
    c1 = b_k * w
    c2 = c1 * w
    c3 = c2 * w
    return (
        b_k, c1 * -0.3333306908607483, c2 * 0.13324779272079468, c3 * -0.05298607796430588,
        c3 * w * 0.017135009169578552,
    )  # fmt: skip


@triton.jit
def coefficients_below_1(b_k, inverse_softcap):
    """The same for |x| < softcap: relative error 5e-8."""
    w = inverse_softcap * inverse_softcap
    c1 = b_k * w
    c2 = c1 * w
    c3 = c2 * w
    c4 = c3 * w
    c5 = c4 * w
    return (
        b_k * 0.9999999403953552, c1 * -0.33332839608192444, c2 * 0.13325203955173492, c3 * -0.053457025438547134,
        c4 * 0.02028997428715229, c5 * -0.006203374359756708, c5 * w * 0.0010410210816189647,
    )  # fmt: skip


@triton.jit
def odd_polynomial(x, c, TERMS: tl.constexpr):
    """x (c[0] + c[1] x^2 + ...), with coefficients as above."""
    w = x * x
    p = c[TERMS - 1]
    for i in tl.static_range(2, TERMS + 1):
        p = tl.fma(p, w, c[TERMS - i])
    return x * p
