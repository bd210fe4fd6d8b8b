"""Specification of `commit`: which proposals are committed, what the rest becomes, and when a row stops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..samplers.encoding import Flag, Measure, Select, Write
from .philox import (
    WORD_RENOISE_HIGH,
    WORD_RENOISE_LOW,
    WORD_SELECT,
    below,
    random_words,
    uniform_from_word,
)


class CommitCall(NamedTuple):
    """The arguments of `commit`: of this function, of every backend's, and (with `check` and `backend`) of the op."""

    tokens: Tensor  # [B, C] int64
    argmax: Tensor  # [B, C] int64
    sample: Tensor  # [B, C] int64
    entropy: Tensor  # [B, C] fp32, nats
    sample_prob: Tensor  # [B, C] fp32
    top1_prob: Tensor  # [B, C] fp32
    top2_prob: Tensor  # [B, C] fp32
    candidates: Tensor | None  # [B, C] bool, None for all
    measure: int  # a `samplers.encoding.Measure`
    select: int  # a `samplers.encoding.Select`
    flags: int  # `samplers.encoding.Flag`s
    k: Tensor  # 0-d or [B] int64
    value: Tensor  # 0-d or [B] fp32
    value2: Tensor  # 0-d or [B] fp32
    mask_id: int  # for Select.EDIT
    write: int  # a `samplers.encoding.Write`
    write_argument: int  # the mask token or the vocabulary size
    seed: Tensor  # 0-d int64
    offset: Tensor  # 0-d int64
    draft: Tensor | None  # [B, C] int64; draft, history and finished: all or none
    history: Tensor | None  # [S, B, C] int64
    finished: Tensor | None  # [B] bool
    confidence: Tensor | None  # 0-d fp32, None: rows never finish

    def contiguous(self) -> CommitCall:
        """The call with a copy of every tensor that has gaps."""
        for field in self:
            if isinstance(field, Tensor) and not field.is_contiguous():
                return CommitCall(*(f.contiguous() if isinstance(f, Tensor) else f for f in self))
        return self


def _per_row(value: Tensor, device, dtype) -> Tensor:
    """A 0-d or [B] parameter as something that broadcasts against [B, C]."""
    value = value.to(device, dtype)
    return value[:, None] if value.ndim else value


def _gumbel(word: Tensor) -> Tensor:
    # Half a step away from 0, so that both logarithms are finite.
    uniform = ((word >> 8).double() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform)).float()


def _score(call: CommitCall, draw: Tensor) -> Tensor:
    if call.measure == Measure.SAMPLE_PROB:
        return call.sample_prob
    if call.measure == Measure.TOP1_PROB:
        return call.top1_prob
    if call.measure == Measure.ENTROPY:
        return -call.entropy
    if call.measure == Measure.MARGIN:
        return call.top1_prob - call.top2_prob
    if call.measure == Measure.RANDOM:
        return draw
    if call.measure == Measure.POSITION:
        return -torch.arange(draw.shape[1], device=draw.device, dtype=torch.float32).expand_as(draw)
    raise ValueError(f"measure: unknown value {call.measure}")


def _best_of_run(score: Tensor, eligible: Tensor) -> Tensor:
    """True where a candidate has the highest score of its run of adjacent candidates (lowest position on ties)."""
    best = torch.zeros_like(eligible)
    for b in range(score.shape[0]):
        position = 0
        while position < score.shape[1]:
            if not eligible[b, position]:
                position += 1
                continue
            end = position
            while end < score.shape[1] and eligible[b, end]:
                end += 1
            best[b, position + int(torch.argmax(score[b, position:end]))] = True
            position = end
    return best


def _selected(call: CommitCall, score: Tensor, eligible: Tensor, draw: Tensor) -> Tensor:
    """Which eligible positions the selection takes, [B, C] bool."""
    select, flags = call.select, call.flags
    k = _per_row(call.k, score.device, torch.int64)
    value = _per_row(call.value, score.device, torch.float32)
    value2 = _per_row(call.value2, score.device, torch.float32)
    if select == Select.BERNOULLI:
        return eligible & (draw < value)

    ranking = torch.where(eligible, score, float("-inf"))
    # A stable sort gives the lower position on ties; positions that are not eligible come after all that are.
    order = torch.argsort(ranking, dim=-1, descending=True, stable=True)
    order = order.gather(1, torch.argsort((~eligible).gather(1, order).int(), dim=-1, stable=True))
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order))
    count = eligible.sum(-1, keepdim=True)
    sorted_score = score.gather(1, order)
    ranks = torch.arange(1, order.shape[1] + 1, device=order.device)

    if select == Select.TOP_K:
        taken = rank <= k
    elif select in (Select.THRESHOLD, Select.HIERARCHY, Select.EDIT):
        # The score is minus the entropy, and the value an entropy.
        threshold = -value if call.measure == Measure.ENTROPY else value
        if flags & Flag.RELATIVE:
            threshold = torch.minimum(threshold, sorted_score[:, :1] - value2)
        strict = flags & Flag.STRICT or select == Select.HIERARCHY
        above = score > threshold if strict else score >= threshold
        taken = above | (rank <= k)
        if select == Select.HIERARCHY:
            taken |= _best_of_run(score, eligible) & (score > value2)
    elif select == Select.FACTOR:
        holds = (sorted_score >= 1.0 - value / (ranks + 1).float()) | (ranks == 1)
        length = (holds & (ranks <= count)).long().cumprod(-1).sum(-1, keepdim=True)
        if flags & Flag.LAST_RANK_QUIRK:
            length = torch.where(length == count - 1, count, length)
        taken = rank <= length
    elif select == Select.ENTROPY_BOUND:
        # fp64 sums: any order of addition on any device gives the same decision.
        sorted_entropy = call.entropy.gather(1, order).double()
        inclusive = sorted_entropy.cumsum(-1)
        if flags & Flag.INCLUSIVE:
            holds = (inclusive < value) | (ranks == 1)
        else:
            exclusive = torch.cat([torch.zeros_like(inclusive[:, :1]), inclusive[:, :-1]], dim=-1)
            holds = exclusive <= value
        taken = holds.gather(1, rank - 1)
    else:
        raise ValueError(f"select: unknown value {select}")
    return eligible & taken


def commit(call: CommitCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One decision over a canvas.

    Every candidate proposes `sample`. Candidates are ranked by `measure` (highest first, ties to the lower
    position; -0.0 equals 0.0), `select` takes some, those are committed; the other candidates receive the
    write; positions that are no candidates keep their token. Comparisons are fp32; sums of entropy are fp64.
    The draws of position (b, c) are Philox(seed, offset, row b * C + c), words 1 to 3 (see `philox`).

    With a state (`draft`, `history`, `finished`): finished rows change nothing and commit nothing; the draft
    of the others becomes `argmax`; and with `confidence` a row becomes finished when its new draft equals
    every canvas in `history` and its mean entropy is below `confidence`; then the draft is pushed to `history`.

    Returns:
        (tokens [B, C] int64, committed [B, C] bool, num_committed [B] int64, draft, history, finished);
        the last three are empty tensors when no state came in.

    Source: EntropyBoundSampler, StableAndConfidentStoppingCriteria and `_denoising_step` of transformers'
    generation_diffusion_gemma.py; the rules as cited in `samplers.rules`.
    """
    # Results then have no gaps either, on every backend.
    call = call.contiguous()
    tokens, finished = call.tokens, call.finished
    batch, length = tokens.shape
    device = tokens.device
    rows = torch.arange(batch * length, device=device).view(batch, length)
    words = random_words(call.seed, call.offset, rows)
    draw = uniform_from_word(words[WORD_SELECT])

    eligible = torch.ones_like(tokens, dtype=torch.bool) if call.candidates is None else call.candidates
    if finished is not None:
        eligible = eligible & ~finished[:, None]

    score = _score(call, draw)
    value2 = _per_row(call.value2, device, torch.float32)
    if call.flags & Flag.GUMBEL:
        score = score / value2 + _gumbel(words[WORD_SELECT])
    ranked = eligible & (tokens == call.mask_id) if call.select == Select.EDIT else eligible
    committed = _selected(call, score, ranked, draw)
    if call.select == Select.EDIT:
        committed |= eligible & ~ranked & (call.sample != tokens) & (score > value2)

    if call.write == Write.REMASK:
        rest = torch.full_like(tokens, call.write_argument)
    elif call.write == Write.RENOISE:
        rest = below(words[WORD_RENOISE_HIGH], words[WORD_RENOISE_LOW], call.write_argument)
    elif call.write == Write.KEEP:
        rest = tokens
    else:
        raise ValueError(f"write: unknown value {call.write}")
    new_tokens = torch.where(committed, call.sample, torch.where(eligible, rest, tokens))
    num_committed = committed.sum(-1)

    if finished is None:
        nothing = tokens.new_empty(0)
        return new_tokens, committed, num_committed, nothing, nothing.clone(), nothing.bool()

    history = call.history
    new_draft = torch.where(finished[:, None], call.draft, call.argmax)
    new_finished = finished.clone()
    if call.confidence is not None:
        stable = (history == new_draft).all(-1).all(0)
        confident = call.entropy.double().mean(-1) < call.confidence.to(device, torch.float32)
        new_finished |= stable & confident
    new_history = torch.cat([history[1:], new_draft[None]]) if history.shape[0] else history.clone()
    return new_tokens, committed, num_committed, new_draft, new_history, new_finished
