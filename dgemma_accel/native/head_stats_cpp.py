"""The `cpp` backend of head_stats."""

import functools

from .head_stats import product_then_row_stats
from .row_stats_cpp import FEATURES, unavailable

__all__ = ["FEATURES", "head_stats", "unavailable"]

head_stats = functools.partial(product_then_row_stats, "cpp")
