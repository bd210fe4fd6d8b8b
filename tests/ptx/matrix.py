"""Matrix products of a warp and of four, and the loads and stores of their fragments.

A warp's registers come as arrays [warps, 32, registers] of uint32. Products of two numbers are exact and are added to
the accumulator in double precision; the sum is cut off to fp32, as tensor cores do.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from .arithmetic import E4M3, Unsupported, cut, from_bf16
from .memory import Memory, SharedMemory

LANE = np.arange(32)
GROUP, PAIR = LANE >> 2, LANE & 3
BITS = {"bf16": 16, "f16": 16, "tf32": 32, "e4m3": 8}
# Of a descriptor's two highest bits: the bytes that a row of a swizzled matrix has.
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}


def elements(bits: np.ndarray, kind: str) -> np.ndarray:
    """Numbers of a kind, as unsigned integers of its size, in double precision."""
    if kind == "bf16":
        return from_bf16(bits).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "e4m3":
        return E4M3[bits].astype(np.float64)
    raise Unsupported(f"a matrix of {kind}")


def _unpacked(registers: np.ndarray, kind: str) -> np.ndarray:
    """[warps, 32, registers] to [warps, 32, registers, elements of one]."""
    dtype = {8: np.uint8, 16: np.uint16, 32: np.uint32}[BITS[kind]]
    parts = np.ascontiguousarray(registers).view(dtype)
    return elements(parts.reshape(*registers.shape, 32 // BITS[kind]), kind)


def a_fragment(registers: np.ndarray, kind: str) -> np.ndarray:
    """[warps, 16, k] of the registers of A: they alternate between rows g and g + 8, then go to the right."""
    warps, _, count = registers.shape
    each = 32 // BITS[kind]
    values = _unpacked(registers, kind)
    matrix = np.empty((warps, 16, 4 * each * max(count // 2, 1)))
    for i in range(count):
        for j in range(each):
            matrix[:, GROUP + 8 * (i & 1), each * PAIR + j + (i >> 1) * 4 * each] = values[:, :, i, j]
    return matrix


def b_fragment(registers: np.ndarray, kind: str) -> np.ndarray:
    """[warps, k, 8] of the registers of B."""
    warps, _, count = registers.shape
    each = 32 // BITS[kind]
    values = _unpacked(registers, kind)
    matrix = np.empty((warps, 4 * each * count, 8))
    for i in range(count):
        for j in range(each):
            matrix[:, each * PAIR + j + i * 4 * each, GROUP] = values[:, :, i, j]
    return matrix


def accumulators(registers: np.ndarray) -> np.ndarray:
    """[warps, 16, n] of fp32 registers in fours: two of row g, two of row g + 8, eight columns for every four."""
    warps, _, count = registers.shape
    # By warp, row, place in a group of columns, group of columns, upper or lower row, left or right column.
    values = np.ascontiguousarray(registers).view(np.float32).reshape(warps, 8, 4, count // 4, 2, 2)
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, count * 2)


def from_accumulators(matrix: np.ndarray) -> list[np.ndarray]:
    """The registers of [warps, 16, n], each as [warps, 32]."""
    warps, _, columns = matrix.shape
    values = np.ascontiguousarray(matrix).reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(values.reshape(columns // 2, warps, 32).view(np.uint32))


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return cut(a @ b + c.astype(np.float64))


def mma(
    shape: str, kind_a: str, kind_b: str, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> list[np.ndarray]:
    """mma.sync of m16n8kK with fp32 accumulators."""
    left, right = a_fragment(a, kind_a), b_fragment(b, kind_b)
    if f"m16n8k{left.shape[2]}" != shape or left.shape[2] != right.shape[1]:
        raise Unsupported(f"mma {shape} of {kind_a} and {kind_b}")
    return from_accumulators(product(left, right, accumulators(c)))


def load_matrices(
    memory: SharedMemory, addresses: np.ndarray, count: int, transposed: bool, who: np.ndarray
) -> list[np.ndarray]:
    """ldmatrix of `count` 8x8 matrices of 16 bits; addresses [warps, 32] of rows, eight lanes a matrix.

    who: the warp of each of the eight rows of a warp.
    """
    result = []
    for i in range(count):
        rows = addresses[:, 8 * i : 8 * i + 8]
        words = memory.load(rows.reshape(-1), 4, 4, "ldmatrix", who)
        matrix = np.stack(words, axis=1).reshape(len(addresses), 8, 4).view(np.uint16)
        if transposed:
            matrix = matrix.transpose(0, 2, 1)
        low, high = (matrix[:, GROUP, 2 * PAIR + j].astype(np.uint32) for j in (0, 1))
        result.append(low | high << np.uint32(16))
    return result


def store_matrices(
    memory: SharedMemory,
    addresses: np.ndarray,
    registers: list[np.ndarray],
    transposed: bool,
    who: np.ndarray,
) -> None:
    """stmatrix, the inverse of `load_matrices`."""
    for i, register in enumerate(registers):
        matrix = np.empty((len(addresses), 8, 8), dtype=np.uint16)
        for j in (0, 1):
            half = (register >> np.uint32(16 * j)).astype(np.uint16)
            if transposed:
                matrix[:, 2 * PAIR + j, GROUP] = half
            else:
                matrix[:, GROUP, 2 * PAIR + j] = half
        words = np.ascontiguousarray(matrix).view(np.uint32).reshape(-1, 4)
        rows = addresses[:, 8 * i : 8 * i + 8].reshape(-1)
        memory.store(rows, [words[:, j] for j in range(4)], 4, "stmatrix", who)


@functools.cache
def _places(
    rows: int, k: int, size: int, row_bytes: int, major: bool, leading: int, stride: int
) -> np.ndarray:
    """Bytes from the start of a matrix in shared memory to its elements [rows, k], before swizzling.

    `major` means that neighbours in memory are of one row and several k. Else they are of one k and several rows, in
    strips `row_bytes` wide; `leading` bytes lie between two strips and `stride` between eight k and the next eight.
    """
    row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if major:
        # Without a swizzle a matrix is made of 8 rows of 16 bytes, `leading` bytes from one to its right neighbour.
        if row_bytes == 16:
            return row % 8 * 16 + row // 8 * stride + column * size // 16 * leading + column * size % 16
        return row % 8 * row_bytes + row // 8 * stride + column * size
    in_strip = row_bytes // size
    return row % in_strip * size + row // in_strip * leading + column % 8 * row_bytes + column // 8 * stride


def described(
    memory: Memory,
    descriptor: int,
    pitch: int,
    rows: int,
    k: int,
    kind: str,
    major: bool,
    reads: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> np.ndarray:
    """[rows, k] of the matrix that a 64-bit descriptor names; `pitch` is where the block's shared memory begins.

    reads: takes (addresses, the bits there).
    """
    size = BITS[kind] // 8
    start, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    if (descriptor >> 49) & 7:
        raise Unsupported("a matrix descriptor with a base offset")
    row_bytes = SWIZZLES[descriptor >> 62]
    if row_bytes == 16 and not major:
        # Their strides stand the other way round.
        leading, stride = stride, leading
    addresses = start + _places(rows, k, size, row_bytes, major, leading, stride)
    swizzle = {16: 0, 32: 1, 64: 3, 128: 7}[row_bytes]
    addresses = addresses ^ ((addresses >> 7 & swizzle) << 4)
    addresses = addresses.reshape(-1) + pitch
    flat = memory.load(addresses, size, 1, "a matrix descriptor")[0]
    if reads is not None:
        reads.append((addresses, flat))
    return elements(flat, kind).reshape(rows, k)


def shape_of(parts: tuple[str, ...]) -> tuple[int, int, int]:
    """m, n and k of an instruction's name."""
    found = next(match for part in parts if (match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part)))
    return int(found[1]), int(found[2]), int(found[3])
