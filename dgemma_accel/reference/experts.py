"""Specification of `experts`: a mixture of gated experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .row_stats import compute_dtype

ACTIVATIONS = ("gelu_tanh", "silu")
# Rows and columns of FP8 weights that share a scale.
SCALE_BLOCK = 128


def activate(gate: Tensor, activation: str) -> Tensor:
    """gelu_tanh: 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))). silu: g / (1 + e^-g)."""
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh")
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    raise ValueError(f"activation: must be one of {ACTIVATIONS}, got {activation!r}")


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of FP8 weights [..., N, K]: [..., ceil(N / 128), ceil(K / 128)]."""
    return (*shape[:-2], *(-(-size // SCALE_BLOCK) for size in shape[-2:]))


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """[..., rows, columns]: the scale of every weight."""
    scale = scale.repeat_interleave(SCALE_BLOCK, -2)[..., :rows, :]
    return scale.repeat_interleave(SCALE_BLOCK, -1)[..., :columns]


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
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / _spread(scale, rows, columns)).to(torch.float8_e4m3fn), scale


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight [..., N, K] in `dtype`, times the scale of its block, scale [..., ceil(N / 128), ceil(K / 128)].

    The product is rounded once, to `dtype`; in fp64 it is exact.
    """
    weight = weight.to(dtype)
    if scale is None:
        return weight
    return weight * _spread(scale.to(dtype), *weight.shape[-2:])


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "gelu_tanh",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """sum over the row's choices (e, w) of w * down_e (act(gate_e x) * (up_e x)), in fp32 (fp64 for fp64 rows).

    Args:
        hidden: [R, E].
        index: [R, K] int64 expert numbers in [0, X); a choice outside that range adds nothing, an expert chosen
            twice by a row counts twice.
        weights: [R, K] router weights.
        gate_up: [X, 2 * I, E], the gate's rows first.
        down: [X, E, I].
        activation: of the gate, one of `ACTIVATIONS`.
        gate_up_scale: None, or for float8_e4m3fn weights [X, ceil(2 * I / 128), ceil(E / 128)] fp32: what a block of
            128 x 128 is multiplied with. The gate's rows and those of the up projection are counted as one, so the two
            share a block where I is no multiple of 128.
        down_scale: likewise, [X, ceil(E / 128), ceil(I / 128)].

    Returns:
        [R, E] in the dtype of `hidden`.

    Source: DiffusionGemmaTextExperts.forward in transformers' modeling_diffusion_gemma.py, which computes in the
    dtype of the weights; its activation is gelu_pytorch_tanh in the released configuration. The format of FP8
    weights is that of FP8Experts in transformers' integrations/finegrained_fp8.py, which rounds rows to FP8 as well.
    """
    compute = compute_dtype(hidden)
    x = hidden.to(compute)
    output = torch.zeros_like(x)

    def widened(weight: Tensor, scale: Tensor | None, expert: int) -> Tensor:
        return dequantize(weight[expert], None if scale is None else scale[expert], compute)

    for expert in index.unique().tolist():
        if not 0 <= expert < gate_up.shape[0]:
            continue
        row, choice = torch.where(index == expert)
        gate, up = (x[row] @ widened(gate_up, gate_up_scale, expert).T).chunk(2, dim=-1)
        result = (activate(gate, activation) * up) @ widened(down, down_scale, expert).T
        output.index_add_(0, row, result * weights[row, choice, None].to(compute))
    return output.to(hidden.dtype)
