"""Specification of `experts`: a mixture of gated experts."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantization import dequantize
from .row_stats import compute_dtype

ACTIVATIONS = ("gelu_tanh", "silu")


def activate(gate: Tensor, activation: str) -> Tensor:
    """gelu_tanh: 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))). silu: g / (1 + e^-g)."""
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh")
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    raise ValueError(f"activation: must be one of {ACTIVATIONS}, got {activation!r}")


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "gelu_tanh",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
) -> Tensor:
    """sum over the row's choices (e, w) of w * down_e (act(gate_e x) * (up_e x)), in fp32 (fp64 for fp64 rows).

    Args:
        hidden: [R, E].
        index: [R, K] int64 expert numbers in [0, X); a choice outside that range adds nothing, an expert chosen
            twice by a row counts twice.
        weights: [R, K] router weights.
        gate_up: [X, 2 * I, E], the gate's rows first; uint8 [X, 2 * I, E / 2] in NVFP4 (see `quantization`).
        down: [X, E, I], or uint8 [X, E, I / 2] in NVFP4.
        activation: of the gate, one of `ACTIVATIONS`.
        gate_up_scale: None, or for float8_e4m3fn weights [X, ceil(2 * I / 128), ceil(E / 128)] fp32: what a block of
            128 x 128 is multiplied with. The gate's rows and those of the up projection are counted as one, so the two
            share a block where I is no multiple of 128. Or [X, 2 * I, 1] fp32: what a row is multiplied with. Of NVFP4
            weights [X, 2 * I, E / 16] float8_e4m3fn.
        down_scale: likewise, [X, ceil(E / 128), ceil(I / 128)] or [X, E, 1], or [X, E, I / 16].
        gate_up_global_scale: None, or for NVFP4 weights [X] fp32: what an expert's matrix is multiplied with. Or
            [X, 2], of the gate's rows and of those of the up projection.
        down_global_scale: likewise, [X].

    Returns:
        [R, E] in the dtype of `hidden`, contiguous whatever the strides of `hidden`.

    Source: DiffusionGemmaTextExperts.forward in transformers' modeling_diffusion_gemma.py, which computes in the
    dtype of the weights; its activation is gelu_pytorch_tanh in the released configuration. The format of FP8
    weights is that of FP8Experts in transformers' integrations/finegrained_fp8.py, which rounds rows to FP8 as well.
    """
    compute = compute_dtype(hidden)
    x = hidden.to(compute)
    output = torch.zeros(x.shape, dtype=x.dtype, device=x.device)

    def widened(weight: Tensor, scale: Tensor | None, total: Tensor | None, expert: int) -> Tensor:
        scale, total = (None if one is None else one[expert] for one in (scale, total))
        return dequantize(weight[expert], scale, compute, total)

    for expert in index.unique().tolist():
        if not 0 <= expert < gate_up.shape[0]:
            continue
        row, choice = torch.where(index == expert)
        gate, up = (x[row] @ widened(gate_up, gate_up_scale, gate_up_global_scale, expert).T).chunk(2, dim=-1)
        result = (activate(gate, activation) * up) @ widened(down, down_scale, down_global_scale, expert).T
        output.index_add_(0, row, result * weights[row, choice, None].to(compute))
    return output.to(hidden.dtype)
