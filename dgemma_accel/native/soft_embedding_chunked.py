"""soft_embedding in slices of the vocabulary: probabilities of one slice at a time, empty slices left out.

This is the `cpp` backend on the host and the `cuda` backend (vendor matrix product) on a GPU, and exact=True of the
Triton backend. It never holds more than one slice of probabilities, and adds the slices up in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.checks import FLOAT_DTYPES
from ..reference.soft_embedding import tempered

# 4,096 columns of 256 rows are 4 MB in fp32 and their part of the embedding 46 MB: enough for an efficient product.
HOST_SLICE = 4096
# 8,192 columns of 256 rows are 8 MB in fp32: inside an L2 cache, and enough for a matrix product to be efficient.
SLICE = 8192

DTYPES = frozenset(FLOAT_DTYPES)

# PyTorch 2.8 gave its CUDA products an fp32 result of 16-bit operands.
PRODUCT_WITH_DTYPE = getattr(torch.ops.aten.mm, "dtype", None)


def _slices(logits: Tensor) -> Iterator[slice]:
    width = HOST_SLICE if logits.device.type == "cpu" else SLICE
    return (slice(start, start + width) for start in range(0, logits.shape[-1], width))


def _add_product(result: Tensor, probabilities: Tensor, weight: Tensor, exact: bool) -> None:
    """result [R, E] fp32 += probabilities [R, n] @ weight [n, E] of one dtype.

    exact: on the host, where a 16-bit product comes out rounded, take a slower one in fp32.
    """
    if weight.dtype == torch.float32 or (exact and weight.device.type == "cpu"):
        result.addmm_(probabilities.float(), weight.float())
    elif PRODUCT_WITH_DTYPE is not None and weight.device.type != "cpu":
        result += PRODUCT_WITH_DTYPE(probabilities, weight, torch.float32)
    else:
        # The host, and an older PyTorch on a GPU: fp32 operands would cost several times the 16-bit product, or take
        # no tensor cores. What the rounding of a slice's product adds is of the size of the result's own rounding.
        result += probabilities @ weight


def soft_embedding(
    logits: Tensor,
    logsumexp: Tensor,
    weight: Tensor,
    temperature: Tensor,
    softcap: float | None,
    tolerance: float = 0.0,
    exact: bool = False,
) -> Tensor:
    """See `reference.soft_embedding`.

    The probabilities of a slice are rounded to the dtype of `weight` for the product; slices add up in fp32, and on a
    GPU each one's product is fp32 too. On the host a slice in which no row holds more than `tolerance` is left out; on
    a GPU that would wait for the device, so every slice is computed.
    """
    if exact:
        return exact_soft_embedding(logits, logsumexp, weight, temperature, softcap)
    rows = logits.shape[0] * logits.shape[1]
    result = torch.zeros(rows, weight.shape[1], dtype=torch.float32, device=logits.device)
    # exp(-inf) = 0: a row without a distribution adds nothing.
    normaliser = logsumexp.nan_to_num(nan=float("inf"))[..., None]
    empty = normaliser.reshape(rows, 1).isinf()
    on_host = logits.device.type == "cpu"
    for columns in _slices(logits):
        x = tempered(logits[..., columns], temperature, softcap)
        probabilities = torch.exp(torch.sub(x, normaliser, out=x), out=x).reshape(rows, -1)
        probabilities.masked_fill_(empty, 0.0)
        if on_host and not bool((probabilities.sum(-1) > tolerance).any()):
            continue
        _add_product(result, probabilities.to(weight.dtype), weight[columns], exact=False)
    return result.to(weight.dtype).reshape(*logits.shape[:-1], weight.shape[1])


def exact_soft_embedding(
    logits: Tensor, logsumexp: Tensor, weight: Tensor, temperature: Tensor, softcap: float | None
) -> Tensor:
    """`reference.soft_embedding` with exact=True, rounding by rounding, without a table in fp32.

    The softmax is that of the ROUNDED tempered logits, whose maximum and sum are found in two passes before the
    product's. The maximum and every rounded logit are the reference's bits; the row's sum and the product add up
    in another order, in fp32.
    """
    rows, valid = logits.shape[0] * logits.shape[1], ~logsumexp.isnan()[..., None]

    def rounded(columns: slice) -> Tensor:
        x = torch.where(valid, tempered(logits[..., columns], temperature, softcap), 0.0)
        return x.to(weight.dtype).float().reshape(rows, -1)

    largest = torch.full((rows, 1), float("-inf"), device=logits.device)
    for columns in _slices(logits):
        largest = torch.maximum(largest, rounded(columns).amax(-1, keepdim=True))
    # In fp64, so that the number of slices does not show.
    total = torch.zeros(rows, 1, dtype=torch.float64, device=logits.device)
    for columns in _slices(logits):
        total += (rounded(columns) - largest).exp_().sum(-1, keepdim=True)
    total = total.float()
    result = torch.zeros(rows, weight.shape[1], dtype=torch.float32, device=logits.device)
    for columns in _slices(logits):
        probabilities = (rounded(columns) - largest).exp_().div_(total)
        _add_product(result, probabilities.to(weight.dtype), weight[columns], exact=True)
    result = torch.where(valid.reshape(rows, 1), result, 0.0)
    return result.to(weight.dtype).reshape(*logits.shape[:-1], weight.shape[1])
