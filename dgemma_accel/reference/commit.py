"""Specification of `commit`: which proposals are committed, what the rest becomes, and when a row stops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..samplers.rules import Flag, Measure, Select, Write
from .philox import (
    WORD_RENOISE_HIGH,
    WORD_RENOISE_LOW,
    WORD_SELECT,
    below,
    random_words,
    uniform_from_word,
)


def _per_row(value: Tensor, device, dtype) -> Tensor:
    """A 0-d or [B] parameter as something that broadcasts against [B, C]."""
    value = value.to(device, dtype)
    return value[:, None] if value.ndim else value


def _gumbel(word: Tensor) -> Tensor:
    # Half a step away from 0, so that both logarithms are finite.
    uniform = ((word >> 8).double() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform)).float()


def _score(
    measure: int, sample_prob: Tensor, top1_prob: Tensor, top2_prob: Tensor, entropy: Tensor, draw: Tensor
):
    if measure == Measure.SAMPLE_PROB:
        return sample_prob
    if measure == Measure.TOP1_PROB:
        return top1_prob
    if measure == Measure.ENTROPY:
        return -entropy
    if measure == Measure.MARGIN:
        return top1_prob - top2_prob
    if measure == Measure.RANDOM:
        return draw
    if measure == Measure.POSITION:
        return -torch.arange(draw.shape[1], device=draw.device, dtype=torch.float32).expand_as(draw)
    raise ValueError(f"measure: unknown value {measure}")


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


def _selected(score, eligible, select, flags, k, value, value2, entropy, draw) -> Tensor:
    """Which eligible positions the selection takes, [B, C] bool."""
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
        threshold = value
        if flags & Flag.RELATIVE:
            threshold = torch.minimum(value, sorted_score[:, :1] - value2)
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
        sorted_entropy = entropy.gather(1, order).double()
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


def commit(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One decision over a canvas.

    Every candidate proposes `sample`. Candidates are ranked by `measure` (highest first, ties to the lower
    position; -0.0 equals 0.0), `select` takes some, those are committed; the other candidates receive the
    write; positions that are no candidates keep their token. Comparisons are fp32; sums of entropy are fp64.
    The draws of position (b, c) are Philox(seed, offset, row b * C + c), words 1 to 3 (see `philox`).

    With a state (`draft`, `history`, `finished`): finished rows change nothing and commit nothing; the draft
    of the others becomes `argmax`; and with `confidence` a row becomes finished when its new draft equals
    every canvas in `history` and its mean entropy is below `confidence`; then the draft is pushed to `history`.

    Args:
        tokens, argmax, sample: [B, C] int64.
        entropy, sample_prob, top1_prob, top2_prob: [B, C] fp32.
        candidates: [B, C] bool, or None for all.
        measure, select, flags, mask_id: see `samplers.rules`.
        k: 0-d or [B] int64. value, value2: 0-d or [B] fp32.
        write, write_argument: a `Write` and its mask token or vocabulary size.
        seed, offset: 0-d int64.
        draft: [B, C] int64, history: [S, B, C] int64, finished: [B] bool; all or none.
        confidence: 0-d fp32, or None: rows never finish.

    Returns:
        (tokens [B, C] int64, committed [B, C] bool, num_committed [B] int64, draft, history, finished);
        the last three are empty tensors when no state came in.

    Source: EntropyBoundSampler, StableAndConfidentStoppingCriteria and `_denoising_step` of transformers'
    generation_diffusion_gemma.py; the rules as cited in `samplers.rules`.
    """
    batch, length = tokens.shape
    device = tokens.device
    k = _per_row(k, device, torch.int64)
    value = _per_row(value, device, torch.float32)
    value2 = _per_row(value2, device, torch.float32)
    rows = torch.arange(batch * length, device=device).view(batch, length)
    words = random_words(seed, offset, rows)
    draw = uniform_from_word(words[WORD_SELECT])

    eligible = torch.ones_like(tokens, dtype=torch.bool) if candidates is None else candidates
    if finished is not None:
        eligible = eligible & ~finished[:, None]

    score = _score(measure, sample_prob, top1_prob, top2_prob, entropy, draw)
    if flags & Flag.GUMBEL:
        score = score / value2 + _gumbel(words[WORD_SELECT])
    ranked = eligible & (tokens == mask_id) if select == Select.EDIT else eligible
    committed = _selected(score, ranked, select, flags, k, value, value2, entropy, draw)
    if select == Select.EDIT:
        committed |= eligible & ~ranked & (sample != tokens) & (score > value2)

    if write == Write.REMASK:
        rest = torch.full_like(tokens, write_argument)
    elif write == Write.RENOISE:
        rest = below(words[WORD_RENOISE_HIGH], words[WORD_RENOISE_LOW], write_argument)
    elif write == Write.KEEP:
        rest = tokens
    else:
        raise ValueError(f"write: unknown value {write}")
    new_tokens = torch.where(committed, sample, torch.where(eligible, rest, tokens))
    num_committed = committed.sum(-1)

    if finished is None:
        nothing = tokens.new_empty(0)
        return new_tokens, committed, num_committed, nothing, nothing.clone(), nothing.bool()

    new_draft = torch.where(finished[:, None], draft, argmax)
    new_finished = finished.clone()
    if confidence is not None:
        stable = (history == new_draft).all(-1).all(0)
        confident = entropy.double().mean(-1) < confidence.to(device, torch.float32)
        new_finished |= stable & confident
    new_history = torch.cat([history[1:], new_draft[None]]) if history.shape[0] else history.clone()
    return new_tokens, committed, num_committed, new_draft, new_history, new_finished
