"""experts' CUDA backend: what it supports and says, and by its compiled kernels that results are within budget."""

import math

import pytest
import torch
from conftest import DEVICES
from test_experts import BLOCKS, PLAIN, ROWS, make_case, make_fp8_case, run
from test_experts_nvfp4 import make_nvfp4_case
from test_feed_forward import check as check_feed_forward
from test_feed_forward import make_case as feed_forward_case

import dgemma_accel
from dgemma_accel.backends import Implementation
from dgemma_accel.native import experts_cuda
from dgemma_accel.native.params import extension, missing_extension
from dgemma_accel.ops.feed_forward import feed_forward
from dgemma_accel.reference.budget_experts import check_experts
from dgemma_accel.reference.feed_forward import FeedForwardCall

ON = DEVICES["cuda"]
SUPPORTED = {
    "device": "cuda", "dtype": torch.bfloat16, "activation": "silu", "experts": 128, "width": 704, "embedding": 2816,
    "compute_capability": (8, 0),
}  # fmt: skip
KINDS = {
    "plain": lambda *arguments, **options: (make_case(*arguments, **options), {}),
    "blocks": lambda *arguments, **options: make_fp8_case(*arguments, **options, which=(BLOCKS, BLOCKS)),
    "rows": lambda *arguments, **options: make_fp8_case(*arguments, **options, which=(ROWS, ROWS)),
    "blocks, plain": lambda *arguments, **options: make_fp8_case(
        *arguments, **options, which=(BLOCKS, PLAIN)
    ),
    "nvfp4": make_nvfp4_case,
}


def compiled(function):
    return pytest.mark.gpu(pytest.mark.ptx(function))


@pytest.mark.skipif(missing_extension() is not None, reason=str(missing_extension()))
@pytest.mark.parametrize(
    "name, value, line",
    [
        ("device", "cpu", "device: required cpu, supported {cuda}"),
        ("dtype", torch.float32, "dtype: required float32, supported {bfloat16, float16}"),
        ("width", 720, "width: required 720, supported multiples of 32"),
        ("embedding", 16, "embedding: required 16, supported multiples of 32"),
        ("experts", 1025, "experts: required 1025, supported up to 1024"),
        (
            "compute_capability",
            (7, 5),
            "compute_capability: required 7.5, supported 8.0 and above, with code for 80 121",
        ),
    ],
)
def test_a_mismatch_says_what_is_required_and_supported(monkeypatch, name, value, line):
    if value == ON:
        pytest.skip("these kernels take CPU tensors")
    monkeypatch.setattr(extension(), "CUDA_ARCHS", "80 121", raising=False)
    implementation = Implementation("experts", "cuda", None, experts_cuda)
    assert implementation.missing(SUPPORTED) == []
    assert implementation.missing({**SUPPORTED, name: value}) == [line]


@pytest.mark.skipif(missing_extension() is not None, reason=str(missing_extension()))
def test_the_limit_is_the_kernel_s():
    if not hasattr(extension(), "EXPERTS_CUDA_MOST"):
        pytest.skip("the extension has no CUDA code")
    assert extension().EXPERTS_CUDA_MOST == experts_cuda.FEATURES["experts"].limit


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(19, 3, 5, 96, 160), (70, 3, 4, 64, 416)], ids=["few", "many"])
def test_within_budget_and_repeats_its_bits(kind, shape, dtype):
    case, settings = KINDS[kind](*shape, dtype, ON)
    result, problems = run(case, "cuda", **settings)
    assert not problems
    if ON == "cuda":
        assert all(torch.equal(run(case, "cuda", **settings)[0], result) for _ in range(3))


@compiled
def test_routing():
    """One expert with every row, some without any, choices of no expert whose weights are NaN."""
    case = make_case(100, 3, 12, 32, 64, torch.bfloat16, ON, skewed=True)
    index, weights = case[1:3]
    index[::3, 1], weights[::3, 1] = 12, math.nan
    index[4] = 12
    result, problems = run(case, "cuda", activation="silu")
    assert not problems and not result[4].any() and result[5].any()


@compiled
def test_nothing_to_do():
    hidden, index, weights, gate_up, down = make_case(3, 2, 4, 32, 64, torch.bfloat16, ON)
    assert dgemma_accel.experts(hidden[:0], index[:0], weights[:0], gate_up, down, backend="cuda").shape == (
        0,
        64,
    )
    alone = dgemma_accel.experts(hidden, index[:, :0], weights[:, :0], gate_up, down, backend="cuda")
    assert alone.shape == (3, 64) and not alone.any()


@compiled
def test_views(monkeypatch):
    """Strides of every tensor are respected, and what lies beside a view is not read."""
    hidden, index, weights, gate_up, down = make_case(11, 3, 4, 32, 64, torch.bfloat16, ON)

    def inside(tensor, *steps, offset=1):
        wide = tensor.new_full([2 * size + 3 for size in tensor.shape], math.nan)
        view = wide[
            tuple(slice(offset, offset + step * size, step) for size, step in zip(tensor.shape, steps))
        ]
        return view.copy_(tensor)

    # Rows that begin anywhere, and rows read where they are.
    pitched = hidden.new_full((11, 72), math.nan)
    pitched[:, :64] = hidden
    expected = run((hidden, index, weights, gate_up, down), "cuda")[0]
    for rows, farthest in ((inside(hidden, 2, 1), 999), (pitched[:, :64], 999), (pitched[:, :64], 71)):
        monkeypatch.setattr(experts_cuda, "FARTHEST", farthest)
        case = (
            rows, index.t().contiguous().t(), inside(weights, 1, 2), inside(gate_up, 2, 1, 1),
            inside(down, 1, 1, 2),
        )  # fmt: skip
        result, problems = run(case, "cuda")
        assert not problems and torch.equal(result, expected)


@compiled
def test_long_prompts_go_by_parts(monkeypatch):
    case = make_case(20, 3, 6, 32, 64, torch.bfloat16, ON)
    whole = run(case, "cuda")[0]
    monkeypatch.setattr(experts_cuda, "PAIRS_AT_ONCE", 24)
    assert torch.equal(run(case, "cuda")[0], whole)


@compiled
@pytest.mark.parametrize("kind", ["plain", "nvfp4"])
def test_opcheck(kind):
    case, settings = KINDS[kind](6, 2, 4, 32, 64, torch.bfloat16, ON)
    # Whether arguments were written to is compared by arithmetic that torch does not have for FP8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    names = ("gate_up_scale", "down_scale", "gate_up_global_scale", "down_global_scale")
    scales = [settings.get(name) for name in names]
    torch.library.opcheck(
        torch.ops.dgemma.experts.default, (*case, "gelu_tanh", False, "cuda", *scales), test_utils=tests
    )


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_beside_a_dense_mlp(activation, dtype):
    case, top_k = feed_forward_case(40, 72, 16, 96, 64, dtype, ON, 4)
    results = feed_forward(FeedForwardCall(*case, top_k, activation), "cuda")
    assert not check_feed_forward(results, case, top_k, activation)
    none = feed_forward(FeedForwardCall(*(t[:0] for t in case[:3]), *case[3:], top_k, activation), "cuda")
    assert [result.shape for result in none] == [(0, 64)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_s_own_sizes(kind):
    """A layer of DiffusionGemma with a canvas, of which a part is looked at, and with a long prompt."""
    for rows in (256, 2048):
        case, settings = KINDS[kind](rows, 8, 32, 704, 2816, torch.bfloat16, ON)
        result = dgemma_accel.experts(*case, **settings, backend="cuda")
        part = torch.arange(0, rows, rows // 16, device=ON)
        looked_at = (case[0][part], case[1][part], case[2][part], *case[3:])
        assert not check_experts(result[part], *looked_at, **settings)


@pytest.mark.gpu
@pytest.mark.capture
@pytest.mark.parametrize("kind", KINDS)
def test_side_stream_and_graph_give_the_same_bits(kind):
    case, settings = KINDS[kind](40, 3, 5, 96, 160, torch.bfloat16, ON)

    def call():
        return dgemma_accel.experts(*case, **settings, backend="cuda")

    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = call()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(expected, aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.fill_(math.nan)
    graph.replay()
    assert torch.equal(captured, expected)
    # The choices are read at each replay.
    case[1].copy_(case[1].flip(0))
    graph.replay()
    assert not check_experts(captured, *case, **settings)
