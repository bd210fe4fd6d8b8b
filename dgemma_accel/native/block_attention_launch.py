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


def launch(
    kernel: str,
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
    """(output, lse) by the extension's function `kernel`, whose splits another one next to it decides.

    On the current stream of the query's device; waits for nothing.
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
        splits_of = getattr(native, f"{kernel.removesuffix('_cuda')}_splits")
        splits = splits_of(params, _multiprocessors(query.device.index))
        shares = partial_outputs(params, splits, query)
        getattr(native, kernel)(params, torch.cuda.current_stream(query.device).cuda_stream)
        del shares, start, end
    return output, lse
