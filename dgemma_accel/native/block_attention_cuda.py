"""`block_attention` by the extension's CUDA kernels: mma.m16n8k16 and cp.async, for compute capability 8.0 and up."""

from __future__ import annotations

import torch
from torch import Tensor

from . import block_attention_sm_90a
from .block_attention_launch import launch
from .params import BuiltCapability, extension, missing_cuda

FEATURES = {
    "device": {"cuda"},
    "dtype": {torch.bfloat16, torch.float16},
    "head_dim": {64, 128, 256, 512},
    "compute_capability": BuiltCapability(8, 0),
}


def unavailable() -> str | None:
    missing = missing_cuda()
    if missing is None and not hasattr(extension(), "block_attention_cuda"):
        return "dgemma_accel._C is older than this package: it has no block_attention"
    return missing


def block_attention(*arguments) -> tuple[Tensor, Tensor]:
    """As `reference.block_attention`, whose arguments it takes by position; waits for nothing.

    On the current stream of the query's device. The prefix is read in place. Where the tiles of queries are too few to
    fill the GPU, several blocks of threads share the keys of one; their fp32 shares take
    splits * B * Hq * C * (D + 1) * 4 bytes until they are merged.

    Raises:
        RuntimeError: CUDA's error at a launch, with its text and the launch's sizes.
    """
    special = block_attention_sm_90a
    if special.wanted(arguments[0].shape[-1]) and not special.missing(*arguments[:5]):
        return launch("block_attention_sm_90a", *arguments)
    return launch("block_attention_cuda", *arguments)
