"""The error budget of `experts`; see `budget`."""

from __future__ import annotations

import torch
from torch import Tensor

from .budget import _within
from .experts import activate, experts


def check_experts(
    result: Tensor,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "gelu_tanh",
) -> list[str]:
    """Violations of the budget by the result of `experts`.

    Truth is the reference in fp64. Plain PyTorch is the reference model's form: every intermediate result in the
    dtype of the weights, choices weighted in fp32 and rounded as they are added.
    """
    if result.shape != hidden.shape or result.dtype != hidden.dtype:
        return [
            f"experts: {tuple(result.shape)} {result.dtype} instead of {tuple(hidden.shape)} {hidden.dtype}"
        ]
    # The reference widens the weights of one expert at a time.
    truth = experts(hidden.double(), index, weights, gate_up, down, activation)
    plain = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        if not 0 <= expert < down.shape[0]:
            continue
        row, choice = torch.where(index == expert)
        gate, up = (hidden[row] @ gate_up[expert].T).chunk(2, dim=-1)
        mixed = (activate(gate, activation) * up) @ down[expert].T
        plain.index_add_(0, row, (mixed * weights[row, choice, None].float()).to(plain.dtype))
    ulp = torch.finfo(hidden.dtype).eps * truth.abs() + torch.finfo(torch.float32).eps
    return _within("experts", result, truth, plain, ulp)
