"""Specification of `soft_embedding`: the expected embedding under the distribution of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from .row_stats import apply_softcap, compute_dtype


def soft_embedding(
    logits: Tensor,
    weight: Tensor,
    temperature: Tensor,
    softcap: float | None,
    exact: bool = False,
) -> Tensor:
    """softmax(softcap(logits) / temperature) @ weight.

    Args:
        logits: [N0, N1, V], as `head_stats` returns them (before softcap and temperature).
        weight: [V, E], the embedding, without embed_scale.
        temperature: 0-d or [N0 * N1] fp32, > 0.
        softcap: c > 0, or None.
        exact: repeat the reference model's roundings, for parity: the tempered logits and then the
            probabilities are rounded to the dtype of `weight` and the product is taken in that dtype.
            Otherwise all arithmetic is fp32 and only the result is rounded, which is nearer the truth.

    Returns:
        [N0, N1, E] in the dtype of `weight`.

    Source: DiffusionGemmaDecoderModel.forward (soft_embeddings) and step 1.c.v of `_denoising_step` in
    transformers' diffusion_gemma.
    """
    x = apply_softcap(logits, softcap)
    temperature = temperature.to(x.device, x.dtype)
    if temperature.ndim:
        temperature = temperature.reshape(*logits.shape[:-1], 1)
    x = x / temperature
    if exact:
        probabilities = torch.softmax(x.to(weight.dtype), dim=-1, dtype=torch.float32).to(weight.dtype)
        return probabilities @ weight
    return (torch.softmax(x, dim=-1) @ weight.to(compute_dtype(logits))).to(weight.dtype)
