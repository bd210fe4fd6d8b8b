"""Top-k and top-p proposals: draws against fp64 and published filters, and no sort of the vocabulary."""

import math

import pytest
import samplers_literal as literal
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dgemma_accel.backends import BackendError
from dgemma_accel.reference.philox import WORD_SAMPLE, random_words, uniform_from_word
from dgemma_accel.samplers import (
    Entropy,
    LowConfidence,
    MaskedDiffusionSampler,
    Proposal,
    Threshold,
    proposals,
)

SEED = torch.tensor(11)


def rows_of(vocab, kind, rows=6):
    x = torch.randn(rows, vocab)
    if kind == "peaky":
        x = x * 6
    if kind == "flat":
        x = x * 1e-3
    if kind == "ties":
        x = (x * 2).round() / 2
    if kind == "banned":
        x[torch.rand_like(x) < 0.7] = -math.inf
        x[:, 0] = 0.5
    return x


def test_tied_tokens_are_kept_or_dropped_together():
    x = torch.log(torch.tensor([[[0.4, 0.2, 0.2, 0.2]]]))

    def most_probable(**filters):
        return float(Proposal(1.0, **filters, confidence="proposal").stats(x, SEED, 0).top1_prob)

    # The mass before each of the three is 0.4: all of them from 0.4 on, none below.
    assert most_probable(top_p=0.41) == pytest.approx(0.4) and most_probable(top_p=0.39) == 1.0
    # And the third largest is as large as the second: all stay.
    assert most_probable(top_k=2) == pytest.approx(0.4) and most_probable(top_k=1) == 1.0


@pytest.mark.parametrize("confidence", ["proposal", "untempered"])
@pytest.mark.parametrize(("k", "p"), [(5, None), (None, 0.8), (7, 0.8), (40, 0.3)])
@pytest.mark.parametrize("k_first", [False, True])
def test_draws_equal_the_published_filters(k, p, k_first, confidence):
    shape, vocab, temperature = (4, 16), 61, 0.7
    logits = torch.randn(*shape, vocab) * 2
    proposal = Proposal(temperature, k, p, k_first, confidence)
    stats = proposal.stats(logits, SEED, 3)
    words = random_words(SEED, torch.tensor(3), torch.arange(64))
    uniform = uniform_from_word(words[WORD_SAMPLE]).tolist()
    plain = torch.softmax(logits.double(), -1).reshape(-1, vocab)
    for row, x in enumerate(logits.double().reshape(-1, vocab)):
        cut = literal.filtered(x, temperature, k, p, k_first)
        token = literal.draw(cut, uniform[row])
        assert int(stats.sample.flatten()[row]) == token
        q = plain[row] if confidence == "untempered" else torch.softmax(cut, -1)
        assert float(stats.sample_prob.flatten()[row]) == pytest.approx(float(q[token]), rel=1e-5)
        assert float(stats.top1_prob.flatten()[row]) == pytest.approx(float(q.max()), rel=1e-5)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.9])
def test_ties_at_the_kth_that_are_no_candidates_are_part_of_the_mass(p):
    """SDAR's order: what top-k keeps, ties included, is what top-p counts."""
    vocab, k = 4608, 7
    x = torch.zeros(1, 1, vocab)
    x[..., [100, 2000, 4000]] = 4.7
    stats = Proposal(1.0, k, p, True, "proposal").stats(x, SEED, 0)
    # The three hold 0.067 of the mass, and all others tie at the seventh place.
    kept = 3 if p < 0.067 else vocab
    q = torch.softmax(x[0, 0].double().topk(kept).values, -1)
    assert float(stats.entropy) == pytest.approx(float(torch.special.entr(q).sum()), rel=1e-5)
    assert float(stats.top1_prob) == pytest.approx(float(q[0]), rel=1e-5)


def test_filters_of_a_greedy_proposal_change_its_confidence_only():
    logits = torch.randn(2, 5, 61)
    stats = Proposal(0.0, 3, None, confidence="proposal").stats(logits, SEED, 0)
    assert torch.equal(stats.sample, logits.argmax(-1))
    top = logits.topk(3).values.softmax(-1)[..., 0]
    torch.testing.assert_close(stats.sample_prob, top)


def test_temperature_by_row():
    logits = torch.randn(3, 4, 61)
    temperature = torch.tensor([0.0, 0.5, 2.0])
    stats = Proposal(temperature, 9, 0.9, confidence="proposal").stats(logits, SEED, 0)
    assert torch.equal(stats.sample[0], logits[0].argmax(-1))
    for row in (1, 2):
        x = literal.filtered(logits[row, 0].double(), float(temperature[row]), 9, 0.9)
        q = torch.softmax(x, -1)
        assert float(stats.sample_prob[row, 0]) == pytest.approx(float(q[stats.sample[row, 0]]), rel=1e-5)


def test_softcap():
    logits = torch.randn(2, 3, 61) * 20
    capped = 5 * torch.tanh(logits / 5)
    for confidence in ("proposal", "untempered"):
        options = {"temperature": 0.8, "top_k": 9, "confidence": confidence}
        ours = Proposal(**options, softcap=5.0).stats(logits, SEED, 0)
        by_hand = Proposal(**options).stats(capped, SEED, 0)
        assert torch.equal(ours.sample, by_hand.sample)
        torch.testing.assert_close(ours.sample_prob, by_hand.sample_prob)


@pytest.mark.parametrize("temperature", [0.0, 0.7, torch.tensor([0.0, 0.7, 1.3])], ids=str)
@pytest.mark.parametrize("filters", [{}, {"top_k": 9}, {"top_k": 9, "top_p": 0.9}], ids=str)
def test_chunks_hold_what_the_filters_keep(filters, temperature, monkeypatch):
    """Of a block that is a view, a few rows at a time, as the statistics have it."""
    block = (torch.randn(3, 20, 61) * 3)[:, 5:12]
    proposal = Proposal(temperature, **filters, confidence="proposal", softcap=8.0)
    monkeypatch.setattr(proposals, "CHUNK_ELEMENTS", 200)
    parts = list(proposal.filtered_chunks(block))
    assert [rows.start for rows, _ in parts] == list(range(0, 21, 3))
    p = torch.softmax(torch.cat([x for _, x in parts]).double(), -1)
    stats = proposal.stats(block, SEED, 2)
    torch.testing.assert_close(
        stats.entropy.flatten().double(), torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(stats.top1_prob.flatten().double(), p.amax(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("vocab", [61, 20_011])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing_to_propose(shape, vocab):
    for options in ({"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}):
        for confidence in ("proposal", "untempered"):
            stats = Proposal(0.7, **options, confidence=confidence).stats(torch.randn(*shape, vocab), SEED, 0)
            assert all(field.shape == shape for field in stats)


def test_a_temperature_that_is_no_fp32_number():
    logits = torch.randn(1, 3, 20_011)
    stats = Proposal(1e-46, None, 0.9, confidence="proposal").stats(logits, SEED, 0)
    assert stats.sample.shape == (1, 3)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_rows_without_a_distribution(broken):
    logits = torch.randn(1, 3, 20_011)
    logits[0, 1, 7] = broken
    logits[0, 2] = -math.inf
    stats = Proposal(0.7, 9, 0.9, confidence="proposal").stats(logits, SEED, 0)
    assert stats.sample_prob[0, 0] > 0
    assert stats.sample_prob[0, 1:].tolist() == [0.0, 0.0]
    assert stats.entropy[0, 1:].isinf().all()


class Sorts(TorchDispatchMode):
    """Notes the largest dimension that anything sorts or selects from."""

    def __init__(self):
        super().__init__()
        self.longest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.split("::")[-1] in ("sort", "argsort", "topk", "kthvalue", "msort"):
            self.longest = max(self.longest, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["normal", "peaky", "flat"])
def test_the_vocabulary_is_never_sorted(kind):
    vocab = 50_021
    logits = rows_of(vocab, kind, rows=4)[None]
    sampler = MaskedDiffusionSampler(
        Threshold(0.5), mask_id=0, temperature=0.7, top_k=20, top_p=0.9, backend="cpp", confidence="proposal"
    )
    with Sorts() as sorts:
        try:
            sampler.step(logits, torch.zeros(1, 4, dtype=torch.int64))
        except BackendError as error:
            pytest.skip(f"the host kernels are not built: {error}")
    assert sorts.longest <= 4


@pytest.mark.parametrize("strategy", [LowConfidence(), Entropy(epsilon=1e-10)], ids=str)
def test_rows_that_are_decided_are_what_they_are_alone(strategy):
    """Their draws are numbered by row, whatever stands in the rows without a decision."""
    logits = torch.stack([rows_of(20_011, kind, rows=5) for kind in ("flat", "normal", "flat")])
    tokens = torch.full((3, 5), 3)
    tokens[1] = 0
    sampler = MaskedDiffusionSampler(
        strategy, 0, 5, steps=5, temperature=1.0, top_p=0.9, confidence="proposal"
    )
    state = sampler.start(tokens, seed=0)
    new_tokens = sampler.step(logits, tokens, state)
    alone = sampler.start(tokens[:2], seed=0)
    assert torch.equal(sampler.step(logits[:2], tokens[:2], alone), new_tokens[:2])
    assert torch.equal(new_tokens[2], tokens[2]) and state.nfe.tolist() == [0, 1, 0]


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.operators += 1
        # A number on the host is read without waiting.
        self.waits += name in ("nonzero", "_local_scalar_dense") and args[0].dtype == torch.bool
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["peaky", "flat"])
@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 20}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_few_operators_and_no_wait(options, kind):
    """On a GPU each costs the host more than the kernel takes."""
    logits = rows_of(20_011, kind, rows=8).reshape(2, 4, -1)
    proposal = Proposal(0.2, **options, confidence="proposal", backend="cpp")
    before = torch.get_rng_state()
    with Counts() as counts:
        try:
            proposal.stats(logits, SEED, 1)
        except BackendError as error:
            pytest.skip(f"the host kernels are not built: {error}")
    assert counts.operators <= 6 and counts.waits == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_logits_are_read_as_they_are():
    logits = rows_of(20_011, "normal").to(torch.bfloat16)[None]
    for options in ({"top_k": 20}, {"top_p": 0.2}, {"top_k": 20, "top_p": 0.5, "top_k_first": True}):
        for confidence in ("proposal", "untempered"):
            proposal = Proposal(0.3, **options, confidence=confidence)
            ours, wide = (proposal.stats(x, SEED, 1) for x in (logits, logits.float()))
            assert torch.equal(ours.sample, wide.sample)
            torch.testing.assert_close(ours.sample_prob, wide.sample_prob)


@pytest.mark.parametrize("confidence", ["proposal", "untempered"])
def test_proposals_alone_are_those_with_statistics(confidence):
    """And say which rows have no distribution."""
    logits = rows_of(1001, "normal")[None]
    logits[0, 1, 7] = math.nan
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "confidence": confidence}
    whole, alone = (Proposal(**options, statistics=on).stats(logits, SEED, 1) for on in (True, False))
    assert torch.equal(whole.sample, alone.sample) and torch.equal(whole.argmax, alone.argmax)
    assert torch.equal(whole.entropy.isinf(), alone.entropy.isinf()) and bool(alone.entropy[0, 1].isinf())
