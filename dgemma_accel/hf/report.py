"""What it costs to compile and capture the steps of an accelerated model, and the passes between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .patches import acceleration_of
from .registry import STEP


@dataclass(frozen=True)
class CaptureReport:
    """One step, or one pass that stores a canvas, that was compiled, and captured where the device can.

    batch, canvas: rows and positions. cache_length: tokens of the cache that it reads, 0 without a capture, which is
    the only one to depend on it. compiled, captured: whether it is. compile_seconds: the first call, compiler and step.
    capture_seconds: warm-up, which holds the compiler's time if it is the first with its shape, and recording.
    memory_bytes: of the graph and its own tensors; captures of one model share working memory, which counts for the
    first. replays: steps or passes taken with it. problem: why it is not compiled or not captured, or None.
    what: "step" or "storing".
    """

    batch: int
    canvas: int
    cache_length: int
    compiled: bool
    captured: bool
    compile_seconds: float | None
    capture_seconds: float | None
    memory_bytes: int
    replays: int
    problem: str | None
    what: str = STEP


def captures(model: nn.Module) -> list[CaptureReport]:
    """What was compiled or captured for an accelerated model; nothing where it is not accelerated."""
    acceleration = acceleration_of(model) if isinstance(model, nn.Module) else None
    if acceleration is None:
        return []
    found, captured_parts = [], set()
    registry = acceleration.captures
    for key, captured in list(registry.found.items()):
        what, _, parts, lengths, shape, *_ = key
        captured_parts.add(id(parts))
        problem = registry.failures.get(key)
        found.append(
            CaptureReport(
                *shape,
                max(lengths),
                parts.failure is None,
                captured is not None,
                parts.seconds,
                None if captured is None else captured.seconds,
                0 if captured is None else captured.bytes,
                0 if captured is None else captured.replays,
                f"not captured: {problem}" if problem else _uncompiled(parts),
                what,
            )
        )
    for parts in list(acceleration.compiled.values()):
        if id(parts) not in captured_parts:
            costs = parts.seconds, None, 0, parts.calls
            found.append(
                CaptureReport(
                    *parts.shape, 0, parts.failure is None, False, *costs, _uncompiled(parts), parts.what
                )
            )
    return found


def _uncompiled(parts) -> str | None:
    return None if parts.failure is None else f"not compiled: {parts.failure}"
