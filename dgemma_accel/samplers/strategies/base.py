"""What a strategy is: from the statistics of one block of logits to one `commit`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.commit import CommitResult, commit
from ...ops.row_stats import RowStats
from ..encoding import EncodedRule, Flag, Measure
from ..proposals import Proposal
from ..rules import Edit, EntropyBound, Rule
from ..writes import Remask

CONFIDENCES = ("untempered", "proposal")
SCHEDULES = ("masked", "block")


def even_count(masked: Tensor, steps: int, step: int | Tensor) -> Tensor:
    """k_s = floor(n / S) + [s < n mod S]: n positions spread evenly over S steps, the remainder first.

    Source: get_num_transfer_tokens of LLaDA's generate.py.

    Args:
        masked: n, int64 of any shape.
        steps: S >= 1.
        step: s in [0, S), an int or a 0-d tensor; a later step commits nothing more.
    """
    if not isinstance(step, Tensor) and step >= steps:
        return torch.zeros_like(masked)
    # Adding S - 1 - s carries over to the next multiple of S exactly where s is below the remainder.
    count = (masked + (steps - 1 - step)) // steps
    return torch.where(step < steps, count, 0) if isinstance(step, Tensor) else count


@dataclass
class BlockState:
    """What a sampler carries from step to step of one block. `MaskedDiffusionSampler.start` makes it, `step` moves it.

    step: number of steps taken so far.
    open: [B, C] bool, positions that belong to the sampler; the others were given and never change.
    masked_at_start: [B] int64.
    active: [B] bool, rows that still have something to decide.
    stuck: [B] bool, rows that ended although masks remain, or positions whose logits have no distribution, because
        no progress was possible.
    nfe: [B] int64, steps taken while the row was active: its function evaluations.
    committed: [B, C] bool, what the last step committed.
    most_steps: the block ends after this many steps in any case.
    seed, offset: the seed of the draws and the number of the next draw.
        A step that is recorded has 0-d tensors of its device for `step` and `offset`.
    memory: what the strategy itself remembers.
    tokens: [B, C], what the running step decides over; None before the first.
    """

    open: Tensor
    masked_at_start: Tensor
    active: Tensor
    stuck: Tensor
    nfe: Tensor
    committed: Tensor
    seed: Tensor
    most_steps: int
    offset: int | Tensor = 0
    step: int | Tensor = 0
    memory: dict[str, Any] = field(default_factory=dict)
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a strategy decides from: one step of one block.

    tokens: [B, C] int64. valid: [B, C] bool, False where the logits have no distribution (NaN, +inf, or all -inf).
    masked: [B, C] bool, valid open mask tokens of active rows. owned: [B, C] bool, positions of active rows that
    the strategy may write where they are valid. stats: `RowStats` [B, C]. steps: evaluations per block.
    """

    tokens: Tensor
    valid: Tensor
    masked: Tensor
    owned: Tensor
    stats: RowStats
    state: BlockState
    steps: int
    schedule: str
    mask_id: int
    vocab_size: int
    backend: str

    @cached_property
    def open(self) -> Tensor:
        """[B, C] bool, valid positions of active rows that the strategy may write."""
        return self.owned & self.valid

    @property
    def number(self) -> int | Tensor:
        """The number of this step in its block, from 0; a 0-d tensor where the step is recorded."""
        return self.state.step

    def even_count(self) -> Tensor:
        """k of this step [B] by the even schedule over the positions masked at the start, or over the whole block."""
        total = self.state.masked_at_start
        if self.schedule == "block":
            total = torch.full_like(total, self.tokens.shape[1])
        return even_count(total, self.steps, self.number)

    def commit(
        self, rule: Rule, write=None, candidates: Tensor | None = None, tokens=None, **kwargs
    ) -> CommitResult:
        """`commit` of this step: masked positions are the candidates and what is not committed is masked again.

        Candidates that are given lose those whose logits have no distribution.
        """
        return commit(
            self.tokens if tokens is None else tokens,
            self.stats,
            rule,
            Remask(self.mask_id) if write is None else write,
            candidates=self.masked if candidates is None else candidates & self.valid,
            seed=self.state.seed,
            offset=self.state.offset,
            backend=self.backend,
            **kwargs,
        )


class Strategy:
    """Base of the strategies. Each one maps the statistics of a step to a rule and a write of `commit`.

    A subclass is a frozen dataclass and defines `rule`, or `decide` where one rule does not say it all.

    scheduled: the number of commits follows the sampler's `steps`, so a block takes at most that many.
    confidence: where the statistics come from when the sampler does not say: "untempered" softmax(l) (LLaDA,
        Fast-dLLM, dInfer, SGLang), or the "proposal" distribution, tempered and filtered (Dream, SDAR,
        DiffusionGemma).
    repeats: if not scheduled, the decision depends on the proposals alone, so a greedy step that changes
        nothing would come again for ever.
    starts_from_noise: a block starts as random tokens of `noise`, not as masks.
    shortest_block: a block that is to be shorter is a mistake of the caller, unless it is all that was asked for.
    reads_statistics: False if the decision takes `stats.argmax` and `stats.sample` alone, and nothing else of the
        statistics.
    recordable: whether a GPU may record a step and replay it for the others (`MaskedDiffusionSampler.graph`): a step
        does the same whatever its number and the values of its tensors are, waits for none of them, and takes
        `Step.number` as a tensor; it writes nothing of its state but `memory`, which holds tensors that keep the names,
        shapes and dtypes of `start`; and strategies that are equal do the same. A class says so itself, or it is taken
        for False.
    """

    scheduled: ClassVar[bool] = False
    confidence: ClassVar[str] = "untempered"
    repeats: ClassVar[bool] = True
    starts_from_noise: ClassVar[bool] = False
    shortest_block: ClassVar[int] = 1
    reads_statistics: ClassVar[bool] = True
    recordable: ClassVar[bool] = False

    def check(self, block_length: int | None, steps: int | None, temperature) -> None:
        """Raise ValueError where the sampler's numbers make no sense for this strategy."""

    def check_proposal(self, proposal: Proposal) -> None:
        """Raise ValueError where the strategy cannot take proposals of this kind.

        A temperature that is a function of the step stands in `proposal` as 1.
        """

    def most_steps(self, masked: int, length: int, steps: int | None) -> int:
        """Steps after which a block of `length` with `masked` open masks ends in any case, if not scheduled.

        `steps` is what the sampler was given, and None stands for one step per mask. A step need not commit: a rule
        may pass all positions over, and a proposal may be the mask.
        """
        return masked if steps is None else steps

    def start(self, state: BlockState, tokens: Tensor) -> None:
        """Prepare `state.memory` at the start of a block."""

    def propose(self, step_logits: Tensor, state: BlockState, masked: Tensor, proposal) -> RowStats:
        """Statistics and proposals of the block's logits [B, C, V]; `proposal` is the sampler's `Proposal` for
        its rows."""
        return proposal.stats(step_logits, state.seed, state.offset)

    def rule(self, step: Step) -> Rule:
        """The rule of this step."""
        raise NotImplementedError(f"{type(self).__name__} has to define rule() or decide()")

    def decide(self, step: Step) -> CommitResult:
        """The decision of this step."""
        return step.commit(self.rule(step))

    def finished(self, step: Step, result: CommitResult) -> Tensor | None:
        """[B] bool: rows with nothing left to decide after this step. None: those without a mask to write."""
        return None

    def final_tokens(self, tokens: Tensor, state: BlockState) -> Tensor:
        """The block's text when it ends."""
        return tokens


@dataclass(frozen=True)
class EveryStep(Strategy):
    """A rule as a strategy: the same rule at every step; a missing k comes from the schedule."""

    fixed: Rule
    recordable = True

    @property
    def scheduled(self) -> bool:
        return getattr(self.fixed, "k", 0) is None

    @property
    def confidence(self) -> str:
        return "proposal" if isinstance(self.fixed, EntropyBound) else "untempered"

    @cached_property
    def _encoded(self) -> EncodedRule:
        return (dataclasses.replace(self.fixed, k=0) if self.scheduled else self.fixed).encode()

    @property
    def reads_statistics(self) -> bool:
        # The draw and the position are no statistics, and `commit` looks at no other where these rank.
        return self._encoded.measure not in (Measure.RANDOM, Measure.POSITION)

    @property
    def repeats(self) -> bool:
        encoded = self._encoded
        return encoded.measure != Measure.RANDOM and not encoded.flags & Flag.GUMBEL

    @property
    def shortest_block(self) -> int:
        k = getattr(self.fixed, "k", None)
        return k if isinstance(k, int) else 1

    def check(self, block_length: int | None, steps: int | None, temperature) -> None:
        k = getattr(self.fixed, "k", None)
        if not isinstance(k, int) or block_length is None:
            return
        if self.shortest_block > block_length:
            raise ValueError(f"k: {k} is more than the {block_length} positions of a block")
        if steps is not None and k * steps < block_length:
            raise ValueError(
                f"steps: {steps} steps of k = {k} cover {k * steps} of a block's {block_length} positions"
            )

    def rule(self, step: Step) -> Rule:
        return dataclasses.replace(self.fixed, k=step.even_count()) if self.scheduled else self.fixed


def as_strategy(strategy: Strategy | Rule) -> Strategy:
    """A strategy as it is; a rule as the strategy that applies it at every step."""
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, Edit):
        raise TypeError(
            "strategy: Edit decides over written tokens too; JointThresholdEdit is the strategy with it"
        )
    if isinstance(strategy, Rule):
        return EveryStep(strategy)
    raise TypeError(
        f"strategy: a samplers.Strategy such as LowConfidence(), or a samplers.Rule such as Threshold(0.9), "
        f"expected, got {type(strategy).__name__}"
    )
