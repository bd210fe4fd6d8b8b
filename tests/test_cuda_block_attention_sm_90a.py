"""block_attention's wgmma variant: what it supports and says, who takes it, and on a Hopper GPU that it is right."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICES
from test_block_attention import make_case

from dgemma_accel.backends import BackendError, Implementation
from dgemma_accel.native import block_attention_cuda, block_attention_sm_90a
from dgemma_accel.native.params import extension, missing_extension
from dgemma_accel.reference.budget import check_block_attention

SUPPORTED = {
    "device": "cuda", "dtype": torch.bfloat16, "head_dim": 512, "compute_capability": (9, 0),
    "rows on 16-byte boundaries": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, value, line",
    [
        ("device", "cpu", "device: required cpu, supported {cuda}"),
        ("dtype", torch.float32, "dtype: required float32, supported {bfloat16, float16}"),
        ("head_dim", 128, "head_dim: required 128, supported {256, 512}"),
        ("compute_capability", (12, 0), "compute_capability: required 12.0, supported {9.0}"),
        (
            "rows on 16-byte boundaries", False,
            "rows on 16-byte boundaries: required False, supported {True}",
        ),
    ],
)  # fmt: skip
def test_a_mismatch_says_what_is_required_and_supported(name, value, line):
    if value == DEVICES["cuda"]:
        pytest.skip("these kernels take CPU tensors")
    implementation = Implementation("block_attention", "sm_90a", None, block_attention_sm_90a)
    assert implementation.missing(SUPPORTED) == []
    assert implementation.missing({**SUPPORTED, name: value}) == [line]


def test_a_call_that_it_does_not_serve_is_refused():
    case = make_case(1, 4, 2, 8, 128, prefix=20, dtype=torch.float32)
    with pytest.raises(BackendError) as error:
        block_attention_sm_90a.block_attention(*case, 1.0, None, False)
    for part in ("sm_90a cannot run this call", "float32", "head_dim: required 128"):
        assert part in str(error.value)


def test_rows_between_boundaries_are_seen():
    query, key, value, *_ = make_case(1, 4, 2, 8, 512, dtype=torch.bfloat16)
    lines = block_attention_sm_90a.missing(query, key, value, None, None)
    assert not any("boundaries" in line for line in lines)
    wide = torch.full((*value.shape[:-1], 515), math.nan, dtype=value.dtype)[..., 1:513]
    lines = block_attention_sm_90a.missing(query, key, wide, None, None)
    assert any("boundaries: required False" in line for line in lines)


@pytest.mark.parametrize(
    "variable, head_dim, served, kernel",
    [
        (None, 512, True, "block_attention_sm_90a"),
        ("", 512, True, "block_attention_sm_90a"),
        (None, 512, False, "block_attention_cuda"),
        # Not measured.
        (None, 256, True, "block_attention_cuda"),
        ("auto", 256, True, "block_attention_cuda"),
        ("portable", 512, True, "block_attention_cuda"),
        ("sm_90a", 512, True, "block_attention_sm_90a"),
        ("sm_90a", 256, True, "block_attention_sm_90a"),
        ("sm_90a", 256, False, "block_attention_cuda"),
    ],
)
def test_backend_cuda_takes_it_where_it_is_faster_or_the_environment_says_so(
    monkeypatch, variable, head_dim, served, kernel
):
    calls = []
    for module in (block_attention_cuda, block_attention_sm_90a):
        monkeypatch.setattr(module, "launch", lambda name, *arguments: calls.append(name))
    monkeypatch.setattr(block_attention_sm_90a, "missing", lambda *tensors: [] if served else ["no"])
    monkeypatch.delenv(block_attention_sm_90a.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(block_attention_sm_90a.VARIABLE, variable)
    block_attention_cuda.block_attention(*make_case(1, 2, 1, 4, head_dim), 1.0, None, False)
    assert calls == [kernel]


def test_an_unknown_variant_is_refused(monkeypatch):
    monkeypatch.setenv(block_attention_sm_90a.VARIABLE, "sm_91")
    with pytest.raises(ValueError, match=r"DGEMMA_ACCEL_BLOCK_ATTENTION: must be one of .*got 'sm_91'"):
        block_attention_sm_90a.wanted(512)


@pytest.mark.skipif(missing_extension() is not None, reason=str(missing_extension()))
def test_splits_fill_pairs_of_multiprocessors():
    native = extension()
    if not hasattr(native, "block_attention_sm_90a_splits"):
        pytest.skip("the extension was built without sm_90a")
    params = native.BlockAttentionParams()
    params.batch, params.query_heads, params.kv_heads, params.length, params.head_dim = 1, 16, 2, 256, 512
    splits = []
    for params.prefix_length in (0, 1024, 8192, 32_768):
        splits.append(native.block_attention_sm_90a_splits(params, 132))
    # 32 tiles of rows for 66 pairs: two splits fill them but for one pair in 33.
    assert splits == [1, 2, 2, 2]
    params.batch = 4
    assert native.block_attention_sm_90a_splits(params, 132) == 1
    # 32 tiles of rows of a sliding layer, a multiprocessor each.
    params.batch, params.kv_heads, params.head_dim, params.prefix_length = 1, 8, 256, 1023
    assert native.block_attention_sm_90a_splits(params, 132) == 4


CASES = [
    (dict(batch=1, query_heads=16, kv_heads=2, length=256, prefix=3000, ranges=[(5, 2990)]), {}),
    (
        dict(batch=2, query_heads=8, kv_heads=2, length=100, prefix=700, ranges=[(0, 700), (13, 40)]),
        {"softcap": 9.0},
    ),
    (dict(batch=1, query_heads=2, kv_heads=2, length=33), {}),
    (
        dict(batch=2, query_heads=4, kv_heads=1, length=190, prefix=400, ranges=[(0, 400), (7, 7)]),
        {"causal": True},
    ),
    (
        dict(batch=1, query_heads=4, kv_heads=2, length=300, prefix=500, ranges=[(2, 500)]),
        {"causal": True, "window": 130},
    ),
]


@pytest.mark.skipif(
    DEVICES["cuda"] != "cpu", reason="for CUDA kernels that are carried out; see `make ptx-tests`"
)
@pytest.mark.skipif(
    not hasattr(extension() if missing_extension() is None else None, "block_attention_sm_90a"),
    reason="built without sm_90a",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize(
    "shape, options",
    # Less of the first, which would take a minute.
    [(CASES[0][0] | {"query_heads": 4, "length": 70, "prefix": 900, "ranges": [(5, 890)]}, {}), *CASES[1:]],
)
def test_within_budget_where_cuda_kernels_are_carried_out(shape, options, head_dim, dtype):
    case = make_case(**shape, head_dim=head_dim, dtype=dtype)
    settings = (head_dim**-0.5, options.get("softcap"), options.get("causal", False), options.get("window"))
    output, lse = block_attention_sm_90a.block_attention(*case, *settings)
    assert not check_block_attention(output, lse, *case, *settings)


# In a process of its own with a time limit: a kernel that waits forever must not take the other tests with it.
ON_A_GPU = """
import itertools

import torch
from test_block_attention import make_case
from test_cuda_block_attention_sm_90a import CASES
from dgemma_accel.native.block_attention_sm_90a import block_attention
from dgemma_accel.reference.budget import check_block_attention

for dtype, head_dim in itertools.product((torch.bfloat16, torch.float16), (256, 512)):
    for shape, options in CASES:
        case = make_case(**shape, head_dim=head_dim, dtype=dtype, device="cuda")
        settings = (head_dim**-0.5, options.get("softcap"), options.get("causal", False), options.get("window"))
        output, lse = block_attention(*case, *settings)
        problems = check_block_attention(output, lse, *case, *settings)
        assert not problems, (head_dim, shape, options, problems)
        for _ in range(3):
            again, lse_again = block_attention(*case, *settings)
            assert torch.equal(output, again) and torch.equal(lse, lse_again)
case = make_case(1, 8, 2, 64, 512, prefix=3000, ranges=[(5, 2990)], dtype=torch.bfloat16, device="cuda")
output, lse = block_attention(*case, 0.05, None, False)
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    aside, _ = block_attention(*case, 0.05, None, False)
torch.cuda.current_stream().wait_stream(stream)
assert torch.equal(output, aside)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured, _ = block_attention(*case, 0.05, None, False)
captured.fill_(float("nan"))
graph.replay()
assert torch.equal(output, captured)
print("right")
"""


@pytest.mark.gpu
def test_on_a_gpu():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is an instruction of compute capability 9.0 only")
    missing = block_attention_sm_90a.unavailable()
    if missing:
        pytest.skip(missing)
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)])}
    command = [sys.executable, "-c", ON_A_GPU]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.strip() == "right", done.stdout + done.stderr
