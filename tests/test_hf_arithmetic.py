"""The specification against transformers' own code, one piece at a time."""

import math

import pytest
import torch

import dgemma_accel
from dgemma_accel import RowStats, reference
from dgemma_accel.samplers import CanvasState, EntropyBound, Keep, StableAndConfident

generation = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
modeling = pytest.importorskip("transformers.models.diffusion_gemma.modeling_diffusion_gemma")
configuration = pytest.importorskip("transformers.models.diffusion_gemma.configuration_diffusion_gemma")


def make_logits(batch, length, vocab, settled):
    logits = torch.randn(batch, length, vocab) * 3
    index = torch.randint(vocab, (batch, length))
    peaks = torch.nn.functional.one_hot(index, vocab) * 30.0
    return torch.where(torch.rand(batch, length, 1) < settled, logits + peaks, logits)


@pytest.mark.parametrize("bound", [0.01, 0.1, 3.0])
def test_entropy_bound_is_the_model_s_sampler(bound):
    sampler = generation.EntropyBoundSampler(generation.EntropyBoundSamplerConfig(bound), 32, 100, 48)
    counts = set()
    for trial in range(20):
        torch.manual_seed(trial)
        logits = make_logits(3, 32, 100, settled=trial / 20)
        stats = dgemma_accel.row_stats(logits, seed=trial, backend="reference")
        canvas = torch.randint(100, (3, 32))
        expected = sampler.accept_canvas(canvas, stats.sample, logits, 1)
        result = dgemma_accel.commit(canvas, stats, EntropyBound(bound), Keep(), backend="reference")
        assert torch.equal(result.committed, sampler.accepted_token_mask)
        assert torch.equal(result.tokens, expected)
        counts.update(result.num_committed.tolist())
    assert len(counts) > 3


@pytest.mark.parametrize("stability", [0, 1, 2])
def test_stop_is_the_model_s_criterion(stability):
    criterion = generation.StableAndConfidentStoppingCriteria(stability, 0.05)
    stop = StableAndConfident(stability, 0.05)
    state = CanvasState.start(torch.zeros(4, 16, dtype=torch.int64), stop)
    outcomes = []
    logits = make_logits(4, 16, 50, settled=1.0)
    for step in range(5):
        logits = logits.clone()
        logits[1, 0] = torch.nn.functional.one_hot(torch.tensor(step), 50) * 40.0
        logits[2] = torch.randn(16, 50)
        stats = dgemma_accel.row_stats(logits, seed=step, backend="reference")
        expected = criterion(stats.argmax, logits) | state.finished
        result = dgemma_accel.commit(
            state.draft, stats, EntropyBound(0.1), Keep(), state=state, stop=stop, backend="reference"
        )
        state = result.state
        assert torch.equal(state.finished, expected)
        outcomes.append(state.finished.tolist())
    assert outcomes[-1][0] and not outcomes[-1][2] and outcomes[-1][1] == (stability == 0)


def test_row_stats_is_the_model_s_chain():
    logits = make_logits(2, 8, 300, settled=0.5)
    capped = torch.tanh(logits / 30.0) * 30.0
    warper = generation.LinearTemperatureScheduleLogitsProcessor(t_min=0.4, t_max=0.8, max_denoising_steps=48)
    processed = warper(None, capped, cur_step=12)
    stats = dgemma_accel.row_stats(
        logits, softcap=30.0, temperature=0.4 + 0.4 * 12 / 48, seed=0, backend="reference"
    )
    categorical = torch.distributions.Categorical(logits=processed)
    assert torch.equal(stats.argmax, processed.argmax(-1))
    assert torch.allclose(stats.entropy, categorical.entropy(), atol=1e-5)
    assert torch.allclose(stats.sample_prob, categorical.log_prob(stats.sample).exp(), rtol=1e-4)


def test_experts():
    config = configuration.DiffusionGemmaTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_experts=4, top_k_experts=2,
        moe_intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    module = modeling.DiffusionGemmaTextExperts(config)
    torch.nn.init.normal_(module.gate_up_proj)
    torch.nn.init.normal_(module.down_proj)
    hidden, index = torch.randn(9, 32), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    with torch.no_grad():
        expected = module(hidden, index, weights)
        result = reference.experts(hidden, index, weights, module.gate_up_proj, module.down_proj)
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(torch.zeros_like(result), expected, rtol=1e-4, atol=1e-3)


def test_invalid_rows_never_lead():
    """What the model's sampler turns into NaN, ours ranks last."""
    logits = torch.zeros(1, 4, 10)
    logits[0, 1] = -math.inf
    stats: RowStats = dgemma_accel.row_stats(logits, seed=0, backend="reference")
    result = dgemma_accel.commit(
        torch.zeros(1, 4, dtype=torch.int64), stats, EntropyBound(1e9), Keep(), backend="reference"
    )
    assert result.committed[0].tolist() == [True, True, True, True] and stats.entropy[0, 1] == math.inf
