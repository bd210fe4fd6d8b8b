"""What the public tests of block_attention do not reach in the Triton kernel: forced splits and their choice."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton_attention = pytest.importorskip("dgemma_accel.triton_kernels.block_attention")

from dgemma_accel.triton_kernels import common  # noqa: E402

from dgemma_accel import configs  # noqa: E402
from dgemma_accel.reference.budget import check_block_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    triton_attention.unavailable() is not None, reason=str(triton_attention.unavailable())
)


def make_case(batch, heads, kv_heads, length, head_dim, prefix, ranges, dtype=torch.float32):
    query = torch.randn(batch, length, heads, head_dim, device=DEVICE).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, kv_heads, length, head_dim, device=DEVICE).to(dtype) for _ in "kv")
    prefix_key, prefix_value = (
        torch.randn(batch, kv_heads, prefix, head_dim, device=DEVICE).to(dtype) for _ in "kv"
    )
    start, end = (torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in zip(*ranges))
    slots = torch.arange(prefix, device=DEVICE)
    outside = (slots < start[:, None]) | (slots >= end[:, None])
    for tensor in (prefix_key, prefix_value):
        tensor.masked_fill_(outside[:, None, :, None], math.nan)
    return [query, key, value, prefix_key, prefix_value, start, end]


@pytest.mark.parametrize("splits, causal, softcap", [(2, False, None), (3, True, 15.0), (9, False, None)])
def test_splits_agree_with_the_truth(splits, causal, softcap):
    # Row 1 has an empty prefix and row 2 a short one: some of their splits get no tile at all.
    case = make_case(3, 2, 1, 19, 64, 150, [(0, 150), (60, 60), (3, 40)])
    arguments = (*case, 0.2, softcap, causal)
    output, lse = triton_attention.block_attention(*arguments, splits=splits)
    assert not check_block_attention(output, lse, *arguments)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits_of_a_window(splits):
    # With seven splits most rows have splits that hold none of their keys.
    case = make_case(2, 2, 1, 90, 64, 150, [(0, 150), (60, 71)])
    arguments = (*case, 0.2, None, True, 30)
    output, lse = triton_attention.block_attention(*arguments, splits=splits)
    assert not check_block_attention(output, lse, *arguments)


def test_splits_in_bf16_and_a_head_that_no_power_of_two_divides():
    case = make_case(1, 6, 2, 9, 96, 130, [(1, 129)], torch.bfloat16)
    arguments = (*case, 0.1, None, False)
    for splits in (1, 4):
        output, lse = triton_attention.block_attention(*arguments, splits=splits)
        assert not check_block_attention(output, lse, *arguments)


def test_a_wide_cache_takes_64_bit_offsets():
    # The stride of a slot times the tile exceeds 31 bits; only the pages that are touched exist.
    query, key, value, *_ = make_case(1, 2, 1, 4, 16, 8, [(0, 8)])
    stride = 2**27
    storage = torch.empty(3 * stride + 64, device="meta" if DEVICE == "cuda" else "cpu")
    if DEVICE == "cuda":
        pytest.skip("allocates the whole cache on a GPU")
    wide = torch.as_strided(storage, (1, 1, 3, 16), (4 * stride, 4 * stride, stride, 1))
    wide.copy_(torch.randn(1, 1, 3, 16))
    arguments = (query, key, value, wide, wide, None, None, 0.25, None, False)
    output, lse = triton_attention.block_attention(*arguments, splits=1)
    assert not check_block_attention(output, lse, *arguments)


class Launches:
    """Stands for a kernel and keeps what it would be launched with."""

    def __init__(self):
        self.grids, self.named = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.grids.append(grid)
            self.named.append(named)

        return launch


def attention_of_a_layer(
    monkeypatch, capability, multiprocessors, prefix, batch=1, layout="heads first", **call
):
    """A global layer of the model on a GPU that is not there: (launches of the attention, launches of the merge)."""
    launches = Launches(), Launches()
    for name, recorder in zip(("block_attention_kernel", "merge_splits_kernel"), launches):
        monkeypatch.setattr(triton_attention, name, recorder)
    monkeypatch.setattr(common, "target", capability)
    monkeypatch.setattr(triton_attention, "multiprocessors", lambda tensor: multiprocessors)
    empty = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
    query, key = empty(batch, 16, 256, 512), empty(batch, 2, 256, 512)
    if layout == "heads first":
        cache = empty(batch, 2, prefix, 512)
    else:
        cache = empty(batch, prefix, 2, 512).transpose(1, 2)
    triton_attention.block_attention(query, key, key, cache, cache, None, None, 1.0, None, False, **call)
    return launches


@pytest.mark.parametrize("layout", ["heads first", "slots first"])
@pytest.mark.parametrize("capability", [(9, 0), (12, 0)])
def test_long_contexts_keep_32_bit_offsets(monkeypatch, capability, layout):
    """The stride of a head or a batch grows with the context; only that of a slot enters a tile's offsets."""
    for prefix in (4096, 131_072, 2**21):
        attention, _ = attention_of_a_layer(monkeypatch, capability, 132, prefix, batch=2, layout=layout)
        assert attention.named[0]["NARROW"] is True


@pytest.mark.parametrize("prefix", [8192, 32_768, 131_072])
@pytest.mark.parametrize("capability, multiprocessors", [((9, 0), 132), ((12, 0), 188)])
def test_partial_results_stay_small(monkeypatch, capability, multiprocessors, prefix):
    partial_results = 2 * 2048 * (512 + 1) * 4
    attention, merge = attention_of_a_layer(monkeypatch, capability, multiprocessors, prefix)
    programs = attention.grids[0][0] * attention.grids[0][1]
    # Eight query heads to a KV head; tiles have other shapes where the compiler cannot slice scores.
    tiles = 2048 // attention.named[0]["BLOCK_M"] * 512 // attention.named[0]["BLOCK_E"]
    splits = attention.grids[0][0] // tiles
    assert len(merge.grids) == 1 and 2 <= splits <= triton_attention.SCRATCH // partial_results
    # At most a sixth of the GPU idles: what the splits are for.
    waves = -(-programs // multiprocessors)
    assert programs >= waves * multiprocessors * 5 / 6
    # Sixteen canvases fill the GPU, and one split of theirs alone would exceed the limit.
    attention, merge = attention_of_a_layer(monkeypatch, capability, multiprocessors, prefix, batch=16)
    assert not merge.grids and attention.grids[0][0] == tiles


@pytest.fixture
def poison():
    """Fresh tensors hold NaN, so what is read and never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("splits", [3, 9, 40])
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 11)])
def test_partial_results_that_no_split_wrote_are_not_read(poison, splits, causal, window):
    assert torch.empty(3).isnan().all()
    case = make_case(3, 2, 1, 19, 64, 150, [(0, 150), (60, 60), (3, 40)])
    arguments = (*case, 0.2, None, causal, window)
    output, lse = triton_attention.block_attention(*arguments, splits=splits)
    assert not check_block_attention(output, lse, *arguments)


def test_a_split_without_tiles_writes_its_log_sum_exp_alone(poison, monkeypatch):
    kept = []

    class Merge:
        def __getitem__(self, grid):
            return lambda *arguments, **named: kept.append(arguments[:2])

    monkeypatch.setattr(triton_attention, "merge_splits_kernel", Merge())
    case = make_case(1, 2, 1, 19, 64, 150, [(60, 60)])
    triton_attention.block_attention(*case, 0.2, None, False, splits=9)
    partial, partial_lse = kept[0]
    empty = partial_lse[0, :, 0] == -math.inf
    assert empty.any(1).tolist() == empty.all(1).tolist() and 0 < empty.any(1).sum() < 9
    assert torch.equal(partial[0, :, 0].isnan().all(-1), empty)


def test_rows_whose_scores_are_all_minus_infinity(poison):
    """They weigh nothing, with splits as without: 0, and -inf as log-sum-exp. The specification divides 0 by 0."""
    case = make_case(1, 2, 1, 5, 64, 40, [(0, 40)])
    case[0][:, 0] = 1.0
    for key in (case[1], case[3]):
        key.fill_(-math.inf)
    for splits in (1, 3):
        output, lse = triton_attention.block_attention(*case, 0.2, None, False, splits=splits)
        assert (output[:, 0] == 0).all() and (lse[:, 0] == -math.inf).all()


@pytest.fixture
def shared_columns(monkeypatch):
    """Several programs share the value columns of a row; fresh tensors hold NaN, so a column that none writes shows."""
    select = configs.select

    def share(block_e, **changes):
        def changed(*arguments, **call):
            return select(*arguments, **call) | {"block_e": block_e} | changes

        monkeypatch.setattr(configs, "select", changed)

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield share
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "head_dim, block_e, causal, softcap, window",
    # 70 columns in tiles of 32: the last one is partly empty, and a fourth would be wholly so.
    [
        (64, 32, False, None, None),
        (70, 32, True, 15.0, None),
        (96, 64, True, None, 30),
        (64, 16, False, 9.0, None),
    ],
)
def test_programs_that_share_the_columns(shared_columns, head_dim, block_e, causal, softcap, window, splits):
    shared_columns(block_e, block_m=32, block_n=16)
    case = make_case(2, 4, 2, 19, head_dim, 90, [(3, 90), (60, 60)])
    arguments = (*case, 0.2, softcap, causal, window)
    output, lse = triton_attention.block_attention(*arguments, splits=splits)
    assert not check_block_attention(output, lse, *arguments)
    # A program whose columns are left out has to show.
    output[..., -(head_dim % block_e or block_e) :] = 0
    assert check_block_attention(output, lse, *arguments)


def test_shared_columns_at_full_width_in_bf16(shared_columns):
    """The shape that `try` lists for sm_90, which is smaller in no direction but the context."""
    shared_columns(256, block_m=128, block_n=32)
    case = make_case(1, 8, 1, 17, 512, 70, [(2, 69)], torch.bfloat16)
    for causal, window in ((False, None), (True, 21)):
        arguments = (*case, 1.0, None, causal, window)
        output, lse = triton_attention.block_attention(*arguments, splits=2)
        assert not check_block_attention(output, lse, *arguments)
        _, whole_lse = triton_attention.block_attention(*arguments, splits=1)
        assert torch.allclose(lse, whole_lse, atol=1e-5)


def test_programs_that_share_columns_count_as_programs(shared_columns, monkeypatch):
    asked = []
    monkeypatch.setattr(
        triton_attention, "split_count", lambda programs, tiles, *_: asked.append(programs) or 1
    )
    case = make_case(1, 2, 1, 5, 64, 30, [(0, 30)])
    triton_attention.block_attention(*case, 0.1, None, False)
    shared_columns(16)
    triton_attention.block_attention(*case, 0.1, None, False)
    assert asked[1] == 4 * asked[0]


class Operators(TorchDispatchMode):
    """Records the names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_prefix_is_neither_copied_nor_written():
    case = make_case(1, 4, 2, 8, 64, 64, [(4, 60)])
    before = [tensor.clone() for tensor in case]
    with Operators() as operators:
        triton_attention.block_attention(*case, 0.1, None, False, splits=1)
    assert operators.names and not operators.names & {"clone", "_to_copy", "cat", "repeat", "expand", "index"}
    for old, new in zip(before, case):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


def test_a_window_bounds_the_splits(monkeypatch):
    asked = []
    monkeypatch.setattr(triton_attention, "split_count", lambda programs, tiles, *_: asked.append(tiles) or 1)
    case = make_case(1, 2, 1, 5, 64, 900, [(0, 900)])
    for window in (None, 8, 2**40):
        triton_attention.block_attention(*case, 0.1, None, True, window)
    assert asked[0] == asked[2] and asked[1] <= 4


def test_split_count_fills_the_gpu():
    count = triton_attention.split_count
    # The model's global layers on 132 multiprocessors: 2 KV heads x 32 row tiles are half a wave.
    for tiles in (256, 1024, 4096):
        splits = count(64, tiles, 132)
        waves = -(-64 * splits // 132)
        assert splits > 1 and waves * 132 <= 64 * splits * 1.1
    assert count(64, 1, 132) == 1
    assert count(132, 100, 132) == 1
    assert count(1, 8, 132) <= 8
    # A costly merge takes fewer splits, and a limit is kept.
    assert 1 <= count(64, 2064, 188, 8.0) < count(64, 2064, 188)
    assert count(64, 2064, 188, 8.0, 3) <= 3 and count(64, 2064, 188, 8.0, 0) == 1
    assert count(1, 10_000, 132) == triton_attention.MAX_SPLITS
