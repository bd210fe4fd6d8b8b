"""Names that releases of transformers differ in, and whether those of the one installed are known here.

The cache is `cache` since 5.24 and was `past_key_values` before.
"""

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


def unknown_names(original: Callable, replacement: Callable) -> str | None:
    """Why `replacement(patch, ...)` cannot stand where `original` stood, or None.

    A release of transformers that renames, adds or drops a parameter is better refused than half served.
    """
    theirs = [
        LATER if name == EARLIER else name
        for name in inspect.signature(original).parameters
        if name != "self"
    ]
    ours = list(inspect.signature(replacement).parameters.values())[1:]
    named = [p for p in ours if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    new = [] if any(p.kind is p.VAR_KEYWORD for p in ours) else set(theirs) - {p.name for p in named}
    # What is keyword-only and has a default is an option of ours.
    needed = [p.name for p in named if p.kind is not p.KEYWORD_ONLY or p.default is p.empty]
    gone = [name for name in needed if name not in theirs]
    lines = [f"takes {', '.join(name for name in theirs if name in new)}"] if new else []
    lines += [f"no longer takes {', '.join(gone)}"] if gone else []
    return " and ".join(lines) or None
