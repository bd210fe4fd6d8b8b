"""What instructions compute, on arrays with one element a thread.

`function(parts)` gives, for the parts of an instruction's name, the type of its result, the types of its operands and a
function of arrays of these types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

# The arrays that hold values of a type. What NumPy has no type for lies there as bits.
DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "f16": np.float16, "bf16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "f32": np.float32, "tf32": np.uint32, "f16x2": np.uint32, "bf16x2": np.uint32, "s16x2": np.uint32,
    "u16x2": np.uint32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f64": np.float64, "f32x2": np.uint64, "e4m3x2": np.uint16, "e5m2x2": np.uint16,
    "e2m1x2": np.uint8,
}  # fmt: skip
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
ROUNDINGS = frozenset({"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna"})
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
F32_TINY = np.float32(2.0**-126)


class Unsupported(NotImplementedError):
    """An instruction that is not carried out here."""


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < F32_TINY, np.copysign(np.float32(0), x), x)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once; the sum in twice the digits is rounded to odd, so that rounding it again is harmless."""
    if a.dtype == np.float64:
        return fma64(a, b, c)
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    total = product + wide
    back = total - product
    error = (product - (total - back)) + (wide - back)
    inexact = (error != 0) & np.isfinite(error)
    if inexact.any():
        bits = np.atleast_1d(total).view(np.int64)
        even = (bits & 1) == 0
        away = (error > 0) == (total > 0)
        bits = np.where(inexact & even, np.where(away, bits + 1, bits - 1), bits)
        total = bits.view(np.float64).reshape(np.shape(total))
    return total.astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c with the product's error added; the last rounding is of a sum of two."""
    product = a * b
    splitter = np.float64(2**27 + 1)
    a_high, b_high = a * splitter, b * splitter
    a_high, b_high = a_high - (a_high - a), b_high - (b_high - b)
    a_low, b_low = a - a_high, b - b_high
    error = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back) + error
    return np.where(np.isfinite(rest), total + rest, total)


def fma_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in fp32, rounded towards minus infinity."""
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    result = exact.astype(np.float32)
    return np.where(result > exact, np.nextafter(result, np.float32(-np.inf)), result)


def bf16(x: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def cut(exact: np.ndarray) -> np.ndarray:
    """Doubles to fp32, towards zero."""
    nearest = exact.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(exact)
    return np.where(beyond & np.isfinite(nearest), np.nextafter(nearest, np.float32(0)), nearest)


def bf16_of_double(exact: np.ndarray) -> np.ndarray:
    """Doubles to the bits of bf16 with one rounding: what fp32 cuts off shows in its last bit."""
    bits = np.atleast_1d(cut(exact)).view(np.uint32)
    inexact = np.isfinite(exact) & (bits.view(np.float32).astype(np.float64) != exact)
    return bf16((bits | inexact.astype(np.uint32)).view(np.float32))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _table(exponent_bits: int, mantissa_bits: int, bias: int, nan: Callable[[int], bool]) -> np.ndarray:
    """The values of all codes of a small float."""
    values = []
    for code in range(1 << (1 + exponent_bits + mantissa_bits)):
        mantissa = code & ((1 << mantissa_bits) - 1)
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
        scale = 2.0 ** (max(exponent, 1) - bias - mantissa_bits)
        value = sign * scale * (mantissa + ((1 << mantissa_bits) if exponent else 0))
        values.append(float("nan") if nan(code) else value)
    return np.array(values, dtype=np.float32)


E4M3 = _table(4, 3, 7, lambda code: code & 0x7F == 0x7F)
E2M1 = _table(2, 1, 1, lambda code: False)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """The codes of the nearest numbers of e4m3 as uint16, ties to the even code; beyond the largest that one."""
    codes = np.arange(127)
    middles = (E4M3[codes[:-1]].astype(np.float64) + E4M3[codes[1:]]) / 2
    wide = np.atleast_1d(values).astype(np.float64)
    size = np.abs(np.nan_to_num(wide, nan=0.0, posinf=448.0, neginf=-448.0))
    # `side` says on which side of an equal middle a number falls: up where the code below is odd.
    below, above = (np.searchsorted(middles, size, side) for side in ("left", "right"))
    found = np.where((below != above) & (below % 2 == 1), above, below)
    signs = np.signbit(wide).astype(np.uint16) << np.uint16(7)
    return np.where(np.isnan(wide), np.uint16(0x7F), signs | found.astype(np.uint16)).astype(np.uint16)


def nudged(exact: np.ndarray) -> np.ndarray:
    """Numbers moved by one unit in their last place, up, down or not at all by a hash of their bits."""
    bits = np.atleast_1d(exact.astype(np.float32)).view(np.int32)
    mixed = (bits.view(np.uint32) * np.uint32(2_654_435_761)) >> np.uint32(16)
    moved = bits + (mixed % np.uint32(3)).astype(np.int32) - np.int32(1)
    normal = np.isfinite(exact) & (np.abs(exact) >= F32_TINY * 2)
    return np.where(normal, moved, bits).view(np.float32).reshape(np.shape(exact))


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b by an approximate reciprocal of b, which is exact where b is a power of two."""
    exact = a / b
    return np.where(np.frexp(b)[0] == np.copysign(np.float32(0.5), b), exact, nudged(exact))


def exponential(x: np.ndarray, flush: bool) -> np.ndarray:
    """2^x within 2^-22 of it; exact where x is an integer, as 2^0 = 1 has to be."""
    exact = np.exp2(x.astype(np.float64)).astype(np.float32)
    result = np.where(x == np.rint(x), exact, nudged(exact))
    return flushed(result) if flush else result


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero."""
    floor = a // b
    return floor + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def _high(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if kind in WIDER:
        bits = DTYPES[kind](0).itemsize * 8
        wide = a.astype(DTYPES[WIDER[kind]]) * b.astype(DTYPES[WIDER[kind]])
        return (wide >> DTYPES[WIDER[kind]](bits)).astype(DTYPES[kind])
    return np.array([(int(x) * int(y)) >> 64 for x, y in np.broadcast(a, b)], dtype=DTYPES[kind]).reshape(
        np.broadcast_shapes(np.shape(a), np.shape(b))
    )


def _shifted(a: np.ndarray, amount: np.ndarray, left: bool) -> np.ndarray:
    bits = a.dtype.itemsize * 8
    inside = np.minimum(amount, np.uint32(bits - 1)).astype(a.dtype)
    result = a << inside if left else a >> inside
    if left or a.dtype.kind == "u":
        result = np.where(amount >= bits, np.zeros_like(result), result)
    return result


def _field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe of 32 bits: `length` of them from `position` on, with the sign of the field's highest one or the number's."""
    signed = a.dtype.kind == "i"
    wide = a.astype(np.int64 if signed else np.uint64)
    at = np.minimum(position & np.uint32(0xFF), 63).astype(wide.dtype)
    empty_bits = (64 - np.minimum(length & np.uint32(0xFF), 32)).astype(wide.dtype)
    taken = wide >> at
    # 64 empty bits are all of them, which no shift of a 64-bit number says.
    inside = np.minimum(empty_bits, 63)
    taken = np.where(empty_bits == 64, np.zeros_like(taken), (taken << inside) >> inside)
    return taken.astype(a.dtype)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: four bytes out of eight; the fourth bit of a selector takes the byte's sign instead."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros_like(both)
    for i in range(4):
        chosen = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(0xF)
        byte = (both >> ((chosen & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte >> np.uint64(7), np.uint64(0xFF), np.uint64(0))
        result = result | (np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * i))
    return result.astype(np.uint32)


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: any function of three bits."""
    code, result = (
        int(np.ravel(table)[0]),
        np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32),
    )
    for i in range(8):
        if code >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def _leading(number: int, bits: int) -> int:
    """bfind.shiftamt: how far a number can be shifted to the left before its highest bit is lost."""
    return bits - number.bit_length() if number else 0xFFFFFFFF


def _highest(number: int, bits: int) -> int:
    """bfind: the place of the highest bit."""
    return number.bit_length() - 1 if number else 0xFFFFFFFF


BIT_COUNTS = {
    "popc": lambda number, bits: number.bit_count(),
    "clz": lambda number, bits: bits - number.bit_length(),
    "brev": lambda number, bits: int(f"{number:0{bits}b}"[::-1], 2),
}


def _inserted(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: the lowest `length` bits of a, put into b from `position` on."""
    bits = b.dtype.itemsize * 8
    result = []
    for x, y, at, count in np.broadcast(a, b, position, length):
        mask = ((1 << (int(count) & 0xFF)) - 1) << (int(at) & 0xFF) & ((1 << bits) - 1)
        result.append(int(y) & ~mask | (int(x) << (int(at) & 0xFF)) & mask)
    return np.array(result, dtype=b.dtype)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(name: str, kind: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    if kind in ("f16", "bf16"):
        widen, compare = convert("f32", kind, frozenset()), comparison(name, "f32")
        return lambda a, b: compare(widen(a), widen(b))
    if not kind.startswith("f"):
        return COMPARISONS[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name.endswith("u"):
        return lambda a, b: COMPARISONS[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: COMPARISONS[name](a, b) & ~np.isnan(a) & ~np.isnan(b)


def _pairs(operation: Callable, half: type, whole: type) -> Callable:
    """An operation on the two numbers of a register."""

    def both(*operands):
        halves = [np.ascontiguousarray(np.atleast_1d(operand)).view(half) for operand in operands]
        return np.ascontiguousarray(operation(*halves)).view(whole)

    return both


def _halves(operation: Callable, kind: str) -> Callable:
    """An operation on numbers of 16 bits, one or two in a register, carried out on doubles."""
    brain = kind.startswith("bf16")

    def rounded(*operands):
        parts = [np.ascontiguousarray(np.atleast_1d(operand)).view(np.uint16) for operand in operands]
        wide = [(from_bf16(part) if brain else part.view(np.float16)).astype(np.float64) for part in parts]
        exact = operation(*np.broadcast_arrays(*wide))
        bits = bf16_of_double(exact) if brain else exact.astype(np.float16).view(np.uint16)
        return np.ascontiguousarray(bits).view(DTYPES[kind] if kind.endswith("x2") else np.uint16)

    return rounded


def convert(target: str, source: str, modifiers: frozenset[str]) -> Callable:
    """cvt: rounding is to nearest even but for integers, whose name tells."""
    if target in ("f16x2", "bf16x2") and source == "f32":
        one = bf16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        relu = (
            (lambda x: np.where(np.isnan(x), x, np.maximum(x, np.float32(0))))
            if "relu" in modifiers
            else None
        )

        def packed(high, low):
            if relu:
                high, low = relu(high), relu(low)
            return (one(high).astype(np.uint32) << np.uint32(16)) | one(low).astype(np.uint32)

        return packed
    if target == "e4m3x2" and source == "f32" and "satfinite" in modifiers:
        return lambda high, low: (to_e4m3(high) << np.uint16(8)) | to_e4m3(low)
    if target in ("f16x2", "bf16x2") and source in ("e4m3x2", "e2m1x2"):
        table, bits = (E4M3, 8) if source == "e4m3x2" else (E2M1, 4)
        values = (table.astype(np.float16).view(np.uint16) if target == "f16x2" else bf16(table)).astype(
            np.uint32
        )

        def widened(codes):
            codes = codes.astype(np.uint32)
            mask = np.uint32((1 << bits) - 1)
            return (values[(codes >> np.uint32(bits)) & mask] << np.uint32(16)) | values[codes & mask]

        return widened
    if source == "bf16":
        if target != "f32":
            raise Unsupported(f"cvt.{target}.{source}")
        return from_bf16
    if target == "bf16":
        if source not in ("f32", "f16"):
            raise Unsupported(f"cvt.{target}.{source}")
        return lambda x: bf16(x.astype(np.float32))
    to = DTYPES[target]
    if target.startswith("f") and "sat" in modifiers:
        return lambda x: np.clip(np.nan_to_num(x, nan=0.0), 0.0, 1.0).astype(to)
    if target.startswith("f"):
        # To a float that is a whole number, where the rounding says so.
        whole = WHOLE.get(next(iter(modifiers & WHOLE.keys()), None), lambda x: x)
        return lambda x: whole(x).astype(to)
    if source.startswith("f"):
        rounding = WHOLE[next(iter(modifiers & ROUNDINGS))]
        least, most = np.iinfo(to).min, np.iinfo(to).max

        def to_integer(x):
            whole = rounding(x.astype(np.float64))
            inside = np.clip(np.nan_to_num(whole, nan=0.0), float(least), float(most))
            # The largest 64-bit numbers are no doubles.
            result = np.where(inside >= float(most), 0.0, inside).astype(to)
            return np.where(inside >= float(most), to(most), result)

        return to_integer
    if "sat" in modifiers:
        raise Unsupported("cvt.sat of integers")
    return lambda x: x.astype(to)


def _float(base: str, kind: str, modifiers: frozenset[str]) -> Callable | None:
    """add, sub, mul, fma, ... of floats; None where the name is of another kind."""
    operation = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma, "div": np.divide, "neg": np.negative,
        "abs": np.abs, "sqrt": np.sqrt, "mad": fma, "fms": lambda a, b, c: fma(a, b, -c),
        "fnma": lambda a, b, c: fma(-a, b, c),
    }.get(base)  # fmt: skip
    if base in ("max", "min"):
        both = {("max", True): np.maximum, ("max", False): np.fmax, ("min", True): np.minimum,
                ("min", False): np.fmin}[base, "NaN" in modifiers]  # fmt: skip
        if "xorsign" in modifiers or "abs" in modifiers:
            raise Unsupported(f"{base} with {sorted(modifiers)}")
        operation = lambda *operands: functools.reduce(both, operands)  # noqa: E731
    elif base == "div" and modifiers & {"full", "approx"}:
        operation = quotient
    elif base == "ex2":
        return lambda x: exponential(x, "ftz" in modifiers)
    elif base == "rcp" and kind == "f64" and "approx" in modifiers:
        # The upper 20 bits of the exact result are right.
        operation = lambda x: ((1 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)  # noqa: E731
    elif base == "rcp":
        operation = (lambda x: quotient(np.float32(1), x)) if "approx" in modifiers else (lambda x: 1 / x)
    elif base == "lg2":
        operation = lambda x: nudged(np.log2(x.astype(np.float64)).astype(np.float32))  # noqa: E731
    elif base == "rsqrt":
        operation = lambda x: nudged((1 / np.sqrt(x.astype(np.float64))).astype(np.float32))  # noqa: E731
    elif base == "fma" and "rm" in modifiers and kind == "f32":
        operation, modifiers = fma_down, modifiers - {"rm"}
    elif base == "copysign":
        operation = lambda a, b: np.copysign(b, a)  # noqa: E731
    if operation is None or kind == "f64":
        return operation
    if modifiers & {"rz", "rm", "rp", "sat"}:
        raise Unsupported(f"{base} with {sorted(modifiers)}")
    dtype = np.float32
    plain = operation
    operation = lambda *operands: plain(*operands).astype(dtype, copy=False)  # noqa: E731
    if "ftz" not in modifiers:
        return operation
    return lambda *operands: flushed(operation(*(flushed(operand) for operand in operands)))


def function(parts: tuple[str, ...]) -> tuple[str, tuple[str, ...] | str, Callable]:
    """(type of the result, types of the operands or the one of all of them, the function)."""
    base, kind, modifiers = parts[0], parts[-1], frozenset(parts[1:-1])
    if base == "cvt":
        return parts[-2], kind, convert(parts[-2], kind, frozenset(parts[1:-2]))
    if base == "setp":
        compare = comparison(parts[1], kind)
        if modifiers & {"and", "or", "xor"}:
            join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[
                next(iter(modifiers & {"and", "or", "xor"}))
            ]
            return "pred", (kind, kind, "pred"), lambda a, b, c: join(compare(a, b), c)
        return "pred", kind, compare
    if base == "selp":
        return kind, (kind, kind, "pred"), lambda a, b, c: np.where(c, a, b)
    if base in ("and", "or", "xor", "not"):
        operation = {
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "not": np.bitwise_not,
        }[base]
        return kind, kind, operation
    if base in ("shl", "shr"):
        return kind, (kind, "u32"), lambda a, b: _shifted(a, b, base == "shl")
    if base == "bfe":
        return kind, (kind, "u32", "u32"), _field
    if base == "prmt":
        if len(parts) > 2:
            raise Unsupported(".".join(parts))
        return kind, kind, _permuted
    if base == "lop3":
        return kind, kind, _logic
    if base in BIT_COUNTS or base == "bfind":
        if base == "bfind" and (kind[0] != "u" or modifiers - {"shiftamt"}):
            raise Unsupported(".".join(parts))
        count = BIT_COUNTS.get(base) or (_leading if modifiers else _highest)
        bits = DTYPES[kind](0).itemsize * 8
        result = kind if base == "brev" else "u32"
        return (
            result,
            kind,
            lambda a: np.array([count(int(x), bits) for x in np.atleast_1d(a)], DTYPES[result]),
        )
    if base == "bfi":
        return kind, (kind, kind, "u32", "u32"), _inserted
    if kind == "f32x2":
        operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma}[base]
        return kind, kind, _pairs(operation, np.float32, np.uint64)
    if kind in ("s16x2", "u16x2"):
        operation = {"add": np.add, "max": np.maximum, "min": np.minimum}[base]
        return kind, kind, _pairs(operation, DTYPES[kind[:3]], np.uint32)
    if kind in ("f16", "bf16") and parts[-2] == "f32" and base in ("add", "sub", "fma"):
        # The last operand and the result are fp32, the others are widened.
        operation = _float(base, "f32", modifiers - {"f32"})
        widen = convert("f32", kind, frozenset())
        kinds = (kind,) * (2 if base == "fma" else 1) + ("f32",)
        return "f32", kinds, lambda *operands: operation(*map(widen, operands[:-1]), operands[-1])
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        operation = {
            "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": lambda a, b, c: a * b + c,
            "neg": np.negative, "abs": np.abs, "max": np.fmax, "min": np.fmin,
        }.get(base)  # fmt: skip
        if "NaN" in modifiers:
            operation = {"max": np.maximum, "min": np.minimum}.get(base)
        if operation is None or modifiers - {"rn", "NaN"}:
            raise Unsupported(".".join(parts))
        return kind, kind, _halves(operation, kind)
    if kind in ("f32", "f64"):
        operation = _float(base, kind, modifiers)
        if operation is None:
            raise Unsupported(".".join(parts))
        return kind, kind, operation
    return _integer(base, kind, modifiers, ".".join(parts))


def _integer(base: str, kind: str, modifiers: frozenset[str], name: str) -> tuple:
    if base in ("mul", "mad"):
        if "wide" in modifiers:
            wide = DTYPES[WIDER[kind]]
            product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
            result = WIDER[kind]
        else:
            product = (lambda a, b: _high(kind, a, b)) if "hi" in modifiers else np.multiply
            result = kind
        if base == "mul":
            return result, kind, product
        return result, (kind, kind, result), lambda a, b, c: product(a, b) + c
    operation = {
        "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "div": _divide, "rem": np.fmod,
    }.get(base)  # fmt: skip
    if base in ("max", "min"):
        both = np.maximum if base == "max" else np.minimum
        operation = lambda *operands: functools.reduce(both, operands)  # noqa: E731
        if "relu" in modifiers:
            inner = operation
            operation = lambda *operands: np.maximum(inner(*operands), 0)  # noqa: E731
    if operation is None or modifiers - {"relu"} or kind[0] not in "us":
        raise Unsupported(name)
    return kind, kind, operation
