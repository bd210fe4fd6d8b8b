"""`commit` by the extension's CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.commit import CommitCall
from .commit_params import prepare
from .params import AtMost, BuiltCapability, extension, missing_cuda

# A block ranks a canvas with one thread per position.
FEATURES = {"device": {"cuda"}, "canvas_length": AtMost(1024), "compute_capability": BuiltCapability(8, 0)}

unavailable = missing_cuda


def commit(call: CommitCall) -> tuple[Tensor, ...]:
    """As `reference.commit`, on the current stream of the tokens' device; waits for nothing."""
    device = call.tokens.device
    with torch.cuda.device(device):
        params, result, alive = prepare(call)
        if result[2].numel() == 0:
            return result
        extension().commit_cuda(params, torch.cuda.current_stream(device).cuda_stream)
        # The launch is queued: the caching allocator hands this memory on in stream order only.
        del alive
    return result
