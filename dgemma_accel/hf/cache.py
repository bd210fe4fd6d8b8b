"""Which caches can be read in place, and the one that `cache_implementation="static"` gets."""

from __future__ import annotations

from torch import Tensor

from .patches import Patch


def readable(cache, layer) -> bool:
    """Whether `layer.keys` and `layer.values` are the whole prefix, [B, Hkv, L, D], as the decoder sees it.

    Offloaded layers may be on another device, quantised ones keep only a residual in `keys`, and a layer of
    transformers' static cache has unused slots, so those are left to the original attention.
    """
    from transformers import cache_utils

    from .preallocated import PreallocatedLayer, PreallocatedSlidingLayer

    if cache.is_compileable or getattr(cache, "offloading", False):
        return False
    kinds = (
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
        PreallocatedLayer,
        PreallocatedSlidingLayer,
    )
    return type(layer) in kinds and isinstance(layer.keys, Tensor) and layer.keys.ndim == 4


def prepare_static_cache(patch: Patch, cache_implementation: str, batch_size: int, max_length: int):
    """`_prepare_static_cache` with a `PreallocatedCache`, kept from call to call while it is large enough.

    As with the original, a later call with a static cache forgets what an earlier one left in it.
    """
    if "offloaded" in cache_implementation:
        return patch.original()(
            cache_implementation=cache_implementation, batch_size=batch_size, max_length=max_length
        )
    from .preallocated import PreallocatedCache

    cache = patch.acceleration.static_cache
    if cache is None or cache.max_length < max_length or cache.batch_size not in (-1, batch_size):
        cache = patch.acceleration.static_cache = PreallocatedCache(patch.owner.config, max_length)
    cache.reset()
    return cache


def leave_uncompiled(patch: Patch, sampler, diffusion_stopping_criteria):
    """`_compile_functions` for a static cache of transformers that the caller made: everything runs uncompiled.

    What it would compile are the original's forwards, and it keeps the first call's sampler for all later ones.
    """
    patch.acceleration.say(
        "static cache",
        "a PreallocatedCache or cache_implementation='static' is faster and right beyond the window",
        "transformers' own, uncompiled, serves",
    )
    model = patch.owner
    return model.model.encoder, model.forward, sampler, diffusion_stopping_criteria
