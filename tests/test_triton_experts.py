"""What the public tests of experts do not reach in the Triton kernels."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

triton_experts = pytest.importorskip("dgemma_accel.triton_kernels.experts")
from dgemma_accel.triton_kernels import expert_routing  # noqa: E402
from test_experts import make_case, make_fp8_case  # noqa: E402

from dgemma_accel import configs  # noqa: E402
from dgemma_accel.reference.budget_experts import check_experts  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    triton_experts.unavailable() is not None, reason=str(triton_experts.unavailable())
)


@pytest.fixture
def poisoned():
    """Fresh tensors hold NaN and the largest integers instead of what memory happens to hold."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 in every direction, so that small cases have many of them; pairs of NVFP4 numbers take 32 deep."""
    select = configs.select

    def changed(op, capability, **call):
        use = dict(select(op, capability, **call))
        depth = 32 if call.get("bytes") == 0.5 else 16
        small = {"block_m": 16, "up_n": 16, "down_n": 16, "up_k": depth, "down_k": depth}
        return use | {name: size for name, size in small.items() if name in use}

    monkeypatch.setattr(configs, "select", changed)


ROUTINGS = {
    "even": lambda: torch.rand(50, 9).topk(4).indices,
    "one expert": lambda: torch.full((70, 2), 8),
    "repeated choices": lambda: torch.randint(9, (40, 5)),
    "some none": lambda: torch.randint(-1, 11, (40, 5)),
    "all none": lambda: torch.full((5, 3), 9),
    "more than one pass": lambda: torch.randint(9, (expert_routing.FEW["BLOCK"] // 3 + 5, 4)),
    "a long prompt": lambda: torch.randint(-1, 10, (expert_routing.MANY_PAIRS // 4 + 7, 4)),
    "more tiles than one store": lambda: torch.full((16 * expert_routing.TILE_BLOCK + 3, 1), 4),
    "a single choice": lambda: torch.tensor([[3]]),
}


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_routing_sorts_by_expert_and_cuts_into_tiles(poisoned, kind, block_m):
    index = ROUTINGS[kind]().to(DEVICE)
    order, tiles = expert_routing.route(index, 9, block_m)
    flat = index.flatten()
    expected = [(flat == expert).nonzero().flatten().tolist() for expert in range(9)]
    assert order.tolist()[: sum(map(len, expected))] == [pair for pairs in expected for pair in pairs]
    wanted, place = [], 0
    for expert, pairs in enumerate(expected):
        wanted += [(expert, place + start, place + len(pairs)) for start in range(0, len(pairs), block_m)]
        place += len(pairs)
    listed = [tuple(column) for column in tiles.T.tolist()]
    assert listed[: len(wanted)] == wanted
    assert all(column[0] == -1 for column in listed[len(wanted) :])


def test_the_launch_is_large_enough_for_any_routing():
    for pairs, count, block_m in ((1, 4, 16), (7, 4, 16), (64, 4, 16), (65, 4, 16), (100, 128, 32)):
        hardest = [1] * min(pairs, count)
        hardest[0] += pairs - len(hardest)
        tiles = sum(-(-rows // block_m) for rows in hardest)
        assert tiles <= expert_routing.most_tiles(pairs, count, block_m) <= tiles + len(hardest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skewed", [False, True])
def test_many_tiles(small_tiles, poisoned, dtype, skewed):
    case = make_case(90, 3, 7, 40, 70, dtype, DEVICE, skewed=skewed)
    assert not check_experts(triton_experts.experts(*case), *case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [40, 101, 192])
def test_many_tiles_of_fp8_weights(small_tiles, poisoned, dtype, width):
    """Tiles that lie in two blocks, several passes to a block, and blocks that end with the matrix."""
    case, scales = make_fp8_case(50, 3, 5, width, 150, dtype, DEVICE, skewed=width == 192)
    result = triton_experts.experts(*case, "gelu_tanh", *scales.values())
    assert not check_experts(result, *case, **scales)


widen = triton_experts.widen


@triton.jit
def widen_kernel(codes, output, DTYPE: tl.constexpr, BY_FP16: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(output + o, widen(tl.load(codes + o), DTYPE, BY_FP16).to(tl.float32))


@pytest.mark.parametrize("dtype", [tl.float32, tl.bfloat16, tl.float16], ids=str)
@pytest.mark.parametrize("way", ["e4m3", "e4m3 by fp16", "bytes"])
def test_every_code_of_e4m3_is_widened_exactly(dtype, way):
    codes = torch.arange(-128, 128, device=DEVICE).to(torch.int8)
    expected = codes.view(torch.float8_e4m3fn).float()
    output = torch.empty(256, device=DEVICE)
    if way != "bytes":
        if triton_experts.is_before(triton_experts.E4M3_INSTRUCTION, codes):
            pytest.skip("no instruction for e4m3 before sm_89")
        codes = codes.view(torch.float8_e4m3fn)
    widen_kernel[(1,)](codes, output, DTYPE=dtype, BY_FP16=way == "e4m3 by fp16", BLOCK=256)
    finite = expected.isfinite()
    assert finite.sum() == 254 and torch.equal(output[finite], expected[finite])
    # The instruction of the hardware drops the sign of a NaN.
    assert torch.equal(output[finite].signbit(), expected[finite].signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_older_architectures_read_bytes_and_compute_the_same(monkeypatch, dtype):
    case, scales = make_fp8_case(20, 2, 4, 100, 150, dtype, DEVICE)
    expected = triton_experts.experts(*case, "gelu_tanh", *scales.values())
    seen, run = [], triton_experts._experts
    monkeypatch.setattr(triton_experts, "is_before", lambda architecture, tensor: True)
    monkeypatch.setattr(
        triton_experts,
        "_experts",
        lambda *a: (seen.append((a[3].weight.dtype, a[4].weight.dtype)), run(*a))[1],
    )
    assert torch.equal(triton_experts.experts(*case, "gelu_tanh", *scales.values()), expected)
    assert seen == [(torch.int8, torch.int8)]


def test_scales_of_experts_that_nobody_chose_are_not_read(small_tiles, poisoned):
    (*rows, gate_up, down), scales = make_fp8_case(40, 3, 8, 24, 40, torch.float32, DEVICE, skewed=True)
    truth = triton_experts.experts(*rows, gate_up, down, "gelu_tanh", *scales.values())
    for scale in scales.values():
        scale[4:] = torch.nan
    assert torch.equal(triton_experts.experts(*rows, gate_up, down, "gelu_tanh", *scales.values()), truth)


def test_weights_of_experts_that_nobody_chose_are_not_read(small_tiles, poisoned):
    hidden, index, weights, gate_up, down = make_case(40, 3, 8, 24, 40, torch.float32, DEVICE, skewed=True)
    truth = triton_experts.experts(hidden, index, weights, gate_up, down)
    gate_up[4:], down[4:] = torch.nan, torch.nan
    assert torch.equal(triton_experts.experts(hidden, index, weights, gate_up, down), truth)


def test_indices_out_of_range_reach_no_memory(small_tiles, poisoned):
    """On a GPU nobody has looked at them."""
    hidden, index, weights, gate_up, down = make_case(20, 3, 5, 24, 40, torch.float32, DEVICE)
    index[3, 1], index[4, 0], index[5, 2], index[6, 1] = -1, 5, 2**40, -(2**62)
    result = triton_experts.experts(hidden, index, weights, gate_up, down)
    assert not check_experts(result, hidden, index, weights, gate_up, down)


def test_a_row_with_nan_stays_alone(small_tiles, poisoned):
    """A tile holds rows side by side; a bad one must not reach its neighbours."""
    hidden, index, weights, gate_up, down = make_case(40, 2, 3, 24, 40, torch.float32, DEVICE)
    truth = triton_experts.experts(hidden, index, weights, gate_up, down)
    hidden[17] = torch.nan
    result = triton_experts.experts(hidden, index, weights, gate_up, down)
    assert result[17].isnan().all()
    others = torch.arange(40) != 17
    assert torch.equal(result[others], truth[others])


def test_long_prompts_go_by_parts(monkeypatch, poisoned):
    case = make_case(50, 3, 6, 24, 40, torch.float32, DEVICE)
    whole = triton_experts.experts(*case)
    monkeypatch.setattr(triton_experts, "PAIRS_AT_ONCE", 48)
    seen, route = [], triton_experts.route
    monkeypatch.setattr(
        triton_experts, "route", lambda index, *a: (seen.append(len(index)), route(index, *a))[1]
    )
    assert torch.allclose(triton_experts.experts(*case), whole, atol=1e-6) and seen == [16, 16, 16, 2]


def test_all_choices_of_a_row_and_columns_beyond_a_block(poisoned):
    """combine_kernel: more columns than one block, and the order of the sum is that of the choices."""
    case = make_case(5, 4, 6, 16, triton_experts.COMBINE_BLOCK + 70, torch.float32, DEVICE)
    assert not check_experts(triton_experts.experts(*case), *case)


RECOMPILATION = """
import torch
from dgemma_accel.triton_kernels import ahead_of_time
from dgemma_accel.triton_kernels.experts import experts

def call(rows, kind):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")
    index, weights = empty(rows, 4, dtype=torch.int64), empty(rows, 4, dtype=torch.float32)
    share, scales = 1, []
    if kind == torch.float8_e4m3fn:
        scales = [empty(64, 1, 1, dtype=torch.float32)] * 2
    elif kind == torch.uint8:
        share, scales = 2, [empty(64, 64, 8, dtype=torch.float8_e4m3fn), empty(64, 128, 2, dtype=torch.float8_e4m3fn)]
        scales += [empty(64, dtype=torch.float32)] * 2
    matrices = empty(64, 64, 128 // share, dtype=kind), empty(64, 128, 32 // share, dtype=kind)
    experts(empty(rows, 128), index, weights, *matrices, "gelu_tanh", *scales)

for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.uint8):
    seen = set()
    for rows in (256, 255, 257, 16, 1, 3):
        with ahead_of_time.recording((9, 0)) as compiled:
            call(rows, kind)
        seen.add(tuple(kernel.hash for _, kernel in compiled))
    print(len(seen), len(compiled))
"""


def test_the_number_of_rows_does_not_recompile():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RECOMPILATION], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "4"] * 3
