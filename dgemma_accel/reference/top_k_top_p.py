"""Specification of `top_k_top_p`: the least logit of each row that top-k and top-p keep."""

from __future__ import annotations

import torch
from torch import Tensor

from .row_stats import apply_softcap, compute_dtype

# Logits that are put in order at a time, so that what is made of them takes some hundred megabytes.
CHUNK_ELEMENTS = 1 << 23


def top_k_top_p(
    logits: Tensor,
    temperature: Tensor,
    top_k: int,
    top_p: float,
    top_k_first: bool,
    softcap: float | None,
) -> Tensor:
    """The cutoff of each row: its tokens whose logit is not below it are kept.

    With x = softcap * tanh(logits / softcap), or x = logits, over the temperature, in fp32:

    - top-k keeps the tokens whose logit reaches the k-th largest, ties counted one by one: all that tie with it stay;
    - top-p keeps the tokens before which, strictly larger logits only, there is at most the share p of the mass
      sum e^x; so a tie is kept or dropped as one, and the largest logit is always kept;
    - the mass is that of the row, or with `top_k_first` that of what top-k keeps;
    - what both keep is kept.

    A row that has no distribution (all -inf, NaN or +inf anywhere, or x beyond fp32) is left as it is, by a cutoff of
    -inf.

    Args:
        logits: [N0, N1, V] bf16, fp16, fp32 or fp64. -inf is allowed.
        temperature: 0-d or [N0 * N1] fp32, >= 0; 0 counts as 1.
        top_k: k >= 1, or 0: keeps all.
        top_p: p in [0, 1]; 1 keeps all.
        softcap: c > 0, or None.

    Returns:
        [N0, N1] fp32 (fp64 for fp64 logits).

    Source: transformers' TopKLogitsWarper; for top-p Holtzman et al., "The Curious Case of Neural Text Degeneration",
    2020, where ties are cut at a place that a sort gives.
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = logits.reshape(-1, vocab)
    temperature = temperature.to(rows.device, compute_dtype(rows)).expand(rows.shape[0])
    part = max(1, CHUNK_ELEMENTS // vocab)
    parts = [
        _cutoffs(l, torch.where(t == 0, 1.0, t)[:, None], top_k, top_p, top_k_first, softcap)
        for l, t in zip(rows.split(part), temperature.split(part), strict=True)
    ]
    return torch.cat(parts).reshape(shape)


def _cutoffs(
    logits: Tensor, temperature: Tensor, top_k: int, top_p: float, top_k_first: bool, softcap: float | None
) -> Tensor:
    """Of rows [R, V], temperature [R, 1]."""
    x = apply_softcap(logits, softcap) / temperature
    logits = logits.to(compute_dtype(logits))
    valid = torch.isfinite(torch.logsumexp(x, -1))
    cutoff = torch.full_like(logits[:, 0], float("-inf"))
    if 0 < top_k <= logits.shape[-1]:
        cutoff = logits.topk(top_k, dim=-1).values[:, -1]
    if top_p < 1:
        values, order = logits.sort(-1, descending=True)
        x = x.gather(-1, order)
        masses = torch.exp((x - x.amax(-1, keepdim=True)).double())
        if top_k_first:
            masses = torch.where(values >= cutoff[:, None], masses, 0.0)
        upto = masses.cumsum(-1)
        first = torch.ones_like(values, dtype=torch.bool)
        first[:, 1:] = values[:, 1:] < values[:, :-1]
        # Every member of a tie takes the sum before its first member; sums rise along the row.
        before = torch.where(first, upto - masses, 0.0).cummax(-1).values
        # The first has nothing before it, whatever the difference of two sums is.
        before[:, 0] = 0.0
        kept = before <= top_p * upto[:, -1:]
        cutoff = torch.maximum(cutoff, torch.where(kept, values, float("inf")).amin(-1))
    return torch.where(valid, cutoff, float("-inf"))
