"""Strategies of Dream: time runs from 1 to `eps`, and each step moves the same share of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...ops.row_stats import RowStats
from ..encoding import Measure
from ..numbers import check_field, check_flag, check_number
from ..rules import Bernoulli, Rule, TopK
from .base import BlockState, Step, Strategy


@lru_cache(maxsize=64)
def _shares(steps: int, eps: float) -> tuple[float, ...]:
    """1 - s/t of every step in fp32, with t and s neighbours on linspace(1, eps, steps + 1); 1 at the last step."""
    # Kept for every later call, so whatever torch's defaults are at the first one must not show.
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32, device="cpu")
    return (*(1 - times[1:-1] / times[:-2]).tolist(), 1.0)


def _share(step: Step, eps: float) -> float | Tensor:
    """The share of the masks that this step commits."""
    shares, number = _shares(step.steps, eps), step.number
    if not isinstance(number, Tensor):
        return shares[min(number, step.steps - 1)]
    memory, name = step.state.memory, "shares"
    if name not in memory:
        # Kept with the recording that reads it, and made before it, when the step is run to warm up.
        memory[name] = torch.tensor(shares, dtype=torch.float32, device=number.device)
    return memory[name].index_select(0, number.clamp_max(step.steps - 1).reshape(1))[0]


def _count(step: Step, eps: float, batch_mean: bool) -> Tensor:
    """k = floor(n (1 - s/t)) of the masked positions n left, [B], in fp32 as published."""
    masked = step.masked.sum(-1)
    left = masked.float()
    if batch_mean:
        left = (masked.sum() / masked.shape[0]).expand_as(left)
    return (left * _share(step, eps)).long()


def _check(strategy) -> None:
    check_field(strategy, "eps", 0.0, 1.0, low_open=True)
    alg_temp = getattr(strategy, "alg_temp", None)
    if alg_temp is not None:
        check_field(strategy, "alg_temp", 0.0)
        # The least that `TopK` divides by.
        check_number("alg_temp", alg_temp or 1.0, 1e-30)


@dataclass(frozen=True)
class Origin(Strategy):
    """Each masked position independently with probability 1 - s/t; at the last step all.

    t and s are neighbours on linspace(1, eps, steps + 1). eps in (0, 1] (1e-3 published).

    Source: alg="origin" of Dream's generation_utils.py.
    """

    eps: float = 1e-3
    scheduled = True
    recordable = True
    reads_statistics = False
    confidence = "proposal"

    def __post_init__(self) -> None:
        _check(self)

    def rule(self, step: Step) -> Rule:
        return Bernoulli(_share(step, self.eps))


@dataclass(frozen=True)
class _TimedTopK(Strategy):
    alg_temp: float | None = None
    eps: float = 1e-3
    batch_mean: bool = False
    scheduled = True
    confidence = "proposal"

    def __post_init__(self) -> None:
        _check(self)
        check_flag(self, "batch_mean")

    def rule(self, step: Step) -> Rule:
        return TopK(
            _count(step, self.eps, self.batch_mean),
            measure=self.measure,
            gumbel_temperature=self.alg_temp or None,
        )


@dataclass(frozen=True)
class MaskgitPlus(_TimedTopK):
    """The k positions of largest c = p(x0), k = floor(n (1 - s/t)) of the n masks left; at the last step all.

    Args:
        alg_temp: None or 0 ranks by c; more draws k positions without replacement from softmax(c / alg_temp),
            as a top-k of c / alg_temp + Gumbel noise.
        eps: in (0, 1], the end of time.
        batch_mean: repeat a quirk of the published code: n is the mean over the batch, so one row's k
            depends on the others. (Where that exceeds a row's masks, published code overwrites given
            tokens with masks; here it commits all that the row has.)

    Source: alg="maskgit_plus" of Dream's generation_utils.py.
    """

    measure = Measure.SAMPLE_PROB
    recordable = True


@dataclass(frozen=True)
class TopkMargin(_TimedTopK):
    """As `MaskgitPlus`, with c = p1 - p2, the margin between the two most probable tokens.

    Source: alg="topk_margin" of Dream's generation_utils.py.
    """

    measure = Measure.MARGIN
    recordable = True


@dataclass(frozen=True)
class Entropy(_TimedTopK):
    """As `MaskgitPlus`, with c = sum p ln p, minus the entropy.

    epsilon: 0 for the entropy itself, which `row_stats` has; more for sum p ln(p + epsilon) (published: 1e-10, to
        keep the logarithm finite), which costs another pass and differs by at most V * epsilon.

    Source: alg="entropy" of Dream's generation_utils.py.
    """

    epsilon: float = 0.0
    measure = Measure.ENTROPY
    recordable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "epsilon", 0.0)

    def check_proposal(self, proposal) -> None:
        if self.epsilon and proposal.confidence != "proposal":
            raise ValueError("epsilon: Entropy takes it with confidence='proposal' only")

    def propose(self, step_logits: Tensor, state: BlockState, masked: Tensor, proposal) -> RowStats:
        stats = super().propose(step_logits, state, masked, proposal)
        if not self.epsilon:
            return stats
        entropy = stats.entropy.clone()
        for rows, x in proposal.filtered_chunks(step_logits):
            p = torch.softmax(x, -1)
            entropy.view(-1)[rows] = -(p * torch.log(p + self.epsilon)).sum(-1)
        return stats._replace(entropy=torch.where(stats.entropy.isinf(), stats.entropy, entropy))
