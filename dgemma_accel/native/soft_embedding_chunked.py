"""soft_embedding in slices of the vocabulary: probabilities of one slice at a time, empty slices left out.

This is the `cpp` backend on the host and the `cuda` backend (vendor matrix product) on a GPU. It never holds more
than one slice of probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import soft_embedding as reference_soft_embedding
from ..reference.soft_embedding import tempered

# 8,192 columns of 256 rows are 8 MB in fp32: inside an L2 cache, and enough for a matrix product to be efficient.
SLICE = 8192

FEATURES = {"dtype": frozenset({torch.bfloat16, torch.float16, torch.float32})}


def unavailable() -> str | None:
    return None


def soft_embedding(
    logits: Tensor,
    logsumexp: Tensor,
    weight: Tensor,
    temperature: Tensor,
    softcap: float | None,
    tolerance: float = 0.0,
    exact: bool = False,
) -> Tensor:
    """See `reference.soft_embedding`. The probabilities of a slice are rounded to the dtype of `weight` for the
    product, and so is the slice's product; slices add up in fp32. On the host a slice in which no row holds more than
    `tolerance` is left out; on a GPU that would wait for the device, so every slice is computed."""
    if exact:
        return reference_soft_embedding(logits, logsumexp, weight, temperature, softcap, exact=True)
    shape = (*logits.shape[:-1], weight.shape[1])
    rows = logits.shape[0] * logits.shape[1]
    result = torch.zeros(rows, weight.shape[1], dtype=torch.float32, device=logits.device)
    # exp(-inf) = 0: a row without a distribution adds nothing.
    normaliser = logsumexp.nan_to_num(nan=float("inf"))[..., None]
    may_skip = logits.device.type == "cpu"
    for start in range(0, logits.shape[-1], SLICE):
        x = tempered(logits[..., start : start + SLICE], temperature, softcap)
        probabilities = torch.exp(torch.sub(x, normaliser, out=x), out=x).reshape(rows, -1)
        probabilities = torch.where(normaliser.reshape(rows, 1).isinf(), 0.0, probabilities)
        if may_skip and not bool((probabilities.sum(-1) > tolerance).any()):
            continue
        result += probabilities.to(weight.dtype) @ weight[start : start + SLICE]
    return result.to(weight.dtype).reshape(shape)
