"""Logits without a distribution (NaN, +inf, or all -inf) are never decided, whatever the strategy."""

import math

import pytest
import torch

from dgemma_accel.backends import load
from dgemma_accel.samplers import (
    Bernoulli,
    BlockState,
    CreditThreshold,
    DInferThreshold,
    Entropy,
    EntropyBound,
    EntropyBoundRenoise,
    Factor,
    Hierarchy,
    HierarchyWithRemask,
    JointThresholdEdit,
    LowConfidence,
    LowConfidenceDynamic,
    Margin,
    MaskedDiffusionSampler,
    MaskgitPlus,
    MinimalTopK,
    Origin,
    Random,
    RunBest,
    Sequential,
    SequentialWindow,
    SGLangLowConfidence,
    Threshold,
    TopK,
    TopkMargin,
)

VOCAB, MASK, LENGTH = 13, 12, 8
# The position that is broken where one is.
BROKEN = 3

# strategy -> options of its sampler
STRATEGIES = {
    LowConfidence(): {},
    LowConfidenceDynamic(0.6): {},
    SequentialWindow(): {},
    SequentialWindow(overwrite=True): {},
    DInferThreshold(0.5): {},
    MinimalTopK(2, 0.5): {},
    CreditThreshold(0.5): {},
    CreditThreshold(0.5, gamma=0.0): {},
    Hierarchy(0.7, 0.3): {},
    HierarchyWithRemask(0.7, 0.3, 0.4): {},
    HierarchyWithRemask(0.7, 0.3, 0.4, reopen_given=True): {},
    Origin(): {},
    MaskgitPlus(): {},
    MaskgitPlus(0.4): {},
    TopkMargin(): {},
    Entropy(): {},
    Entropy(epsilon=1e-3): {},
    SGLangLowConfidence(0.5): {},
    JointThresholdEdit(0.5, 0.5): {},
    EntropyBoundRenoise(VOCAB): {"steps": 6},
    TopK(3): {},
    Random(): {},
    Random(2): {},
    Margin(): {},
    Sequential(): {},
    Sequential(3): {},
    Threshold(0.5): {},
    Threshold(0.5, min_count=0): {},
    Factor(1.0): {},
    Factor(1.0, last_rank_quirk=True): {},
    EntropyBound(0.1): {},
    EntropyBound(0.1, inclusive=True): {},
    Bernoulli(0.5): {"steps": 40},
    RunBest(0.7, 0.3): {},
}


def broken_row(kind):
    row = torch.zeros(VOCAB)
    if kind == "nan":
        row[:] = math.nan
    elif kind == "one nan":
        row[5] = math.nan
    elif kind == "all -inf":
        row[:] = -math.inf
    else:
        row[5] = math.inf
    return row


def model_of(positions, kind):
    """Certain of token i + 1 at place i, but for those positions."""

    def model(tokens):
        logits = torch.zeros(*tokens.shape, VOCAB)
        target = torch.arange(1, tokens.shape[1] + 1).expand_as(tokens)
        logits.scatter_(-1, target[..., None], 30.0)
        logits[:, positions] = broken_row(kind)
        return logits

    return model


def sampler_of(strategy, **options):
    options = {"mask_id": MASK, "block_length": LENGTH, **STRATEGIES.get(strategy, {}), **options}
    return MaskedDiffusionSampler(strategy, **options)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["nan", "one nan", "all -inf", "+inf"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_one_of_eight_positions(strategy, kind, temperature):
    if isinstance(strategy, JointThresholdEdit) and temperature:
        pytest.skip("greedy only")
    sampler = sampler_of(strategy, temperature=temperature)
    result = sampler.generate(model_of([BROKEN], kind), [[]], LENGTH, seed=1)
    expected = list(range(1, LENGTH + 1))
    expected[BROKEN] = MASK
    assert result.new_tokens.tolist() == [expected]
    assert result.stuck.tolist() == [True]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["nan", "one nan", "all -inf", "+inf"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_every_position(strategy, kind, temperature):
    """The row ends at once, and a row beside it that can go on does."""
    if isinstance(strategy, JointThresholdEdit) and temperature:
        pytest.skip("greedy only")
    whole, none = model_of([], kind), model_of(list(range(LENGTH)), kind)
    sampler = sampler_of(strategy, temperature=temperature, guidance_scale=0.0)
    tokens = torch.full((2, LENGTH), MASK)
    open_ = torch.ones_like(tokens, dtype=torch.bool)
    state, x, steps = sampler.start(tokens, open=open_, seed=1), tokens, 0
    while state.active.any():
        steps += 1
        x = sampler.step(torch.cat([none(x[:1]), whole(x[1:])]), x, state)
        assert not state.committed[0].any()
        assert not state.active[0]
    x = sampler.decider.final_tokens(x, state)
    assert x.tolist() == [[MASK] * LENGTH, list(range(1, LENGTH + 1))]
    assert state.stuck.tolist() == [True, False]
    assert state.nfe.tolist() == [1, steps]


def test_written_tokens_keep_what_they_have():
    """Strategies that look at written tokens again leave those alone whose logits break later."""

    def model(tokens):
        if bool((tokens[:, BROKEN] == MASK).any()):
            logits = model_of([], "nan")(tokens)
            # In doubt about all others, so that there is a second step.
            keep = torch.arange(LENGTH) == BROKEN
            return torch.where(keep[:, None], logits, logits / 60)
        return model_of([BROKEN], "nan")(tokens)

    for strategy in (HierarchyWithRemask(0.9, 0.8, 0.4), JointThresholdEdit(0.9, 0.1)):
        result = sampler_of(strategy).generate(model, [[]], LENGTH)
        assert result.new_tokens.tolist() == [list(range(1, LENGTH + 1))]
        assert not result.stuck.any()


@pytest.mark.parametrize("name", ["reference", "cpp", "triton"])
@pytest.mark.parametrize(
    "strategy", [LowConfidence(), Random(), DInferThreshold(0.5), CreditThreshold(0.5)], ids=repr
)
def test_backends(strategy, name):
    for op in ("row_stats", "commit"):
        implementation, reason = load(op, name)
        if implementation is None:
            pytest.skip(reason)
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    tokens = torch.full((1, LENGTH), MASK, device=device)
    sampler = sampler_of(strategy, backend=name)
    for kind in ("one nan", "all -inf", "+inf"):
        state, x = sampler.start(tokens, seed=1), tokens
        while state.active.any():
            x = sampler.step(model_of([BROKEN], kind)(x.cpu()).to(device), x, state)
        assert x[0].tolist() == [1, 2, 3, MASK, 5, 6, 7, 8]
        assert state.stuck.tolist() == [True]


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("confidence", ["untempered", "proposal"])
@pytest.mark.parametrize("temperature", [1e-45, torch.tensor(1e-45), torch.tensor([1e-45])], ids=repr)
def test_temperatures_that_fp32_cannot_divide_by(temperature, confidence, filters, name):
    """Such a step takes the argmax or decides nothing; it takes no other token."""
    sampler = sampler_of(
        Threshold(0.5), temperature=temperature, confidence=confidence, backend=name, **filters
    )
    result = sampler.generate(model_of([], "nan"), [[]], LENGTH, seed=1)
    decided = result.new_tokens != MASK
    assert torch.equal(result.new_tokens[decided], torch.arange(1, LENGTH + 1).expand(1, -1)[decided])
    assert result.stuck.tolist() == [not bool(decided.all())]


def test_guidance():
    """Broken logits of either half leave none."""

    def model(tokens):
        logits = model_of([], "nan")(tokens)
        logits[0, 1 + 2] = math.nan
        logits[1, 1 + 5] = math.nan
        return logits

    sampler = sampler_of(Threshold(0.5), guidance_scale=1.0)
    result = sampler.generate(model, [[1]], LENGTH)
    assert (result.new_tokens == MASK).nonzero()[:, 1].tolist() == [2, 5]
    assert result.stuck.tolist() == [True]


@pytest.mark.parametrize("temperature", [0.0, 0.7, "by row", "by step"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_a_step_on_a_device_waits_for_nothing(strategy, temperature):
    """Reading a value of the "meta" device fails, as waiting for a GPU does not."""
    if isinstance(strategy, JointThresholdEdit) and temperature != 0.0:
        pytest.skip("greedy only")
    if isinstance(strategy, Entropy) and strategy.epsilon:
        pytest.skip("goes over the rows by number")
    if isinstance(temperature, str):
        by_row = torch.full((2,), 0.5, device="meta")
        temperature = {"by row": by_row, "by step": lambda *_: 0.3}[temperature]
    tokens = torch.full((2, LENGTH), MASK, device="meta")
    count = torch.zeros(2, dtype=torch.int64, device="meta")
    sampler = sampler_of(strategy, temperature=temperature)
    state = BlockState(
        open=tokens == MASK,
        masked_at_start=count,
        active=count == 0,
        stuck=count != 0,
        nfe=count,
        committed=tokens != MASK,
        seed=torch.tensor(1),
        most_steps=3,
    )
    sampler.decider.start(state, tokens)
    for _ in range(3):
        tokens = sampler.step(torch.empty(2, LENGTH, VOCAB, device="meta"), tokens, state)
    assert tokens.is_meta and state.stuck.is_meta
