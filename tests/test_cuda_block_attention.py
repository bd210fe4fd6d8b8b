"""block_attention's CUDA backend: what it supports and says, and on a GPU that it fits into streams and graphs."""

import pytest
import torch
from conftest import DEVICES
from test_block_attention import make_case

import dgemma_accel
from dgemma_accel.backends import Implementation
from dgemma_accel.native import block_attention_cuda, block_attention_launch
from dgemma_accel.native.params import extension, missing_extension
from dgemma_accel.reference.budget import check_block_attention

SUPPORTED = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 512, "compute_capability": (8, 0)}


@pytest.mark.skipif(missing_extension() is not None, reason=str(missing_extension()))
@pytest.mark.parametrize(
    "name, value, line",
    [
        ("device", "cpu", "device: required cpu, supported {cuda}"),
        ("dtype", torch.float32, "dtype: required float32, supported {bfloat16, float16}"),
        ("head_dim", 96, "head_dim: required 96, supported {128, 256, 512, 64}"),
        (
            "compute_capability",
            (7, 5),
            "compute_capability: required 7.5, supported 8.0 and above, with code for 80 121",
        ),
        (
            "compute_capability",
            (9, 0),
            "compute_capability: required 9.0, supported 8.0 and above, with code for 80 121",
        ),
    ],
)
def test_a_mismatch_says_what_is_required_and_supported(monkeypatch, name, value, line):
    if value == DEVICES["cuda"]:
        pytest.skip("these kernels take CPU tensors")
    monkeypatch.setattr(extension(), "CUDA_ARCHS", "80 121", raising=False)
    implementation = Implementation("block_attention", "cuda", None, block_attention_cuda)
    assert implementation.missing(SUPPORTED) == []
    assert implementation.missing({**SUPPORTED, "compute_capability": (12, 1)}) == []
    assert implementation.missing({**SUPPORTED, name: value}) == [line]


def long_prefix(head_dim: int, dtype=torch.bfloat16):
    """One tile of rows and keys for many blocks of threads, so that the prefix is split."""
    # Where kernels are carried out on the host a GPU has few multiprocessors, and less is split among them.
    prefix = 3000 if DEVICES["cuda"] == "cuda" else 1000
    ranges = [(5, prefix - 10)]
    # Two clusters of two blocks fill those four, so two tiles of rows would not be split.
    kv_heads = 1 if head_dim == 512 else 2
    return make_case(
        1, 8, kv_heads, 16, head_dim, prefix=prefix, ranges=ranges, dtype=dtype, device=DEVICES["cuda"]
    )


def attend(case):
    query, key, value, prefix_key, prefix_value, start, end = case
    return dgemma_accel.block_attention(
        query, key, value, prefix_key, prefix_value, prefix_start=start, prefix_end=end, return_lse=True,
        backend="cuda",
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_split_prefix_is_within_budget_and_repeats_its_bits(monkeypatch, head_dim, dtype):
    case, used, right = long_prefix(head_dim, dtype), [], block_attention_launch.partial_outputs
    monkeypatch.setattr(
        block_attention_launch,
        "partial_outputs",
        lambda params, splits, query: (used.append(splits), right(params, splits, query))[1],
    )
    output, lse = attend(case)
    assert used[0] > 1, "the prefix is split"
    assert not check_block_attention(output, lse, *case, head_dim**-0.5, None, False)
    for _ in range(3 if DEVICES["cuda"] == "cuda" else 1):
        again, lse_again = attend(case)
        assert torch.equal(output, again) and torch.equal(lse, lse_again)


@pytest.mark.gpu
@pytest.mark.ptx
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_unaligned_rows(head_dim):
    case = make_case(
        2,
        4,
        2,
        19,
        head_dim,
        prefix=41,
        ranges=[(2, 40), (0, 41)],
        dtype=torch.float16,
        device=DEVICES["cuda"],
    )
    for i, tensor in enumerate(case[:5]):
        wide = torch.full(
            (*tensor.shape[:-1], head_dim + 3), float("nan"), dtype=tensor.dtype, device=DEVICES["cuda"]
        )
        wide[..., 1:-2] = tensor
        case[i] = wide[..., 1:-2]
    assert not check_block_attention(*attend(case), *case, head_dim**-0.5, None, False)


@pytest.mark.gpu
@pytest.mark.capture
@pytest.mark.parametrize("head_dim", [256, 512])
def test_side_stream_and_graph_give_the_same_bits(head_dim):
    case = long_prefix(head_dim)
    output, lse = attend(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside, _ = attend(case)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(output, aside)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_lse = attend(case)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(output, captured) and torch.equal(lse, captured_lse)
    # The bounds are read at each replay.
    case[6].fill_(100)
    graph.replay()
    assert not check_block_attention(captured, captured_lse, *case, head_dim**-0.5, None, False)
