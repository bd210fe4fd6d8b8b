"""What kernels read and store, counted where they are carried out on the host: the reads that the floors assume."""

import numpy as np
import pytest
import torch
from conftest import CUDA_PTX, PTX
from ptx import kernel as carried_out
from test_block_attention import make_case as make_attention_case

import dgemma_accel
from dgemma_accel.samplers import EntropyBound, Renoise

pytestmark = pytest.mark.skipif(
    not PTX and not CUDA_PTX, reason="nothing is carried out; see `make ptx-tests`"
)
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not there, reason="not carried out"))
    for name, there in (("triton", PTX), ("cuda", CUDA_PTX))
]


@pytest.fixture
def traffic(monkeypatch):
    found = []
    monkeypatch.setattr(carried_out, "traffic", found)
    return found


def bytes_of(memory, tensor: torch.Tensor) -> tuple[int, int]:
    """(read, stored) of the memory that holds a tensor."""
    i = np.searchsorted(memory.starts, tensor.data_ptr(), side="right") - 1
    return int(memory.read[i]), int(memory.stored[i])


@pytest.mark.parametrize("name", BACKENDS)
def test_row_stats_reads_the_logits_once(traffic, name):
    logits = torch.randn(3, 24_576).to(torch.bfloat16)
    dgemma_accel.row_stats(logits, seed=3, temperature=0.7, softcap=30.0, backend=name)
    (_, tiles), (_, merge) = traffic
    size = logits.numel() * 2
    assert bytes_of(tiles, logits) == (size, 0)
    # The tiles of the largest logit and of the sample, to find their places: a few of 64 at the model's size.
    assert bytes_of(merge, logits)[0] <= 4 * len(logits) * 4096 * 2
    assert tiles.stored.sum() + merge.stored.sum() < size / 100


@pytest.mark.parametrize("name", BACKENDS)
def test_commit_is_one_launch_that_reads_and_stores_every_array_once(traffic, name):
    tokens, logits = torch.randint(50, (2, 64)), torch.randn(2, 64, 50)
    stats = dgemma_accel.row_stats(logits, seed=1, backend="reference")
    result = dgemma_accel.commit(tokens, stats, EntropyBound(3.0), Renoise(50), seed=3, backend=name)
    ((_, memory),) = traffic
    assert bytes_of(memory, result.tokens)[1] == tokens.numel() * 8
    assert bytes_of(memory, stats.sample) == (tokens.numel() * 8, 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_block_attention_reads_keys_once_for_each_tile_of_rows(traffic, name):
    """Each tile of rows walks the keys of [start, end), in whole tiles of keys; nothing of the prefix is copied."""
    case = make_attention_case(1, 4, 2, 64, 128, prefix=1000, ranges=[(300, 420)], dtype=torch.bfloat16)
    query, key, value, prefix_key, prefix_value, start, end = case
    output = dgemma_accel.block_attention(
        query, key, value, prefix_key, prefix_value, prefix_start=start, prefix_end=end, backend=name
    )
    _, memory = traffic[0]
    # Once for every split of the keys.
    assert bytes_of(memory, query)[0] / (query.numel() * 2) in (1, 2, 3, 4)
    per_slot = prefix_key.shape[1] * prefix_key.shape[3] * 2
    read = [bytes_of(memory, tensor)[0] / per_slot for tensor in (prefix_key, prefix_value)]
    # 128 rows of a KV head are one, two or four tiles; a tile of keys has 64 at most.
    assert (
        read[0] == read[1]
        and min(read[0] / tiles for tiles in (1, 2, 4) if read[0] / tiles >= 120) <= 120 + 2 * 64
    )
    assert bytes_of(traffic[-1][1], output)[1] == output.numel() * 2


@pytest.mark.skipif(not PTX, reason="not carried out")
def test_experts_read_the_chosen_weights_once_and_no_others(traffic):
    count, width, embedding = 8, 64, 128
    gate_up = torch.randn(count, 2 * width, embedding).to(torch.bfloat16)
    down = torch.randn(count, embedding, width).to(torch.bfloat16)
    hidden = torch.randn(24, embedding).to(torch.bfloat16)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(24)])
    weights = torch.rand(24, 2)
    dgemma_accel.experts(hidden, index, weights, gate_up, down, backend="triton")
    chosen = len(index.unique())
    read = {
        kernel: bytes_of(memory, weight)[0]
        for kernel, memory in traffic
        for reads, weight in (("gate_up_kernel", gate_up), ("down_kernel", down))
        if kernel == reads
    }
    # At most 24 rows of an expert, which are one tile.
    assert read["gate_up_kernel"] == chosen * 2 * width * embedding * 2
    assert read["down_kernel"] == chosen * width * embedding * 2
