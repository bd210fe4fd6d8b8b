"""Specification of `experts`: a mixture of gated experts."""

from __future__ import annotations

import torch
from torch import Tensor

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

    Returns:
        [R, E] in the dtype of `hidden`.

    Source: DiffusionGemmaTextExperts.forward in transformers' modeling_diffusion_gemma.py, which computes in the
    dtype of the weights; its activation is gelu_pytorch_tanh in the released configuration.
    """
    compute = compute_dtype(hidden)
    x = hidden.to(compute)
    output = torch.zeros_like(x)
    for expert in index.unique().tolist():
        if not 0 <= expert < gate_up.shape[0]:
            continue
        row, choice = torch.where(index == expert)
        gate, up = (x[row] @ gate_up[expert].to(compute).T).chunk(2, dim=-1)
        result = (activate(gate, activation) * up) @ down[expert].to(compute).T
        output.index_add_(0, row, result * weights[row, choice, None].to(compute))
    return output.to(hidden.dtype)
