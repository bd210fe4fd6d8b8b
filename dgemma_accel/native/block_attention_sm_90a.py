"""`block_attention` at head_dim 256 and 512 by the extension's wgmma kernels, for compute capability 9.0.

Backend "cuda" takes them at the head dims at which one was measured to be faster than others. In the environment
DGEMMA_ACCEL_BLOCK_ATTENTION=sm_90a says wherever they can, and =portable nowhere.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from ..backends import BackendError, Implementation, compute_capability
from .block_attention_launch import launch
from .block_attention_params import is_aligned
from .params import extension, missing_cuda

FEATURES = {
    "device": {"cuda"},
    "dtype": {torch.bfloat16, torch.float16},
    "head_dim": {256, 512},
    "compute_capability": {(9, 0)},
    "rows on 16-byte boundaries": {True},
}
VARIABLE = "DGEMMA_ACCEL_BLOCK_ATTENTION"
VARIANTS = ("auto", "sm_90a", "portable")
# Where one was measured to be faster. At 256 none has run on a GPU.
FASTER = {512}


def unavailable() -> str | None:
    missing = missing_cuda()
    if missing is None and not hasattr(extension(), "block_attention_sm_90a"):
        return "dgemma_accel._C was built without sm_90a"
    return missing


def wanted(head_dim: int) -> bool:
    """Whether backend "cuda" takes this variant; ValueError where the environment names one that does not exist."""
    variant = os.environ.get(VARIABLE) or VARIANTS[0]
    if variant not in VARIANTS:
        raise ValueError(f"{VARIABLE}: must be one of {VARIANTS}, got {variant!r}")
    return variant == "sm_90a" or (variant == "auto" and head_dim in FASTER)


def missing(query: Tensor, *keys_and_values: Tensor | None) -> list[str]:
    """One line for each requirement of a call that the variant does not meet."""
    tensors = [tensor for tensor in (query, *keys_and_values) if tensor is not None]
    requirements = {
        "device": query.device.type, "dtype": query.dtype, "head_dim": query.shape[-1],
        "compute_capability": compute_capability(query.device),
        "rows on 16-byte boundaries": all(map(is_aligned, tensors)),
    }  # fmt: skip
    own = Implementation("block_attention", "sm_90a", block_attention, sys.modules[__name__])
    return own.missing(requirements)


def block_attention(*arguments) -> tuple[Tensor, Tensor]:
    """As `block_attention_cuda.block_attention`.

    Raises:
        BackendError: the call is not one that the variant serves; what was required and what is supported.
        RuntimeError: CUDA's error at a launch, with its text and the launch's sizes.
    """
    lines = missing(*arguments[:5])
    if lines:
        raise BackendError("block_attention: sm_90a cannot run this call: " + "; ".join(lines))
    return launch("block_attention_sm_90a", *arguments)
