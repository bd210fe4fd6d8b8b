"""One call of `generate`: what its denoising steps need to know and cannot see in their arguments."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from .patches import Patch


@dataclass
class Call:
    """needs_logits: a streamer of this call takes the logits of every step."""

    needs_logits: bool = False


# A context variable keeps two threads that generate with one model apart.
_current: ContextVar[Call | None] = ContextVar("dgemma_accel_generate", default=None)


def current_call() -> Call:
    return _current.get() or Call()


def generate(patch: Patch, *args, **kwargs):
    """`DiffusionGemmaGenerationMixin.generate`, with the call's streamer in view."""
    streamer = kwargs.get("streamer", args[2] if len(args) > 2 else None)
    call = Call(
        needs_logits=hasattr(streamer, "put_draft") and bool(getattr(streamer, "_takes_logits", False))
    )
    token = _current.set(call)
    try:
        return patch.original()(*args, **kwargs)
    finally:
        _current.reset(token)
