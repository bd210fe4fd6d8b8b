"""What a step's head, sampler and self-conditioning hold at their peak, at full width, beyond weights and cache.

Counted on meta tensors: every allocation of the launchers and of PyTorch's operations, and none of their work.
"""

from unittest import mock

import pytest
import torch
from live_memory import LiveBytes, launchers_of

triton_head = pytest.importorskip("dgemma_accel.triton_kernels.head_stats")

from dgemma_accel.triton_kernels.block_attention import block_attention  # noqa: E402
from dgemma_accel.triton_kernels.commit import commit  # noqa: E402
from dgemma_accel.triton_kernels.row_stats import row_stats  # noqa: E402
from dgemma_accel.triton_kernels.soft_embedding import soft_embedding  # noqa: E402

from dgemma_accel.native import soft_embedding_cuda  # noqa: E402
from dgemma_accel.native.soft_embedding_chunked import soft_embedding as chunked_soft_embedding  # noqa: E402
from dgemma_accel.reference.commit import CommitCall  # noqa: E402
from dgemma_accel.samplers import EntropyBound, Renoise  # noqa: E402

VOCAB, CANVAS, EMBEDDING, SOFTCAP = 262_144, 256, 2816, 30.0
ALLOWED = 300e6
# Multiprocessors of one GPU of each architecture: A100, L40S, H200, B200, RTX PRO 6000.
GPUS = {(8, 0): 108, (8, 9): 142, (9, 0): 132, (10, 0): 148, (12, 0): 188}


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def fused_head(hidden, weight):
    one, zero = torch.tensor(0.6), torch.tensor(0)
    return triton_head.head_stats(hidden, weight, one, None, None, zero, zero, SOFTCAP)


def product_then_row_stats(hidden, weight):
    one, zero = torch.tensor(0.6), torch.tensor(0)
    logits = torch.nn.functional.linear(hidden, weight)
    return logits, *row_stats(logits, one, None, None, zero, zero, SOFTCAP)


def sample(batch, fields):
    argmax, drawn, entropy, _, top1, top2, probability = fields
    rule, write = EntropyBound(0.1).encode(), Renoise(VOCAB)
    tokens, number, zero = empty(batch, CANVAS, dtype=torch.int64), torch.tensor(0.0), torch.tensor(0)
    return commit(CommitCall(
        tokens, argmax, drawn, entropy, probability, top1, top2, None,
        int(rule.measure), int(rule.select), int(rule.flags), zero, number, number, -1,
        int(write.kind), write.argument, zero, zero,
        tokens, empty(1, batch, CANVAS, dtype=torch.int64), empty(batch, dtype=torch.bool), number,
    ))  # fmt: skip


def step(batch, head, conditioning, exact=False):
    hidden = empty(batch, CANVAS, EMBEDDING, dtype=torch.bfloat16)
    weight = empty(VOCAB, EMBEDDING, dtype=torch.bfloat16)
    with LiveBytes(hidden, weight) as held:
        logits, *fields = head(hidden, weight)
        sample(batch, fields)
        soft = conditioning(logits, fields[0], fields[4], weight, torch.tensor(0.6), SOFTCAP, 0.0, exact)
        del logits
        soft = soft * 53.0
    assert soft.shape == hidden.shape
    return held.peak


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("capability", GPUS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_triton_step_in_300_megabytes_a_canvas(monkeypatch, capability, batch):
    with launchers_of(capability, GPUS[capability], monkeypatch) as counters:
        for head in (fused_head, product_then_row_stats):
            peak = step(batch, head, soft_embedding)
            table = batch * CANVAS * VOCAB * 2
            assert table < peak < ALLOWED * batch
            assert peak < 2 * table, "room for a second table, even in bf16"
    assert sum(counter.count > 0 for counter in counters) >= 7, "the launchers ran"


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("prefix", [0, 8192, 32_768, 131_072])
@pytest.mark.parametrize("capability", GPUS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_attention_holds_less_than_half_of_a_step(monkeypatch, capability, prefix, batch):
    """What a layer's attention allocates, its output included; it is gone before the head allocates anything."""
    for kv_heads, head_dim in ((2, 512), (8, 256)):
        shape = (batch, kv_heads, CANVAS, head_dim)
        key, cache = (
            empty(*shape, dtype=torch.bfloat16),
            empty(*shape[:2], prefix, head_dim, dtype=torch.bfloat16),
        )
        query = empty(batch, 16, CANVAS, head_dim, dtype=torch.bfloat16)
        with launchers_of(capability, GPUS[capability], monkeypatch) as counters:
            with LiveBytes(query, key, cache) as held:
                block_attention(query, key, key, cache, cache, None, None, 1.0, None, False)
        output = query.numel() * 2
        assert output <= held.peak < output + 101e6 < ALLOWED * batch / 2
        assert any(counter.count for counter in counters)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("exact", [False, True])
def test_chunked_and_exact_conditioning_in_300_megabytes(monkeypatch, exact, batch):
    with launchers_of((9, 0), 132, monkeypatch):
        assert step(batch, product_then_row_stats, chunked_soft_embedding, exact) < ALLOWED * batch
        assert step(batch, fused_head, soft_embedding, exact) < ALLOWED * batch


@pytest.mark.parametrize("batch", [1, 16])
def test_cuda_conditioning_in_300_megabytes(monkeypatch, batch):
    """The extension's kernels allocate nothing; the products between them are PyTorch's on meta tensors."""
    native = mock.Mock(SOFT_EMBEDDING_TILE=2048)
    monkeypatch.setattr(soft_embedding_cuda, "extension", lambda: native)

    def conditioning(logits, argmax, top1_prob, weight, temperature, softcap, tolerance, exact):
        return soft_embedding_cuda.by_kernels(logits, argmax, top1_prob, weight, temperature, softcap, 0)

    table = batch * CANVAS * VOCAB * 2
    with launchers_of((9, 0), 132, monkeypatch):
        peak = step(batch, product_then_row_stats, conditioning)
    assert native.soft_embedding_probabilities_cuda.call_count == 8
    # A slice of probabilities, 23 MB of partial results, and 1.4 MB of output by canvas.
    assert table + 40e6 * batch < peak < table + 45e6 * batch < ALLOWED * batch


def test_exact_conditioning_on_the_host(monkeypatch):
    """Measured with tensors that exist: a table in fp32 would be 17 MB here, a slice of it is 1 MB."""
    rows, vocab, embedding = 64, 65_536, 8
    logits = torch.randn(1, rows, vocab, dtype=torch.bfloat16)
    weight = torch.randn(vocab, embedding, dtype=torch.bfloat16)
    argmax, top1_prob = logits.argmax(-1), logits.float().softmax(-1).amax(-1)
    for exact in (False, True):
        with LiveBytes(logits, weight, argmax, top1_prob) as held:
            chunked_soft_embedding(logits, argmax, top1_prob, weight, torch.tensor(1.0), None, 0.0, exact)
        assert 0 < held.peak < rows * vocab * 4 / 2


def test_the_original_chain_holds_more_than_a_gigabyte():
    """The original's step: logits to fp32, softcap, temperature, softmax to sample, entropy, bf16 conditioning."""
    hidden = empty(1, CANVAS, EMBEDDING, dtype=torch.bfloat16)
    weight = empty(VOCAB, EMBEDDING, dtype=torch.bfloat16)
    with LiveBytes(hidden, weight) as held:
        logits = torch.nn.functional.linear(hidden, weight).float()
        logits = torch.tanh(logits / SOFTCAP) * SOFTCAP
        processed = logits / 0.6
        probabilities = torch.softmax(processed, -1, dtype=torch.float32)
        normalised = processed - torch.logsumexp(processed, -1, keepdim=True)
        _ = -(normalised * probabilities).sum(-1), probabilities.argmax(-1)
        del normalised, logits
        conditioning = processed.to(torch.bfloat16)
        soft = conditioning.softmax(dim=-1, dtype=torch.float32).to(torch.bfloat16) @ weight
    assert soft.shape == hidden.shape
    assert held.peak > 1e9 > ALLOWED


def test_the_count_sees_what_is_let_go():
    with LiveBytes() as held:
        first = empty(1000)
        del first
        second = empty(1500)
        third = second.view(30, 50) + 1
    assert held.peak == 4 * 3000 and third.shape == (30, 50)
