"""`feed_forward` with the extension's experts; router, choice and what is between the MLP's products are PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.feed_forward import FeedForwardCall, choose
from .experts_cuda import FEATURES, experts, unavailable
from .feed_forward_branches import feed_forward as in_branches
from .quantize_rows_cuda import quantize_rows

__all__ = ["FEATURES", "feed_forward", "unavailable"]


def feed_forward(call: FeedForwardCall) -> tuple[Tensor, Tensor]:
    """Arguments and results: `reference.feed_forward`; waits for nothing.

    Gate, up, act(gate) and its product with up are rounded to the dtype of `dense`, as in the model; weights of the
    choices are fp32.
    """
    with torch.cuda.device(call.hidden.device):
        return in_branches(call, _gated, choose, experts, quantize_rows)


def _gated(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation == "gelu_tanh":
        torch.ops.aten.gelu_(gate, approximate="tanh")
    else:
        torch.nn.functional.silu(gate, inplace=True)
    gate.mul_(up)
