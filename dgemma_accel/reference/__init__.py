"""The specification: every op in plain PyTorch, on any device, in fp32 (fp64 when the input is fp64)."""

from .block_attention import block_attention
from .commit import commit
from .experts import experts
from .feed_forward import feed_forward
from .head_stats import head_stats
from .philox import philox4x32, random_words, uniform_from_word
from .progress import progress
from .row_stats import row_stats
from .soft_embedding import soft_embedding
from .top_k_top_p import top_k_top_p

__all__ = [
    "block_attention",
    "commit",
    "experts",
    "feed_forward",
    "head_stats",
    "philox4x32",
    "progress",
    "random_words",
    "row_stats",
    "soft_embedding",
    "top_k_top_p",
    "uniform_from_word",
]
