"""Rules of `commit`: which positions are committed.

Every rule is a measure (how good a position is), a selection over the ranking by that measure, and a
few numbers. `encode()` gives that triple; it is all that a kernel sees, so rules with the same measure and
selection share one kernel. Numbers that may differ by row or change between steps without recompiling may
be tensors: a scalar, a 0-d tensor or one value per batch row [B].
"""

from __future__ import annotations

from dataclasses import dataclass

from .encoding import PROBABILITIES, EncodedRule, Flag, Measure, Select
from .numbers import PER_ROW, Number, check_field, check_flag


def _check_measure(measure: Measure, allowed: tuple[Measure, ...] = tuple(Measure)) -> None:
    if not isinstance(measure, Measure):
        raise TypeError(
            f"measure: a samplers.Measure such as Measure.SAMPLE_PROB expected, got {type(measure).__name__}"
        )
    if measure not in allowed:
        names = ", ".join(f"Measure.{one.name}" for one in allowed)
        raise ValueError(f"measure: must be one of {names}, which lie in [0, 1], got Measure.{measure.name}")


def _check_count(rule: Rule) -> None:
    if rule.k is not None:
        check_field(rule, "k", 0, integer=True, tensor=PER_ROW)


def _given_count(rule: Rule) -> Number:
    if rule.k is None:
        raise ValueError(
            f"k: {type(rule).__name__}() without k is a strategy, whose k a MaskedDiffusionSampler takes from its "
            "schedule; commit needs a number"
        )
    return rule.k


@dataclass(frozen=True)
class Rule:
    """Base of the rules; `encode()` is what `commit` runs."""

    def encode(self) -> EncodedRule:
        raise NotImplementedError(f"{type(self).__name__} has to define encode()")


@dataclass(frozen=True)
class TopK(Rule):
    """The k candidates of highest confidence.

    `low_confidence` remasking of LLaDA (generate.py) and Fast-dLLM, `low_confidence_static` of SDAR. k larger
    than the number of candidates commits all of them; k = 0 commits none.

    Args:
        k: >= 0, an int, 0-d tensor or [B].
        measure: what confidence means, a `Measure`; the probability of the proposed token by default.
        gumbel_temperature: None, or tau >= 1e-30 (a number, 0-d tensor or [B]): rank score / tau + Gumbel noise
            (Dream's `alg_temp`).
    """

    k: Number
    measure: Measure = Measure.SAMPLE_PROB
    gumbel_temperature: Number | None = None

    def __post_init__(self) -> None:
        check_field(self, "k", 0, integer=True, tensor=PER_ROW)
        _check_measure(self.measure)
        if self.gumbel_temperature is not None:
            check_field(self, "gumbel_temperature", 1e-30, tensor=PER_ROW)

    def encode(self) -> EncodedRule:
        if self.gumbel_temperature is None:
            return EncodedRule(self.measure, Select.TOP_K, k=self.k)
        return EncodedRule(self.measure, Select.TOP_K, Flag.GUMBEL, k=self.k, value2=self.gumbel_temperature)


@dataclass(frozen=True)
class Random(Rule):
    """k candidates chosen uniformly (LLaDA's `random` remasking). k as in `TopK`.

    As a strategy of `MaskedDiffusionSampler`, k = None takes k from the schedule of the step.
    """

    k: Number | None = None

    def __post_init__(self) -> None:
        _check_count(self)

    def encode(self) -> EncodedRule:
        return EncodedRule(Measure.RANDOM, Select.TOP_K, k=_given_count(self))


@dataclass(frozen=True)
class Margin(Rule):
    """The k candidates of largest top-1 minus top-2 probability. k as in `Random`.

    The measure of Dream's `topk_margin`; `samplers.TopkMargin` is that algorithm with its own schedule.
    """

    k: Number | None = None

    def __post_init__(self) -> None:
        _check_count(self)

    def encode(self) -> EncodedRule:
        return EncodedRule(Measure.MARGIN, Select.TOP_K, k=_given_count(self))


@dataclass(frozen=True)
class Sequential(Rule):
    """The first k candidates in reading order (SDAR's `sequential`). k as in `Random`."""

    k: Number | None = None

    def __post_init__(self) -> None:
        _check_count(self)

    def encode(self) -> EncodedRule:
        return EncodedRule(Measure.POSITION, Select.TOP_K, k=_given_count(self))


@dataclass(frozen=True)
class Threshold(Rule):
    """Every candidate of confidence >= tau, and the best `min_count` whatever their confidence.

    Fast-dLLM's threshold is the default (rank 1 always). `strict` compares with > (SGLang's LowConfidence).
    `slack` s replaces tau by min(tau, best confidence - s) (dInfer, s = 1e-5: near ties go together).
    `min_count` = k_s with `strict` is SDAR's `low_confidence_dynamic`; `min_count` = m dInfer's minimal top-k.

    Args:
        tau: in [0, 1], a number, 0-d tensor or [B].
        min_count: >= 0, an int, 0-d tensor or [B].
        slack: None, or >= 0: a number, 0-d tensor or [B].
        measure: a `Measure` in [0, 1]: SAMPLE_PROB, TOP1_PROB or MARGIN.
    """

    tau: Number
    min_count: Number = 1
    strict: bool = False
    slack: Number | None = None
    measure: Measure = Measure.SAMPLE_PROB

    def __post_init__(self) -> None:
        check_field(self, "tau", 0.0, 1.0, tensor=PER_ROW)
        check_field(self, "min_count", 0, integer=True, tensor=PER_ROW)
        check_flag(self, "strict")
        _check_measure(self.measure, PROBABILITIES)
        if self.slack is not None:
            check_field(self, "slack", 0.0, tensor=PER_ROW)

    def encode(self) -> EncodedRule:
        flags = Flag.STRICT if self.strict else Flag.NONE
        if self.slack is not None:
            flags |= Flag.RELATIVE
        slack = 0.0 if self.slack is None else self.slack
        return EncodedRule(
            self.measure, Select.THRESHOLD, flags, k=self.min_count, value=self.tau, value2=slack
        )


@dataclass(frozen=True)
class Factor(Rule):
    """The longest run of best ranks n with confidence c(n) >= 1 - f / (n + 1); rank 1 always (Fast-dLLM).

    The published code commits everything when only the last rank fails; `last_rank_quirk=True` repeats that.

    Args:
        f: >= 0, a number, 0-d tensor or [B].
        measure: as in `Threshold`.
    """

    f: Number
    last_rank_quirk: bool = False
    measure: Measure = Measure.SAMPLE_PROB

    def __post_init__(self) -> None:
        check_field(self, "f", 0.0, tensor=PER_ROW)
        check_flag(self, "last_rank_quirk")
        _check_measure(self.measure, PROBABILITIES)

    def encode(self) -> EncodedRule:
        flags = Flag.LAST_RANK_QUIRK if self.last_rank_quirk else Flag.NONE
        return EncodedRule(self.measure, Select.FACTOR, flags, value=self.f)


@dataclass(frozen=True)
class EntropyBound(Rule):
    """Candidates in order of rising entropy while the entropy of those before them sums to at most `bound`.

    At least one is always committed. DiffusionGemma's sampler (arXiv 2505.24857): I(tokens) is at most the
    exclusive sum. `inclusive=True` is SDAR's `entropy_bounded`: the inclusive sum stays below the bound,
    clamped to at least one.

    Args:
        bound: >= 0 in nats, a number, 0-d tensor or [B].
    """

    bound: Number
    inclusive: bool = False

    def __post_init__(self) -> None:
        check_field(self, "bound", 0.0, tensor=PER_ROW)
        check_flag(self, "inclusive")

    def encode(self) -> EncodedRule:
        flags = Flag.INCLUSIVE if self.inclusive else Flag.NONE
        return EncodedRule(Measure.ENTROPY, Select.ENTROPY_BOUND, flags, value=self.bound)


@dataclass(frozen=True)
class EntropyThreshold(Rule):
    """Every candidate whose entropy is below tau, and the `min_count` of least entropy whatever theirs is.

    d3LLM's `entropy_threshold` and SGLang's EntropyThreshold, which take tau = 0.95 and -sum p ln(p + 1e-8).

    Args:
        tau: >= 0 in nats, a number, 0-d tensor or [B].
        min_count: >= 0, an int, 0-d tensor or [B].
    """

    tau: Number = 0.95
    min_count: Number = 1

    def __post_init__(self) -> None:
        check_field(self, "tau", 0.0, tensor=PER_ROW)
        check_field(self, "min_count", 0, integer=True, tensor=PER_ROW)

    def encode(self) -> EncodedRule:
        return EncodedRule(Measure.ENTROPY, Select.THRESHOLD, Flag.STRICT, k=self.min_count, value=self.tau)


@dataclass(frozen=True)
class Bernoulli(Rule):
    """Each candidate independently with probability p (Dream's `origin`).

    Args:
        p: in [0, 1], a number, 0-d tensor or [B].
    """

    p: Number

    def __post_init__(self) -> None:
        check_field(self, "p", 0.0, 1.0, tensor=PER_ROW)

    def encode(self) -> EncodedRule:
        return EncodedRule(Measure.RANDOM, Select.BERNOULLI, value=self.p)


@dataclass(frozen=True)
class RunBest(Rule):
    """Every candidate above tau, the best of each run of adjacent candidates if above `low`, and the best
    `min_count` overall (dInfer's hierarchical decoding).

    Args:
        tau, low: in [0, 1], a number, 0-d tensor or [B].
        min_count: >= 0, an int, 0-d tensor or [B].
    """

    tau: Number
    low: Number = 0.4
    min_count: Number = 1

    def __post_init__(self) -> None:
        check_field(self, "tau", 0.0, 1.0, tensor=PER_ROW)
        check_field(self, "low", 0.0, 1.0, tensor=PER_ROW)
        check_field(self, "min_count", 0, integer=True, tensor=PER_ROW)

    def encode(self) -> EncodedRule:
        return EncodedRule(
            Measure.SAMPLE_PROB, Select.HIERARCHY, k=self.min_count, value=self.tau, value2=self.low
        )


@dataclass(frozen=True)
class Edit(Rule):
    """Mask tokens by strict threshold, other candidates where a confident proposal differs (SGLang JointThreshold).

    A candidate that holds `mask_id` is committed if its confidence is > tau, or if it is among the best `min_count`
    mask positions; any other candidate is rewritten if the proposal differs from its token and has
    confidence > tau_edit. Leave the prompt out of `candidates`. Use with `Keep()`: mask tokens that are not
    committed stay mask tokens.

    Args:
        tau, tau_edit: in [0, 1], a number, 0-d tensor or [B].
        mask_id: the mask token.
        min_count: >= 0, an int, 0-d tensor or [B].
    """

    tau: Number
    tau_edit: Number
    mask_id: int
    min_count: Number = 1

    def __post_init__(self) -> None:
        check_field(self, "tau", 0.0, 1.0, tensor=PER_ROW)
        check_field(self, "tau_edit", 0.0, 1.0, tensor=PER_ROW)
        check_field(self, "mask_id", 0, 2**31 - 1, integer=True)
        check_field(self, "min_count", 0, integer=True, tensor=PER_ROW)

    def encode(self) -> EncodedRule:
        return EncodedRule(
            Measure.SAMPLE_PROB,
            Select.EDIT,
            Flag.STRICT,
            k=self.min_count,
            value=self.tau,
            value2=self.tau_edit,
            mask_id=self.mask_id,
        )
