"""`commit`: which proposals are committed to the canvas, what the rest becomes, and when a row stops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_type_hints

import torch
from torch import Tensor

from ..backends import pick, requirements
from ..reference.commit import CommitCall
from ..samplers.canvas import CanvasState, StableAndConfident
from ..samplers.encoding import Flag, Measure, Select, Write
from ..samplers.rules import Rule
from . import checks
from .registration import operator
from .row_stats import RowStats

_GUMBEL = int(Flag.GUMBEL)
_STATS_DTYPES = tuple(
    torch.int64 if name in ("argmax", "sample") else torch.float32 for name in RowStats._fields
)


@dataclass(frozen=True)
class CommitResult:
    """What `commit` decided.

    tokens: [B, C] int64. committed: [B, C] bool. num_committed: [B] int64.
    state: the next `CanvasState` when one was given, else None.
    """

    tokens: Tensor
    committed: Tensor
    num_committed: Tensor
    state: CanvasState | None = None


@operator("commit", {**get_type_hints(CommitCall), "check": bool, "backend": str})
def _commit(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, check, backend = CommitCall(*arguments[:-2]), arguments[-2], arguments[-1]
    checks.values_in("k", call.k, 0, checks.INT64_MAX, force=check)
    checks.values_in("value", call.value, 0.0, math.inf, force=check)
    low_open = bool(call.flags & _GUMBEL)
    checks.values_in("value2", call.value2, 0.0, math.inf, low_open=low_open, force=check)
    return pick("commit", backend, requirements(call.tokens, canvas_length=call.tokens.shape[1]))(call)


@_commit.register_fake
def _(*arguments):
    call = CommitCall(*arguments[:-2])
    tokens, finished = call.tokens, call.finished

    def like(tensor):
        return tokens.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (
        tokens.new_empty(tokens.shape),
        tokens.new_empty(tokens.shape, dtype=torch.bool),
        tokens.new_empty(tokens.shape[:1]),
        like(call.draft),
        like(call.history),
        tokens.new_empty(0, dtype=torch.bool) if finished is None else finished.new_empty(finished.shape),
    )


def _check_state(state: CanvasState, stop: StableAndConfident | None, tokens: Tensor) -> None:
    depth = 0 if stop is None else stop.stability
    for name, shape, dtype in (
        ("draft", tokens.shape, torch.int64),
        ("history", (depth, *tokens.shape), torch.int64),
        ("finished", tokens.shape[:1], torch.bool),
    ):
        tensor = getattr(state, name)
        if checks.fits(tensor, dtype, shape, tokens.device):
            continue
        checks.is_tensor(f"state.{name}", tensor)
        checks.has_dtype(f"state.{name}", tensor, (dtype,))
        checks.has_shape(f"state.{name}", tensor, shape, "as CanvasState.start(tokens, stop) makes it")
        checks.on_device(f"state.{name}", tensor, tokens.device, "tokens")


def commit(
    tokens: Tensor,
    stats: RowStats,
    rule: Rule,
    write,
    *,
    candidates: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    state: CanvasState | None = None,
    stop: StableAndConfident | None = None,
    check: bool = False,
    backend: str = "auto",
) -> CommitResult:
    """Commit proposals by a rule and write the rest of the canvas.

    Every candidate proposes `stats.sample`. The rule ranks the candidates (confidence is `stats.sample_prob`
    unless it names another measure; ties go to the lower position) and picks; a candidate that is
    not picked gets the write; a position that is no candidate keeps its token.

    With a `state`, finished rows change nothing, the draft follows `stats.argmax`, and `stop` sets
    `state.finished` for rows that are stable and confident; `result.state` goes into the next call.

    Args:
        tokens: [B, C] int64, the canvas.
        stats: `RowStats` with fields [B, C].
        rule: a `samplers.Rule`: TopK, Threshold, Factor, EntropyBound, Random, Margin, Sequential, Edit, ...
        write: `samplers.Remask(mask_id)`, `Renoise(vocab_size)` or `Keep()`.
        candidates: [B, C] bool, or None for all positions.
        seed, offset: as in `row_stats`; used by random rules and by `Renoise`. Draws that share seed and
            offset with `row_stats` are still independent of its samples.
        state: `samplers.CanvasState`, or None.
        stop: `samplers.StableAndConfident`, or None: rows never finish. Needs a state.
        check: read tensor parameters on the device too and raise for values out of range. Waits for
            the device.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        `CommitResult`.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value.
        backends.BackendError: the backend named cannot run this call.

    Source: EntropyBoundSampler and StableAndConfidentStoppingCriteria of transformers'
    generation_diffusion_gemma.py; each rule names its own.
    """
    checks.is_tensor("tokens", tokens)
    checks.has_dtype("tokens", tokens, (torch.int64,))
    if tokens.ndim != 2:
        raise ValueError(f"tokens: shape must be [B, C], got {tuple(tokens.shape)}")
    if not isinstance(stats, RowStats):
        raise TypeError(f"stats: RowStats expected, got {type(stats).__name__}")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: a samplers.Rule such as TopK(k) expected, got {type(rule).__name__}")
    # A class has its `kind` too.
    if isinstance(write, type) or not isinstance(getattr(write, "kind", None), Write):
        raise TypeError(f"write: Remask, Renoise or Keep expected, got {type(write).__name__}")
    shape, device = tokens.shape, tokens.device
    for name, field, dtype in zip(RowStats._fields, stats, _STATS_DTYPES):
        if checks.fits(field, dtype, shape, device):
            continue
        checks.is_tensor(f"stats.{name}", field)
        checks.has_dtype(f"stats.{name}", field, (dtype,))
        checks.has_shape(f"stats.{name}", field, shape, "as tokens")
        checks.on_device(f"stats.{name}", field, device, "tokens")
    if candidates is not None and not checks.fits(candidates, torch.bool, shape, device):
        checks.is_tensor("candidates", candidates)
        checks.has_dtype("candidates", candidates, (torch.bool,))
        checks.has_shape("candidates", candidates, shape, "as tokens")
        checks.on_device("candidates", candidates, device, "tokens")
    if stop is not None and not isinstance(stop, StableAndConfident):
        raise TypeError(f"stop: StableAndConfident or None expected, got {type(stop).__name__}")
    if state is not None and not isinstance(state, CanvasState):
        raise TypeError(f"state: CanvasState or None expected, got {type(state).__name__}")
    checks.is_bool("check", check)
    checks.is_string("backend", backend)
    if state is not None:
        _check_state(state, stop, tokens)
    elif stop is not None:
        raise ValueError("stop: needs a state; CanvasState.start(tokens, stop) makes the first one")

    encoded, rows, keep = rule.encode(), shape[:1], checks.may_keep_numbers(tokens)
    measure, select, flags = encoded.measure, encoded.select, int(encoded.flags)
    if not torch.compiler.is_compiling():
        # Checks what a rule of the caller says; torch 2.11's compiler cannot trace the making of an enum member.
        measure = measure if isinstance(measure, Measure) else Measure(measure)
        select = select if isinstance(select, Select) else Select(select)
    if seed is None and not (measure == Measure.RANDOM or flags & _GUMBEL or write.kind == Write.RENOISE):
        # A call that draws nothing leaves torch's generator alone.
        seed = 0
    seed, offset = checks.seed_and_offset(seed, offset, device, keep=keep)
    confidence = None
    if stop is not None:
        confidence = checks.number_or_rows(
            "stop.confidence", stop.confidence, (), device, low_open=True, keep=keep
        )
    call = CommitCall(
        tokens=tokens,
        argmax=stats.argmax,
        sample=stats.sample,
        entropy=stats.entropy,
        sample_prob=stats.sample_prob,
        top1_prob=stats.top1_prob,
        top2_prob=stats.top2_prob,
        candidates=candidates,
        measure=int(measure),
        select=int(select),
        flags=flags,
        k=checks.number_or_rows("rule.k", encoded.k, rows, device, dtype=torch.int64, keep=keep),
        value=checks.number_or_rows("rule.value", encoded.value, rows, device, keep=keep),
        value2=checks.number_or_rows("rule.value2", encoded.value2, rows, device, keep=keep),
        mask_id=encoded.mask_id,
        write=int(write.kind),
        write_argument=write.argument,
        seed=seed,
        offset=offset,
        draft=None if state is None else state.draft,
        history=None if state is None else state.history,
        finished=None if state is None else state.finished,
        confidence=confidence,
    )
    new_tokens, committed, count, draft, history, finished = _commit(*call, check, backend)
    next_state = None if state is None else CanvasState(draft, history, finished)
    return CommitResult(new_tokens, committed, count, next_state)
