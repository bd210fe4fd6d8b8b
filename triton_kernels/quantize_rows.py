"""`quantize_rows` in one launch: a program finds the scale of a row and rounds it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.quantization import FP8
from .common import CAPABILITIES, DEVICES, FUSED, next_power_of_2, on_device, unavailable

__all__ = ["FEATURES", "quantize_rows", "unavailable"]

FEATURES = {
    "device": DEVICES,
    "compute_capability": CAPABILITIES,
    "dtype": frozenset({torch.bfloat16, torch.float16, torch.float32}),
}

# Numbers that a program takes at a time.
MOST = 4096


@triton.jit
def to_e4m3(x):
    """The codes of the float8_e4m3fn numbers nearest to x, |x| at most 448, ties to even; NaN for NaN.

    By integers: the conversion of Triton's interpreter cuts off, and GPUs below 8.9 have none.
    """
    b_bits = x.to(tl.int32, bitcast=True)
    b_size = b_bits & 0x7FFFFFFF
    # Half of the last place that stays, less one where that place is even; the carry may go into the exponent, which is
    # 120 less there.
    b_normal = ((b_size + 0x7FFFF + ((b_size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the last place is 2^-9, which is that of fp32 between 2^14 and 2^15.
    b_small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    b_code = tl.where(b_size < 0x3C800000, b_small, b_normal)
    b_code = tl.where(b_size > 0x7F800000, 0x7F, b_code)
    return (b_code | ((b_bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["stride", "width"])
def quantize_rows_kernel(
    rows, numbers, scales, stride: tl.int64, width: tl.int32,
    VECTOR: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """VECTOR divides stride and width, so that the compiler loads so many at once."""
    i_r = tl.program_id(0).to(tl.int64)
    p_row = rows + i_r * (stride // VECTOR) * VECTOR
    b_largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_row = tl.load(p_row + o, mask=o // VECTOR * VECTOR < width, other=0.0).to(tl.float32)
        b_largest = tl.maximum(b_largest, tl.abs(b_row), propagate_nan=tl.PropagateNan.ALL)
    # A largest number that is NaN is none to `max`.
    spoilt = tl.max((b_largest != b_largest).to(tl.int32), 0) != 0
    scale = tl.maximum(tl.max(b_largest, 0) * (1 / 448), LEAST)
    scale = tl.where(spoilt, float("nan"), scale)
    tl.store(scales + i_r, scale)
    p_numbers = numbers + i_r * (width // VECTOR) * VECTOR
    for start in range(0, width, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o // VECTOR * VECTOR < width
        # Once more: it is still near.
        b_row = tl.load(p_row + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_numbers + o, to_e4m3(tl.div_rn(b_row, tl.zeros([BLOCK], tl.float32) + scale)), mask=m)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results: `reference.quantization.quantize_rows`, the same bits."""
    width = rows.shape[-1]
    flat = rows.reshape(-1, width)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    numbers = torch.empty(rows.shape, dtype=FP8, device=rows.device)
    scales = torch.empty((*rows.shape[:-1], 1), dtype=torch.float32, device=rows.device)
    if numbers.numel():
        aligned = not (width % 8 or flat.stride(0) % 8 or flat.data_ptr() % 16)
        with on_device(rows):
            quantize_rows_kernel[(flat.shape[0],)](
                flat, numbers.view(torch.uint8), scales, flat.stride(0), width, VECTOR=8 if aligned else 1,
                LEAST=torch.finfo(torch.float32).tiny, BLOCK=min(next_power_of_2(width), MOST), **FUSED,
                num_warps=8,
            )  # fmt: skip
    return numbers, scales
