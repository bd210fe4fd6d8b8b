"""Fused kernels for diffusion language models: block attention, confidence selection, remasking."""

from . import samplers
from .hf import accelerate, accelerated, restore
from .ops.block_attention import block_attention
from .ops.commit import CommitResult, commit
from .ops.row_stats import RowStats, row_stats
from .version import __version__

__all__ = [
    "CommitResult",
    "RowStats",
    "__version__",
    "accelerate",
    "accelerated",
    "block_attention",
    "commit",
    "restore",
    "row_stats",
    "samplers",
]
