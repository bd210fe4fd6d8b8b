"""The reference as a backend: any device, any dtype."""

from .reference import (
    block_attention,
    commit,
    experts,
    feed_forward,
    head_stats,
    progress,
    row_stats,
    soft_embedding,
    top_k_top_p,
)
from .reference.quantization import quantize_rows

__all__ = [
    "FEATURES",
    "block_attention",
    "commit",
    "experts",
    "feed_forward",
    "head_stats",
    "progress",
    "quantize_rows",
    "row_stats",
    "soft_embedding",
    "top_k_top_p",
    "unavailable",
]

FEATURES: dict[str, object] = {}


def unavailable() -> str | None:
    return None
