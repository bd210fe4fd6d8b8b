"""Strategies of dInfer's parallel decoders."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...ops.commit import CommitResult
from ...ops.row_stats import RowStats
from ..numbers import check_field, check_flag
from ..rules import Rule, RunBest, Threshold, TopK
from ..writes import Keep, Remask
from .base import BlockState, Step, Strategy

# Of credit, so that raised logits are fp32 numbers.
LARGEST_WEIGHT = 1e30


@dataclass(frozen=True)
class DInferThreshold(Strategy):
    """Masked positions whose proposal is not the mask itself, with c >= min(tau, best c - slack).

    So the best commits always, and what is within `slack` of it goes with it. A row in which every proposal
    is the mask ends with the flag `stuck` (dInfer's loop does not end).

    Args:
        tau: in [0, 1] (0.9 published).
        slack: >= 0 (1e-5 published).

    Source: get_transfer_index_threshold in dInfer's parallel_strategy.py.
    """

    tau: float = 0.9
    slack: float = 1e-5
    recordable = True

    def __post_init__(self) -> None:
        check_field(self, "tau", 0.0, 1.0)
        check_field(self, "slack", 0.0)

    def decide(self, step: Step) -> CommitResult:
        candidates = step.masked & (step.stats.sample != step.mask_id)
        return step.commit(Threshold(self.tau, slack=self.slack), candidates=candidates)


@dataclass(frozen=True)
class MinimalTopK(Strategy):
    """The m best always, others where c >= tau.

    m >= 1, tau in [0, 1].

    Source: get_transfer_index_cache (minimal_topk) in dInfer's parallel_strategy.py.
    """

    m: int = 1
    tau: float = 0.9
    recordable = True

    def __post_init__(self) -> None:
        check_field(self, "m", 1, integer=True)
        check_field(self, "tau", 0.0, 1.0)

    @property
    def shortest_block(self) -> int:
        return self.m

    def check(self, block_length: int | None, steps: int | None, temperature) -> None:
        if block_length is not None and self.shortest_block > block_length:
            raise ValueError(f"m: {self.m} is more than the {block_length} positions of a block")

    def rule(self, step: Step) -> Rule:
        return Threshold(self.tau, min_count=self.m)


@dataclass(frozen=True)
class CreditThreshold(DInferThreshold):
    """`DInferThreshold` on logits raised by the credit that a token gathered in earlier steps.

    Every step: C <- beta C; C[i, argmax_i] += p1_i ^ gamma at masked positions i; l' = l + alpha ln(1 + C); proposals
    and confidence come from l'. C starts at zero with each block.

    At most one entry of C per position and step is not zero, so C is kept as that list instead of a table of the
    vocabulary's size. At temperature 0 the statistics of l' follow from those of l and the list; the logits
    are read once and never copied.

    Args:
        tau, slack: as in `DInferThreshold`.
        alpha: weight of the credit, in [0, 1e30] (0.7 published).
        gamma: exponent of the probability, >= 0 (0.2 published).
        beta: decay, in [0, 1] (0.8 published).

    Source: CreditThresholdParallelDecoder in dInfer's parallel_strategy.py.
    """

    alpha: float = 0.7
    gamma: float = 0.2
    beta: float = 0.8
    repeats = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "alpha", 0.0, LARGEST_WEIGHT)
        check_field(self, "gamma", 0.0)
        check_field(self, "beta", 0.0, 1.0)

    def check_proposal(self, proposal) -> None:
        if proposal.filtered:
            raise ValueError("top_k, top_p: CreditThreshold has no filter")
        if proposal.confidence != "untempered" and not proposal.greedy:
            raise ValueError("confidence: CreditThreshold takes 'untempered' only")

    def start(self, state: BlockState, tokens: Tensor) -> None:
        state.memory["credit"] = _Credit(
            tokens.new_empty(*tokens.shape, 0), tokens.new_empty(*tokens.shape, 0, dtype=torch.float32)
        )

    def propose(self, step_logits: Tensor, state: BlockState, masked: Tensor, proposal) -> RowStats:
        plain = replace(proposal, temperature=0.0, confidence="untempered")
        base = plain.stats(step_logits, state.seed, state.offset)
        credit = state.memory["credit"].after_step(base, masked, self.gamma, self.beta)
        state.memory["credit"] = credit
        boost = self.alpha * torch.log1p(credit.values)
        if proposal.greedy:
            return _boosted_greedy(step_logits, base, credit.tokens, boost, proposal.softcap)
        # Drawn by inverting the CDF in vocabulary order, which needs the raised logits themselves.
        raised = step_logits.float()
        if proposal.softcap is not None:
            raised = proposal.softcap * torch.tanh(raised / proposal.softcap)
        raised = raised.scatter_add(-1, credit.tokens, boost)
        return replace(proposal, softcap=None).stats(raised, state.seed, state.offset)


@dataclass(frozen=True)
class _Credit:
    """The entries of the credit table that may differ from zero.

    tokens: [B, C, S] int64, distinct for each position as far as their value is not zero. values: [B, C, S] fp32.
    """

    tokens: Tensor
    values: Tensor

    def after_step(self, stats: RowStats, masked: Tensor, gamma: float, beta: float) -> _Credit:
        values = self.values * beta
        # Not where there is no distribution: 0 ^ 0 is 1.
        gain = torch.where(masked & ~stats.logsumexp.isnan(), stats.top1_prob.pow(gamma), 0.0)[..., None]
        top = stats.argmax[..., None]
        known = (self.tokens == top) & (values > 0)
        values = torch.where(known, values + gain, values)
        fresh = torch.where(known.any(-1, keepdim=True), 0.0, gain)
        return _Credit(torch.cat([self.tokens, top], -1), torch.cat([values, fresh], -1))


def _boosted_greedy(logits: Tensor, base: RowStats, tokens: Tensor, boost: Tensor, softcap) -> RowStats:
    """Argmax and its probability of logits raised at a few tokens, from the statistics of the plain logits.

    Raising can only move the argmax to a raised token, so the plain argmax and the raised ones are all there
    is to compare; the sum of powers grows by the raised tokens' own growth.
    """
    own = torch.cat([base.argmax[..., None], tokens], -1)
    x = logits.gather(-1, own).float()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    same = (tokens == base.argmax[..., None]) & (boost > 0)
    raised = x.clone()
    raised[..., 1:] += boost
    raised[..., 0] += torch.where(same, boost, 0.0).sum(-1)

    best = raised.amax(-1, keepdim=True)
    # Ties go to the lower token, as argmax has it.
    argmax = torch.where(raised == best, own, torch.iinfo(torch.int64).max).amin(-1)
    # All relative to the largest raised logit: by itself a power of the credit's weight would overflow.
    growth = torch.exp(raised[..., 1:] - best) - torch.exp(x[..., 1:] - best)
    total = torch.exp(base.logsumexp - best[..., 0]) + growth.sum(-1)
    logsumexp = best[..., 0] + torch.log(total)
    valid = ~base.logsumexp.isnan()
    # Rounding may leave the sum the least bit below its largest power, which is 1.
    probability = torch.where(valid, (1.0 / total).clamp_max(1.0), 0.0)
    argmax = torch.where(valid, argmax, 0)
    return base._replace(
        argmax=argmax, sample=argmax, logsumexp=logsumexp, top1_prob=probability, sample_prob=probability
    )


@dataclass(frozen=True)
class Hierarchy(Strategy):
    """The best of each run of adjacent masks if c > low, every c > tau, and the overall best.

    tau, low in [0, 1] (low 0.4 published). A tie inside a run goes to the lower position.

    Source: HierarchyDecoder in dInfer's parallel_strategy.py.
    """

    tau: float = 0.9
    low: float = 0.4
    recordable = True

    def __post_init__(self) -> None:
        check_field(self, "tau", 0.0, 1.0)
        check_field(self, "low", 0.0, 1.0)

    def rule(self, step: Step) -> Rule:
        return RunBest(self.tau, self.low)


@dataclass(frozen=True)
class HierarchyWithRemask(Hierarchy):
    """`Hierarchy` that takes back doubtful tokens: a written position with p(x0) < rho is open again.

    Over the masks and the r reopened positions: the best of each run if c > low, every c > tau, and then the
    best of what is left until r + 1 are committed. A reopened position that is not committed becomes a mask. So the
    number of masks falls at every step.

    Args:
        tau, low: as in `Hierarchy`.
        rho: in [0, 1] (0.4 published).
        reopen_given: repeat a quirk of the published code, which reopens prompt tokens in the block too.

    Source: get_transfer_index_hierarchy_remask in dInfer's parallel_strategy.py.
    """

    rho: float = 0.4
    reopen_given: bool = False
    recordable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "rho", 0.0, 1.0)
        check_flag(self, "reopen_given")

    def start(self, state: BlockState, tokens: Tensor) -> None:
        if self.reopen_given:
            state.open = torch.ones_like(state.open)

    def decide(self, step: Step) -> CommitResult:
        reopened = step.open & ~step.masked & (step.stats.sample_prob < self.rho)
        candidates = step.masked | reopened
        first = step.commit(RunBest(self.tau, self.low, min_count=0), write=Keep(), candidates=candidates)
        missing = (reopened.sum(-1) + 1 - first.num_committed).clamp_min(0)
        second = step.commit(
            TopK(missing),
            write=Remask(step.mask_id),
            candidates=candidates & ~first.committed,
            tokens=first.tokens,
        )
        return CommitResult(
            second.tokens, first.committed | second.committed, first.num_committed + second.num_committed
        )
