"""Specification of `feed_forward`: the dense MLP and the mixture of experts of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .experts import activate, experts
from .row_stats import compute_dtype


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


def feed_forward(
    dense: Tensor,
    routed: Tensor,
    hidden: Tensor,
    dense_gate: Tensor,
    dense_up: Tensor,
    dense_down: Tensor,
    router: Tensor,
    expert_scale: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    activation: str = "gelu_tanh",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_global_scale: Tensor | None = None,
    down_global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The dense MLP of `dense` and the mixture for `hidden` of the experts that a router chooses by `routed`.

    Products are in fp32 (fp64 for fp64 rows). The router's scores are rounded to the dtype of `routed`, in which the
    model makes its choice.

    Args:
        dense, routed, hidden: [R, E], the same rows as each part wants them normalised.
        dense_gate, dense_up: [F, E]. dense_down: [E, F].
        router: [X, E]. expert_scale: [X].
        The others as in `experts`.

    Returns:
        ([R, E] of the MLP, [R, E] of the experts), in the dtypes of `dense` and `hidden`.

    Source: DiffusionGemmaDecoderTextLayer.forward in transformers' modeling_diffusion_gemma.py, between its norms.
    """
    compute = compute_dtype(dense)
    gate, up = (dense.to(compute) @ weight.to(compute).T for weight in (dense_gate, dense_up))
    mlp = (activate(gate, activation) * up) @ dense_down.to(compute).T
    scores = (routed.to(compute) @ router.to(compute).T).to(routed.dtype)
    index, weights = choose(scores, expert_scale, top_k)
    scales = (gate_up_scale, down_scale, gate_up_global_scale, down_global_scale)
    return mlp.to(dense.dtype), experts(hidden, index, weights, gate_up, down, activation, *scales)
