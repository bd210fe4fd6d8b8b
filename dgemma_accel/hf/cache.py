"""Which caches can be read in place."""

from __future__ import annotations

from torch import Tensor


def readable(cache, layer) -> bool:
    """Whether `layer.keys` and `layer.values` are the whole prefix, [B, Hkv, L, D], as the decoder sees it.

    Offloaded layers may be on another device, quantised ones keep only a residual in `keys`, and a static layer
    has unused slots, so those are left to the original attention.
    """
    from transformers import cache_utils

    if cache.is_compileable or getattr(cache, "offloading", False):
        return False
    if type(layer) not in (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer):
        return False
    return isinstance(layer.keys, Tensor) and layer.keys.ndim == 4
