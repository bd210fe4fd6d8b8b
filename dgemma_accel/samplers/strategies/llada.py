"""Strategies of LLaDA and of SDAR's block diffusion; `Random`, `Sequential` and `EntropyBound` are rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ops.commit import CommitResult
from ..numbers import check_field, check_flag
from ..rules import Rule, Sequential, Threshold, TopK
from ..writes import Keep
from .base import Step, Strategy


@dataclass(frozen=True)
class LowConfidence(Strategy):
    """The k_s most confident masked positions, c = p(x0).

    k_s = floor(n / S) + [s < n mod S] with n masked positions at the start of the block and S steps. With
    the sampler's `schedule="block"`, n is the block's length: SDAR's `low_confidence_static`. k_s above the
    number of masked positions commits those (SDAR's code overwrites given tokens then).

    Source: `low_confidence` of LLaDA's generate.py, and of Fast-dLLM without a threshold.
    """

    scheduled = True
    recordable = True

    def rule(self, step: Step) -> Rule:
        return TopK(step.even_count())


@dataclass(frozen=True)
class LowConfidenceDynamic(Strategy):
    """H = {c > tau} if it holds at least k_s positions, else the k_s most confident.

    tau in [0, 1] (0.85 published). k_s as in `LowConfidence`; SDAR's own takes the sampler's `schedule="block"`.

    Source: `low_confidence_dynamic` of SDAR's generate.py.
    """

    tau: float = 0.85
    scheduled = True
    recordable = True
    confidence = "proposal"

    def __post_init__(self) -> None:
        check_field(self, "tau", 0.0, 1.0)

    def rule(self, step: Step) -> Rule:
        return Threshold(self.tau, min_count=step.even_count(), strict=True)


@dataclass(frozen=True)
class SequentialWindow(Strategy):
    """The masked positions among the k_s consecutive ones that begin at the first mask.

    Differs from `Sequential` only where given tokens stand between masks: they use up places of the window.

    overwrite: repeat a quirk of the published code, which replaces those given tokens by its proposals too.

    Source: `sequential` of SDAR's generate.py.
    """

    overwrite: bool = False
    scheduled = True
    recordable = True
    reads_statistics = False
    confidence = "proposal"

    def __post_init__(self) -> None:
        check_flag(self, "overwrite")

    def decide(self, step: Step) -> CommitResult:
        positions = torch.arange(step.tokens.shape[1], device=step.tokens.device)
        length = step.tokens.shape[1]
        first = torch.where(step.masked, positions, length).amin(-1, keepdim=True)
        window = (positions >= first) & (positions < first + step.even_count()[:, None])
        if not self.overwrite:
            window &= step.masked
        return step.commit(Sequential(length), write=Keep(), candidates=window)
