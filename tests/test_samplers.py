"""Strategies against literal statements of the published algorithms, decision by decision, on a toy model."""

import math
from functools import partial

import pytest
import samplers_literal as literal
import torch

from dgemma_accel.samplers import (
    CreditThreshold,
    DInferThreshold,
    Edit,
    Entropy,
    EntropyBound,
    EntropyBoundRenoise,
    EntropyThreshold,
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
    Proposal,
    Random,
    Sequential,
    SequentialWindow,
    SGLangLowConfidence,
    Threshold,
    TopK,
    TopkMargin,
)

VOCAB, MASK, LENGTH, BATCH = 11, 10, 8, 32


class Toy(torch.nn.Module):
    """A bidirectional toy: neighbours and the mean decide. Positions in like surroundings tie exactly.

    Token 3 is ruled out by -inf. `mask_bias` lets the model propose the mask itself now and then.
    """

    def __init__(self, seed, sharpness=3.0, mask_bias=-20.0, positions=True):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCAB, 12, generator=generator)
        self.place = torch.randn(64, 12, generator=generator) * (0.8 if positions else 0.0)
        self.head = torch.randn(12, VOCAB, generator=generator) * sharpness * 0.5
        self.bias = torch.zeros(VOCAB)
        self.bias[MASK] = mask_bias
        self.bias[3] = float("-inf")

    def forward(self, tokens, attention_mask=None):
        keep = torch.ones_like(tokens) if attention_mask is None else attention_mask
        h = self.embedding[tokens] * keep[..., None]
        left, right = h.roll(1, 1), h.roll(-1, 1)
        left[:, 0], right[:, -1] = 0, 0
        mean = h.sum(1, keepdim=True) / keep.sum(1)[:, None, None]
        # Counted from the end, so that padding on the left shifts nothing.
        place = self.place[: tokens.shape[1]].flip(0)
        logits = torch.tanh(0.4 * h + 0.7 * left + 0.5 * right + mean + place) @ self.head + self.bias
        # A matrix product rounds by its tiling; on a grid, like surroundings give like logits.
        return (logits * 256).round() / 256


MODELS = {
    "flat": partial(Toy, sharpness=1.0),
    # Sharper still, and confidences so near 1 that fp32 ties them would meet fp64 ones that it does not.
    "peaky": partial(Toy, sharpness=4.0),
    "ties": partial(Toy, positions=False),
    "proposes_mask": partial(Toy, mask_bias=1.5),
    "only_mask": partial(Toy, mask_bias=60.0),
}

dream_options = {"confidence": "proposal", "scheduled": True}
# strategy -> (its literal statement, the options of the literal loop)
CASES = {
    "low_confidence": (LowConfidence(), literal.low_confidence, {"scheduled": True}),
    "random": (Random(), literal.random_order, {"scheduled": True}),
    "margin": (Margin(), literal.margin, {"scheduled": True}),
    "sequential": (Sequential(), literal.sequential, {"scheduled": True}),
    "window": (SequentialWindow(), literal.sequential_window, {"scheduled": True, "schedule": "block"}),
    "window_overwrite": (
        SequentialWindow(overwrite=True),
        partial(literal.sequential_window, overwrite=True),
        {"scheduled": True, "schedule": "block"},
    ),
    "static_sdar": (
        LowConfidence(),
        literal.low_confidence,
        {"scheduled": True, "schedule": "block", "confidence": "proposal"},
    ),
    "dynamic": (
        LowConfidenceDynamic(0.6),
        partial(literal.dynamic, tau=0.6),
        {"scheduled": True, "schedule": "block", "confidence": "proposal"},
    ),
    "threshold": (Threshold(0.5), partial(literal.threshold, tau=0.5), {}),
    "minimal_top_k": (MinimalTopK(2, 0.6), partial(literal.threshold, tau=0.6, m=2), {}),
    "sglang": (SGLangLowConfidence(0.4), partial(literal.sglang_threshold, tau=0.4), {}),
    "dinfer": (DInferThreshold(0.5), partial(literal.dinfer_threshold, tau=0.5), {}),
    "credit": (CreditThreshold(0.5), partial(literal.dinfer_threshold, tau=0.5), {"credit": True}),
    "factor": (Factor(1.2), partial(literal.factor, f=1.2), {}),
    "factor_quirk": (Factor(1.2, last_rank_quirk=True), partial(literal.factor, f=1.2, quirk=True), {}),
    "entropy_bound": (
        EntropyBound(1.5),
        partial(literal.entropy_bound, bound=1.5),
        {"confidence": "proposal"},
    ),
    "entropy_bounded": (
        EntropyBound(1.5, inclusive=True),
        partial(literal.entropy_bounded, gamma=1.5),
        {"confidence": "proposal"},
    ),
    "entropy_threshold": (EntropyThreshold(0.8), partial(literal.entropy_threshold, tau=0.8), {}),
    "hierarchy": (Hierarchy(0.7, 0.3), partial(literal.hierarchy, tau=0.7, low=0.3), {}),
    "hierarchy_remask": (
        HierarchyWithRemask(0.7, 0.3, 0.45),
        partial(literal.hierarchy_remask, tau=0.7, low=0.3, rho=0.45),
        {},
    ),
    "hierarchy_reopen_given": (
        HierarchyWithRemask(0.7, 0.3, 0.45, reopen_given=True),
        partial(literal.hierarchy_remask, tau=0.7, low=0.3, rho=0.45, given_too=True),
        {},
    ),
    "joint_threshold": (
        JointThresholdEdit(0.6, 0.5, edit_budget=5),
        partial(literal.joint_threshold, tau=0.6, tau_edit=0.5, budget=5),
        {"limit": LENGTH + 5, "ends": True},
    ),
    "origin": (Origin(), literal.origin, dream_options),
    "maskgit_plus": (MaskgitPlus(), lambda v: literal.dream(v, v.c), dream_options),
    "maskgit_alg_temp": (MaskgitPlus(0.4), lambda v: literal.dream(v, v.c, 0.4), dream_options),
    "topk_margin": (TopkMargin(), lambda v: literal.dream(v, literal.margin_of(v)), dream_options),
    "entropy": (Entropy(), partial(literal.dream_entropy, epsilon=0.0), dream_options),
    "entropy_epsilon": (Entropy(epsilon=0.02), partial(literal.dream_entropy, epsilon=0.02), dream_options),
}
literal.REOPENS_GIVEN.add(CASES["hierarchy_reopen_given"][1])


def blocks(generator):
    """Blocks of all kinds: whole, with given tokens before, between and after, and with nothing to decide."""
    tokens = torch.randint(0, MASK, (BATCH, LENGTH), generator=generator)
    share = torch.linspace(0, 1, BATCH)[:, None]
    masked = torch.rand(BATCH, LENGTH, generator=generator) < share
    masked[0] = False
    masked[-4:] = True
    return torch.where(masked, MASK, tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_algorithm(name, temperature):
    strategy, decide, options = CASES[name]
    if isinstance(strategy, JointThresholdEdit) and temperature:
        pytest.skip("greedy only")
    options = {"scheduled": False, "confidence": "untempered", "schedule": "masked", **options}
    decisions = 0
    for number, (kind, make) in enumerate(MODELS.items()):
        for round_ in range(3):
            model = make(7 * number + round_)
            generator = torch.Generator().manual_seed(100 * number + round_)
            tokens = blocks(generator)
            open_ = tokens == MASK
            steps = (3, LENGTH, 5)[round_]
            sampler = MaskedDiffusionSampler(
                strategy,
                mask_id=MASK,
                block_length=LENGTH,
                steps=steps if options["scheduled"] else None,
                temperature=temperature,
                confidence=options["confidence"],
                schedule=options["schedule"],
            )
            state = sampler.start(tokens, seed=5 + number, offset=round_)
            x = tokens
            while state.active.any():
                x = sampler.step(model(x), x, state)
            expected, nfe, stuck, offset = literal.run_block(
                decide,
                model,
                tokens,
                open_,
                mask_id=MASK,
                steps=steps,
                temperature=temperature,
                seed=5 + number,
                offset=round_,
                **options,
            )
            assert torch.equal(x, expected), f"{kind}: {(x != expected).any(-1).sum()} rows differ"
            assert state.nfe.tolist() == nfe
            assert state.stuck.tolist() == stuck
            assert state.offset == offset
            decisions += sum(nfe)
    assert decisions > 1000 * (1 + temperature) / 2


def test_parity_is_over_thousands_of_decisions_of_every_kind():
    """The cases above would be worth little if blocks ended at once or always the same way."""
    seen = {"stuck": 0, "done": 0, "long": 0}
    for number, make in enumerate(MODELS.values()):
        tokens = blocks(torch.Generator().manual_seed(number))
        sampler = MaskedDiffusionSampler(Threshold(0.5), mask_id=MASK, block_length=LENGTH)
        state = sampler.start(tokens)
        x, model = tokens, make(7 * number)
        while state.active.any():
            x = sampler.step(model(x), x, state)
        seen["stuck"] += int(state.stuck.sum())
        seen["done"] += int((~state.stuck).sum())
        seen["long"] += int((state.nfe >= 3).sum())
    assert min(seen.values()) >= 10, seen


def one_hot(tokens, vocab=VOCAB):
    """Logits that leave one token each: probability 1 and entropy 0, exactly."""
    logits = torch.full((*tokens.shape, vocab), float("-inf"))
    return logits.scatter(-1, tokens[..., None], 0.0)


def take(sampler, logits, tokens):
    return sampler.step(logits, tokens)


MASKED = torch.full((1, LENGTH), MASK)


def test_exact_ties_go_to_the_lower_position():
    logits = torch.zeros(1, LENGTH, VOCAB)
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=LENGTH, steps=4)
    assert (take(sampler, logits, MASKED) != MASK).tolist() == [[True, True] + [False] * 6]


def test_threshold_met_exactly_commits_and_strictly_does_not():
    target = torch.arange(LENGTH)[None]
    at = MaskedDiffusionSampler(Threshold(1.0), mask_id=MASK)
    assert torch.equal(take(at, one_hot(target), MASKED), target)
    strict = MaskedDiffusionSampler(Threshold(1.0, strict=True), mask_id=MASK)
    assert (take(strict, one_hot(target), MASKED) != MASK).sum() == 1


def test_entropy_exactly_at_the_bound():
    target = torch.arange(LENGTH)[None]
    logits = one_hot(target)
    logits[0, 3:] = torch.randn(LENGTH - 3, VOCAB)
    at = MaskedDiffusionSampler(EntropyBound(0.0), mask_id=MASK)
    # Three entropies of 0, and the first of the others: nothing stands before it either.
    assert (take(at, logits, MASKED) != MASK).sum() == 4
    inclusive = MaskedDiffusionSampler(EntropyBound(0.0, inclusive=True), mask_id=MASK)
    assert (take(inclusive, logits, MASKED) != MASK).sum() == 1


def test_factor_where_only_the_last_rank_fails():
    # Four candidates: three certain, one at chance.
    tokens = torch.tensor([[MASK, MASK, MASK, MASK]])
    logits = one_hot(torch.tensor([[1, 2, 4, 5]]))
    logits[0, 3] = 0.0
    intended = take(MaskedDiffusionSampler(Factor(1.0), mask_id=MASK), logits, tokens)
    quirk = take(MaskedDiffusionSampler(Factor(1.0, last_rank_quirk=True), mask_id=MASK), logits, tokens)
    assert intended.tolist() == [[1, 2, 4, MASK]]
    assert quirk.tolist() == [[1, 2, 4, 0]]


def test_rows_with_different_k():
    tokens = torch.randint(0, MASK, (4, LENGTH))
    for row, count in enumerate((0, 1, 5, 8)):
        tokens[row, LENGTH - count :] = MASK
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=LENGTH, steps=3)
    state = sampler.start(tokens)
    out = sampler.step(torch.randn(4, LENGTH, VOCAB), tokens, state)
    assert state.committed.sum(-1).tolist() == [0, 1, 2, 3]
    assert torch.equal(out[0], tokens[0])


def test_k_above_the_masked_positions_leaves_given_tokens_alone():
    tokens = torch.tensor([[1, 2, 4, 5, 6, 7, MASK, MASK]])
    logits = torch.randn(1, LENGTH, VOCAB)
    logits[..., MASK] = -50
    for strategy in (LowConfidence(), LowConfidenceDynamic(0.99), Sequential(), SequentialWindow(), Random()):
        sampler = MaskedDiffusionSampler(
            strategy, mask_id=MASK, block_length=LENGTH, steps=1, schedule="block"
        )
        out = take(sampler, logits, tokens)
        assert torch.equal(out[:, :6], tokens[:, :6])
        assert (out != MASK).all()


def test_every_proposal_is_the_mask():
    logits = torch.zeros(1, LENGTH, VOCAB)
    logits[..., MASK] = 9.0
    for strategy in (DInferThreshold(), CreditThreshold(), Threshold(0.9), Hierarchy(), LowConfidence()):
        sampler = MaskedDiffusionSampler(strategy, mask_id=MASK, block_length=LENGTH)
        result = sampler.generate(
            lambda x: torch.zeros(*x.shape, VOCAB).index_fill(-1, torch.tensor(MASK), 9.0), [[1]], LENGTH
        )
        assert result.stuck.tolist() == [True]
        assert (result.new_tokens == MASK).all()
        assert result.calls <= LENGTH


def test_positions_without_a_distribution_are_not_decided():
    logits = torch.randn(1, LENGTH, VOCAB)
    logits[..., MASK] = -50
    logits[0, 2] = float("-inf")
    logits[0, 5] = float("nan")
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=LENGTH)
    state, x, order = sampler.start(MASKED), MASKED, []
    while state.active.any():
        x = sampler.step(logits, x, state)
        order += state.committed.nonzero()[:, 1].tolist()
    assert sorted(order) == [0, 1, 3, 4, 6, 7]
    assert x[0, [2, 5]].tolist() == [MASK, MASK] and state.stuck.tolist() == [True]


def test_greedy_and_tempered_share_the_confidence():
    """Sampling tempered leaves the confidence untempered: p(x0) of softmax(l), whatever T."""
    logits = torch.randn(2, LENGTH, 257)
    for temperature in (0.0, 0.3, torch.tensor([0.0, 2.0])):
        sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=256, temperature=temperature)
        stats = sampler._proposal(0, LENGTH).stats(logits, torch.tensor(3), 1)
        p = torch.softmax(logits.double(), -1).gather(-1, stats.sample[..., None])[..., 0]
        torch.testing.assert_close(stats.sample_prob.double(), p, rtol=1e-5, atol=1e-8)
    assert torch.equal(stats.sample[0], logits[0].argmax(-1))


def test_dream_batch_mean_quirk():
    tokens = torch.tensor([[1, 2, 4, 5, 6, 7, 8, MASK], [MASK] * LENGTH])
    logits = torch.randn(2, LENGTH, VOCAB)
    logits[..., MASK] = -50
    numbers = {"mask_id": MASK, "block_length": LENGTH, "steps": 2}
    own, mean = (MaskedDiffusionSampler(MaskgitPlus(batch_mean=quirk), **numbers) for quirk in (False, True))
    # 1 - s/t is 0.4995 at the first of two steps: floor(1 * 0.4995) and floor(8 * 0.4995), or of 4.5 for both.
    for sampler, counts in ((own, [0, 3]), (mean, [1, 2])):
        state = sampler.start(tokens)
        sampler.step(logits, tokens, state)
        assert state.committed.sum(-1).tolist() == counts


def test_entropy_bound_renoise_is_the_diffusiongemma_step():
    published = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    length, vocab = 32, 101
    for round_ in range(20):
        logits = torch.randn(3, length, vocab) * 3
        tokens = torch.randint(vocab, (3, length))
        sampler = MaskedDiffusionSampler(
            EntropyBoundRenoise(vocab, bound=2.0), mask_id=0, block_length=length, temperature=0.7
        )
        state = sampler.start(tokens, open=torch.ones_like(tokens, dtype=torch.bool), seed=round_)
        out = sampler.step(logits, tokens, state)
        config = published.EntropyBoundSamplerConfig(entropy_bound=2.0)
        theirs = published.EntropyBoundSampler(config, length, vocab, 48)
        theirs.accept_canvas(tokens, out, logits / 0.7, 1)
        assert torch.equal(state.committed, theirs.accepted_token_mask)
        assert torch.equal(state.memory["draft"], logits.argmax(-1))
        assert ((out >= 0) & (out < vocab)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": 0.9}, "strategy"),
        ({"strategy": Edit(0.5, 0.5, MASK)}, "JointThresholdEdit is the strategy"),
        ({"mask_id": -1}, "mask_id"),
        ({"steps": 0}, "steps"),
        ({"block_length": 0}, "block_length"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"confidence": "tempered"}, "confidence"),
        ({"schedule": "cosine"}, "schedule"),
        ({"interface": "llada"}, "interface"),
        ({"strategy": TopK(9)}, "k: 9 is more than the 8"),
        ({"strategy": Margin(9)}, "k: 9 is more than the 8"),
        ({"strategy": MinimalTopK(9)}, "m: 9 is more than the 8"),
        ({"strategy": TopK(2), "steps": 3}, "3 steps of k = 2 cover 6 of a block's 8"),
        ({"strategy": JointThresholdEdit(), "temperature": 0.5}, "temperature"),
    ],
)
def test_bad_numbers(arguments, message):
    arguments = {"strategy": LowConfidence(), "mask_id": MASK, "block_length": LENGTH, **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        MaskedDiffusionSampler(**arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowConfidenceDynamic(1.2),
        lambda: SGLangLowConfidence(-0.1),
        lambda: EntropyThreshold(-0.5),
        lambda: JointThresholdEdit(edit_budget=-1),
        lambda: JointThresholdEdit(tau_edit=2),
        lambda: DInferThreshold(slack=-1e-5),
        lambda: MinimalTopK(0),
        lambda: CreditThreshold(beta=1.5),
        lambda: Hierarchy(low=2),
        lambda: HierarchyWithRemask(rho=-1),
        lambda: Origin(eps=0),
        lambda: MaskgitPlus(alg_temp=-1),
        lambda: Entropy(epsilon=-1),
        lambda: EntropyBoundRenoise(0),
        lambda: Random(-1),
    ],
)
def test_bad_parameters_of_strategies(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_bad_steps():
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=MASK, block_length=LENGTH)
    with pytest.raises(ValueError, match=r"mask_id: 10 is outside the vocabulary of the logits, \[0, 10\)"):
        sampler.step(torch.zeros(1, LENGTH, MASK), MASKED)
    with pytest.raises(ValueError, match="logits: shape must be"):
        sampler.step(torch.zeros(1, LENGTH - 1, VOCAB), MASKED)
    with pytest.raises(TypeError, match="logits"):
        sampler.step(torch.zeros(1, LENGTH, VOCAB, dtype=torch.int64), MASKED)
    with pytest.raises(ValueError, match="tokens"):
        sampler.start(MASKED[0])
    with pytest.raises(ValueError, match="CreditThreshold has no filter"):
        MaskedDiffusionSampler(CreditThreshold(), mask_id=MASK, top_k=3).step(
            torch.zeros(1, LENGTH, VOCAB), MASKED
        )


@pytest.mark.parametrize("alpha", [0.7, 20.0, 150.0, 400.0, 1e30])
def test_credit_of_any_weight(alpha):
    """Greedy: probabilities of the raised logits in fp64, from a table of credits."""
    gamma, beta = 0.2, 0.8
    logits = torch.randn(4, 1, 6, VOCAB) * 2
    logits[..., MASK] = -9.0
    logits[2, 0, 3] = -math.inf
    logits[2, 0, 3, 1] = 1.0
    strategy = CreditThreshold(0.0, slack=0.0, alpha=alpha, gamma=gamma, beta=beta)
    state = MaskedDiffusionSampler(strategy, mask_id=MASK, block_length=6).start(torch.full((1, 6), MASK))
    table = torch.zeros(6, VOCAB, dtype=torch.float64)
    for step in logits:
        p, top = step[0].double().softmax(-1).max(-1)
        table = (table * beta).scatter_add(-1, top[:, None], (p**gamma)[:, None])
        # As fp32 holds them: at the largest weights that is coarse.
        raised = (step[0].double() + (alpha * table.log1p()).float().double()).float().double()
        expected = raised.softmax(-1)
        stats = strategy.propose(step, state, torch.ones(1, 6, dtype=torch.bool), Proposal())
        chosen = expected.gather(-1, stats.sample[0, :, None])[:, 0]
        near = 1e-4 if alpha < 1e3 else 1.0
        assert torch.allclose(stats.sample_prob[0].double(), chosen, atol=near)
        assert (chosen >= expected.amax(-1) - near).all()
        assert stats.sample_prob.isfinite().all() and (stats.sample_prob <= 1).all()
