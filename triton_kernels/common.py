"""What the Triton kernels share: where they run, scalars by value, Philox, softcap."""

from __future__ import annotations

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import compute_capability

# Kernels are built for the interpreter or for the compiler when their module is imported.
INTERPRET = bool(triton.knobs.runtime.interpret)
DEVICES = frozenset({"cuda", "cpu"}) if INTERPRET else frozenset({"cuda"})
# Of some kernels older compilers make something else, which configuration files then know by a name.
SINCE_3_9 = INTERPRET or tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)


# Of every launch: a * b + c is one instruction and is rounded once. Triton 3.10 no longer does so by itself, and the
# tile shapes were chosen by instructions counted with it.
FUSED = {"enable_fp_fusion": True}


class AtLeast:
    """The compute capabilities from `minimum` up, as a container for FEATURES."""

    def __init__(self, minimum: tuple[int, int]):
        self.minimum = minimum

    def __contains__(self, capability: tuple[int, int]) -> bool:
        return tuple(capability) >= self.minimum

    def __str__(self) -> str:
        return f"{self.minimum[0]}.{self.minimum[1]} and newer"


class UpTo:
    """The integers from `minimum` to `maximum`, as a container for FEATURES."""

    def __init__(self, maximum: int, minimum: int = 1):
        self.maximum, self.minimum = maximum, minimum

    def __contains__(self, value: int) -> bool:
        return self.minimum <= value <= self.maximum

    def __str__(self) -> str:
        return f"{self.minimum} to {self.maximum}"


CAPABILITIES = AtLeast((8, 0))


def unavailable() -> str | None:
    """None, or what Triton kernels miss on this machine."""
    if INTERPRET:
        return None
    if torch.cuda.is_available():
        return _why_no_launcher()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 was set after Triton was imported; set it before"
    return "no CUDA device is available (TRITON_INTERPRET=1 runs Triton kernels on the CPU, slowly)"


@functools.cache
def _why_no_launcher() -> str | None:
    """None, or why Triton cannot launch what it compiles.

    It brings a compiler for kernels, and none for its own launcher in C, which it builds on first use and keeps in its
    cache. Images that are made to run models often have no C compiler.
    """
    try:
        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        return (
            "Triton cannot build its launcher, for which it takes a C compiler and Python's headers "
            f"(gcc and python3-dev): {type(error).__name__}: {first}"
        )
    return None


# The architecture to compile for when it is not that of the tensors' device (see `ahead_of_time`).
target: tuple[int, int] | None = None


def capability(tensor: Tensor) -> tuple[int, int] | None:
    """The compute capability whose configuration a launch on `tensor` takes; None under the interpreter."""
    return target or compute_capability(tensor.device)


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device; 1 where there is no GPU, so that nothing is split by default."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def on_device(tensor: Tensor):
    """The context in which a kernel on `tensor` has to be launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def by_value(parameter: Tensor | None, default: float | int = 0) -> tuple[float | int | Tensor, bool, int]:
    """A 0-d or per-row parameter as (argument, whether it is a pointer, stride by row).

    A 0-d CPU tensor goes by value; a tensor on the device is only read by the kernel, so nothing waits.
    """
    if parameter is None:
        return default, False, 0
    if parameter.ndim == 0 and parameter.device.type == "cpu":
        return parameter.item(), False, 0
    return parameter, True, parameter.stride(0) if parameter.ndim else 0


def int_by_value(parameter: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A 0-d or per-row int64 parameter as (tensor or None, value, stride by row).

    The value has an argument of its own: a Python int takes 32 or 64 bits by its size, which would recompile.
    """
    value, pointer, stride = by_value(parameter)
    if INTERPRET and not pointer and 2**31 <= value < 2**32:
        # The interpreter holds such an int in 32 bits with a sign, whatever the kernel says its argument is.
        return parameter, 0, 0
    return (value, 0, stride) if pointer else (None, value, 0)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def rows_within_reach(matrix: Tensor, rows: int) -> Tensor:
    """The matrix or a copy of it: unit last stride, and `rows` rows of a tile so close that 32 bits hold their offsets.

    Rows lie further apart where they are positions of a long context, of which others stay between them.
    """
    near = min(rows, matrix.shape[0]) * matrix.stride(0) < 2**31
    return matrix if near and matrix.stride(1) == 1 else matrix.contiguous()


@triton.jit
def philox(seed, offset, rows):
    """The four 32-bit words of each row, as `reference.philox.random_words`; rows is int64."""
    seed = seed.to(tl.int64)
    offset = offset.to(tl.int64)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = (rows & 0).to(tl.uint32)
    c0 = (rows & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((rows >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    multiplier_0 = zero + tl.full((), 0xD2511F53, tl.uint32)
    multiplier_1 = zero + tl.full((), 0xCD9E8D57, tl.uint32)
    weyl_0 = tl.full((), 0x9E3779B9, tl.uint32)
    weyl_1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(multiplier_0, c0)
        high_1 = tl.umulhi(multiplier_1, c2)
        low_0 = multiplier_0 * c0
        low_1 = multiplier_1 * c2
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 = k0 + weyl_0
        k1 = k1 + weyl_1
    return c0, c1, c2, c3


@triton.jit
def uniform_from_word(word):
    """uint32 to fp32 in [0, 1): the upper 24 bits, exact."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def tanh_near_0(u):
    """tanh where |u| < 0.625: an odd polynomial, a least-squares fit of relative error 6.4e-10."""
    w = u * u
    p = 0.00229582
    p = p * w - 0.00834696
    p = p * w + 0.02176995
    p = p * w - 0.0539594
    p = p * w + 0.13333304
    p = p * w - 0.33333333
    return u + u * (w * p)


@triton.jit
def tanh(u):
    """tanh to about 2 units in the last place of fp32, over all of it.

    1 - 2 / (e^2u + 1) cancels near 0, so there the polynomial takes its place.
    """
    a = tl.abs(u)
    large = 1.0 - 2.0 / (tl.exp2(a * 2.8853900817779268) + 1.0)
    large = tl.where(u < 0, -large, large)
    return tl.where(a < 0.625, tanh_near_0(u), large)


@triton.jit
def cap(x, softcap, inverse_softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap) of an fp32 tile, or x."""
    if SOFTCAP:
        x = softcap * tanh(x * inverse_softcap)
    return x


@triton.jit
def parameter(p, index, stride, POINTER: tl.constexpr):
    """A parameter that came by value, or its value of a row."""
    # Two branches with one name and not two returns: the compiler wants all returns of a function to be of one type.
    if POINTER:
        result = tl.load(p + index * stride)
    else:
        result = p
    return result


@triton.jit
def int_parameter(p, value, index, stride):
    """What `int_by_value` passed, for a row."""
    if p is None:
        result = value
    else:
        result = tl.load(p + index * stride)
    return result
