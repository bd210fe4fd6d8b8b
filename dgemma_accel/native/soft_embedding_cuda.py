"""The `cuda` backend of soft_embedding: slice by slice of the vocabulary, with the vendor's matrix product.

Probabilities of 16-bit weights and the sum of the slices are the extension's CUDA kernels. What these do not take
(fp32, exact=True, a PyTorch without a product of 16 bits in fp32, an extension without code for the GPU) is made of
PyTorch's operations, which need no extension.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from ..backends import compute_capability
from . import soft_embedding_chunked as chunked
from .params import DTYPES, NO_DEVICE, BuiltCapability, extension, missing_cuda, row_parameter

__all__ = ["FEATURES", "soft_embedding", "unavailable"]

logger = logging.getLogger("dgemma_accel")

FEATURES = {"device": {"cuda"}, "dtype": chunked.DTYPES}
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_CAPABILITIES = BuiltCapability(8, 0)

# Of 256 rows the probabilities of a slice are 16.8 MB, which stay in the L2 cache of every GPU from 40 MB on beside the
# logits that pass through it, and the partial results of a vocabulary of 262,144 are 23 MB.
SLICE = 32_768


def unavailable() -> str | None:
    return None if torch.cuda.is_available() else NO_DEVICE


@functools.cache
def missing_kernels(device: torch.device) -> str | None:
    """One line where the extension's kernels cannot run, which is said once."""
    missing, capability = missing_cuda(), compute_capability(device)
    if chunked.PRODUCT_WITH_DTYPE is None:
        missing = (
            f"PyTorch {torch.__version__} has no product of 16-bit matrices in fp32 (2.8 and newer have)"
        )
    elif missing is None and capability not in KERNEL_CAPABILITIES:
        required = ".".join(map(str, capability))
        missing = f"compute_capability: required {required}, supported {KERNEL_CAPABILITIES}"
    if missing is not None:
        logger.warning("soft_embedding on %s: PyTorch's operations (no kernel: %s)", device, missing)
    return missing


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
    """See `reference.soft_embedding`; on the current stream of the logits' device; waits for nothing.

    Probabilities are rounded to the dtype of `weight`, products are fp32, slices add up in fp32, in order, and a row is
    divided by the mass of its rounded probabilities. Which slices hold more than `tolerance` only the device knows, so
    every one is computed.
    """
    arguments = (logits, argmax, top1_prob, weight, temperature, softcap)
    if exact or weight.dtype not in KERNEL_DTYPES or missing_kernels(logits.device) is not None:
        return chunked.soft_embedding(*arguments, tolerance, exact)
    with torch.cuda.device(logits.device):
        return by_kernels(*arguments, torch.cuda.current_stream(logits.device).cuda_stream)


def by_kernels(
    logits: Tensor,
    argmax: Tensor,
    top1_prob: Tensor,
    weight: Tensor,
    temperature: Tensor,
    softcap: float | None,
    stream: int,
) -> Tensor:
    native = extension()
    rows0, rows1, vocab = logits.shape
    rows, embedding = rows0 * rows1, weight.shape[1]
    output = weight.new_empty(rows0, rows1, embedding)
    if output.numel() == 0:
        return output
    tiles = -(-vocab // native.SOFT_EMBEDDING_TILE)
    columns = min(SLICE, tiles * native.SOFT_EMBEDDING_TILE)
    starts = range(0, vocab, columns)
    probabilities = weight.new_empty(rows, columns)
    masses = weight.new_empty((rows, tiles), dtype=torch.float32)
    partial = weight.new_empty((len(starts), rows, embedding), dtype=torch.float32)
    argmax, top1_prob = argmax.contiguous(), top1_prob.contiguous()
    # `SoftEmbeddingParams.FIELDS` names them.
    params = native.SoftEmbeddingParams(
        logits, DTYPES[logits.dtype], rows0, rows1, vocab, logits.stride(0), logits.stride(1), argmax, top1_prob,
        row_parameter(temperature, logits.device), 0.0 if softcap is None else softcap, columns, embedding,
        probabilities, masses, partial, output,
    )  # fmt: skip
    for index, start in enumerate(starts):
        native.soft_embedding_probabilities_cuda(params, index, stream)
        end = min(start + columns, vocab)
        chunked.vendor_product(probabilities[:, : end - start], weight[start:end], partial[index])
    native.soft_embedding_sum_cuda(params, stream)
    return output
