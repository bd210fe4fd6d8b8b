"""Specification of `experts`: a mixture of gated experts."""

from __future__ import annotations

import torch
from torch import Tensor


def experts(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """sum over the row's experts e of weight_e * down_e (gelu_tanh(gate_e x) * (up_e x)), in fp32.

    Args:
        hidden: [R, E].
        top_k_index: [R, K] int64 expert numbers in [0, X).
        top_k_weights: [R, K] router weights.
        gate_up: [X, 2 * I, E], the gate's rows first.
        down: [X, E, I].

    Returns:
        [R, E] in the dtype of `hidden`.

    Source: DiffusionGemmaTextExperts.forward in transformers' modeling_diffusion_gemma.py, with the
    activation gelu_pytorch_tanh of the released configuration.
    """
    x = hidden.float()
    output = torch.zeros_like(x)
    for expert in top_k_index.unique().tolist():
        row, slot = torch.where(top_k_index == expert)
        gate, up = (x[row] @ gate_up[expert].float().T).chunk(2, dim=-1)
        result = (torch.nn.functional.gelu(gate, approximate="tanh") * up) @ down[expert].float().T
        output.index_add_(0, row, result * top_k_weights[row, slot, None].float())
    return output.to(hidden.dtype)
