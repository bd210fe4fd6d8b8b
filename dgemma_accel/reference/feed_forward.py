"""Specification of `feed_forward`: the dense MLP and the mixture of experts of one layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .experts import activate, experts
from .quantization import quantize_rows
from .row_stats import compute_dtype

# Fields of a call that has FP8 weights of the MLP.
DENSE_SCALES = ("dense_gate_scale", "dense_up_scale", "dense_down_scale")


class FeedForwardCall(NamedTuple):
    """What the op takes.

    dense, routed, hidden: [R, E], the same rows as the MLP, the router and the experts want them normed.
    dense_gate, dense_up: [F, E]. dense_down: [E, F].
    router: [X, E]. expert_scale: [X], what a choice's weight is multiplied with. top_k: K, 1 to X.
    dense_gate_scale, dense_up_scale: [F, 1]. dense_down_scale: [E, 1]. Of FP8 weights of the MLP, as in `linears`.
    The others as in `experts`.
    """

    dense: Tensor
    routed: Tensor
    hidden: Tensor
    dense_gate: Tensor
    dense_up: Tensor
    dense_down: Tensor
    router: Tensor
    expert_scale: Tensor
    gate_up: Tensor
    down: Tensor
    top_k: int
    activation: str
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    gate_up_global_scale: Tensor | None = None
    down_global_scale: Tensor | None = None
    dense_gate_scale: Tensor | None = None
    dense_up_scale: Tensor | None = None
    dense_down_scale: Tensor | None = None

    def mixture(self, run, index: Tensor, weights: Tensor) -> Tensor:
        """What an implementation of `experts` makes of the rows and of these choices."""
        rows = (self.hidden, index, weights, self.gate_up, self.down, self.activation)
        scales = (self.gate_up_scale, self.down_scale, self.gate_up_global_scale, self.down_global_scale)
        return run(*rows, *scales)


def choose(scores: Tensor, expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts of each row: those of the largest scores, ties to the lower number.

    Args:
        scores: [R, X].
        expert_scale: [X].
        top_k: K, 1 to X.

    Returns:
        (index [R, K] int64, weights [R, K] fp32): softmax(scores) of the choices, divided by their sum, times the
        experts' scales; fp64 for fp64 scores.

    Source: DiffusionGemmaTextRouter.forward in transformers' modeling_diffusion_gemma.py.
    """
    probabilities = torch.softmax(scores.to(compute_dtype(scores)), dim=-1)
    # A stable sort keeps the lower number first; topk promises nothing.
    index = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probabilities.gather(1, index)
    weights = weights / weights.sum(-1, keepdim=True)
    return index, weights * expert_scale.to(weights.dtype)[index]


def feed_forward(call: FeedForwardCall) -> tuple[Tensor, Tensor]:
    """The dense MLP of `dense` and the mixture for `hidden` of the experts that a router chooses by `routed`.

    Products are in fp32 (fp64 for fp64 rows); where the MLP's weights are FP8, so are the rows of its products, each
    with a scale of its own. The router's scores are rounded to the dtype of `routed`, in which the model makes its
    choice.

    Returns:
        ([R, E] of the MLP, [R, E] of the experts), in the dtypes of `dense` and `hidden`.

    Source: DiffusionGemmaDecoderTextLayer.forward in transformers' modeling_diffusion_gemma.py, between its norms.
    """
    compute = compute_dtype(call.dense)

    def product(rows: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return rows.to(compute) @ weight.to(compute).T
        numbers, row_scale = quantize_rows(rows)
        return (numbers.to(compute) * row_scale) @ (weight.to(compute) * scale).T

    gate = product(call.dense, call.dense_gate, call.dense_gate_scale)
    up = product(call.dense, call.dense_up, call.dense_up_scale)
    mlp = product(activate(gate, call.activation) * up, call.dense_down, call.dense_down_scale)
    scores = (call.routed.to(compute) @ call.router.to(compute).T).to(call.routed.dtype)
    return mlp.to(call.dense.dtype), call.mixture(experts, *choose(scores, call.expert_scale, call.top_k))
