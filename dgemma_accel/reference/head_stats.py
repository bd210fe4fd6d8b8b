"""Specification of `head_stats`: the lm_head product and the statistics of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .row_stats import row_stats


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    temperature: Tensor,
    stats_temperature: Tensor | None,
    uniform: Tensor | None,
    seed: Tensor | None,
    offset: Tensor,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """logits = hidden @ weight^T in the model's dtype, then `row_stats` of them.

    The logits are rounded to the dtype of `weight` before softcap and temperature, as the reference
    model's lm_head does; everything after that rounding is fp32.

    Args:
        hidden: [N0, N1, E], the last hidden state.
        weight: [V, E], the lm_head (tied to the embedding).
        The others as in `row_stats`.

    Returns:
        (logits [N0, N1, V] in the dtype of `weight`, then the seven tensors of `row_stats`).

    Source: the end of DiffusionGemmaForBlockDiffusion.forward in transformers' modeling_diffusion_gemma.py.
    """
    logits = torch.nn.functional.linear(hidden, weight)
    return logits, *row_stats(logits, temperature, stats_temperature, uniform, seed, offset, softcap)
