"""`commit`: which proposals are committed to the canvas, what the rest becomes, and when a row stops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import compute_capability, pick
from ..samplers.rules import CanvasState, EncodedRule, Flag, Measure, Rule, Select, StableAndConfident, Write
from . import checks
from .row_stats import RowStats


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


@torch.library.custom_op("dgemma::commit", mutates_args=())
def _commit(
    tokens: Tensor,
    argmax: Tensor,
    sample: Tensor,
    entropy: Tensor,
    sample_prob: Tensor,
    top1_prob: Tensor,
    top2_prob: Tensor,
    candidates: Tensor | None,
    measure: int,
    select: int,
    flags: int,
    k: Tensor,
    value: Tensor,
    value2: Tensor,
    mask_id: int,
    write: int,
    write_argument: int,
    seed: Tensor,
    offset: Tensor,
    draft: Tensor | None,
    history: Tensor | None,
    finished: Tensor | None,
    confidence: Tensor | None,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.values_in("k", k, 0, checks.INT64_MAX, force=check)
    checks.values_in("value", value, 0.0, float("inf"), force=check)
    low_open = bool(flags & Flag.GUMBEL)
    checks.values_in("value2", value2, 0.0, float("inf"), low_open=low_open, force=check)
    run = pick("commit", backend, _requirements(tokens))
    return run(
        tokens,
        argmax,
        sample,
        entropy,
        sample_prob,
        top1_prob,
        top2_prob,
        candidates,
        measure,
        select,
        flags,
        k,
        value,
        value2,
        mask_id,
        write,
        write_argument,
        seed,
        offset,
        draft,
        history,
        finished,
        confidence,
    )


@_commit.register_fake
def _(
    tokens,
    argmax,
    sample,
    entropy,
    sample_prob,
    top1_prob,
    top2_prob,
    candidates,
    measure,
    select,
    flags,
    k,
    value,
    value2,
    mask_id,
    write,
    write_argument,
    seed,
    offset,
    draft,
    history,
    finished,
    confidence,
    check,
    backend,
):
    def like(tensor):
        return tokens.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (
        tokens.new_empty(tokens.shape),
        tokens.new_empty(tokens.shape, dtype=torch.bool),
        tokens.new_empty(tokens.shape[:1]),
        like(draft),
        like(history),
        tokens.new_empty(0, dtype=torch.bool) if finished is None else finished.new_empty(finished.shape),
    )


def _requirements(tokens: Tensor) -> dict[str, object]:
    needs: dict[str, object] = {"device": tokens.device.type, "canvas_length": tokens.shape[1]}
    capability = compute_capability(tokens.device)
    if capability is not None:
        needs["compute_capability"] = capability
    return needs


def _check_state(state: CanvasState, stop: StableAndConfident | None, tokens: Tensor) -> None:
    depth = 0 if stop is None else stop.stability
    for name, shape, dtype in (
        ("draft", tuple(tokens.shape), torch.int64),
        ("history", (depth, *tokens.shape), torch.int64),
        ("finished", tuple(tokens.shape[:1]), torch.bool),
    ):
        tensor = checks.is_tensor(f"state.{name}", getattr(state, name))
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
    if not isinstance(getattr(write, "kind", None), Write):
        raise TypeError(f"write: Remask, Renoise or Keep expected, got {type(write).__name__}")
    shape, device = tuple(tokens.shape), tokens.device
    for name, field in zip(stats._fields, stats):
        dtype = torch.int64 if name in ("argmax", "sample") else torch.float32
        if (
            isinstance(field, Tensor)
            and field.dtype == dtype
            and field.shape == shape
            and field.device == device
        ):
            continue
        checks.is_tensor(f"stats.{name}", field)
        checks.has_dtype(f"stats.{name}", field, (dtype,))
        checks.has_shape(f"stats.{name}", field, shape, "as tokens")
        checks.on_device(f"stats.{name}", field, device, "tokens")
    if candidates is not None:
        checks.is_tensor("candidates", candidates)
        checks.has_dtype("candidates", candidates, (torch.bool,))
        checks.has_shape("candidates", candidates, shape, "as tokens")
        checks.on_device("candidates", candidates, device, "tokens")
    if state is not None:
        _check_state(state, stop, tokens)
    elif stop is not None:
        raise ValueError("stop: needs a state; CanvasState.start(tokens, stop) makes the first one")

    encoded = _encode(rule, shape, device)
    seed, offset = _draws(encoded, write, seed, offset, device)
    confidence = None
    if stop is not None:
        confidence = checks.number_or_rows("stop.confidence", stop.confidence, (), device, low_open=True)
    tokens_out, committed, count, draft, history, finished = torch.ops.dgemma.commit(
        tokens,
        stats.argmax,
        stats.sample,
        stats.entropy,
        stats.sample_prob,
        stats.top1_prob,
        stats.top2_prob,
        candidates,
        int(encoded.measure),
        int(encoded.select),
        int(encoded.flags),
        encoded.k,
        encoded.value,
        encoded.value2,
        encoded.mask_id,
        int(write.kind),
        write.argument,
        seed,
        offset,
        None if state is None else state.draft,
        None if state is None else state.history,
        None if state is None else state.finished,
        confidence,
        check,
        backend,
    )
    next_state = None if state is None else CanvasState(draft, history, finished)
    return CommitResult(tokens_out, committed, count, next_state)


def _encode(rule: Rule, shape: tuple[int, int], device: torch.device) -> EncodedRule:
    """The rule with its numbers as tensors that a kernel can read."""
    encoded = rule.encode()
    rows = shape[:1]
    measure, select = encoded.measure, encoded.select
    if not torch.compiler.is_compiling():
        # Checks what a rule of the caller says; torch 2.11's compiler cannot trace the making of an enum member.
        measure, select = Measure(measure), Select(select)
    return EncodedRule(
        measure,
        select,
        encoded.flags,
        checks.number_or_rows("rule.k", encoded.k, rows, device, dtype=torch.int64),
        checks.number_or_rows("rule.value", encoded.value, rows, device),
        checks.number_or_rows("rule.value2", encoded.value2, rows, device),
        encoded.mask_id,
    )


def _draws(encoded: EncodedRule, write, seed, offset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Seed and offset; a call that draws nothing leaves torch's generator alone."""
    random = encoded.measure == Measure.RANDOM or encoded.flags & Flag.GUMBEL or write.kind == Write.RENOISE
    if seed is None and not random:
        seed = 0
    return checks.seed_and_offset(seed, offset, device)
