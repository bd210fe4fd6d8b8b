"""torch's default dtype and device are the caller's: a sampler does not see them."""

import contextlib

import pytest
import torch
from samplers_models import MASK, VOCAB

from dgemma_accel.samplers import (
    CreditThreshold,
    EntropyBoundRenoise,
    JointThresholdEdit,
    LowConfidence,
    MaskedDiffusionSampler,
    MaskgitPlus,
)
from dgemma_accel.samplers.strategies import dream

TABLE = torch.randn(16, VOCAB)
TABLE[:, MASK] = -9.0
OPTIONS = {
    "greedy": (LowConfidence(), {}),
    "top_k": (LowConfidence(), {"temperature": 0.8, "top_k": 5}),
    "top_p": (LowConfidence(), {"temperature": 0.8, "top_p": 0.7}),
    "credit": (CreditThreshold(0.5), {}),
    "dream": (MaskgitPlus(), {"steps": 5}),
    "noise": (EntropyBoundRenoise(MASK), {"steps": 5}),
    "edits": (JointThresholdEdit(0.5, 0.5), {}),
}


def model(tokens):
    return TABLE[: tokens.shape[1]].expand(tokens.shape[0], -1, -1)


def text(name):
    strategy, options = OPTIONS[name]
    sampler = MaskedDiffusionSampler(strategy, mask_id=MASK, block_length=8, **options)
    return sampler.generate(model, [[1, 2]], 8, seed=3)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = [
    lambda: default_dtype(torch.bfloat16),
    lambda: default_dtype(torch.float64),
    lambda: torch.device("meta"),
]


@pytest.mark.parametrize("default", DEFAULTS, ids=["bfloat16", "float64", "meta"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_text_is_the_same(name, default):
    expected = text(name)
    dream._shares.cache_clear()
    with default():
        result = text(name)
    assert torch.equal(result.sequences, expected.sequences) and torch.equal(result.nfe, expected.nfe)


def test_top_p_of_a_large_vocabulary():
    sampler = MaskedDiffusionSampler(LowConfidence(), mask_id=0, temperature=1.0, top_p=0.5)
    tokens, logits = torch.zeros(1, 4, dtype=torch.int64), torch.randn(1, 4, 9000) * 6
    state = sampler.start(tokens, seed=1)
    expected = sampler.step(logits, tokens, state)
    with default_dtype(torch.bfloat16):
        state = sampler.start(tokens, seed=1)
        assert torch.equal(sampler.step(logits, tokens, state), expected)


def test_shares_of_dream_are_those_of_fp32_whatever_came_first():
    expected = dream._shares(64, 1e-3)
    dream._shares.cache_clear()
    with default_dtype(torch.bfloat16):
        assert dream._shares(64, 1e-3) == expected
    assert dream._shares(64, 1e-3) == expected
