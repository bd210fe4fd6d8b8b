"""`block_attention` by the extension's CUDA kernels: mma.m16n8k16 and cp.async, for compute capability 8.0 and up."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .block_attention_params import block_attention_params, outputs, partial_outputs
from .params import CapabilityAtLeast, extension, missing_cuda

FEATURES = {
    "device": {"cuda"},
    "dtype": {torch.bfloat16, torch.float16},
    "head_dim": {64, 128, 256, 512},
    "compute_capability": CapabilityAtLeast(8, 0),
}


def unavailable() -> str | None:
    missing = missing_cuda()
    if missing is None and not hasattr(extension(), "block_attention_cuda"):
        return "dgemma_accel._C is older than this package: it has no block_attention"
    return missing


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    prefix_start: Tensor | None,
    prefix_end: Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.block_attention`, on the current stream of the query's device; waits for nothing.

    The prefix is read in place. Where the tiles of queries are too few to fill the GPU, several blocks of threads
    share the keys of one; their fp32 shares take splits * B * Hq * C * (D + 1) * 4 bytes until they are merged.

    Raises:
        RuntimeError: CUDA's error at a launch, with its text and the launch's sizes.
    """
    with torch.cuda.device(query.device):
        native = extension()
        # A bound that is not contiguous (a column, an expanded scalar) is copied: a few bytes.
        start = None if prefix_start is None else prefix_start.contiguous()
        end = None if prefix_end is None else prefix_end.contiguous()
        params = block_attention_params(
            query, key, value, prefix_key, prefix_value, start, end, scale, softcap, causal, window
        )
        output, lse = outputs(params, query)
        splits = native.block_attention_splits(params, _multiprocessors(query.device.index))
        shares = partial_outputs(params, splits, query)
        native.block_attention_cuda(params, torch.cuda.current_stream(query.device).cuda_stream)
        del shares, start, end
    return output, lse
