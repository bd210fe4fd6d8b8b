"""Specification of `soft_embedding`: the expected embedding under the distribution of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from .row_stats import apply_softcap, compute_dtype


def tempered(logits: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
    """softcap(logits) / temperature in the compute dtype; temperature is 0-d or one value per row."""
    x = apply_softcap(logits, softcap)
    temperature = temperature.to(x.device, x.dtype)
    return x / (temperature.reshape(*logits.shape[:-1], 1) if temperature.ndim else temperature)


def soft_embedding(
    logits: Tensor,
    argmax: Tensor,
    top1_prob: Tensor,
    weight: Tensor,
    temperature: Tensor,
    softcap: float | None,
    tolerance: float = 0.0,
    exact: bool = False,
) -> Tensor:
    """softmax(softcap(logits) / temperature) @ weight.

    Args:
        logits: [N0, N1, V], as `head_stats` returns them (before softcap and temperature).
        argmax: [N0, N1] int64, where a row's largest logit is, as `row_stats` computes it. The specification finds it
            by itself.
        top1_prob: [N0, N1] fp32, that logit's probability at `temperature`, as `row_stats` computes it. A row in which
            it is 0 or NaN has no distribution and yields zeros.
        weight: [V, E], the embedding, without embed_scale.
        temperature: 0-d or [N0 * N1] fp32, > 0.
        softcap: c > 0, or None.
        tolerance: implementations may leave out tiles of rows x vocabulary in which no row holds more mass than
            this; the specification computes all.
        exact: repeat the reference model's roundings, for parity: the tempered logits and then the
            probabilities are rounded to the dtype of `weight` and the product is taken in that dtype.
            Otherwise all arithmetic is fp32 and only the result is rounded, which is nearer the truth.

    Returns:
        [N0, N1, E] in the dtype of `weight`.

    Source: DiffusionGemmaDecoderModel.forward (soft_embeddings) and step 1.c.v of `_denoising_step` in
    transformers' diffusion_gemma.
    """
    dtype = weight.dtype
    x = tempered(logits, temperature, softcap)
    valid = (top1_prob > 0)[..., None]
    x = torch.where(valid, x, 0.0)
    if exact:
        probabilities = torch.softmax(x.to(weight.dtype), dim=-1, dtype=torch.float32).to(weight.dtype)
    else:
        probabilities, weight = torch.softmax(x, dim=-1), weight.to(compute_dtype(logits))
    return torch.where(valid, probabilities @ weight, 0.0).to(dtype).contiguous()
