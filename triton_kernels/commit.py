"""`commit` in one launch: a program ranks, selects and writes one row of the batch.

A position becomes a 64-bit key that sorts like (not ranked, score descending, position): the order of the
specification. The program sorts keys alone; position, score and a few bits come back out of a key, and
everything after the sort is loaded and stored at the sorted positions, so that ranks are plain indices and
no inverse permutation is needed.

    bit 45: not ranked    bits 44..13: score, inverted    bits 12..2: position    bit 1: eligible    bit 0: best of run
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..reference.commit import CommitCall
from ..samplers.encoding import Flag, Measure, Select, Write
from .common import (
    CAPABILITIES,
    DEVICES,
    FUSED,
    UpTo,
    by_value,
    capability,
    int_by_value,
    int_parameter,
    next_power_of_2,
    on_device,
    parameter,
    philox,
    unavailable,
    uniform_from_word,
)

__all__ = ["FEATURES", "commit", "unavailable"]

MAX_CANVAS = 1024

FEATURES = {
    "device": DEVICES,
    "canvas_length": UpTo(MAX_CANVAS, minimum=0),
    "compute_capability": CAPABILITIES,
}

SAMPLE_PROB, TOP1_PROB, ENTROPY, MARGIN, RANDOM, POSITION = (tl.constexpr(int(m)) for m in Measure)
TOP_K, THRESHOLD, FACTOR, ENTROPY_BOUND, BERNOULLI, HIERARCHY, EDIT = (tl.constexpr(int(s)) for s in Select)
REMASK, RENOISE = tl.constexpr(int(Write.REMASK)), tl.constexpr(int(Write.RENOISE))


@triton.jit
def gumbel_noise(word):
    """Gumbel noise of a word, in fp64 as far as the last rounding."""
    uniform = ((word >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08
    return -(tl.log(-tl.log(uniform)).to(tl.float32))


@triton.jit
def sortable(x):
    """fp32 to 32 bits, held in int64, that ascend where x descends; -0.0 and 0.0 give the same bits.

    NaN comes before everything, as in torch.sort, whatever its sign.
    """
    b = tl.where(x == x, (x + 0.0).to(tl.int32, bitcast=True), 0x7FFFFFFF)
    # A negative float orders by its bits reversed; the sign bit goes last.
    ascending = tl.where(b < 0, b ^ 0x7FFFFFFF, b).to(tl.int64)
    return 0x7FFFFFFF - ascending


@triton.jit
def score_of(bits):
    """The inverse of `sortable`."""
    ascending = (0x7FFFFFFF - bits).to(tl.int32)
    return tl.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).to(tl.float32, bitcast=True)


@triton.jit
def best_so_far(key_a, start_a, key_b, start_b):
    """Segmented minimum: a segment's start forgets what came before it."""
    return tl.where(start_b != 0, key_b, tl.minimum(key_a, key_b)), start_a | start_b


@triton.jit
def sort_keys(b_key, BLOCK: tl.constexpr, LOG2: tl.constexpr):
    """Distinct int64 keys in ascending order, by a bitonic network."""
    if LOG2 > 0:
        b_cube = tl.reshape(b_key, [2] * LOG2)
        for merge in tl.static_range(1, LOG2 + 1):
            # Runs of 2 ** merge keys ascend where that bit of the position is 0; the last run always does.
            if merge < LOG2:
                b_ascending = tl.reshape(tl.arange(0, 2), [1] * (LOG2 - 1 - merge) + [2] + [1] * merge) == 0
            else:
                b_ascending = tl.full([1] * LOG2, 1, tl.int1)
            for step in tl.static_range(merge):
                # The partner is what the pair's sum leaves: one reduction, exact because integer addition wraps.
                b_partner = tl.sum(b_cube, LOG2 - merge + step, keep_dims=True) - b_cube
                b_bit = tl.reshape(
                    tl.arange(0, 2), [1] * (LOG2 - merge + step) + [2] + [1] * (merge - 1 - step)
                )
                b_cube = tl.where((b_cube > b_partner) == ((b_bit != 0) != b_ascending), b_partner, b_cube)
        b_key = tl.reshape(b_cube, [BLOCK])
    return b_key


@triton.jit(
    do_not_specialize=(
        "k_value value value2 mask_id write_argument seed_value offset_value confidence batch depth".split()
    ),
    do_not_specialize_on_alignment=["k", "seed", "offset"],
)
def commit_kernel(
    tokens, argmax, sample, entropy, sample_prob, top1_prob, top2_prob, candidates,
    draft, history, finished,
    new_tokens, committed, num_committed, new_draft, new_history, new_finished,
    k, k_value: tl.int64, value, value2, mask_id: tl.int64, write_argument: tl.int64,
    seed, seed_value: tl.int64, offset, offset_value: tl.int64, confidence,
    k_stride, value_stride, value2_stride, batch: tl.int64, depth: tl.int32,
    MEASURE: tl.constexpr, SELECT: tl.constexpr, WRITE: tl.constexpr,
    STRICT: tl.constexpr, RELATIVE: tl.constexpr, INCLUSIVE: tl.constexpr, LAST_RANK_QUIRK: tl.constexpr,
    GUMBEL: tl.constexpr,
    VALUE_POINTER: tl.constexpr, VALUE2_POINTER: tl.constexpr, CONFIDENCE_POINTER: tl.constexpr,
    CANDIDATES: tl.constexpr, STATE: tl.constexpr, STOP: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
    LOG2: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    p_row = i_b * LENGTH
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < LENGTH

    row_k = tl.cast(int_parameter(k, k_value, i_b, k_stride), tl.int64)
    row_value = tl.cast(parameter(value, i_b, value_stride, VALUE_POINTER), tl.float32)
    row_value2 = tl.cast(parameter(value2, i_b, value2_stride, VALUE2_POINTER), tl.float32)
    row_seed = int_parameter(seed, seed_value, 0, 0)
    row_offset = int_parameter(offset, offset_value, 0, 0)

    # In order of position, [BLOCK].
    m_eligible = m_c
    if CANDIDATES:
        m_eligible &= tl.load(candidates + p_row + o_c, mask=m_c, other=0) != 0
    if STATE:
        was_finished = tl.load(finished + i_b) != 0
        m_eligible &= was_finished == 0

    if MEASURE == SAMPLE_PROB:
        b_score = tl.load(sample_prob + p_row + o_c, mask=m_c, other=0.0)
    elif MEASURE == TOP1_PROB:
        b_score = tl.load(top1_prob + p_row + o_c, mask=m_c, other=0.0)
    elif MEASURE == ENTROPY:
        b_score = -tl.load(entropy + p_row + o_c, mask=m_c, other=0.0)
    elif MEASURE == MARGIN:
        b_top1 = tl.load(top1_prob + p_row + o_c, mask=m_c, other=0.0)
        b_score = b_top1 - tl.load(top2_prob + p_row + o_c, mask=m_c, other=0.0)
    elif MEASURE == RANDOM:
        _, _, _, b_word = philox(row_seed, row_offset, p_row + o_c)
        b_score = uniform_from_word(b_word)
    else:
        tl.static_assert(MEASURE == POSITION)
        b_score = -o_c.to(tl.float32)
    if GUMBEL:
        _, _, _, b_word = philox(row_seed, row_offset, p_row + o_c)
        b_score = tl.div_rn(b_score, tl.zeros([BLOCK], tl.float32) + row_value2) + gumbel_noise(b_word)

    m_ranked = m_eligible
    if SELECT == EDIT:
        m_ranked = m_eligible & (tl.load(tokens + p_row + o_c, mask=m_c, other=0) == mask_id)
    b_key = (
        (tl.where(m_ranked, 0, 1).to(tl.int64) << 45) | (sortable(b_score) << 13) | (o_c.to(tl.int64) << 2)
    )
    if SELECT == HIERARCHY:
        # The best of a run has the smallest key of it, seen from both of its ends.
        b_break = tl.where(m_ranked, 0, 1)
        b_left, _ = tl.associative_scan((b_key, b_break), 0, best_so_far)
        b_right, _ = tl.associative_scan((b_key, b_break), 0, best_so_far, reverse=True)
        m_best = m_ranked & (b_key <= b_left) & (b_key <= b_right)
        b_key |= tl.where(m_best, 1, 0).to(tl.int64)
    b_key |= tl.where(m_eligible, 2, 0).to(tl.int64)

    # In order of rank, [BLOCK] (of position where nothing asks for ranks). Lanes beyond the canvas hold the
    # largest positions and no eligible bit.
    if SELECT != BERNOULLI:
        b_key = sort_keys(b_key, BLOCK, LOG2)
    o_c = ((b_key >> 2) & 0x7FF).to(tl.int32)
    m_c = o_c < LENGTH
    m_ranked = (b_key >> 45) == 0
    m_eligible = (b_key & 2) != 0
    b_score = score_of((b_key >> 13) & 0xFFFFFFFF)
    b_rank = tl.arange(0, BLOCK) + 1
    count = tl.sum(m_ranked.to(tl.int32), 0)

    if SELECT == BERNOULLI:
        _, _, _, b_word = philox(row_seed, row_offset, p_row + o_c)
        m_taken = uniform_from_word(b_word) < row_value
    elif SELECT == TOP_K:
        m_taken = b_rank <= row_k
    elif (SELECT == THRESHOLD) or (SELECT == HIERARCHY) or (SELECT == EDIT):
        # The score is minus the entropy, and the value an entropy.
        threshold = -row_value if MEASURE == ENTROPY else row_value
        if RELATIVE:
            best = tl.sum(tl.where(b_rank == 1, b_score, 0.0), 0)
            threshold = tl.minimum(threshold, best - row_value2)
        if STRICT or (SELECT == HIERARCHY):
            m_taken = b_score > threshold
        else:
            m_taken = b_score >= threshold
        m_taken |= b_rank <= row_k
        if SELECT == HIERARCHY:
            m_taken |= ((b_key & 1) != 0) & (b_score > row_value2)
    elif SELECT == FACTOR:
        b_bar = 1.0 - tl.div_rn(tl.zeros([BLOCK], tl.float32) + row_value, (b_rank + 1).to(tl.float32))
        # A score of NaN does not hold, which `<` would not tell.
        m_fails = ((b_score >= b_bar) == 0) & (b_rank > 1) & (b_rank <= count)
        length = tl.min(tl.where(m_fails, b_rank - 1, count), 0)
        if LAST_RANK_QUIRK:
            length = tl.where(length == count - 1, count, length)
        m_taken = b_rank <= length
    else:
        tl.static_assert(SELECT == ENTROPY_BOUND)
        b_entropy = tl.load(entropy + p_row + o_c, mask=m_c & m_ranked, other=0.0).to(tl.float64)
        b_inclusive = tl.cumsum(b_entropy, 0)
        bound = row_value.to(tl.float64)
        if INCLUSIVE:
            m_taken = (b_inclusive < bound) | (b_rank == 1)
        else:
            # Shifted, not subtracted: infinity minus infinity would lose the row's end, and a sum its last bit.
            b_before = tl.gather(b_inclusive, tl.maximum(b_rank - 2, 0), 0)
            m_taken = tl.where(b_rank == 1, 0.0, b_before) <= bound

    m_committed = m_ranked & m_taken
    b_tokens = tl.load(tokens + p_row + o_c, mask=m_c, other=0)
    b_sample = tl.load(sample + p_row + o_c, mask=m_c, other=0)
    if SELECT == EDIT:
        m_committed |= m_eligible & (m_ranked == 0) & (b_sample != b_tokens) & (b_score > row_value2)

    b_rest = b_tokens
    if WRITE == REMASK:
        b_rest = tl.zeros([BLOCK], tl.int64) + write_argument
    elif WRITE == RENOISE:
        _, b_high, b_low, _ = philox(row_seed, row_offset, p_row + o_c)
        b_carry = (b_low.to(tl.int64) * write_argument) >> 32
        b_rest = (b_high.to(tl.int64) * write_argument + b_carry) >> 32
    b_new = tl.where(m_committed, b_sample, tl.where(m_eligible, b_rest, b_tokens))
    tl.store(new_tokens + p_row + o_c, b_new, mask=m_c)
    tl.store(committed + p_row + o_c, m_committed, mask=m_c)
    tl.store(num_committed + i_b, tl.sum(m_committed.to(tl.int64), 0))

    if STATE:
        o_c = tl.arange(0, BLOCK)
        m_c = o_c < LENGTH
        b_draft = tl.load(draft + p_row + o_c, mask=m_c, other=0)
        b_argmax = tl.load(argmax + p_row + o_c, mask=m_c, other=0)
        b_draft = tl.where(was_finished, b_draft, b_argmax)
        tl.store(new_draft + p_row + o_c, b_draft, mask=m_c)
        b_same = m_c
        for i_s in range(depth):
            p_slot = tl.cast(i_s, tl.int64) * batch * LENGTH + p_row
            b_old = tl.load(history + p_slot + o_c, mask=m_c, other=0)
            b_same &= b_old == b_draft
            if i_s > 0:
                tl.store(new_history + p_slot - batch * LENGTH + o_c, b_old, mask=m_c)
        if depth > 0:
            tl.store(new_history + (depth - 1).to(tl.int64) * batch * LENGTH + p_row + o_c, b_draft, mask=m_c)
        now_finished = was_finished
        if STOP:
            limit = tl.cast(parameter(confidence, 0, 0, CONFIDENCE_POINTER), tl.float32).to(tl.float64)
            b_entropy = tl.load(entropy + p_row + o_c, mask=m_c, other=0.0).to(tl.float64)
            mean = tl.sum(b_entropy, 0) / LENGTH
            stable = tl.sum(b_same.to(tl.int32), 0) == LENGTH
            now_finished |= stable & (mean < limit)
        tl.store(new_finished + i_b, now_finished)


def commit(call: CommitCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments, results and arithmetic: `reference.commit`. One launch; canvases of up to 1024 tokens."""
    call = call.contiguous()
    tokens, flags, state = call.tokens, call.flags, call.finished is not None
    batch, length = tokens.shape
    new_tokens = torch.empty_like(tokens)
    committed = tokens.new_empty(tokens.shape, dtype=torch.bool)
    num_committed = tokens.new_empty(batch)
    if state:
        new_state = tuple(torch.empty_like(tensor) for tensor in (call.draft, call.history, call.finished))
    else:
        new_state = (tokens.new_empty(0), tokens.new_empty(0), tokens.new_empty(0, dtype=torch.bool))
    if batch == 0 or length == 0:
        num_committed.zero_()
        if state:
            new_state[-1].copy_(call.finished)
        return new_tokens, committed, num_committed, *new_state

    k, k_value, k_stride = int_by_value(call.k)
    value_value, value_pointer, value_stride = by_value(call.value)
    value2_value, value2_pointer, value2_stride = by_value(call.value2)
    seed, seed_value, _ = int_by_value(call.seed)
    offset, offset_value, _ = int_by_value(call.offset)
    confidence_value, confidence_pointer, _ = by_value(call.confidence, 0.0)
    block = next_power_of_2(length)
    config = configs.select("commit", capability(tokens), block=block)
    with on_device(tokens):
        commit_kernel[(batch,)](
            tokens, call.argmax, call.sample, call.entropy, call.sample_prob, call.top1_prob, call.top2_prob,
            call.candidates, call.draft, call.history, call.finished,
            new_tokens, committed, num_committed, *new_state,
            k, k_value, value_value, value2_value, call.mask_id, call.write_argument, seed, seed_value,
            offset, offset_value, confidence_value,
            k_stride, value_stride, value2_stride, batch, call.history.shape[0] if state else 0,
            MEASURE=call.measure, SELECT=call.select, WRITE=call.write,
            STRICT=bool(flags & Flag.STRICT), RELATIVE=bool(flags & Flag.RELATIVE),
            INCLUSIVE=bool(flags & Flag.INCLUSIVE), LAST_RANK_QUIRK=bool(flags & Flag.LAST_RANK_QUIRK),
            GUMBEL=bool(flags & Flag.GUMBEL),
            VALUE_POINTER=value_pointer, VALUE2_POINTER=value2_pointer, CONFIDENCE_POINTER=confidence_pointer,
            CANDIDATES=call.candidates is not None, STATE=state, STOP=call.confidence is not None,
            LENGTH=length, BLOCK=block, LOG2=block.bit_length() - 1,
            **FUSED, num_warps=config["num_warps"],
        )  # fmt: skip
    return new_tokens, committed, num_committed, *new_state
