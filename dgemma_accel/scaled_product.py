"""Products of FP8 rows with FP8 weights, both with a scale for each row, by PyTorch's own kernels.

What PyTorch has for it depends on the device, its release and the libraries it was built with: scales of rows within
the product, one scale for a whole matrix, or neither. So the best way is tried out once for each device and dtype.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .backends import compute_capability
from .reference.quantization import FP8_SUM_ERROR

logger = logging.getLogger("dgemma_accel")

# Ways of multiplying: scales within the product; numbers alone, the sums scaled afterwards; numbers widened to fp32.
BY_ROW, AFTERWARDS, WIDENED = "by row", "afterwards", "widened"
# What both sides of a weight have to be a multiple of for the first two.
ALIGNMENT = 16

_ways: dict[tuple[torch.device, torch.dtype], str] = {}
# A scale of 1 on each device that scales afterwards, from before anything was recorded there.
_ones: dict[torch.device, Tensor] = {}


def multiplies_fp8(device: torch.device) -> bool:
    """Whether rows are worth rounding to FP8 there: Ada, Hopper and later multiply it twice as fast as bf16."""
    capability = compute_capability(device)
    return capability is None or capability >= (8, 9)


# A constant where a step is traced.
multiplies_fp8._dynamo_marked_constant = True


def scaled_product(
    rows: Tensor, row_scale: Tensor | None, weight: Tensor, scale: Tensor, out: Tensor
) -> None:
    """out = (rows * row_scale) @ (weight * scale)^T, rounded once to the dtype of `out`.

    Sums are as exact as matrix units make them (`FP8_SUM_ERROR`).

    Args:
        rows: [R, K] float8_e4m3fn; with `row_scale` None in the dtype of `out`, and the weight is widened to that.
        row_scale: [R, 1] fp32.
        weight: [N, K] float8_e4m3fn, contiguous. scale: [N, 1] fp32.
        out: [R, N] bf16, fp16 or fp32, contiguous.
    """
    if not out.numel():
        return
    if row_scale is None:
        torch.mm(rows, (weight.to(scale.dtype) * scale).to(out.dtype).T, out=out)
        return
    aligned = not any(size % ALIGNMENT for size in weight.shape)
    _run(way_of(out.device, out.dtype) if aligned else WIDENED, rows, row_scale, weight, scale, out)


def way_of(device: torch.device, dtype: torch.dtype) -> str:
    """The first of the ways that gives the product of a small case; found out on the first call."""
    key = device, dtype
    if key not in _ways:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Nothing can be tried in a recording. This is right everywhere, and a step runs once before it is recorded.
            return WIDENED
        _ways[key] = next((way for way in (BY_ROW, AFTERWARDS) if _works(way, device, dtype)), WIDENED)
        if device.type == "cuda" and _ways[key] == WIDENED:
            logger.warning(
                "linears on %s: PyTorch has no product of FP8 in %s, so numbers are widened", device, dtype
            )
    return _ways[key]


def _works(way: str, device: torch.device, dtype: torch.dtype) -> bool:
    # No draw of the caller's: another seed would be another text.
    def numbers(rows: int, step: float) -> Tensor:
        places = torch.arange(rows * 64, dtype=torch.float32, device=device).reshape(rows, 64)
        return (places * step).sin().to(torch.float8_e4m3fn)

    rows, weight = numbers(32, 0.7), numbers(48, 1.3)
    row_scale, scale = (
        torch.arange(1, size + 1, dtype=torch.float32, device=device)[:, None] / 8 for size in (32, 48)
    )
    result = torch.empty(32, 48, dtype=dtype, device=device)
    if way == AFTERWARDS:
        _ones.setdefault(device, torch.ones((), dtype=torch.float32, device=device))
    try:
        _run(way, rows, row_scale, weight, scale, result)
    except torch.OutOfMemoryError:
        # Says nothing of the way.
        raise
    except (RuntimeError, ValueError):
        # As PyTorch says that it has no such product here.
        return False
    truth = (rows.double() * row_scale) @ (weight.double() * scale).T
    error = (result.double() - truth).abs().max()
    return bool(error <= (4 * torch.finfo(dtype).eps + FP8_SUM_ERROR) * truth.abs().max())


def _run(way: str, rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, out: Tensor) -> None:
    if way == BY_ROW:
        torch._scaled_mm(rows, weight.T, row_scale, scale.T, out_dtype=out.dtype, out=out)
        return
    if way == AFTERWARDS:
        one = _ones[out.device]
        sums = torch._scaled_mm(rows, weight.T, one, one, out_dtype=torch.float32)
    else:
        sums = rows.float() @ weight.float().T
    torch.mul(sums.mul_(row_scale), scale.T, out=out)
