"""row_stats, top_k_top_p and commit by CUDA kernels: graphs, streams, repeatability, errors that leave it usable."""

import pytest
import torch

import dgemma_accel
from dgemma_accel.backends import load
from dgemma_accel.native.params import extension
from dgemma_accel.native.row_stats_params import outputs, row_stats_params
from dgemma_accel.samplers import EntropyBound, Renoise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(load("row_stats", "cuda")[0] is None, reason=str(load("row_stats", "cuda")[1])),
]


def step(logits, tokens, seed):
    shared = {"temperature": 0.7, "softcap": 30.0, "backend": "cuda"}
    stats = dgemma_accel.row_stats(logits, seed=seed, **shared)
    cutoff = dgemma_accel.top_k_top_p(logits, top_k=400, top_p=0.9, **shared)
    filtered = dgemma_accel.row_stats(logits, seed=seed, cutoff=cutoff, **shared)
    committed = dgemma_accel.commit(
        tokens, stats, EntropyBound(2.0), Renoise(1000), seed=seed, backend="cuda"
    )
    return (*stats, cutoff, *filtered, committed.tokens, committed.committed, committed.num_committed)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right))


@pytest.fixture
def canvas():
    # An odd vocabulary: rows start anywhere in a 16-byte vector.
    logits = torch.randn(2, 256, 50_001, device="cuda", dtype=torch.bfloat16)
    return logits, torch.randint(1000, (2, 256), device="cuda")


def test_two_runs_give_the_same_bits(canvas):
    assert same(step(*canvas, 3), step(*canvas, 3))


@pytest.mark.capture
def test_a_captured_graph_replays_with_a_new_seed(canvas):
    seed = torch.tensor(3, device="cuda")
    step(*canvas, seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*canvas, seed)
    for value in (3, 11):
        seed.fill_(value)
        graph.replay()
        assert same(captured, step(*canvas, value))


def test_a_side_stream_is_used(canvas):
    logits, tokens = canvas
    expected = step(logits * 2, tokens, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work that takes longer than a launch: kernels on another stream would read the logits too early.
        late = logits.clone()
        torch.cuda._sleep(50_000_000)
        late *= 2
        result = step(late, tokens, 3)
    torch.cuda.current_stream().wait_stream(stream)
    assert same(result, expected)


def test_a_failed_launch_leaves_the_device_usable(canvas):
    logits, tokens = canvas
    rows = torch.empty(1, 1, 1, device="cuda").expand(2**16, 2**16, 1)
    params = row_stats_params(
        rows, torch.tensor(1.0), None, None, torch.tensor(1), torch.tensor(0), None, outputs(logits)
    )
    with pytest.raises(RuntimeError, match=r"row_stats: more than 2\^31 - 1 tiles"):
        extension().row_stats_cuda(params, torch.cuda.current_stream().cuda_stream)
    assert same(step(logits, tokens, 3), step(logits, tokens, 3))
