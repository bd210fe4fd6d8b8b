"""The cache under the name that transformers gives it: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

EARLIER, LATER = "past_key_values", "cache"


def cache_argument() -> str:
    """What the methods of the transformers that is installed call the cache."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationMixin

    return LATER if LATER in inspect.signature(DiffusionGemmaGenerationMixin.generate).parameters else EARLIER


def takes_cache(replacement: Callable) -> Callable:
    """Let `replacement`, whose parameter is `cache`, be called with either name, as transformers itself can be."""

    @functools.wraps(replacement)
    def under_either_name(*args, **kwargs):
        if EARLIER in kwargs:
            earlier = kwargs.pop(EARLIER)
            kwargs.setdefault(LATER, earlier)
        return replacement(*args, **kwargs)

    return under_either_name
