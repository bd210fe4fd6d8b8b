"""The reference as a backend: any device, any dtype."""

from .reference import block_attention, commit, row_stats

__all__ = ["FEATURES", "block_attention", "commit", "row_stats", "unavailable"]

FEATURES: dict[str, object] = {}


def unavailable() -> str | None:
    return None
