"""The machine of tests/ptx: its arithmetic against Python's numbers, its warps and matrices, and what it refuses."""

import json
import math
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import arithmetic
from ptx.arithmetic import Unsupported
from ptx.kernel import Kernel, pack
from ptx.machine import Diverged
from ptx.memory import MemoryFault, Unordered
from ptx.program import parse

THREADS = 64
EDGES = [
    0,
    1,
    2,
    5,
    31,
    32,
    33,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    0xFFFFFFFF,
    0xFFFFFFFE,
    0x12345678,
    0xFEDCBA98,
]


def run(body: str, *tensors: torch.Tensor, threads: int = THREADS, blocks: int = 1, shared: int = 0) -> None:
    """A kernel whose parameters are pointers to tensors, in %rd1, %rd2, ...; %r1 is the thread, %r2 the block."""
    names = [f"p{i}" for i in range(len(tensors))]
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [{name}];" for i, name in enumerate(names))
    text = f"""
    .extern .shared .align 16 .b8 global_smem[];
    .visible .entry kernel({", ".join(f".param .u64 {name}" for name in names)})
    {{
    .reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<99>; .reg .b64 %rd<50>;
    {loads}
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    {body}
    ret;
    }}"""
    stretches = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()) for tensor in tensors
    ]
    values = [pack("*", tensor) for tensor in tensors]
    Kernel(parse(text)).launch((blocks, 1, 1), threads, shared, values, stretches)


# By bytes: the registers of that size, and how `struct` and torch write such a number.
KINDS = {4: ("r", "I", torch.int32), 8: ("rd", "Q", torch.int64)}


def of_each(instruction: str, *operands: list[int], size: int = 4) -> list[int]:
    """What `instruction` makes of each tuple of operands, a thread each; it reads {0}, {1}, ... and writes {d}."""
    register, form, dtype = KINDS[size]
    count = len(operands[0])
    threads = -(-count // 32) * 32
    tensors = [torch.zeros(threads, dtype=dtype) for _ in range(len(operands) + 1)]
    body, names = "", {"d": f"%{register}30"}
    for i, (tensor, numbers) in enumerate(zip(tensors, operands)):
        data = bytearray(struct.pack(f"<{threads}{form}", *numbers, *numbers[-1:] * (threads - count)))
        tensor.copy_(torch.frombuffer(data, dtype=dtype))
        names[str(i)] = f"%{register}{20 + i}"
        body += (
            f"mad.wide.u32 %rd10, %r1, {size}, %rd{i + 1};\nld.global.b{8 * size} {names[str(i)]}, [%rd10];\n"
        )
    for name, written in names.items():
        instruction = instruction.replace("{" + name + "}", written)
    body += f"{instruction};\nmad.wide.u32 %rd10, %r1, {size}, %rd{len(tensors)};\n"
    run(f"{body}st.global.b{8 * size} [%rd10], {names['d']};", *tensors, threads=threads)
    return list(struct.unpack(f"<{threads}{form}", tensors[-1].numpy().tobytes()))[:count]


def signed(number: int, bits: int = 32) -> int:
    number %= 1 << bits
    return number - (1 << bits) if number >> (bits - 1) else number


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(number: int, at: int, length: int, negative: bool) -> int:
    at, length = at & 255, length & 255
    number = signed(number) if negative else number
    taken = (number >> at) & ((1 << length) - 1)
    if negative and length:
        highest = min(at + length - 1, 31)
        if number >> highest & 1:
            taken |= -1 << (highest - at + 1) if highest >= at else -1
    return taken


def permuted(a: int, b: int, selector: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    result = []
    for i in range(4):
        chosen = selector >> 4 * i & 15
        byte = source[chosen & 7]
        result.append((255 if byte & 128 else 0) if chosen & 8 else byte)
    return int.from_bytes(bytes(result), "little")


INTEGERS = {
    "add.s32 {d}, {0}, {1}": lambda a, b: a + b,
    "sub.s32 {d}, {0}, {1}": lambda a, b: a - b,
    "mul.lo.s32 {d}, {0}, {1}": lambda a, b: a * b,
    "mul.hi.u32 {d}, {0}, {1}": lambda a, b: a * b >> 32,
    "mul.hi.s32 {d}, {0}, {1}": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 {d}, {0}, {1}, {0}": lambda a, b: a * b + a,
    "div.s32 {d}, {0}, {1}": lambda a, b: towards_zero(signed(a), signed(b)),
    "div.u32 {d}, {0}, {1}": lambda a, b: a // b,
    "rem.s32 {d}, {0}, {1}": lambda a, b: signed(a) - signed(b) * towards_zero(signed(a), signed(b)),
    "min.s32 {d}, {0}, {1}": lambda a, b: min(signed(a), signed(b)),
    "max.u32 {d}, {0}, {1}": max,
    "max.relu.s32 {d}, {0}, {1}": lambda a, b: max(signed(a), signed(b), 0),
    "shl.b32 {d}, {0}, {1}": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 {d}, {0}, {1}": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32 {d}, {0}, {1}": lambda a, b: signed(a) >> min(b, 31),
    "bfe.u32 {d}, {0}, {1}, 7": lambda a, b: field(a, b, 7, False),
    "bfe.s32 {d}, {0}, 5, {1}": lambda a, b: field(a, 5, min(b & 255, 32), True),
    "prmt.b32 {d}, {0}, {1}, 0x7E1U": lambda a, b: permuted(a, b, 0x7E1),
    "lop3.b32 {d}, {0}, {1}, 12, 0x96": lambda a, b: a ^ b ^ 12,
    "xor.b32 {d}, {0}, {1}": lambda a, b: a ^ b,
    "not.b32 {d}, {0}": lambda a, b: ~a,
    "popc.b32 {d}, {0}": lambda a, b: a.bit_count(),
    "cvt.s32.s8 {d}, {0}": lambda a, b: signed(a, 8),
    "cvt.u32.u16 {d}, {0}": lambda a, b: a & 0xFFFF,
    "add.s16x2 {d}, {0}, {1}": lambda a, b: ((a >> 16) + (b >> 16) & 0xFFFF) << 16 | (a + b & 0xFFFF),
    "clz.b32 {d}, {0}": lambda a, b: 32 - a.bit_length(),
    "brev.b32 {d}, {0}": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 {d}, {0}": lambda a, b: a.bit_length() - 1,
    "bfind.shiftamt.u32 {d}, {0}": lambda a, b: 32 - a.bit_length() if a else -1,
    "bfi.b32 {d}, {0}, {1}, 9, 7": lambda a, b: b & ~(127 << 9) | (a & 127) << 9,
    "bfi.b32 {d}, {0}, {1}, 30, 8": lambda a, b: b & (1 << 30) - 1 | a << 30,
    "setp.lt.s32 %p9, {0}, {1}; selp.b32 {d}, 7, 9, %p9": lambda a, b: 7 if signed(a) < signed(b) else 9,
    "setp.gt.u32 %p9, {0}, {1}; selp.b32 {d}, {0}, {1}, %p9": lambda a, b: max(a, b),
    "setp.gt.u32 %p9, {0}, {1}; mov.b32 {d}, 3; @!%p9 mov.b32 {d}, 4": lambda a, b: 3 if a > b else 4,
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integers(instruction):
    divides = instruction.startswith(("div", "rem"))
    # -2^31 / -1 has no result.
    pairs = [
        (a, b) for a in EDGES for b in EDGES if not divides or (b and (a, b) != (0x80000000, 0xFFFFFFFF))
    ]
    found = of_each(instruction, *map(list, zip(*pairs)))
    assert found == [INTEGERS[instruction](a, b) % (1 << 32) for a, b in pairs]


WIDE = {
    "mul.lo.s64 {d}, {0}, {1}": lambda a, b: a * b,
    "mul.hi.u64 {d}, {0}, {1}": lambda a, b: a * b >> 64,
    "add.s64 {d}, {0}, {1}": lambda a, b: a + b,
    "min.s64 {d}, {0}, {1}": lambda a, b: min(signed(a, 64), signed(b, 64)),
    "mov.b64 {%r40, %r41}, {0}; mov.b64 {d}, {%r41, %r40}": lambda a, b: a >> 32 | a << 32,
    "cvt.u32.u64 %r40, {0}; mul.wide.s32 {d}, %r40, -3": lambda a, b: signed(a) * -3,
    "cvt.u32.u64 %r40, {0}; cvt.s64.s32 {d}, %r40": lambda a, b: signed(a),
    "cvt.u32.u64 %r40, {0}; mad.wide.u32 {d}, %r40, 5, {1}": lambda a, b: a % (1 << 32) * 5 + b,
}


@pytest.mark.parametrize("instruction", WIDE)
def test_wide_integers(instruction):
    numbers = [*EDGES, 1 << 63, (1 << 64) - 1, 0x0123456789ABCDEF]
    pairs = [(a, b) for a in numbers for b in numbers]
    found = of_each(instruction, *map(list, zip(*pairs)), size=8)
    assert found == [WIDE[instruction](a, b) % (1 << 64) for a, b in pairs]


def bits_of(numbers) -> list[int]:
    return [int(bits) for bits in np.asarray(numbers, dtype=np.float32).view(np.uint32)]


def floats_of(bits: list[int]) -> np.ndarray:
    return np.array(bits, dtype=np.uint32).view(np.float32)


def nearest(exact: Fraction) -> float:
    """An exact number in fp32, to nearest even; of normal size."""
    if exact == 0:
        return 0.0
    size = Fraction(2) ** (math.floor(math.log2(abs(exact))) - 23)
    while abs(exact) / size >= 1 << 24:
        size *= 2
    while abs(exact) / size < 1 << 23:
        size /= 2
    return float(round(exact / size) * size)


def test_a_fused_product_is_rounded_once():
    """Among them sums that a double rounds to a tie of fp32, which a second rounding would send the wrong way."""
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(3000).astype(np.float32) for _ in range(3))
    # 1 + 2^-24 and a little more or less: the little is lost in a double.
    a[:4], b[:4] = [1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-12, -1 - 2.0**-12], 2.0**-12
    c[:4] = [1, 1 + 2.0**-23, -1, -1 - 2.0**-23]
    a[4:6], b[4:6], c[4:6] = 2.0**-40, [2.0**-40, -(2.0**-40)], 1 + 2.0**-23
    wide = [1 + 2.0**-24 + 2.0**-60, 1 + 2.0**-24 - 2.0**-60]
    assert [float(np.float32(np.float64(x))) for x in wide] == [1.0, 1.0]
    found = floats_of(of_each("fma.rn.f32 {d}, {0}, {1}, {2}", bits_of(a), bits_of(b), bits_of(c)))
    exact = [
        nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c)
    ]
    assert found.tolist() == exact
    # 2^-24 is half a unit, and the product carries 2^-60 beyond it.
    halves = (
        [2.0**-12 * (1 + 2.0**-18)] * 2,
        [2.0**-12 * (1 + 2.0**-18), 2.0**-12 * (1 - 2.0**-18)],
        [1.0, 1.0],
    )
    found = floats_of(of_each("fma.rn.f32 {d}, {0}, {1}, {2}", *map(bits_of, halves)))
    exact = [nearest(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(*halves)]
    assert found.tolist() == exact == [1 + 2.0**-23, 1.0]


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1.5, 2.0**-130, 3.0e38]
COMPARISONS = [
    ("eq", lambda a, b: a == b), ("ne", lambda a, b: a != b and a == a and b == b), ("lt", lambda a, b: a < b),
    ("geu", lambda a, b: not a < b), ("neu", lambda a, b: a != b), ("num", lambda a, b: a == a and b == b),
    ("nan", lambda a, b: a != a or b != b),
]  # fmt: skip


@pytest.mark.parametrize("name, function", COMPARISONS)
def test_comparisons_of_floats(name, function):
    pairs = [(a, b) for a in SPECIAL for b in SPECIAL]
    instruction = f"setp.{name}.f32 %p9, {{0}}, {{1}}; selp.b32 {{d}}, 1, 0, %p9"
    found = of_each(instruction, *(bits_of(side) for side in zip(*pairs)))
    assert found == [int(function(a, b)) for a, b in pairs]


@pytest.mark.parametrize("dtype, kind", [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("name, function", COMPARISONS)
def test_comparisons_of_sixteen_bits(name, function, dtype, kind):
    """One number, and two in a register, each with a predicate of its own."""
    small = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1.5]
    pairs = [(a, b) for a in small for b in small]
    low = [torch.tensor(side, dtype=dtype).view(torch.uint16).tolist() for side in zip(*pairs)]
    wanted = [int(function(a, b)) for a, b in pairs]
    narrow = "cvt.u16.u32 %rs{i}, {{{j}}}"
    single = "; ".join(
        [*(narrow.format(i=8 + j, j=j) for j in range(2)), f"setp.{name}.{kind} %p9, %rs8, %rs9"]
    )
    assert of_each(single + "; selp.b32 {d}, 1, 0, %p9", *low) == wanted
    # The upper numbers are those of the pairs turned around.
    words = [[a | b << 16 for a, b in zip(side, reversed(side))] for side in low]
    double = (
        f"setp.{name}.{kind}x2 %p8|%p9, {{0}}, {{1}}; selp.b32 {{d}}, 1, 0, %p8; @%p9 add.u32 {{d}}, {{d}}, 2"
    )
    assert of_each(double, *words) == [a + 2 * b for a, b in zip(wanted, reversed(wanted))]


def test_maxima_with_and_without_nan():
    pairs = [(a, b) for a in SPECIAL for b in SPECIAL]
    sides = [bits_of(side) for side in zip(*pairs)]
    quiet, loud = (floats_of(of_each(f"max.{kind}f32 {{d}}, {{0}}, {{1}}", *sides)) for kind in ("", "NaN."))
    for (a, b), without, with_nan in zip(pairs, quiet, loud):
        numbers = [x for x in (a, b) if x == x]
        assert (without == max(numbers)) if numbers else math.isnan(without)
        assert (with_nan == max(a, b)) if len(numbers) == 2 else math.isnan(with_nan)


def test_conversions():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat(
        [torch.randn(500, generator=generator) * 10**k for k in (-6, 0, 4)] + [torch.tensor(SPECIAL)]
    )
    bits = bits_of(numbers.numpy())
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        rounded = numbers.to(dtype)
        found = of_each(f"cvt.rn.{kind}.f32 %rs9, {{0}}; cvt.u32.u16 {{d}}, %rs9", bits)
        found = torch.tensor([signed(x, 16) for x in found], dtype=torch.int16).view(dtype)
        assert torch.equal(found.nan_to_num(7.0), rounded.nan_to_num(7.0)) and torch.equal(
            found.isnan(), rounded.isnan()
        )
        back = of_each(f"cvt.rn.{kind}x2.f32 {{d}}, 0f3F800000, {{0}}", bits)
        one = {"bf16": 0x3F80, "f16": 0x3C00}[kind]
        assert all(x >> 16 == one for x in back)
        low = torch.tensor([signed(x, 16) for x in back], dtype=torch.int16).view(dtype)
        assert torch.equal(low.nan_to_num(7.0), rounded.nan_to_num(7.0))
    codes = list(range(256))
    found = of_each("cvt.u16.u32 %rs9, {0}; cvt.rn.f16x2.e4m3x2 {d}, %rs9", codes)
    low = torch.tensor([signed(x, 16) for x in found], dtype=torch.int16).view(torch.float16).float()
    exact = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(low.nan_to_num(9999.0), exact.nan_to_num(9999.0))
    values = [
        0.0,
        -0.0,
        448.0,
        463.0,
        -464.0,
        1e9,
        2.0**-10,
        3 * 2.0**-10,
        -(2.0**-9),
        17.0,
        19.0,
        1e-30,
        math.nan,
    ]
    values += torch.randn(200).mul(torch.logspace(-4, 3, 200)).tolist()
    found = of_each(
        "cvt.rn.satfinite.e4m3x2.f32 %rs9, 0f3F800000, {0}; cvt.u32.u16 {d}, %rs9", bits_of(values)
    )
    nearest = torch.tensor(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert [x & 0xFF for x in found] == nearest.tolist() and {x >> 8 for x in found} == {0x38}
    whole = of_each("cvt.rzi.s32.f32 {d}, {0}", bits_of([1.9, -1.9, 3e9, -3e9, math.nan]))
    assert [signed(x) for x in whole] == [1, -1, 2**31 - 1, -(2**31), 0]
    numbers = [1.5, 2.5, -1.5, 1.9, -1.9, 3e9, math.inf]
    for rounding, of in (("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)):
        floats = floats_of(of_each(f"cvt.{rounding}.f32.f32 {{d}}, {{0}}", bits_of(numbers)))
        assert floats.tolist() == [of(x) if math.isfinite(x) else x for x in numbers]


@pytest.mark.parametrize("kind, dtype", [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_two_halves_at_once(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(512, generator=generator).to(dtype) for _ in range(3))
    words = [[int(x) % (1 << 32) for x in t.view(torch.int32)] for t in (a, b, c)]
    found = of_each(f"fma.rn.{kind} {{d}}, {{0}}, {{1}}, {{2}}", *words)
    result = torch.tensor([signed(x) for x in found], dtype=torch.int32).view(dtype)
    # fp64 holds the sum of these exactly but for a few, and torch rounds it once more through fp32.
    exact = a.double() * b.double() + c.double()
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=2.0**-14)
    assert ((result.double() - exact).abs() <= 0.5 * spacing).all()
    a[::5] = math.nan
    words[0] = [int(x) % (1 << 32) for x in a.view(torch.int32)]
    for name, of in (
        ("max", torch.fmax),
        ("max.NaN", torch.maximum),
        ("min", torch.fmin),
        ("min.NaN", torch.minimum),
    ):
        found = of_each(f"{name}.{kind} {{d}}, {{0}}, {{1}}", *words[:2])
        result = torch.tensor([signed(x) for x in found], dtype=torch.int32).view(dtype)
        torch.testing.assert_close(result, of(a, b), rtol=0, atol=0, equal_nan=True)


def test_approximations_are_off_but_not_by_much():
    x = np.linspace(-20, 20, 4000).astype(np.float32)
    for instruction, exact in (
        ("ex2.approx.ftz.f32 {d}, {0}", np.exp2(x.astype(np.float64))),
        ("rcp.approx.ftz.f32 {d}, {0}", 1 / x.astype(np.float64)),
        ("div.full.f32 {d}, 0f40400000, {0}", 3 / x.astype(np.float64)),
    ):
        found = floats_of(of_each(instruction, bits_of(x))).astype(np.float64)
        error = np.abs(found / exact - 1)
        assert 2.0**-24 < error.max() <= 2.0**-22, instruction
    # What a kernel may count on.
    assert floats_of(of_each("ex2.approx.f32 {d}, {0}", bits_of([0.0, -math.inf, 3.0]))).tolist() == [
        1.0,
        0.0,
        8.0,
    ]
    assert floats_of(of_each("ex2.approx.ftz.f32 {d}, {0}", bits_of([-126.5, -126.0]))).tolist() == [
        0.0,
        2.0**-126,
    ]
    assert floats_of(of_each("rcp.approx.ftz.f32 {d}, {0}", bits_of([1.0, -2.0, math.inf]))).tolist() == [
        1,
        -0.5,
        0,
    ]


def test_threads_that_branch_apart_meet_again():
    """Thread t counts to t; then the warp shuffles, which takes all of it."""
    out = torch.zeros(2 * THREADS, dtype=torch.int32)
    run(
        """
        mov.b32 %r10, 0;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 bra $done;
        $again:
        add.s32 %r10, %r10, 1;
        setp.lt.s32 %p2, %r10, %r1;
        @%p2 bra $again;
        $done:
        bar.sync 0;
        shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;
        mad.lo.s32 %r12, %r2, 64, %r1;
        mad.wide.u32 %rd10, %r12, 4, %rd1;
        st.global.b32 [%rd10], %r11;
        """,
        out,
        blocks=2,
    )
    assert out.tolist() == [t ^ 1 for t in range(THREADS)] * 2


def test_threads_meet_where_branches_end_whatever_the_order_of_the_text():
    """The compiler may put the end of branches between them."""
    out = torch.zeros(THREADS, dtype=torch.int32)
    run(
        """
        mov.b32 %r10, 7;
        setp.eq.b32 %p1, %r1, 3;
        @%p1 bra $together;
        setp.lt.s32 %p2, %r1, 20;
        @%p2 bra $few;
        bra.uni $many;
        $together:
        shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;
        mad.wide.u32 %rd10, %r1, 4, %rd1;
        st.global.b32 [%rd10], %r11;
        ret;
        $many:
        add.s32 %r10, %r1, 1000;
        bra.uni $together;
        $few:
        add.s32 %r10, %r1, 100;
        bra.uni $together;
        """,
        out,
    )
    mine = torch.arange(THREADS)
    mine = torch.where(mine == 3, 7, torch.where(mine < 20, mine + 100, mine + 1000))
    assert out.tolist() == mine[torch.arange(THREADS) ^ 1].tolist()


@pytest.mark.parametrize(
    "instruction",
    ["bar.sync 0;", "shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;", "redux.sync.add.s32 %r11, %r10, -1;",
     "match.any.sync.b32 %r11, %r10, -1;"],
)  # fmt: skip
def test_a_part_of_the_threads_is_refused(instruction):
    body = f"""
    mov.b32 %r10, 0;
    setp.eq.b32 %p1, %r1, 0;
    @%p1 bra $skipped;
    {instruction}
    $skipped:
    """
    with pytest.raises(Diverged, match="reaches"):
        run(body)


WARPS_APART = """
    mov.b32 %r10, global_smem;
    mad.lo.u32 %r11, %r1, 4, %r10;
    xor.b32 %r12, %r1, 32;
    mad.lo.u32 %r12, %r12, 4, %r10;
    setp.lt.u32 %p1, %r1, 32;
    @%p1 bra $first;
    st.shared.b32 [%r11], %r1;
    bar.sync 0;
    ld.shared.b32 %r13, [%r12];
    bra.uni $end;
    $first:
    st.shared.b32 [%r11], %r1;
    bar.sync 0;
    {behind}
    ld.shared.b32 %r13, [%r12];
    $end:
    mad.wide.u32 %rd10, %r1, 4, %rd1;
    st.global.b32 [%rd10], %r13;
"""


def test_warps_of_a_block_meet_at_barriers_in_different_places():
    out = torch.zeros(THREADS, dtype=torch.int32)
    run(WARPS_APART.format(behind=""), out, shared=4 * THREADS)
    assert out.tolist() == (torch.arange(THREADS) ^ 32).tolist()
    # What one does behind its barrier is not ordered with what the other does behind its own.
    with pytest.raises(Unordered):
        run(WARPS_APART.format(behind="st.shared.b32 [%r11], %r1;"), out, shared=4 * THREADS)


def test_shuffles_and_reductions():
    out = torch.zeros(6, THREADS, dtype=torch.int32)
    modes = [("up", 3, 0), ("down", 3, 31), ("idx", 5, 31), ("bfly", 7, 31)]
    body = "add.s32 %r10, %r1, 100;\nmad.wide.u32 %rd10, %r1, 4, %rd1;\n"
    for i, (mode, by, clamp) in enumerate(modes):
        body += (
            f"shfl.sync.{mode}.b32 %r11, %r10, {by}, {clamp}, -1;\nst.global.b32 [%rd10+{256 * i}], %r11;\n"
        )
    for i, name in ((4, "add"), (5, "min")):
        body += f"redux.sync.{name}.s32 %r11, %r10, -1;\nst.global.b32 [%rd10+{256 * i}], %r11;\n"
    run(body, out)
    lane, base = torch.arange(THREADS) % 32, torch.arange(THREADS) // 32 * 32 + 100
    assert torch.equal(out[0], (base + torch.where(lane >= 3, lane - 3, lane)).int())
    assert torch.equal(out[1], (base + torch.where(lane < 29, lane + 3, lane)).int())
    assert torch.equal(out[2], (base + 5).int())
    assert torch.equal(out[3], (base + (lane ^ 7)).int())
    assert torch.equal(out[4], (base * 32 + 31 * 16).int())
    assert torch.equal(out[5], base.int())


def test_lanes_find_their_equals():
    out = torch.zeros(THREADS, dtype=torch.int32)
    run(
        """
        shr.u32 %r10, %r1, 1;
        and.b32 %r10, %r10, 3;
        match.any.sync.b32 %r11, %r10, -1;
        mad.wide.u32 %rd10, %r1, 4, %rd1;
        st.global.b32 [%rd10], %r11;
        """,
        out,
    )
    expected = [0x03030303 << (thread % 8 // 2 * 2) for thread in range(THREADS)]
    assert [number & 0xFFFFFFFF for number in out.tolist()] == expected


def test_atomic_operations_count_every_thread():
    total, order = torch.zeros(1, dtype=torch.int32), torch.full((THREADS,), -1, dtype=torch.int32)
    floats = torch.zeros(4)
    run(
        """
        atom.global.gpu.relaxed.add.u32 %r10, [%rd1], 2;
        mad.wide.u32 %rd10, %r1, 4, %rd2;
        st.global.b32 [%rd10], %r10;
        mov.b32 %r11, 0f3F000000;
        red.global.gpu.relaxed.add.v4.f32 [%rd3], {%r11, %r11, %r11, %r11};
        """,
        total, order, floats,
    )  # fmt: skip
    assert total.item() == 2 * THREADS
    assert sorted(order.tolist()) == list(range(0, 2 * THREADS, 2))
    assert floats.tolist() == [0.5 * THREADS] * 4


FAULTS = {
    "behind the end": (
        "mad.wide.u32 %rd10, %r1, 4, %rd1;\nld.global.b32 %r10, [%rd10+4];",
        "outside of global",
    ),
    "before the start": ("ld.global.b32 %r10, [%rd1+-4];", "outside of global"),
    "not aligned": ("ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd1+8];", "no multiples of 16"),
    "behind shared memory": (
        "st.shared.b32 [global_smem+60], %r1;\nst.shared.b32 [global_smem+64], %r1;",
        "shared",
    ),
    "a copy not aligned": (
        "mov.b32 %r10, 0;\ncp.async.cg.shared.global [%r10], [%rd1+8], 0x10;",
        "multiple of 16",
    ),
    "an unwritten address": ("ld.global.b32 %r10, [%rd40];", "memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_gpu_would_refuse_is_an_error(fault):
    body, message = FAULTS[fault]
    # On a multiple of 16 bytes, whatever torch's allocator does.
    held = torch.zeros(THREADS + 4, dtype=torch.int32)
    skip = -held.data_ptr() % 16 // 4
    with pytest.raises(MemoryFault, match=message):
        run(body, held[skip : skip + THREADS], shared=64)


def test_what_is_not_known_is_refused():
    for body in (
        "tcgen05.shift.cta_group::1.down [%r10];",
        "mul.rz.f32 %r10, %r11, %r12;",
        "prmt.b32.f4e %r10, %r11, %r12, 0;",
    ):
        with pytest.raises(Unsupported):
            run(body)


def test_what_was_never_written_is_poison():
    out = torch.zeros(2, dtype=torch.int32)
    run(
        "ld.shared.b32 %r10, [global_smem];\nst.global.b32 [%rd1], %r10;\nst.global.b32 [%rd1+4], %r50;",
        out,
        shared=16,
    )
    assert out.tolist() == [-1, -1]


def test_copies_leave_zeros_where_nothing_is_taken():
    source, out = torch.arange(4 * 32, dtype=torch.int32), torch.zeros(4 * 32, dtype=torch.int32)
    run(
        """
        and.b32 %r10, %r1, 1;
        shl.b32 %r11, %r10, 4;
        shl.b32 %r12, %r1, 4;
        cvt.u64.u32 %rd10, %r12;
        add.s64 %rd11, %rd1, %rd10;
        cp.async.cg.shared.global [%r12], [%rd11], 0x10, %r11;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r12];
        add.s64 %rd12, %rd2, %rd10;
        st.global.v4.b32 [%rd12], {%r20, %r21, %r22, %r23};
        """,
        source, out, threads=32, shared=512,
    )  # fmt: skip
    assert torch.equal(out.view(32, 4)[1::2], source.view(32, 4)[1::2])
    assert (out.view(32, 4)[::2] == 0).all()


def test_a_copy_that_was_not_waited_for_is_poison():
    source, out = torch.arange(4 * 32, dtype=torch.int32), torch.zeros(2, 4 * 32, dtype=torch.int32)
    copies = "\n".join(
        f"add.s32 %r11, %r12, {512 * i}; cp.async.cg.shared.global [%r11], [%rd11], 0x10; cp.async.commit_group;"
        for i in (0, 1)
    )
    run(
        f"""
        shl.b32 %r12, %r1, 4;
        cvt.u64.u32 %rd10, %r12;
        add.s64 %rd11, %rd1, %rd10;
        {copies}
        cp.async.wait_group 1;
        add.s64 %rd12, %rd2, %rd10;
        ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r12];
        st.global.v4.b32 [%rd12], {{%r20, %r21, %r22, %r23}};
        ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r12+512];
        st.global.v4.b32 [%rd12+512], {{%r20, %r21, %r22, %r23}};
        """,
        source, out, threads=32, shared=1024,
    )  # fmt: skip
    assert torch.equal(out[0], source) and (out[1] == -1).all()


@pytest.mark.parametrize("barrier", ["", "bar.sync 0;"])
@pytest.mark.parametrize("reads_first", [False, True])
def test_warps_that_no_barrier_orders_are_seen(barrier, reads_first):
    """Each thread writes its own word and reads that of the thread 32 further on, of the other warp."""
    write = "st.shared.b32 [%r10], %r1;"
    read = "ld.shared.b32 %r12, [%r11];"
    first, second = (read, write) if reads_first else (write, read)
    body = f"""
        shl.b32 %r10, %r1, 2;
        xor.b32 %r11, %r10, 128;
        {first}
        {barrier}
        {second}
        """
    if barrier:
        run(body, shared=256)
    else:
        with pytest.raises(Unordered, match="with no barrier"):
            run(body, shared=256)


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_a_warp_multiplies_matrices(kind, dtype):
    """A by ldmatrix, B [k, n] by its transposing form, C through mma.sync, all by the layouts of the ISA."""
    a, b, out = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.zeros(16, 8)
    run(
        f"""
        // Each thread brings 16 bytes of A, the first 16 also of B: rows of A have 32 bytes, those of B 16.
        shl.b32 %r10, %r1, 4;
        cvt.u64.u32 %rd10, %r10;
        add.s64 %rd11, %rd1, %rd10;
        ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd11];
        st.shared.v4.b32 [%r10], {{%r20, %r21, %r22, %r23}};
        setp.lt.u32 %p1, %r1, 16;
        add.s64 %rd12, %rd2, %rd10;
        @%p1 ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd12];
        @%p1 st.shared.v4.b32 [%r10+512], {{%r20, %r21, %r22, %r23}};
        bar.sync 0;
        // Lanes 0 to 15 name the rows of the left half of A, 16 to 31 those of the right one.
        and.b32 %r11, %r1, 15;
        shr.u32 %r12, %r1, 4;
        shl.b32 %r13, %r11, 5;
        mad.lo.s32 %r14, %r12, 16, %r13;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r30, %r31, %r32, %r33}}, [%r14];
        shl.b32 %r15, %r11, 4;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r34, %r35}}, [%r15+512];
        mov.b32 %r40, 0; mov.b32 %r41, 0; mov.b32 %r42, 0; mov.b32 %r43, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
            {{%r40, %r41, %r42, %r43}}, {{%r30, %r31, %r32, %r33}}, {{%r34, %r35}}, {{%r40, %r41, %r42, %r43}};
        // Row lane / 4 and that + 8, columns 2 (lane % 4) and the next.
        shr.u32 %r50, %r1, 2;
        and.b32 %r51, %r1, 3;
        shl.b32 %r52, %r50, 5;
        mad.lo.s32 %r53, %r51, 8, %r52;
        cvt.u64.u32 %rd20, %r53;
        add.s64 %rd21, %rd3, %rd20;
        st.global.v2.b32 [%rd21], {{%r40, %r41}};
        st.global.v2.b32 [%rd21+256], {{%r42, %r43}};
        """,
        a, b, out, threads=32, shared=1024,
    )  # fmt: skip
    exact = a.double() @ b.double()
    assert ((out.double() - exact).abs() <= 2.0**-23 * exact.abs() + 2.0**-40).all()
    # Cut off, not rounded.
    assert (out.double().abs() <= exact.abs()).all()


def test_a_product_and_a_sum_that_may_be_one_are():
    """1 + 2^-12 squared is 1 + 2^-11 + 2^-24, of which the last is lost where the product is rounded."""
    x = [struct.unpack("<I", struct.pack("<f", 1 + 2.0**-12))[0]]
    minus = "mov.b32 %r50, 0fBF801000;"  # -(1 + 2^-11)
    fused = of_each(f"{minus} mul.f32 %r51, {{0}}, {{0}}; add.f32 {{d}}, %r51, %r50", x)
    apart = of_each(f"{minus} mul.rn.f32 %r51, {{0}}, {{0}}; add.f32 {{d}}, %r51, %r50", x)
    less = of_each(f"{minus} neg.f32 %r50, %r50; mul.f32 %r51, {{0}}, {{0}}; sub.f32 {{d}}, %r50, %r51", x)
    assert floats_of([*fused, *apart, *less]).tolist() == [2.0**-24, 0.0, -(2.0**-24)]


def test_arguments_lie_at_multiples_of_their_size():
    kernel = Kernel(
        parse(
            ".visible .entry k(.param .u32 a, .param .u64 .ptr .global .align 1 b, .param .f32 c)\n{\nret;\n}"
        )
    )
    packed = kernel.arguments([pack("i32", -2), pack("i64", 5), pack("fp32", 1.5)])
    assert packed == struct.pack("<iiqf", -2, 0, 5, 1.5)
    with pytest.raises(ValueError, match="3 parameters"):
        kernel.arguments([pack("i32", 1)])


def test_e2m1_and_e4m3_tables():
    assert arithmetic.E2M1[:8].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert arithmetic.E2M1[8:].tolist() == [-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


# In a process of its own: this one may have set Triton to interpret.
PLANTED = r"""
import json, re, sys
sys.path.insert(0, sys.argv[1])
from ptx import triton_driver
from ptx.memory import MemoryFault, Unordered
triton_driver.install((9, 0))
import torch
from dgemma_accel.reference.budget import check_block_attention
from dgemma_accel.triton_kernels.block_attention import block_attention
from test_block_attention import make_case

def first(pattern, by):
    return lambda text: re.sub(pattern, by, text, count=1)

MUTANTS = {
    "none": lambda text: text,
    "another order of columns": lambda text: re.sub(r"(wgmma[^;]*, 1, 1, )1;", r"\g<1>0;", text),
    "a tile kept": first(r"(wgmma\.mma_async\S+ \{[^}]*\}, \S+, \S+,) (?:0|%p\d+|p),", r"\1 1,"),
    "an exchange of other lanes": first(r"(shfl\.sync\.bfly\.b32\s+\S+, \S+), 1,", r"\1, 2,"),
    "a bound off by one": lambda text: text.replace("setp.lt.s32", "setp.le.s32"),
    "another base": lambda text: text.replace("ex2.approx.ftz.f32", "rcp.approx.ftz.f32"),
    "a copy that takes nothing": first(r"(cp\.async\.cg\S+ [^;]*, 0x10), %r\d+;", r"\1, 0;"),
    "no wait for copies": lambda text: re.sub(r"cp\.async\.wait_group\s+\d+;", "", text),
    "no wait for products": lambda text: re.sub(r"wgmma\.wait_group\S+\s+\d+;", "", text),
    "no barriers": lambda text: text.replace("bar.sync", "bar.warp.sync"),
    "another swizzle": first(r"xor\.b32", "or.b32"),
}
torch.manual_seed(0)
case = make_case(1, 4, 2, 40, 64, prefix=100, ranges=[(3, 97)], dtype=torch.bfloat16)
arguments = (*case, 0.125, None, False)
parsed, told = triton_driver.kernel_of.__wrapped__, {}
for name, change in MUTANTS.items():
    texts = []
    def kernel_of(text):
        texts.append(change(text) != text)
        return parsed(change(text))
    triton_driver.kernel_of = kernel_of
    try:
        problems = check_block_attention(*block_attention(*arguments, splits=2), *arguments)
    except (MemoryFault, Unordered) as fault:
        problems = [str(fault)]
    told[name] = [any(texts), problems]
print(json.dumps(told))
"""


def test_what_a_compiler_could_get_wrong_is_seen():
    """Triton's block_attention for Hopper, and mutants of its PTX."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", PLANTED, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("none") == [False, []]
    assert len(told) == 10 and all(changed and problems for changed, problems in told.values()), told
