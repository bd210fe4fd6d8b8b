"""What a sampler, a strategy, a proposal and a step refuse, when, and by which name."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from samplers_models import MASK, VOCAB

from dgemma_accel.samplers import (
    Bernoulli,
    BlockCausal,
    CreditThreshold,
    DInferThreshold,
    Entropy,
    FullSequence,
    HierarchyWithRemask,
    JointThresholdEdit,
    LowConfidence,
    MaskedDiffusionSampler,
    MaskgitPlus,
    MinimalTopK,
    PrefixCache,
    Proposal,
    SequentialWindow,
    Threshold,
    TopK,
)

LENGTH = 8
TOKENS = torch.full((1, LENGTH), MASK)
LOGITS = torch.randn(1, LENGTH, VOCAB)
LOGITS[..., MASK] = -9.0  # where the mask is proposed, a position stays open


def sampler_of(strategy=None, **options):
    return MaskedDiffusionSampler(
        strategy or LowConfidence(), **{"mask_id": MASK, "block_length": LENGTH, **options}
    )


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("value", [math.nan, -0.5, math.inf])
def test_temperatures_are_refused_with_and_without_filters(value, filters):
    for temperature in (value, torch.tensor(value), torch.tensor([value])):
        with pytest.raises(ValueError, match="^temperature: .*must be"):
            sampler_of(temperature=temperature, **filters)
        with pytest.raises(ValueError, match="^temperature: .*must be"):
            Proposal(temperature, **filters).stats(LOGITS, torch.tensor(1), 0)
        with pytest.raises(ValueError, match="^temperature: .*must be"):
            sampler_of(temperature=lambda *_, t=temperature: t, **filters).step(LOGITS, TOKENS)


def test_temperature_of_the_step_may_be_any_number():
    for value in (np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])):
        torch.manual_seed(0)
        ours = sampler_of(Threshold(0.1), temperature=lambda *_, t=value: t).step(LOGITS, TOKENS)
        torch.manual_seed(0)
        expected = sampler_of(Threshold(0.1), temperature=0.5).step(LOGITS, TOKENS)
        assert torch.equal(ours, expected)
    with pytest.raises(TypeError, match="temperature: a number or a tensor expected, got str"):
        sampler_of(temperature=lambda *_: "hot").step(LOGITS, TOKENS)


def steps_of(strategy, steps, **options):
    """Steps that a block takes whose proposal is always the mask."""
    logits = torch.zeros(1, LENGTH, VOCAB)
    logits[..., MASK] = 40.0
    sampler = sampler_of(strategy, steps=steps, **options)
    state, tokens = sampler.start(TOKENS, seed=0), TOKENS
    while state.active.any():
        tokens = sampler.step(logits, tokens, state)
    assert state.stuck.all()
    return int(state.nfe)


def test_steps_are_honoured_where_a_step_may_commit_nothing():
    assert steps_of(Bernoulli(0.0), 30) == 30
    assert steps_of(Bernoulli(0.5), 30) == 30
    assert steps_of(Threshold(1.0, min_count=0), 30, temperature=0.5) == 30
    assert steps_of(Threshold(0.5), 30, temperature=0.5) == 30
    assert steps_of(DInferThreshold(0.5), 30, temperature=0.5) == 30
    assert steps_of(CreditThreshold(0.5), 30) == 30
    # Greedy and without a draw the same step would come again.
    assert steps_of(Threshold(0.5), 30) == 1
    # Without a number: one step for each mask. The edits have a budget of their own.
    assert steps_of(Bernoulli(0.5), None) == LENGTH
    assert steps_of(JointThresholdEdit(edit_budget=3), 30) <= LENGTH + 3
    assert steps_of(Bernoulli(0.5), 3) == 3


def test_more_steps_than_masks_finish_what_fewer_would_leave():
    logits = torch.zeros(1, LENGTH, VOCAB)
    logits[..., 4] = 9.0
    for steps, done in ((None, False), (200, True)):
        sampler = sampler_of(Bernoulli(0.1), steps=steps)
        state, tokens = sampler.start(TOKENS, seed=0), TOKENS
        while state.active.any():
            tokens = sampler.step(logits, tokens, state)
        assert bool((tokens == 4).all()) is done
        assert bool(state.stuck) is not done


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sampler_of(eos_id=MASK), ValueError, "eos_id: must not be the mask"),
        (lambda: sampler_of(eos_id=(1, MASK)), ValueError, "eos_id: must not be the mask"),
        (lambda: sampler_of(pad_id=MASK), ValueError, "pad_id: must not be the mask"),
        (lambda: sampler_of(eos_id=-1), ValueError, "eos_id: a token id in"),
        (lambda: sampler_of(eos_id=[1, -1]), ValueError, "eos_id: a token id in"),
        (lambda: sampler_of(pad_id=-1), ValueError, "pad_id: a token id in"),
        (lambda: sampler_of(mask_id=2**31), ValueError, "mask_id: a token id in"),
        (lambda: sampler_of(mask_id=1.0), TypeError, "mask_id: a token id .* got float"),
        (lambda: sampler_of(mask_id=None), TypeError, "mask_id: a token id .* got NoneType"),
        (lambda: sampler_of(mask_id=True), TypeError, "mask_id: a token id .* got bool"),
        (lambda: sampler_of(eos_id="</s>"), TypeError, "eos_id: a token id .* got str"),
        (lambda: sampler_of(eos_id=[2.5]), TypeError, "eos_id: a token id .* got float"),
        (lambda: sampler_of(pad_id=1.5), TypeError, "pad_id: a token id .* got float"),
        (lambda: sampler_of(guidance_scale=math.inf), ValueError, r"guidance_scale: must be in \[0.0, inf\)"),
        (lambda: sampler_of(guidance_scale=torch.ones(1)), TypeError, "guidance_scale: .* got a tensor"),
        (lambda: sampler_of(steps=torch.ones(1).long()), TypeError, "steps: an int expected, got a tensor"),
        (lambda: sampler_of(block_length=torch.tensor(3)), TypeError, "block_length: .* got a tensor"),
        (lambda: sampler_of(top_k=torch.tensor([3])), TypeError, "top_k: an int expected, got a tensor"),
        (lambda: sampler_of(top_p=torch.tensor([0.3])), TypeError, "top_p: a number expected, got a tensor"),
        (lambda: sampler_of(temperature=torch.ones(1, 2)), ValueError, "temperature: .* got shape"),
        (lambda: sampler_of(temperature="hot"), TypeError, "temperature: .* got str"),
        (lambda: MaskgitPlus(torch.ones(1)), TypeError, "alg_temp: a number expected, got a tensor"),
        (lambda: MaskgitPlus(math.inf), ValueError, r"alg_temp: must be in \[0.0, inf\), got inf"),
        (lambda: MaskgitPlus(1e-40), ValueError, "alg_temp: must be in"),
        (lambda: MaskgitPlus(eps=0), ValueError, r"eps: must be in \(0.0, 1.0\], got 0"),
        (lambda: CreditThreshold(alpha=math.inf), ValueError, r"alpha: must be in \[0.0, 1e\+30\], got inf"),
        (lambda: CreditThreshold(gamma=math.inf), ValueError, "gamma: must be in"),
        (lambda: CreditThreshold(alpha=torch.ones(1)), TypeError, "alpha: a number expected, got a tensor"),
        (lambda: HierarchyWithRemask(rho=torch.ones(1)), TypeError, "rho: a number expected, got a tensor"),
        (lambda: MinimalTopK(torch.tensor(2)), TypeError, "m: an int expected, got a tensor"),
        (lambda: sampler_of(softcap=-1.0), ValueError, "softcap: must be finite and in"),
        (lambda: sampler_of(softcap="30"), TypeError, "softcap: a number or None"),
        (lambda: sampler_of(backend="gpu"), ValueError, "backend: must be one of"),
        (lambda: sampler_of(CreditThreshold(), top_k=3), ValueError, "CreditThreshold has no filter"),
        (lambda: sampler_of(CreditThreshold(), top_p=0.5), ValueError, "CreditThreshold has no filter"),
        (
            lambda: sampler_of(CreditThreshold(), confidence="proposal", temperature=1.0),
            ValueError,
            "confidence: CreditThreshold takes 'untempered' only",
        ),
        (
            lambda: sampler_of(CreditThreshold(), confidence="proposal", temperature=lambda *_: 0.0),
            ValueError,
            "confidence: CreditThreshold takes 'untempered' only",
        ),
        (
            lambda: sampler_of(Entropy(epsilon=1e-3), confidence="untempered"),
            ValueError,
            "epsilon: Entropy takes it with confidence='proposal' only",
        ),
        (
            lambda: sampler_of(JointThresholdEdit(), temperature=lambda *_: 0.0),
            ValueError,
            "temperature: Joint",
        ),
        (
            lambda: sampler_of(JointThresholdEdit(), temperature=torch.tensor([0.0, 0.1])),
            ValueError,
            "temperature: Joint",
        ),
        (
            lambda: sampler_of().step(LOGITS, TOKENS, "x"),
            TypeError,
            "state: what start.. returned .* got str",
        ),
    ],
)
def test_what_is_refused_before_a_model_is_called(make, error, message):
    with pytest.raises(error, match=f"^.*{message}"):
        make()


def test_what_is_taken():
    sampler = sampler_of(mask_id=np.int64(MASK), eos_id=[np.int32(2), 3], pad_id=np.uint8(0))
    assert (sampler.mask_id, sampler.eos_ids, sampler.padding) == (MASK, (2, 3), 0)
    assert all(type(one) is int for one in (sampler.mask_id, *sampler.eos_ids, sampler.padding))
    for zero in (torch.tensor(0.0), torch.zeros(1)):
        sampler_of(JointThresholdEdit(), temperature=zero).step(LOGITS, TOKENS)
    sampler_of(CreditThreshold(), confidence="proposal", top_k=0, top_p=1.0).step(LOGITS, TOKENS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(2**63), r"k: must be in \[0, 9223372036854775807\], got 9223372036854775808"),
        (lambda: Threshold(0.5, min_count=2**70), r"min_count: must be in \[0, 9223372036854775807\]"),
        (
            lambda: JointThresholdEdit(penalty_lambda=1e300),
            r"penalty_lambda: must be in \[0.0, 3.40\d+e\+38\]",
        ),
        (
            lambda: sampler_of(temperature=1e300),
            r"temperature: must be in \[0.0, 3.40\d+e\+38\], got 1e\+300",
        ),
        (lambda: sampler_of(steps=10**30), r"steps: must be in \[1, 2147483647\], got 1000"),
        (lambda: sampler_of(block_length=2**40), r"block_length: must be in \[1, 2147483647\]"),
        (lambda: sampler_of(guidance_scale=10**400), r"guidance_scale: must be in \[0.0, 3.40"),
        (lambda: CreditThreshold(alpha=1e31), r"alpha: must be in \[0.0, 1e\+30\], got 1e\+31"),
    ],
)
def test_numbers_that_no_kernel_could_hold(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_numbers_of_numpy_are_numbers():
    sampler = sampler_of(
        Threshold(np.float32(0.5), min_count=np.int32(2)),
        block_length=np.int64(LENGTH),
        steps=np.int16(9),
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        top_p=np.float32(0.5),
        softcap=np.float32(30.0),
    )
    plain = sampler_of(
        Threshold(0.5, min_count=2), steps=9, temperature=0.5, top_k=5, top_p=0.5, softcap=30.0
    )
    # Held as Python's own, so that nothing that follows has to know.
    assert sampler == plain and type(sampler.block_length) is int and type(sampler.temperature) is float
    assert type(sampler.strategy.min_count) is int and type(sampler.strategy.tau) is float

    def model(tokens):
        return LOGITS[:, : tokens.shape[1]]

    ours = sampler.generate(model, [[1]], np.int64(5), seed=np.int64(3))
    assert torch.equal(ours.sequences, plain.generate(model, [[1]], 5, seed=3).sequences)
    for rule in (TopK(np.int64(2)), Threshold(np.float32(0.5)), Bernoulli(np.float64(0.5))):
        sampler_of(rule, steps=LENGTH).step(LOGITS, TOKENS)
    with pytest.raises(TypeError, match="k: an int or a tensor expected, got float32"):
        TopK(np.float32(2.0))
    with pytest.raises(TypeError, match="tau: a number or a tensor expected, got bool"):
        Threshold(np.bool_(True))


@pytest.mark.parametrize("strategy", [TopK(4), MinimalTopK(4)], ids=lambda s: type(s).__name__)
def test_a_text_may_be_shorter_than_what_a_step_commits(strategy):
    sampler = sampler_of(strategy, block_length=None)
    result = sampler.generate(lambda tokens: LOGITS[:, : tokens.shape[1]], [[1]], 2)
    assert result.nfe.tolist() == [1] and not result.stuck.any()
    with pytest.raises(ValueError, match="4 is more than the 2 positions of a block"):
        sampler_of(strategy, block_length=2)


def test_a_step_takes_one_temperature_for_each_row():
    for temperature in (torch.tensor([0.5, 0.5]), lambda *_: torch.tensor([0.5, 0.5])):
        for filters in ({}, {"top_k": 3}):
            with pytest.raises(ValueError, match="^temperature: one value per row is 1 values, got 2"):
                sampler_of(temperature=temperature, **filters).step(LOGITS, TOKENS)
    with pytest.raises(ValueError, match="^temperature: one value per row is 2 values, got 1"):
        sampler_of(temperature=torch.tensor([0.5])).step(LOGITS.expand(2, -1, -1), TOKENS.expand(2, -1))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda s: s.start(TOKENS, open=(TOKENS == MASK).to("meta")),
            "open: must be on cpu like tokens, got meta",
        ),
        (lambda s: s.step(LOGITS.to("meta"), TOKENS), "logits: must be on cpu like tokens, got meta"),
        (
            lambda s: s.step(LOGITS.to("meta"), TOKENS, s.start(TOKENS)),
            "logits: must be on cpu like tokens, got meta",
        ),
        (
            lambda s: s.step(LOGITS, TOKENS, replace(s.start(TOKENS), open=(TOKENS == MASK).to("meta"))),
            "state.open: must be on cpu like tokens, got meta",
        ),
        (
            lambda s: s.generate(lambda tokens: LOGITS[:, : tokens.shape[1]].to("meta"), [[1]], 4),
            "logits: must be on cpu like tokens, got meta",
        ),
    ],
)
def test_tensors_on_another_device(call, message):
    for sampler in (sampler_of(), sampler_of(temperature=0.5, top_p=0.9)):
        with pytest.raises(ValueError, match=f"^{message}"):
            call(sampler)


def test_tokens_of_a_step_are_a_tensor():
    state = sampler_of().start(TOKENS)
    for carried in (None, state):
        with pytest.raises(TypeError, match="^tokens: a torch.Tensor expected, got list"):
            sampler_of().step(LOGITS, TOKENS.tolist(), carried)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: sampler_of(top_k_first="no"), "top_k_first"),
        (lambda: SequentialWindow("no"), "overwrite"),
        (lambda: MaskgitPlus(batch_mean="no"), "batch_mean"),
        (lambda: HierarchyWithRemask(0.9, 0.4, 0.4, "no"), "reopen_given"),
        (lambda: FullSequence("2d"), "shift_logits"),
        (lambda: FullSequence(position_ids="no"), "position_ids"),
        (lambda: PrefixCache("no"), "shift_logits"),
        (lambda: BlockCausal("no"), "shift_logits"),
    ],
)
def test_a_word_is_no_bool(make, name):
    with pytest.raises(TypeError, match=f"^{name}: a bool expected, got str"):
        make()


def test_an_interface_is_an_object():
    for value in (FullSequence, "dream"):
        with pytest.raises(TypeError, match=r"interface: .* such as FullSequence\(\) expected, got"):
            sampler_of(interface=value)
