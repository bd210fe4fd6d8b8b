"""Strategies of SGLang's diffusion decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...ops.commit import CommitResult
from ...ops.row_stats import RowStats
from ...reference.row_stats import apply_softcap
from ..numbers import check_field
from ..rules import Edit, Rule, Threshold
from ..writes import Keep
from .base import BlockState, Step, Strategy


@dataclass(frozen=True)
class SGLangLowConfidence(Strategy):
    """Masked positions with c > tau, strictly; if there is none, the single best.

    tau in [0, 1] (0.95 published).

    Source: LowConfidence in SGLang's dllm/algorithm.
    """

    tau: float = 0.95
    recordable = True

    def __post_init__(self) -> None:
        check_field(self, "tau", 0.0, 1.0)

    def rule(self, step: Step) -> Rule:
        return Threshold(self.tau, min_count=1, strict=True)


@dataclass(frozen=True)
class JointThresholdEdit(Strategy):
    """Masks become tokens as in `SGLangLowConfidence`, and tokens already written may be edited.

    A written token is replaced where the proposal differs from it and p(x0) > tau_edit. What was given at the
    start of the block is never edited. A row ends when a step changes nothing, or when it has been without masks
    for more than `edit_budget` steps.

    Args:
        tau: in [0, 1].
        tau_edit: in [0, 1].
        edit_budget: steps without masks, >= 0.
        penalty_lambda: >= 0 logits. From each position's logits it is taken off the token that stands before it in
            the block (a mask counts as a token), against repetitions. 0, as published, costs nothing; more
            costs a copy of the block's logits.

    Source: JointThreshold in SGLang's dllm/algorithm (LLaDA 2.1).
    """

    tau: float = 0.5
    tau_edit: float = 0.0
    edit_budget: int = 16
    penalty_lambda: float = 0.0
    recordable = True

    def __post_init__(self) -> None:
        check_field(self, "tau", 0.0, 1.0)
        check_field(self, "tau_edit", 0.0, 1.0)
        check_field(self, "edit_budget", 0, integer=True)
        check_field(self, "penalty_lambda", 0.0)

    def propose(self, step_logits: Tensor, state: BlockState, masked: Tensor, proposal) -> RowStats:
        if not self.penalty_lambda:
            return super().propose(step_logits, state, masked, proposal)
        lowered = apply_softcap(step_logits, proposal.softcap)
        before = state.tokens[:, :-1, None]
        # A token that was given may have no logit to take anything off.
        index = before.clamp(0, lowered.shape[-1] - 1)
        less = lowered.new_full(before.shape, -self.penalty_lambda).masked_fill(index != before, 0.0)
        lowered = torch.cat([lowered[:, :1], lowered[:, 1:].scatter_add(-1, index, less)], 1)
        return replace(proposal, softcap=None).stats(lowered, state.seed, state.offset)

    def check(self, block_length, steps, temperature) -> None:
        if not callable(temperature):
            zero = temperature == 0
            if bool(zero.all() if isinstance(zero, Tensor) else zero):
                return
        raise ValueError(
            "temperature: JointThresholdEdit edits until nothing changes, which needs temperature 0"
        )

    def most_steps(self, masked: int, length: int, steps: int | None) -> int:
        most = length + self.edit_budget
        return most if steps is None else min(most, steps)

    def start(self, state: BlockState, tokens: Tensor) -> None:
        state.memory["edits"] = torch.zeros_like(state.masked_at_start)

    def decide(self, step: Step) -> CommitResult:
        edits = step.state.memory["edits"]
        edits += step.state.active & ~step.masked.any(-1)
        candidates = step.open & (edits <= self.edit_budget)[:, None]
        return step.commit(Edit(self.tau, self.tau_edit, step.mask_id), write=Keep(), candidates=candidates)

    def finished(self, step: Step, result: CommitResult) -> Tensor:
        return result.num_committed == 0
