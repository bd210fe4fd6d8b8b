"""The two formats of quantised expert weights: what their numbers mean, and how weights are rounded to them.

FP8: float8_e4m3fn numbers, and an fp32 scale for each block of 128 x 128, or for each row.

NVFP4: e2m1 numbers (a sign, and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6), two in a byte with the even column in the low
four bits; a float8_e4m3fn scale for each 16 consecutive columns of a row; an fp32 global scale for the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
# The dtype that holds two e2m1 numbers.
NVFP4 = torch.uint8
# Rows and columns of FP8 weights that share a scale.
SCALE_BLOCK = 128
# Columns of NVFP4 weights that share a scale.
SCALE_GROUP = 16
# The magnitudes of e2m1 by their code; the fourth bit is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TINY = torch.finfo(torch.float32).tiny
# What a GPU's sum of products of FP8 may be off by, of the sum of their magnitudes: matrix units keep fewer bits of it
# than fp32 has, on Hopper about 14.
FP8_SUM_ERROR = 2.0**-11


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of FP8 weights [..., N, K]: [..., ceil(N / 128), ceil(K / 128)]."""
    return (*shape[:-2], *(-(-size // SCALE_BLOCK) for size in shape[-2:]))


def scales_by_row(weight: Tensor, scale: Tensor) -> bool:
    """Whether the scales of FP8 weights [..., N, K] are [..., N, 1]; where N is 1, so are those of one block."""
    return scale.shape == (*weight.shape[:-1], 1)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn numbers, fp32 scales) of weights [..., N, K], computed in fp32.

    A scale brings the largest weight of its block of 128 x 128 to the largest finite number, 448; a block of zeros has
    the smallest normal one. Numbers are rounded to nearest even. Weights that are not finite leave scales that are not.
    """
    rows, columns = weight.shape[-2:]
    *_, down, across = scale_shape(weight.shape)
    weight = weight.float()
    whole = torch.nn.functional.pad(weight, (0, across * SCALE_BLOCK - columns, 0, down * SCALE_BLOCK - rows))
    blocks = whole.unflatten(-1, (across, SCALE_BLOCK)).unflatten(-3, (down, SCALE_BLOCK))
    largest = blocks.abs().amax((-3, -1))
    scale = _quotient(largest, torch.finfo(FP8).max).clamp(min=TINY)
    return (weight / _spread(scale, rows, columns)).to(FP8), scale


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn numbers [..., K], fp32 scales [..., 1]), contiguous, of rows [..., K], computed in fp32.

    A scale brings the largest number of its row to 448, as `quantize` does by block. Rows that are not finite become
    NaN or 0. Can be traced: a compiler fuses it with what made the rows.

    Source: per-token and per-channel FP8 of compressed-tensors' format "float-quantized".
    """
    rows = rows.float()
    scale = (rows.abs().amax(-1, keepdim=True) * (1 / torch.finfo(FP8).max)).clamp(min=TINY)
    return (rows / scale).to(FP8).contiguous(), scale.contiguous()


def quantize_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(uint8 pairs of e2m1 numbers, float8_e4m3fn scales, fp32 global scales) of weights [..., N, K], in fp32.

    The global scale of a matrix is its largest weight / (6 * 448), so that the scale of the largest block is 448, the
    end of e4m3. A block's scale brings its largest weight to 6 and is rounded to nearest even, as are the numbers by
    the scales as they were rounded; what lies beyond 6 becomes 6. A block too small for a scale is zeros. Weights that
    are not finite leave global scales that are not.

    Args:
        weight: [..., N, K], K a multiple of 16.

    Returns:
        [..., N, K / 2], [..., N, K / 16] and [...].

    Source: the format of NVFP4 checkpoints, `weight`, `weight_scale` and `weight_scale_2`.
    """
    blocks = weight.float().unflatten(-1, (-1, SCALE_GROUP))
    largest = blocks.abs().amax(-1)
    top = torch.finfo(FP8).max
    # Below this a block's quotient with the global scale would not be finite.
    total = _quotient(largest.amax((-2, -1)), E2M1[-1] * top).clamp(min=TINY)
    scale = (_quotient(largest, E2M1[-1]) / total[..., None, None]).clamp(max=top).to(FP8)
    unit = scale.float() * total[..., None, None]
    numbers = torch.where(unit[..., None] > 0, blocks / unit[..., None], 0.0).flatten(-2)
    codes = _e2m1(numbers)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale, total


def _quotient(numbers: Tensor, divisor: float) -> Tensor:
    """The same bits on every device: PyTorch multiplies by the reciprocal of a number on a GPU, not of a tensor."""
    return numbers / numbers.new_full((), divisor)


def _e2m1(numbers: Tensor) -> Tensor:
    """The codes of the nearest e2m1 numbers as uint8, ties to the even code."""
    middle = torch.tensor(E2M1, dtype=torch.float32, device=numbers.device)
    middle = (middle[:-1] + middle[1:]) / 2
    # `bucketize` leaves what equals a border below it; a tie goes up where the code above is the even one.
    middle[1::2] = torch.nextafter(middle[1::2], torch.zeros_like(middle[1::2]))
    codes = torch.bucketize(numbers.abs(), middle, out_int32=True).to(torch.uint8)
    return codes | numbers.signbit().to(torch.uint8) << 3


def unpack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The e2m1 numbers [..., N, K] of bytes [..., N, K / 2]; exact in every floating dtype."""
    codes = torch.stack([weight & 15, weight >> 4], -1).flatten(-2)
    values = torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=dtype, device=weight.device)
    return values[codes.int()]


def dequantize(
    weight: Tensor, scale: Tensor | None, dtype: torch.dtype, global_scale: Tensor | None = None
) -> Tensor:
    """weight [..., N, K] in `dtype`, times its scale; without a scale, weights as they are.

    Args:
        weight: [..., N, K], float8_e4m3fn where it has scales, or NVFP4's bytes [..., N, K / 2].
        scale: of FP8 [..., ceil(N / 128), ceil(K / 128)] or [..., N, 1] fp32, of NVFP4 [..., N, K / 16] float8_e4m3fn.
        dtype: of the result. In fp64 it is exact; in fp32 FP8 is rounded once, as is NVFP4.
        global_scale: [...] fp32, of NVFP4; or [..., 2], of the first and the second half of the rows.
    """
    if weight.dtype == NVFP4:
        numbers = unpack(weight, dtype).unflatten(-1, (-1, SCALE_GROUP)) * scale.to(dtype)[..., None]
        total = global_scale.to(dtype)
        if total.ndim < weight.ndim - 1:
            return numbers.flatten(-2) * total[..., None, None]
        return numbers.flatten(-2) * total.repeat_interleave(weight.shape[-2] // 2, -1)[..., None]
    weight = weight.to(dtype)
    if scale is None:
        return weight
    scale = scale.to(dtype)
    return weight * (scale if scales_by_row(weight, scale) else _spread(scale, *weight.shape[-2:]))


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """[..., rows, columns]: the scale of every weight."""
    scale = scale.repeat_interleave(SCALE_BLOCK, -2)[..., :rows, :]
    return scale.repeat_interleave(SCALE_BLOCK, -1)[..., :columns]
