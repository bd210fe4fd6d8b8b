"""A call of one of the extension's block_attention kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .block_attention_params import block_attention_params, outputs, partial_outputs
from .params import extension


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: str, *arguments) -> tuple[Tensor, Tensor]:
    """(output, lse) by the extension's function `kernel`, whose splits another one next to it decides.

    On the current stream of the query's device; waits for nothing.

    Args:
        arguments: those of `reference.block_attention`, by position.
    """
    query, *keys_and_values, start, end = arguments[:7]
    with torch.cuda.device(query.device):
        native = extension()
        # A bound that is not contiguous (a column, an expanded scalar) is copied: a few bytes.
        bounds = [None if bound is None else bound.contiguous() for bound in (start, end)]
        params = block_attention_params(query, *keys_and_values, *bounds, *arguments[7:])
        output, lse = outputs(params, query)
        splits_of = getattr(native, f"{kernel.removesuffix('_cuda')}_splits")
        splits = splits_of(params, _multiprocessors(query.device.index))
        shares = partial_outputs(params, splits, query)
        getattr(native, kernel)(params, torch.cuda.current_stream(query.device).cuda_stream)
        del shares, bounds
    return output, lse
