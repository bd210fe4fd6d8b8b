"""block_attention: every backend against fp64 truth within the error budget, on poisoned prefixes and odd shapes."""

import math

import pytest
import torch

import dgemma_accel
from dgemma_accel.backends import BackendError
from dgemma_accel.reference.budget import check_block_attention

OP = "block_attention"


def make_case(
    batch,
    query_heads,
    kv_heads,
    length,
    head_dim,
    prefix=0,
    ranges=None,
    dtype=torch.float32,
    device="cpu",
    scale=1.0,
):
    """Inputs of a call; slots outside the ranges hold NaN, and every tensor is a non-contiguous view."""

    def heads(count, slots):
        # [B, length, H, D] storage seen as [B, H, length, D], as a projection leaves it.
        return (torch.randn(batch, slots, count, head_dim, device=device) * scale).to(dtype).transpose(1, 2)

    query, key, value = heads(query_heads, length), heads(kv_heads, length), heads(kv_heads, length)
    if not prefix:
        return [query, key, value, None, None, None, None]
    prefix_key, prefix_value = (
        (torch.randn(batch, kv_heads, prefix + 5, head_dim, device=device) * scale).to(dtype)[:, :, :prefix]
        for _ in "kv"
    )
    start = end = None
    if ranges is not None:
        start, end = (torch.tensor(column, dtype=torch.int32, device=device) for column in zip(*ranges))
        slots = torch.arange(prefix, device=device)
        outside = (slots < start[:, None]) | (slots >= end[:, None])
        for tensor in (prefix_key, prefix_value):
            tensor.masked_fill_(outside[:, None, :, None], math.nan)
    return [query, key, value, prefix_key, prefix_value, start, end]


def run(case, backend, scale=None, softcap=None, causal=False, window=None):
    query, key, value, prefix_key, prefix_value, start, end = case
    output, lse = dgemma_accel.block_attention(
        query, key, value, prefix_key, prefix_value, prefix_start=start, prefix_end=end,
        scale=scale, softcap=softcap, causal=causal, window=window, return_lse=True, backend=backend,
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return output, check_block_attention(output, lse, *case, scale, softcap, causal, window)


def supported_dtype(backend):
    """fp32 where the backend has it: the CUDA kernels are for 16-bit tensors."""
    return torch.bfloat16 if backend == "cuda" else torch.float32


CASES = {
    "square": dict(batch=1, query_heads=2, kv_heads=2, length=32, head_dim=64),
    "grouped": dict(batch=2, query_heads=8, kv_heads=2, length=20, head_dim=64, prefix=40),
    "one_query": dict(batch=1, query_heads=4, kv_heads=1, length=1, head_dim=64, prefix=33),
    "ranges": dict(
        batch=4,
        query_heads=4,
        kv_heads=2,
        length=17,
        head_dim=64,
        prefix=70,
        ranges=[(0, 70), (13, 70), (5, 31), (40, 40)],
    ),
    "odd_block": dict(
        batch=1, query_heads=6, kv_heads=2, length=37, head_dim=128, prefix=101, ranges=[(3, 99)]
    ),
    "sliding_layer": dict(batch=1, query_heads=4, kv_heads=2, length=32, head_dim=256, prefix=63),
    "global_layer": dict(
        batch=1, query_heads=8, kv_heads=1, length=16, head_dim=512, prefix=50, ranges=[(2, 50)]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_within_budget(backend, device, name, dtype):
    case = make_case(**CASES[name], dtype=dtype, device=device)
    if backend == "cuda" and dtype == torch.float32:
        with pytest.raises(BackendError, match="dtype: required float32, supported"):
            run(case, backend)
        return
    _, problems = run(case, backend)
    assert not problems


@pytest.mark.parametrize("name", ["ranges", "odd_block"])
def test_causal_softcap_and_scale(backend, device, name):
    for kwargs in (
        {"causal": True},
        {"softcap": 5.0},
        {"scale": 1.0},
        {"causal": True, "softcap": 20.0, "scale": 0.3},
    ):
        case = make_case(**CASES[name], dtype=supported_dtype(backend), device=device)
        _, problems = run(case, backend, **kwargs)
        assert not problems, kwargs


def test_large_scores_do_not_overflow(backend, device):
    case = make_case(1, 4, 2, 16, 64, prefix=48, scale=8.0, dtype=supported_dtype(backend), device=device)
    output, problems = run(case, backend, scale=1.0)
    assert not problems and bool(output.isfinite().all())


def test_empty_prefix_equals_none(backend, device):
    query, key, value, *_ = make_case(2, 4, 2, 19, 64, dtype=supported_dtype(backend), device=device)
    nowhere = torch.full((2, 2, 30, 64), math.nan, dtype=query.dtype, device=device)
    zero = torch.zeros(2, dtype=torch.int32, device=device)
    alone = dgemma_accel.block_attention(query, key, value, backend=backend)
    for start, end in ((zero, zero), (zero + 9, zero + 9), (zero + 20, zero + 3)):
        empty = dgemma_accel.block_attention(
            query, key, value, nowhere, nowhere, prefix_start=start, prefix_end=end, backend=backend
        )
        assert torch.allclose(alone, empty, atol=1e-6)


def test_bounds_may_have_any_stride(backend, device):
    case = make_case(**CASES["ranges"], dtype=supported_dtype(backend), device=device)
    *tensors, start, end = case
    expected, problems = run(case, backend)
    assert not problems
    table = torch.stack([start, end], 1)
    wide = table.flatten()
    for bounds in ((table[:, 0], table[:, 1]), (wide[::2], wide[1::2])):
        assert torch.equal(run([*tensors, *bounds], backend)[0], expected)

    # One slot for all rows; what follows it in memory would be one too.
    for tensor in tensors[3:]:
        tensor.normal_()
    slots = torch.tensor([12, 70, 5, 40], dtype=torch.int32, device=device)
    one, same = slots[:1].expand(4), torch.full_like(slots, 12)
    for bounds, plain in (((None, one), (None, same)), ((one, None), (same, None))):
        ours, expected = (run([*tensors, *pair], backend) for pair in (bounds, plain))
        assert torch.equal(ours[0], expected[0]) and not ours[1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix, ranges", [(0, None), (30, [(7, 7), (20, 3)]), (30, [(0, 30), (4, 19)])])
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3, 1e-46])
def test_any_scale(backend, device, scale, prefix, ranges, causal):
    """What no query sees is left out whatever its scores are scaled by."""
    case = make_case(2, 2, 1, 7, 64, prefix, ranges, dtype=supported_dtype(backend), device=device)
    _, problems = run(case, backend, scale=scale, causal=causal)
    assert not problems


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_other(backend, device, bad, prefix):
    for length in (5, 20):
        for place, causal, lost in (
            ("query", False, [2]),
            ("query", True, [2]),
            ("key", False, range(length)),
            ("key", True, range(2, length)),
        ):
            case = make_case(1, 2, 1, length, 64, prefix, dtype=supported_dtype(backend), device=device)
            case[place == "key"][:, :, 2] = bad
            output, lse = dgemma_accel.block_attention(
                *case[:5], causal=causal, return_lse=True, backend=backend
            )
            expected = torch.tensor([position in lost for position in range(length)], device=device)
            assert torch.equal(output.isnan(), expected[:, None].expand(output.shape)), (place, causal)
            assert torch.equal(lse.isnan(), expected.expand(lse.shape)), (place, causal)


WINDOWED = {
    "shorter_than_the_block": ("odd_block", 5),
    "itself_alone": ("odd_block", 1),
    "over_the_prefix_end": ("odd_block", 30),
    "several_tiles": ("long_block", 70),
    "more_than_there_is": ("odd_block", 2**40),
    "ranges": ("ranges", 25),
    "head_dim_512": ("global_layer", 21),
    "without_prefix": ("square", 7),
}
CASES_OF_WINDOWS = CASES | {
    "long_block": dict(
        batch=2, query_heads=2, kv_heads=1, length=150, head_dim=64, prefix=90, ranges=[(0, 90), (50, 71)]
    ),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_window(backend, device, name):
    shape, window = WINDOWED[name]
    case = make_case(**CASES_OF_WINDOWS[shape], dtype=supported_dtype(backend), device=device)
    for softcap in (None, 20.0):
        _, problems = run(case, backend, causal=True, window=window, softcap=softcap)
        assert not problems
    # One key more or less has to show.
    query, *_ = case
    if window < query.shape[2]:
        output, lse = dgemma_accel.block_attention(
            *case[:5], prefix_start=case[5], prefix_end=case[6], causal=True, window=window, return_lse=True,
            backend=backend,
        )  # fmt: skip
        scale = query.shape[-1] ** -0.5
        for other in (window - 1, window + 1):
            if other:
                lines = check_block_attention(output, lse, *case, scale, None, True, other)
                assert {line.split(":")[0] for line in lines} == {"output", "lse"}


def test_what_a_window_hides_is_not_read(backend, device):
    """Slots of the prefix that no query sees may hold anything, as those outside of [start, end)."""
    case = make_case(
        1, 2, 1, 20, 64, prefix=200, ranges=[(10, 190)], dtype=supported_dtype(backend), device=device
    )
    query, key, value, prefix_key, prefix_value, start, end = case
    expected, problems = run(case, backend, causal=True, window=40)
    assert not problems
    if backend == "reference":
        return
    # Query 0 sees itself and slots 151 ... 189.
    for tensor in (prefix_key, prefix_value):
        tensor[:, :, :151] = math.nan
    result = dgemma_accel.block_attention(
        query, key, value, prefix_key, prefix_value, prefix_start=start, prefix_end=end, causal=True, window=40,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(result, expected)


def test_window_agrees_with_a_mask_over_positions():
    """The mask of transformers' sliding layers: 0 <= distance < window, of a block after a left-padded prefix."""
    query, key, value, prefix_key, prefix_value, start, end = make_case(
        2, 4, 2, 21, 64, prefix=34, ranges=[(0, 30), (25, 34)]
    )
    for window in (1, 6, 12, 25, 100):
        result = dgemma_accel.block_attention(
            query, key, value, prefix_key, prefix_value, prefix_start=start, prefix_end=end, causal=True,
            window=window, backend="reference",
        )  # fmt: skip
        for b, (first, last) in enumerate(((0, 30), (25, 34))):
            keys = torch.cat([prefix_key[b, :, first:last], key[b]], 1)
            values = torch.cat([prefix_value[b, :, first:last], value[b]], 1)
            of_query = torch.arange(last - first, last - first + 21)[:, None]
            of_key = torch.arange(last - first + 21)[None]
            mask = (of_key <= of_query) & (of_query - of_key < window)
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[b], keys, values, attn_mask=mask, enable_gqa=True
            )
            assert torch.allclose(result[b], expected, atol=2e-6)


def test_agrees_with_scaled_dot_product_attention():
    query, key, value, prefix_key, prefix_value, *_ = make_case(2, 6, 3, 21, 64, prefix=34)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([prefix_key, key], 2),
        torch.cat([prefix_value, value], 2),
        enable_gqa=True,
        scale=0.7,
    )
    result = dgemma_accel.block_attention(
        query, key, value, prefix_key, prefix_value, scale=0.7, backend="reference"
    )
    assert torch.allclose(result, expected, atol=2e-6)


def test_budget_fails_zeros_wrong_scale_and_a_dropped_tile():
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(1, 4, 2, 16, 64, prefix=256, dtype=dtype)
        output, lse = dgemma_accel.block_attention(
            *case[:5], scale=0.125, return_lse=True, backend="reference"
        )
        arguments = (*case, 0.125, None, False)
        assert not check_block_attention(output, lse, *arguments)
        assert check_block_attention(torch.zeros_like(output), None, *arguments)
        assert check_block_attention(output, torch.zeros_like(lse), *arguments)
        warm, warm_lse = dgemma_accel.block_attention(
            *case[:5], scale=0.125 / 1.1, return_lse=True, backend="reference"
        )
        assert check_block_attention(warm, None, *arguments) and check_block_attention(
            output, warm_lse, *arguments
        )
        start = torch.tensor([32], dtype=torch.int32)
        tile, tile_lse = dgemma_accel.block_attention(
            *case[:5], prefix_start=start, scale=0.125, return_lse=True, backend="reference"
        )
        assert check_block_attention(tile, None, *arguments) and check_block_attention(
            output, tile_lse, *arguments
        )


Q, K = torch.zeros(2, 4, 8, 64), torch.zeros(2, 2, 8, 64)
P, BOUND = torch.zeros(2, 2, 10, 64), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, kwargs, error, text",
    [
        (("q", K, K), {}, TypeError, "query: a torch.Tensor expected"),
        ((Q[0], K, K), {}, ValueError, r"query: shape must be \[B, Hq, C, D\]"),
        ((Q.long(), K, K), {}, TypeError, "query: dtype must be one of"),
        ((Q, K.half(), K), {}, TypeError, "key: dtype must be one of float32"),
        ((Q[:, :3], K, K), {}, ValueError, "key: .* Hkv dividing Hq = 3"),
        ((Q, K[:1], K), {}, ValueError, "key: shape must be"),
        ((Q, K, K[:, :1]), {}, ValueError, "value: shape must be"),
        ((Q, K, K[..., :32]), {}, ValueError, "value: shape must be"),
        ((Q[:, :, :0], K[:, :, :0], K[:, :, :0]), {}, ValueError, "query: no dimension may be 0"),
        ((Q, K, K, P), {}, ValueError, "prefix_key and prefix_value: give both or neither"),
        ((Q, K, K, P, P[:, :, :4]), {}, ValueError, "prefix_value: shape must be"),
        ((Q, K, K, P.to("meta"), P), {}, ValueError, "prefix_key: must be on cpu like query, got meta"),
        ((Q, K, K), {"prefix_end": BOUND}, ValueError, "prefix_end: given without a prefix"),
        ((Q, K, K, P, P), {"prefix_end": BOUND.long()}, TypeError, "prefix_end: dtype must be one of int32"),
        ((Q, K, K, P, P), {"prefix_end": BOUND[:1]}, ValueError, "prefix_end: shape must be"),
        (
            (Q, K, K, P, P),
            {"prefix_end": BOUND + 11},
            ValueError,
            r"prefix_end: values must be in \[0, 10\], got 11",
        ),
        (
            (Q, K, K, P, P),
            {"prefix_start": BOUND - 1},
            ValueError,
            r"prefix_start: values must be in \[0, 10\], got -1",
        ),
        ((Q, K, K), {"scale": math.nan}, ValueError, "scale: must be finite"),
        ((Q, K, K), {"scale": "1"}, TypeError, "scale: a number expected"),
        ((Q, K, K), {"causal": True, "window": 0}, ValueError, "window: must be at least 1, got 0"),
        ((Q, K, K), {"causal": True, "window": 4.0}, TypeError, "window: an int or None expected, got float"),
        ((Q, K, K), {"window": 4}, ValueError, "window: only for causal=True"),
        ((Q, K, K), {"softcap": 0.0}, ValueError, "softcap: must be finite and in"),
    ],
)
def test_bad_input(arguments, kwargs, error, text):
    with pytest.raises(error, match=text):
        dgemma_accel.block_attention(*arguments, **{"backend": "reference", **kwargs})


def test_opcheck(backend, device):
    query, key, value, prefix_key, prefix_value, start, end = make_case(
        2, 4, 2, 16, 64, prefix=32, ranges=[(0, 32), (3, 20)], dtype=supported_dtype(backend), device=device
    )
    for window in (None, 9):
        arguments = (
            query, key, value, prefix_key, prefix_value, start, end, 0.125, None, True, window, False, backend,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.dgemma.block_attention.default, arguments)


def test_compile_fullgraph(backend, device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value, prefix):
        return dgemma_accel.block_attention(query * 2, key, value, prefix, prefix, backend=backend) + 1

    query, key, value, prefix, *_ = make_case(
        1, 4, 2, 16, 64, prefix=32, dtype=supported_dtype(backend), device=device
    )
    expected = dgemma_accel.block_attention(query * 2, key, value, prefix, prefix, backend=backend) + 1
    assert torch.equal(attend(query, key, value, prefix), expected)
