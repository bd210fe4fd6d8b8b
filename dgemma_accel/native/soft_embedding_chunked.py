"""soft_embedding in slices of the vocabulary: probabilities of one slice at a time, empty slices left out.

This is the `cpp` backend on the host, what the `cuda` backend's kernels do not take on a GPU, and exact=True of the
`cuda` and Triton backends. It never holds more than one slice of probabilities, and adds the slices up in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.checks import FLOAT_DTYPES
from ..reference.row_stats import apply_softcap
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


def vendor_product(probabilities: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [R, E] fp32 = probabilities [R, n] @ weight [n, E] of 16 bits."""
    if weight.device.type == "cpu":
        # Kernels that are interpreted: the host has no product of 16-bit operands with an fp32 result.
        torch.mm(probabilities.float(), weight.float(), out=out)
    else:
        torch.ops.aten.mm.dtype_out(probabilities, weight, torch.float32, out=out)


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
    argmax: Tensor,
    top1_prob: Tensor,
    weight: Tensor,
    temperature: Tensor,
    softcap: float | None,
    tolerance: float = 0.0,
    exact: bool = False,
) -> Tensor:
    """See `reference.soft_embedding`.

    The probabilities of a slice are rounded to the dtype of `weight` for the product; slices add up in fp32, and on a
    GPU each one's product is fp32 too. A row's result is divided by the mass of its rounded probabilities. On the host
    a slice in which no row holds more than `tolerance` is left out; on a GPU that would wait for the device, so every
    slice is computed.
    """
    if exact:
        return exact_soft_embedding(logits, top1_prob, weight, temperature, softcap)
    rows = logits.shape[0] * logits.shape[1]
    result = torch.zeros(rows, weight.shape[1], dtype=torch.float32, device=logits.device)
    mass = torch.zeros(rows, 1, dtype=torch.float32, device=logits.device)
    # A place of other logits reads a wrong value, and no memory outside the row.
    place = argmax.clamp(0, logits.shape[-1] - 1)[..., None]
    peak = apply_softcap(logits.gather(-1, place), softcap)
    place, top1_prob = place.reshape(rows, 1), top1_prob.reshape(rows, 1)
    empty = ~(top1_prob > 0)
    if temperature.ndim:
        temperature = temperature.reshape(*logits.shape[:-1], 1)
    temperature = temperature.to(logits.device)
    on_host = logits.device.type == "cpu"
    for columns in _slices(logits):
        # p = p1 e^((x - x1) / T), with nothing of the size of x / T: its last place is no longer small where T is.
        x = apply_softcap(logits[..., columns], softcap)
        # Of fp32 logits that are not capped it is the logits themselves.
        x = torch.sub(x, peak, out=None if softcap is None and logits.dtype == x.dtype else x)
        x = x.clamp_(max=0.0).div_(temperature).flatten(0, 1)
        _zero_at(x, place - columns.start)
        probabilities = x.exp_().mul_(top1_prob).masked_fill_(empty, 0.0).to(weight.dtype)
        own = probabilities.sum(-1, keepdim=True, dtype=torch.float32)
        mass += own
        if on_host and not bool((own > tolerance).any()):
            continue
        _add_product(result, probabilities, weight[columns], exact=False)
    # 0 / 0 is a row without a distribution.
    result = torch.where(empty, 0.0, result / mass)
    return result.to(weight.dtype).reshape(*logits.shape[:-1], weight.shape[1])


def _zero_at(table: Tensor, place: Tensor) -> None:
    """table [R, n] at place [R, 1] becomes 0 in the rows whose place lies in [0, n).

    The same value, capped alone and capped in a table, may differ in its last place.
    """
    width = table.shape[1]
    inside, place = (place >= 0) & (place < width), place.clamp(0, width - 1)
    table.scatter_(1, place, torch.where(inside, 0.0, table.gather(1, place)))


def exact_soft_embedding(
    logits: Tensor, top1_prob: Tensor, weight: Tensor, temperature: Tensor, softcap: float | None
) -> Tensor:
    """`reference.soft_embedding` with exact=True, rounding by rounding, without a table in fp32.

    The softmax is that of the ROUNDED tempered logits, whose maximum and sum are found in two passes before the
    product's. The maximum and every rounded logit are the reference's bits; the row's sum and the product add up
    in another order, in fp32.
    """
    rows, valid = logits.shape[0] * logits.shape[1], (top1_prob > 0)[..., None]

    def rounded(columns: slice) -> Tensor:
        x = torch.where(valid, tempered(logits[..., columns], temperature, softcap), 0.0)
        return x.to(weight.dtype).float().flatten(0, 1)

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
