"""experts: every backend against fp64 truth, with every kind of routing."""

import pytest
import torch

import dgemma_accel
from dgemma_accel.reference.budget_experts import check_experts
from dgemma_accel.reference.quantization import dequantize, quantize, scale_shape

OP = "experts"
# Not of every size and dtype; see test_cuda_experts.py.
WITHOUT = ("cuda",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_case(rows, top_k, count, width, embedding, dtype, device, *, skewed=False):
    """(hidden, index, weights, gate_up, down), K different experts a row; skewed: all rows choose the first."""
    scores = torch.rand(rows, count)
    if skewed:
        scores[:, 0] = 2.0
        scores[:, count // 2 :] -= 2.0
    weights = torch.rand(rows, top_k) + 0.1
    tensors = (
        torch.randn(rows, embedding).to(dtype),
        scores.topk(top_k).indices,
        weights / weights.sum(-1, keepdim=True),
        (torch.randn(count, 2 * width, embedding) * embedding**-0.5).to(dtype),
        (torch.randn(count, embedding, width) * width**-0.5).to(dtype),
    )
    return tuple(tensor.to(device) for tensor in tensors)


def uneven_fp8(weight):
    """(float8_e4m3fn weights, scales) of fp32 weights [..., N, K], whose blocks are made to differ 50-fold in size."""
    size = torch.exp(4 * torch.rand(scale_shape(weight.shape), device=weight.device) - 2)
    return quantize(weight * dequantize(torch.ones_like(weight), size, torch.float32))


def uneven_fp8_rows(weight):
    """The same with a scale for each row, [..., N, 1]."""
    weight = weight * torch.exp(4 * torch.rand(*weight.shape[:-1], 1, device=weight.device) - 2)
    scale = weight.abs().amax(-1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


BLOCKS, ROWS, PLAIN = uneven_fp8, uneven_fp8_rows, None


def make_fp8_case(
    rows, top_k, count, width, embedding, dtype, device, *, skewed=False, which=(BLOCKS, BLOCKS)
):
    """(the arguments of `make_case` with FP8 weights, the scales as keywords); which: of gate_up, of down."""
    case = list(make_case(rows, top_k, count, width, embedding, torch.float32, device, skewed=skewed))
    case[0], scales = case[0].to(dtype), {}
    for position, name, quantised in ((3, "gate_up_scale", which[0]), (4, "down_scale", which[1])):
        if quantised:
            case[position], scales[name] = quantised(case[position])
        else:
            case[position] = case[position].to(dtype)
    return tuple(case), scales


def run(case, backend, **settings):
    result = dgemma_accel.experts(*case, backend=backend, **settings)
    return result, check_experts(result, *case, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, top_k, count, width, embedding",
    [(1, 1, 1, 1, 1), (7, 3, 5, 24, 40), (40, 4, 16, 70, 130), (130, 2, 3, 16, 96)],
)
def test_within_budget(backend, device, dtype, rows, top_k, count, width, embedding):
    case = make_case(rows, top_k, count, width, embedding, dtype, device)
    result, problems = run(case, backend)
    assert result.shape == (rows, embedding) and result.dtype == dtype
    assert not problems


def test_skewed_routing(backend, device):
    """One expert has every row, half of them have none."""
    case = make_case(100, 3, 12, 20, 48, torch.float32, device, skewed=True)
    assert (case[1] == 0).sum() == 100 and not (case[1] >= 6).any()
    assert not run(case, backend)[1]


def test_every_row_to_one_expert_many_times(backend, device):
    hidden, index, weights, gate_up, down = make_case(33, 4, 5, 16, 32, torch.float32, device)
    case = (hidden, torch.full_like(index, 3), weights, gate_up, down)
    result, problems = run(case, backend)
    assert not problems
    single = dgemma_accel.experts(
        hidden, index[:, :1] * 0 + 3, weights.sum(1, True), gate_up, down, backend=backend
    )
    assert torch.allclose(result, single, atol=1e-5)


def test_choices_of_no_expert_add_nothing(backend, device):
    """X means no expert; its weight may be anything, and a row may have chosen nothing at all."""
    hidden, index, weights, gate_up, down = make_case(20, 3, 6, 16, 32, torch.float32, device)
    index[::2, 1], weights[::2, 1] = 6, float("nan")
    index[4] = 6
    result, problems = run((hidden, index, weights, gate_up, down), backend)
    assert not problems
    assert not result[4].any() and result[5].any()


def test_silu(backend, device):
    case = make_case(9, 2, 4, 24, 40, torch.float32, device)
    result, problems = run(case, backend, activation="silu")
    assert not problems and check_experts(result, *case, activation="gelu_tanh")


def test_large_gates(backend, device):
    """Where e^-g overflows the gate is 0 or the identity, not NaN."""
    hidden, index, weights, gate_up, down = make_case(8, 2, 3, 16, 32, torch.float32, device)
    for activation in ("gelu_tanh", "silu"):
        result, problems = run((hidden * 300, index, weights, gate_up, down), backend, activation=activation)
        assert not problems and result.isfinite().all()


def test_views(backend, device):
    """Strides of every tensor are respected, and what lies beside a view is not read."""
    hidden, index, weights, gate_up, down = make_case(11, 3, 4, 24, 40, torch.float32, device)

    def inside(tensor, *slices):
        wide = torch.full([2 * size + 3 for size in tensor.shape], float("nan"), device=device)
        view = wide[tuple(slice(1, 1 + step * size, step) for size, step in zip(tensor.shape, slices))]
        return view.copy_(tensor)

    case = (
        inside(hidden, 2, 1), index.t().contiguous().t(), inside(weights, 1, 2), inside(gate_up, 2, 1, 1),
        inside(down, 2, 1, 2),
    )  # fmt: skip
    result, problems = run(case, backend)
    assert not problems
    assert torch.allclose(result, run((hidden, index, weights, gate_up, down), backend)[0], atol=1e-6)


@pytest.mark.parametrize("rows, top_k", [(0, 2), (3, 0)])
def test_nothing_to_do(backend, device, rows, top_k):
    case = make_case(rows, top_k, 4, 16, 32, torch.float32, device)
    result, _ = run(case, backend)
    assert result.shape == (rows, 32) and not result.any()


def test_weights_of_the_models_dtype(backend, device):
    hidden, index, weights, gate_up, down = make_case(9, 2, 4, 24, 40, torch.bfloat16, device)
    assert not run((hidden, index, weights.bfloat16(), gate_up, down), backend)[1]


def test_runs_repeat_and_rows_do_not_depend_on_others(backend, device):
    case = make_case(60, 4, 8, 24, 40, torch.float32, device)
    first, again = run(case, backend)[0], run(case, backend)[0]
    assert torch.equal(first, again)
    part = dgemma_accel.experts(*(t[10:20] for t in case[:3]), *case[3:], backend=backend)
    assert torch.allclose(first[10:20], part, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (128, 256), (150, 301)])
def test_quantize_block_by_block(device, dtype, rows, columns):
    weight = torch.randn(2, rows, columns, device=device).to(dtype)
    weight[1, :128, :128] = 0
    codes, scale = quantize(weight)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert codes.shape == weight.shape and scale.shape == (2, -(-rows // 128), -(-columns // 128))
    for number, down, across in torch.cartesian_prod(*map(torch.arange, scale.shape)):
        place = number, slice(down * 128, down * 128 + 128), slice(across * 128, across * 128 + 128)
        block = weight[place].float()
        factor = max(block.abs().max() / 448, torch.finfo(torch.float32).tiny)
        assert scale[number, down, across] == factor
        assert torch.equal(codes[place].float(), (block / factor).to(torch.float8_e4m3fn).float())
    assert codes.float().abs().amax((1, 2))[0] == 448
    # Three bits of mantissa: half a step is 1/16 of a number, and 2^-10 scales below the smallest normal one.
    limit = torch.maximum(
        weight.abs().double() / 16, dequantize(torch.ones_like(codes), scale, torch.float64) / 1024
    )
    assert ((dequantize(codes, scale, torch.float64) - weight.double()).abs() <= limit).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantize_shows_weights_that_are_not_finite(value):
    weight = torch.ones(200, 3)
    weight[150, 1] = value
    assert quantize(weight)[1].isfinite().tolist() == [[True], [False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, top_k, count, width, embedding",
    # One block and less; the up projection from inside a block, as in DiffusionGemma; on a block's border; odd sizes.
    [(1, 1, 1, 1, 1), (7, 3, 5, 24, 40), (33, 3, 4, 192, 256), (20, 2, 3, 128, 384), (12, 2, 3, 101, 263)],
)
@pytest.mark.parametrize("kind", [BLOCKS, ROWS], ids=["by block", "by row"])
def test_fp8_weights_within_budget(backend, device, dtype, rows, top_k, count, width, embedding, kind):
    case, scales = make_fp8_case(rows, top_k, count, width, embedding, dtype, device, which=(kind, kind))
    if kind is ROWS:
        assert scales["gate_up_scale"].shape == (count, 2 * width, 1)
    result, problems = run(case, backend, **scales)
    assert result.shape == (rows, embedding) and result.dtype == dtype
    assert not problems


@pytest.mark.parametrize(
    "which",
    [(BLOCKS, PLAIN), (PLAIN, BLOCKS), (ROWS, PLAIN), (PLAIN, ROWS), (BLOCKS, ROWS), (ROWS, BLOCKS)],
    ids=["gate_up", "down", "gate_up by row", "down by row", "down alone by row", "gate_up alone by row"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_two_kinds(backend, device, dtype, which):
    case, scales = make_fp8_case(30, 3, 5, 100, 200, dtype, device, which=which)
    assert len(scales) == 2 - which.count(PLAIN) and not run(case, backend, **scales)[1]


def test_fp8_weights_with_skewed_routing_and_choices_of_no_expert(backend, device):
    """Experts without rows, one with all of them, and rows that chose nobody."""
    case, scales = make_fp8_case(60, 3, 8, 70, 150, torch.float32, device, skewed=True)
    index, weights = case[1:3]
    index[::3, 1], weights[::3, 1] = 8, float("nan")
    index[4] = 8
    result, problems = run(case, backend, **scales, activation="silu")
    assert not problems and not result[4].any() and result[5].any()


@pytest.mark.parametrize("by_row", [False, True], ids=["by block", "by row"])
def test_fp8_weights_of_any_magnitude(backend, device, by_row):
    """The smallest and largest codes, and scales that would leave fp16."""
    hidden, index, weights, _, _ = make_case(9, 2, 3, 16, 32, torch.float16, device)
    codes = torch.arange(256, dtype=torch.int16, device=device).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]
    gate_up, down = (codes[torch.randint(len(codes), s, device=device)] for s in ((3, 32, 32), (3, 32, 16)))
    scales = {name: torch.full((3, 32 if by_row else 1, 1), value, device=device) for name, value in (
        ("gate_up_scale", 2.0**-12), ("down_scale", 2.0**-20))}  # fmt: skip
    assert not run((hidden, index, weights, gate_up, down), backend, **scales)[1]


@pytest.mark.parametrize("kind", [BLOCKS, ROWS], ids=["by block", "by row"])
def test_views_of_fp8_weights_and_scales(backend, device, kind):
    (*rows, gate_up, down), scales = make_fp8_case(
        11, 3, 4, 96, 160, torch.float32, device, which=(kind, kind)
    )
    expected = run((*rows, gate_up, down), backend, **scales)[0]

    def apart(tensor):
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), device=device).to(
            tensor.dtype
        )
        return wide[..., ::2].copy_(tensor)

    scales = {name: apart(scale) for name, scale in scales.items()}
    assert torch.equal(run((*rows, apart(gate_up), apart(down)), backend, **scales)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_fails_wrong_scales(dtype):
    """A neighbour's scale, none at all, blocks counted from the first row of the up projection, a dropped tile."""
    case, scales = make_fp8_case(24, 3, 4, 192, 256, dtype, "cpu")
    assert not run(case, "reference", **scales)[1]
    gate_up, down = scales["gate_up_scale"], scales["down_scale"]
    assert gate_up.shape == (4, 3, 2) and down.shape == (4, 2, 2)

    def fails(computed, **changed):
        wrong = dgemma_accel.experts(*computed, **scales | changed, backend="reference")
        return bool(check_experts(wrong, *case, **scales))

    assert check_experts(torch.zeros_like(case[0]), *case, **scales)
    for name, scale in scales.items():
        assert fails(case, **{name: torch.ones_like(scale)})
        assert all(fails(case, **{name: scale.roll(1, dimension)}) for dimension in range(3))
        one_block = scale.clone()
        one_block[2, 0, 1] = scale[2, 1, 1]
        assert fails(case, **{name: one_block})
    for position, part in (
        (3, (slice(None), slice(176, 192))),
        (4, (slice(None), slice(None), slice(128, 144))),
    ):
        narrow = case[position].clone()
        narrow[part] = 0
        assert fails((*case[:position], narrow, *case[position + 1 :]))

    def through(gate_scale, up_scale):
        """The 192 rows of each projection with scales of their own, dequantised outside the op."""
        halves = zip(case[3].chunk(2, 1), (gate_scale, up_scale))
        weight = torch.cat([dequantize(half, scale, torch.float32) for half, scale in halves], 1)
        under = dequantize(case[4], down, torch.float32)
        hidden, index, weights = case[0].float(), *case[1:3]
        result = dgemma_accel.experts(hidden, index, weights, weight, under, backend="reference")
        return check_experts(result.to(dtype), *case, **scales)

    # Rows 128 to 191 of the gate and 0 to 63 of the up projection share the middle block; a block that began with the
    # up projection would hold rows 0 to 127 of it.
    assert through(gate_up[:, :2], gate_up[:, 1:])
    assert through(gate_up[:, 1:], gate_up[:, :2])
    equal = gate_up.clone()
    equal[:, 2] = gate_up[:, 1]
    scales["gate_up_scale"] = equal
    assert not through(equal[:, :2], equal[:, 1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_fails_wrong_scales_by_row(dtype):
    """A neighbour's scale, none at all, the gate's for the up projection, one row's, another expert's."""
    case, scales = make_fp8_case(24, 3, 4, 40, 72, dtype, "cpu", which=(ROWS, ROWS))
    assert not run(case, "reference", **scales)[1]

    def fails(**changed):
        wrong = dgemma_accel.experts(*case, **scales | changed, backend="reference")
        return bool(check_experts(wrong, *case, **scales))

    for name, scale in scales.items():
        assert fails(**{name: torch.ones_like(scale)})
        assert fails(**{name: scale.roll(1, 0)}) and fails(**{name: scale.roll(1, 1)})
        one_row = scale.clone()
        one_row[case[1][0, 0], 5] *= 4
        assert fails(**{name: one_row})
    gate = scales["gate_up_scale"][:, :40]
    assert fails(gate_up_scale=torch.cat([gate, gate], 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_fails_zeros_a_dropped_expert_and_a_wrong_weight(dtype):
    hidden, index, weights, gate_up, down = case = make_case(32, 4, 8, 64, 96, dtype, "cpu")
    result, problems = run(case, "reference")
    assert not problems
    assert check_experts(torch.zeros_like(result), *case)
    without = torch.where(index == 5, 8, index)
    assert check_experts(dgemma_accel.experts(hidden, without, *case[2:], backend="reference"), *case)
    one_choice = index.clone()
    one_choice[7, 2] = 8
    assert check_experts(dgemma_accel.experts(hidden, one_choice, *case[2:], backend="reference"), *case)
    wrong = dgemma_accel.experts(hidden, index, weights * 1.1, gate_up, down, backend="reference")
    assert check_experts(wrong, *case)
    swapped = torch.cat(gate_up.chunk(2, 1)[::-1], 1)
    assert check_experts(
        dgemma_accel.experts(hidden, index, weights, swapped, down, backend="reference"), *case
    )
    assert check_experts(dgemma_accel.experts(*case, activation="silu", backend="reference"), *case)
    narrow = gate_up.clone()
    narrow[:, 48:64] = 0
    assert check_experts(
        dgemma_accel.experts(hidden, index, weights, narrow, down, backend="reference"), *case
    )


H, I, W, GU, D = make_case(3, 2, 4, 5, 6, torch.float32, "cpu")
(_, _, _, GU8, D8), S8 = make_fp8_case(3, 2, 4, 5, 6, torch.float32, "cpu")
GS, DS = S8["gate_up_scale"], S8["down_scale"]


@pytest.mark.parametrize(
    "arguments, kwargs, error, text",
    [
        ((H.tolist(), I, W, GU, D), {}, TypeError, "hidden: a torch.Tensor expected, got list"),
        ((H.double(), I, W, GU, D), {}, TypeError, "hidden: dtype must be one of"),
        ((H[0], I, W, GU, D), {}, ValueError, r"hidden: shape must be \[R, E\]"),
        ((H, I.int(), W, GU, D), {}, TypeError, "index: dtype must be one of int64, got int32"),
        ((H, I[:2], W, GU, D), {}, ValueError, r"index: shape must be \[3, K\] like hidden, got \(2, 2\)"),
        ((H, I, W[:, :1], GU, D), {}, ValueError, r"weights: shape must be \(3, 2\)"),
        ((H, I, W.long(), GU, D), {}, TypeError, "weights: dtype must be one of"),
        ((H, I, W, GU[:, :9], D), {}, ValueError, r"gate_up: shape must be \(4, 10, 6\)"),
        ((H, I, W, GU[:3], D), {}, ValueError, "gate_up: shape must be"),
        (
            (H, I, W, GU.half(), D),
            {},
            TypeError,
            "gate_up: dtype must be one of float32, float8_e4m3fn, uint8, got float16",
        ),
        (
            (H, I, W, GU, D.half()),
            {},
            TypeError,
            "down: dtype must be one of float32, float8_e4m3fn, uint8, got float16",
        ),
        ((H, I, W, GU, D[:, :5]), {}, ValueError, r"down: shape must be \[X, 6, I\] like hidden"),
        ((H, I, W, GU, D[0]), {}, ValueError, "down: shape must be"),
        ((H, I, W, GU.to("meta"), D), {}, ValueError, "gate_up: must be on cpu like hidden, got meta"),
        ((H, I - 4, W, GU, D), {}, ValueError, r"index: values must be in \[0, 4\], got -"),
        ((H, I + 4, W, GU, D), {}, ValueError, r"index: values must be in \[0, 4\]"),
        (
            (H, I, W, GU8, D),
            {},
            ValueError,
            r"gate_up_scale: float8_e4m3fn weights need their scales, \(4, 1, 1\)",
        ),
        ((H, I, W, GU, D8), {}, ValueError, "down_scale: float8_e4m3fn weights need their scales"),
        (
            (H, I, W, GU, D),
            {"gate_up_scale": GS},
            ValueError,
            "gate_up_scale: only float8.*gate_up is float32",
        ),
        ((H, I, W, GU8, D), {"gate_up_scale": GS, "down_scale": DS}, ValueError, "down_scale: only float8"),
        (
            (H, I, W, GU8, D),
            {"gate_up_scale": GS[0]},
            ValueError,
            r"gate_up_scale: shape must be \(4, 1, 1\) \(one for .* or \(4, 10, 1\), one for each row",
        ),
        (
            (H, I, W, GU8, D),
            {"gate_up_scale": torch.ones(4, 5, 1)},
            ValueError,
            "gate_up_scale: shape must be",
        ),
        ((H, I, W, GU8, D), {"gate_up_scale": torch.ones(4, 10)}, ValueError, "gate_up_scale: shape must be"),
        (
            (H, I, W, GU8, D),
            {"gate_up_scale": GS.half()},
            TypeError,
            "gate_up_scale: dtype must be one of float32",
        ),
        (
            (H, I, W, GU8, D),
            {"gate_up_scale": 1.0},
            TypeError,
            "gate_up_scale: a torch.Tensor expected, got float",
        ),
        (
            (H, I, W, GU8, D),
            {"gate_up_scale": GS.to("meta")},
            ValueError,
            "gate_up_scale: must be on cpu like gate_up",
        ),
        ((H, I, W, GU8.view(torch.int8), D), {}, TypeError, "gate_up: dtype must be one of float32, float8"),
        ((GU8[0], I, W, GU8, D), {}, TypeError, "hidden: dtype must be one of"),
        ((H, I, W, GU, D), {"activation": "relu"}, ValueError, "activation: must be one of"),
        ((H, I, W, GU, D), {"backend": "cpp"}, dgemma_accel.backends.BackendError, "no cpp implementation"),
    ],
)
def test_bad_input(arguments, kwargs, error, text):
    with pytest.raises(error, match=text):
        dgemma_accel.experts(*arguments, **{"backend": "reference"} | kwargs)


def test_opcheck(backend, device):
    case = make_case(6, 2, 4, 16, 32, torch.float32, device)
    torch.library.opcheck(torch.ops.dgemma.experts.default, (*case, "gelu_tanh", False, backend))
    case, scales = make_fp8_case(6, 2, 4, 16, 32, torch.float32, device)
    settings = ("gelu_tanh", False, backend, *scales.values())
    # Whether arguments were written to is compared by arithmetic that torch does not have for FP8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.dgemma.experts.default, (*case, *settings), test_utils=tests)


def test_compiles_whole(backend, device):
    case = make_case(6, 2, 4, 16, 32, torch.float32, device)
    compiled = torch.compile(
        lambda *c: dgemma_accel.experts(*c, backend=backend) * 2, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*case), run(case, backend)[0] * 2)


def test_fp8_compiles_whole(backend, device):
    case, scales = make_fp8_case(6, 2, 4, 16, 32, torch.float32, device)
    compiled = torch.compile(
        lambda *c: dgemma_accel.experts(*c, **scales, backend=backend) * 2, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*case), run(case, backend, **scales)[0] * 2)
