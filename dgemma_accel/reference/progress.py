"""Specification of `progress`: which rows of a block go on after a decision, and which are stuck."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class ProgressCall(NamedTuple):
    """The arguments of `progress`: of this function, of every backend's, and (with `backend`) of the op."""

    tokens: Tensor  # [B, C] int64, before the decision
    new_tokens: Tensor  # [B, C] int64, after it
    open: Tensor  # [B, C] bool, positions that the sampler may write
    entropy: Tensor  # [B, C] fp32, +inf where the logits have no distribution
    active: Tensor  # [B] bool
    stuck: Tensor  # [B] bool
    nfe: Tensor  # [B] int64
    finished: Tensor | None  # [B] bool, None: rows without a mask among their open positions
    mask_id: int
    noise: bool  # the block started from noise, so every open position is decided anew
    ends_unchanged: bool  # a step that changes nothing would come again
    last: bool  # no other step is allowed

    def contiguous(self) -> ProgressCall:
        """The call with a copy of every tensor that has gaps."""
        return ProgressCall(*(field.contiguous() if isinstance(field, Tensor) else field for field in self))


def progress(call: ProgressCall) -> tuple[Tensor, Tensor, Tensor]:
    """What a decision means for the rows of a block.

    An active row ends when it is finished, at the last step, or when no later step can do anything: it is unchanged,
    and either `ends_unchanged` or none of its positions that are left to decide has a distribution. It is stuck if it
    ends with something undecided: a mask, or from noise a position without a distribution.

    Returns:
        active [B] bool, stuck [B] bool, nfe [B] int64 (one more for the rows that were active).
    """
    valid = call.entropy != math.inf
    owned = call.open & call.active[:, None]
    masks_left = ((call.new_tokens == call.mask_id) & call.open).any(-1)
    unchanged = (call.new_tokens == call.tokens).all(-1)
    ended = ~masks_left if call.finished is None else call.finished
    if call.ends_unchanged:
        ended = ended | unchanged
    elif call.noise:
        ended = ended | (unchanged & ~(owned & valid).any(-1))
    else:
        decidable = (owned & valid & (call.tokens == call.mask_id)).any(-1)
        ended = ended | (unchanged & masks_left & ~decidable)
    ended = call.active if call.last else call.active & ended
    undecided = (owned & ~valid).any(-1) if call.noise else masks_left
    stuck = call.stuck | (ended & undecided)
    return call.active & ~ended, stuck, call.nfe + call.active
