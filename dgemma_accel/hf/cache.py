"""Which caches can be read in place, and the ones that calls without a cache of their own get."""

from __future__ import annotations

from torch import Tensor

from .call import Call, active_call
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


def prepare_cache(patch: Patch, generation_config, batch_size: int, max_length: int):
    """`_prepare_cache_for_generation`: where steps are captured, calls that ask for none get one in place."""
    call, device = active_call(), patch.owner.device
    if (
        generation_config.cache_implementation is None
        and call is not None
        and not patch.overridden
        and patch.acceleration.graph_on(device)
    ):
        return _lease(patch, call, batch_size, max_length)
    return patch.original()(generation_config=generation_config, batch_size=batch_size, max_length=max_length)


def prepare_static_cache(patch: Patch, cache_implementation: str, batch_size: int, max_length: int):
    """`_prepare_static_cache` with a `PreallocatedCache`, whose buffers stay from call to call."""
    if "offloaded" in cache_implementation or patch.overridden:
        return patch.original()(
            cache_implementation=cache_implementation, batch_size=batch_size, max_length=max_length
        )
    return _lease(patch, active_call(), batch_size, max_length)


def _lease(patch: Patch, call: Call | None, batch_size: int, max_length: int):
    """Buffers of the model's bank for the length of a call; without a call to give them back, a cache of its own."""
    if call is None:
        from .preallocated import PreallocatedCache

        return PreallocatedCache(patch.owner.config, max_length, growing=True)
    cache = patch.acceleration.bank.lease(patch.owner.config, batch_size, max_length)
    call.leased.append((patch.acceleration.bank, cache))
    return cache


def leave_uncompiled(patch: Patch, sampler, diffusion_stopping_criteria):
    """`_compile_functions` for a static cache of transformers that the caller made: everything runs uncompiled.

    What it would compile are the original's forwards, and it keeps the first call's sampler for all later ones.
    """
    if patch.overridden:
        return patch.original()(sampler, diffusion_stopping_criteria)
    patch.acceleration.say(
        "static cache",
        "a PreallocatedCache or cache_implementation='static' is faster and right beyond the window",
        "transformers' own, uncompiled, serves",
    )
    model = patch.owner
    return model.model.encoder, model.forward, sampler, diffusion_stopping_criteria
