"""Fused kernels for diffusion language models: block attention, confidence selection, remasking."""

from . import samplers
from .hf import (
    accelerate,
    accelerated,
    captures,
    from_pretrained,
    quantize_experts,
    quantize_linears,
    restore,
)
from .ops.block_attention import block_attention
from .ops.commit import CommitResult, commit
from .ops.experts import experts
from .ops.head_stats import head_stats
from .ops.merge_stats import merge_stats
from .ops.row_stats import RowStats, row_stats
from .ops.soft_embedding import soft_embedding
from .ops.top_k_top_p import top_k_top_p
from .version import __version__

__all__ = [
    "CommitResult",
    "RowStats",
    "__version__",
    "accelerate",
    "accelerated",
    "block_attention",
    "captures",
    "commit",
    "experts",
    "from_pretrained",
    "head_stats",
    "merge_stats",
    "quantize_experts",
    "quantize_linears",
    "restore",
    "row_stats",
    "samplers",
    "soft_embedding",
    "top_k_top_p",
]
