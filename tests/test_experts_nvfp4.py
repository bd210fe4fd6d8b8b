"""experts with NVFP4 weights: the format against its literal statement, every backend against fp64 truth."""

import math
from fractions import Fraction

import pytest
import torch
from test_experts import DTYPES, make_case, run, uneven_fp8

import dgemma_accel
from dgemma_accel.reference.budget_experts import check_experts
from dgemma_accel.reference.quantization import FP8, dequantize, quantize_nvfp4, unpack

OP = "experts"
# Not of every size and dtype; see test_cuda_experts.py.
WITHOUT = ("cuda",)
SCALES = ("gate_up_scale", "down_scale", "gate_up_global_scale", "down_global_scale")


def uneven_nvfp4(weight):
    """NVFP4 of fp32 weights [X, N, K] whose groups of 16 and whose experts are made to differ 50-fold in size."""
    blocks = weight.unflatten(-1, (-1, 16))
    blocks = blocks * torch.exp(4 * torch.rand(blocks.shape[:-1], device=weight.device) - 2)[..., None]
    size = torch.exp(4 * torch.rand(len(weight), device=weight.device) - 2)
    return quantize_nvfp4(blocks.flatten(-2) * size[:, None, None])


def make_nvfp4_case(rows, top_k, count, width, embedding, dtype, device, *, skewed=False, which=(True, True)):
    """(the arguments of `make_case` with NVFP4 weights, the scales as keywords); which: gate_up, down."""
    case = list(make_case(rows, top_k, count, width, embedding, torch.float32, device, skewed=skewed))
    case[0], scales = case[0].to(dtype), {}
    for position, name, quantised in ((3, "gate_up", which[0]), (4, "down", which[1])):
        if quantised:
            case[position], scales[f"{name}_scale"], scales[f"{name}_global_scale"] = uneven_nvfp4(
                case[position]
            )
        else:
            case[position] = case[position].to(dtype)
    return tuple(case), scales


def e2m1(code):
    """The value of four bits by IEEE's rules: sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * 2 ** (exponent - 1)
    return -size if sign else size


def test_numbers_are_those_of_the_bits_with_the_even_column_low(device):
    byte = torch.arange(256, device=device).to(torch.uint8)
    expected = [[float(e2m1(code & 15)), float(e2m1(code >> 4))] for code in range(256)]
    for dtype in (torch.float64, *DTYPES):
        assert unpack(byte[:, None], dtype).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 16), (3, 48), (20, 128)])
def test_quantize_number_by_number(device, dtype, rows, columns):
    """The nearest of 16 numbers, found by looking at all; of two as near the one with an even code."""
    weight = (torch.randn(2, rows, columns, device=device) * torch.rand(2, rows, 1, device=device)).to(dtype)
    weight[1, 0, :16] = 0
    packed, scale, total = quantize_nvfp4(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (2, rows, columns // 2)
    assert scale.dtype == FP8 and scale.shape == (2, rows, columns // 16)
    assert total.dtype == torch.float32 and total.shape == (2,)
    magnitudes = [float(e2m1(code)) for code in range(8)]
    for number in range(2):
        matrix = weight[number].float()
        assert total[number] == max(matrix.abs().max() / (6 * 448), torch.finfo(torch.float32).tiny)
        for row in range(rows):
            for group in range(columns // 16):
                block = matrix[row, group * 16 : group * 16 + 16]
                factor = (block.abs().max() / 6 / total[number]).to(FP8)
                assert scale[number, row, group].float() == factor.float()
                unit = factor.float() * total[number]
                for place, value in enumerate(block):
                    byte = int(packed[number, row, group * 8 + place // 2])
                    code = byte >> 4 if place % 2 else byte & 15
                    quotient = abs(value / unit).item() if unit > 0 else 0.0
                    distance = [abs(quotient - magnitude) for magnitude in magnitudes]
                    nearest = [c for c in range(8) if distance[c] == min(distance)]
                    assert (code & 7) in nearest and (len(nearest) == 1 or code % 2 == 0)
                    assert bool(code >> 3) == (math.copysign(1, value) < 0) or not unit > 0
    if rows > 1:
        assert scale.float().amax((1, 2)).tolist() == [448, 448]


def test_ties_go_to_the_even_code(device):
    """The middles of all neighbours, and what is beyond 6 by a scale that was rounded down."""
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2, device=device)
    values[8:] *= -1
    packed, scale, total = quantize_nvfp4(values[None] * 448)
    assert scale.item() == 448 and total.item() == 1
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert unpack(packed, torch.float32).tolist() == [expected + [-value for value in expected]]
    # A largest weight of 6 * 17, whose scale e4m3 rounds to 16.
    weight = torch.zeros(2, 16, device=device)
    weight[0, 0], weight[1, 0] = 6 * 448, 6 * 17
    packed, scale, total = quantize_nvfp4(weight)
    assert total == 1 and scale.tolist() == [[448.0], [16.0]] and unpack(packed, torch.float32)[1, 0] == 6


def test_quantize_knows_no_default_dtype(device):
    """The borders between two numbers are fp32 whatever torch's default is."""
    weight = torch.randn(4, 64, 64, device=device)
    expected, before = quantize_nvfp4(weight), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        result = quantize_nvfp4(weight)
    finally:
        torch.set_default_dtype(before)
    for ours, wanted in zip(result, expected):
        assert torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8))


def test_quantize_shows_weights_that_are_not_finite(device):
    for value in (float("nan"), float("inf")):
        weight = torch.ones(2, 3, 32, device=device)
        weight[1, 2, 20] = value
        assert quantize_nvfp4(weight)[2].isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_numbers_times_their_scales_are_exact(device, dtype):
    """All 16 numbers by all 254 scales: a kernel may multiply them in the rows' dtype before the product."""
    codes = torch.arange(256, dtype=torch.int16, device=device).to(torch.uint8).view(FP8)
    codes = codes[codes.float().isfinite()]
    numbers = unpack(torch.arange(16, device=device).to(torch.uint8)[:, None], dtype)[:, 0]
    products = numbers[:, None] * codes.to(dtype)
    exact = [[e2m1(code) * Fraction(float(scale)) for scale in codes] for code in range(16)]
    assert all(
        Fraction(float(product)) == wanted
        for row, wanted_row in zip(products, exact)
        for product, wanted in zip(row, wanted_row)
    )


def test_dequantize_is_exact_in_fp64(device):
    packed, scale, total = uneven_nvfp4(torch.randn(2, 3, 32, device=device))
    result = dequantize(packed, scale, torch.float64, total)
    for number, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(32)):
        byte = int(packed[number, row, column // 2])
        code = byte >> 4 if column % 2 else byte & 15
        wanted = (
            e2m1(code) * Fraction(float(scale[number, row, column // 16])) * Fraction(float(total[number]))
        )
        assert Fraction(float(result[number, row, column])) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, top_k, count, width, embedding",
    # The least; a last pass that is not whole; several passes; a width of 44 groups as DiffusionGemma's.
    [(9, 1, 1, 16, 16), (7, 3, 5, 48, 80), (33, 3, 4, 176, 272), (12, 2, 3, 112, 528), (5, 2, 2, 704, 64)],
)
def test_within_budget(backend, device, dtype, rows, top_k, count, width, embedding):
    case, scales = make_nvfp4_case(rows, top_k, count, width, embedding, dtype, device)
    result, problems = run(case, backend, **scales)
    assert result.shape == (rows, embedding) and result.dtype == dtype
    assert not problems


@pytest.mark.parametrize("which", [(True, False), (False, True)], ids=["gate_up", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_of_the_weights_in_nvfp4(backend, device, dtype, which):
    case, scales = make_nvfp4_case(30, 3, 5, 96, 208, dtype, device, which=which)
    assert len(scales) == 2 and not run(case, backend, **scales)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_in_nvfp4_and_one_in_fp8(backend, device, dtype):
    for position, name in ((3, "gate_up_scale"), (4, "down_scale")):
        case, scales = make_nvfp4_case(20, 2, 4, 96, 208, dtype, device, which=(position == 4, position == 3))
        case = list(case)
        case[position], scales[name] = uneven_fp8(case[position].float())
        assert not run(case, backend, **scales)[1]


def test_skewed_routing_and_choices_of_no_expert(backend, device):
    """Experts without rows, one with all of them, and rows that chose nobody."""
    case, scales = make_nvfp4_case(60, 3, 8, 80, 144, torch.float32, device, skewed=True)
    index, weights = case[1:3]
    index[::3, 1], weights[::3, 1] = 8, float("nan")
    index[4] = 8
    result, problems = run(case, backend, **scales, activation="silu")
    assert not problems and not result[4].any() and result[5].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_and_scales_of_any_magnitude(backend, device, dtype):
    """The smallest and largest numbers and scales, and global scales that would leave fp16."""
    hidden, index, weights, _, _ = make_case(9, 2, 3, 32, 64, dtype, device)
    codes = torch.arange(127, dtype=torch.int16, device=device).to(torch.uint8).view(FP8)
    matrices, scales = [], {}
    for name, rows, columns, total in (("gate_up", 64, 64, 2.0**-12), ("down", 64, 32, 2.0**-20)):
        matrices.append(torch.randint(256, (3, rows, columns // 2), device=device).to(torch.uint8))
        scales[f"{name}_scale"] = codes[torch.randint(127, (3, rows, columns // 16), device=device)]
        scales[f"{name}_global_scale"] = torch.full((3,), total, device=device)
    assert not run((hidden, index, weights, *matrices), backend, **scales)[1]


def test_views(backend, device):
    """Strides and offsets of all tensors are respected, also those that no word of 32 bits has."""
    (*rows, gate_up, down), scales = make_nvfp4_case(11, 3, 4, 96, 160, torch.float32, device)
    expected = run((*rows, gate_up, down), backend, **scales)[0]

    def apart(tensor):
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 127, device=device).to(tensor.dtype)
        return wide[..., ::2].copy_(tensor)

    def aside(tensor):
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), 127, device=device).to(tensor.dtype)
        return wide[..., 1:-2].copy_(tensor)

    for view in (apart, aside):
        moved = {name: apart(scale) for name, scale in scales.items()}
        case = (apart(rows[0]), *rows[1:], view(gate_up), view(down))
        assert torch.equal(run(case, backend, **moved)[0], expected)


@pytest.mark.parametrize("rows, top_k", [(0, 2), (3, 0)])
def test_nothing_to_do(backend, device, rows, top_k):
    case, scales = make_nvfp4_case(rows, top_k, 4, 16, 32, torch.float32, device)
    result, _ = run(case, backend, **scales)
    assert result.shape == (rows, 32) and not result.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_fails_wrong_weights_and_scales(dtype):
    """The nibbles the other way round, a neighbour's scale, none at all, a dropped tile, a wrong sign."""
    case, scales = make_nvfp4_case(24, 3, 4, 96, 128, dtype, "cpu")
    assert not run(case, "reference", **scales)[1]

    def fails(computed, **changed):
        wrong = dgemma_accel.experts(*computed, **scales | changed, backend="reference")
        return bool(check_experts(wrong, *case, **scales))

    assert check_experts(torch.zeros_like(case[0]), *case, **scales)
    for name, scale in scales.items():
        assert fails(case, **{name: torch.ones_like(scale)})
        for dimension in range(scale.ndim):
            moved = scale.view(torch.uint8) if scale.dtype == FP8 else scale
            assert fails(case, **{name: moved.roll(1, dimension).view(scale.dtype)})
    for position in (3, 4):
        weight = case[position]
        wrong = (
            weight << 4 | weight >> 4,
            weight ^ 0x80,
            weight ^ 0x08,
            weight.roll(1, -1),
            weight.view(torch.int32).roll(1, -1).view(torch.uint8),
            torch.where(torch.arange(weight.shape[-1]) < weight.shape[-1] - 8, weight, 0),
        )
        for changed in wrong:
            assert fails((*case[:position], changed, *case[position + 1 :]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_up_may_have_global_scales_of_their_own(backend, device, dtype):
    case, scales = make_nvfp4_case(6, 2, 4, 16, 32, dtype, device)
    shared = scales["gate_up_global_scale"]
    alike = scales | {"gate_up_global_scale": torch.stack([shared, shared], -1)}
    assert torch.equal(run(case, backend, **scales)[0], run(case, backend, **alike)[0])
    factors = torch.tensor([3.0, 0.25], device=device)
    apart = scales | {"gate_up_global_scale": shared[:, None] * factors}
    result, problems = run(case, backend, **apart)
    assert problems == []
    swapped = scales | {"gate_up_global_scale": shared[:, None] * factors.flip(0)}
    assert check_experts(result, *case, **swapped) != []


H, I, W, GU, D = make_case(3, 2, 4, 16, 32, torch.float32, "cpu")
(_, _, _, GU4, D4), S4 = make_nvfp4_case(3, 2, 4, 16, 32, torch.float32, "cpu")
GS, DS, GT, DT = (S4[name] for name in SCALES)


@pytest.mark.parametrize(
    "matrices, scales, error, text",
    [
        ((GU4, D), (None, None, GT, None), ValueError, r"gate_up_scale: NVFP4 \(uint8\) weights need their scales"),
        ((GU4, D), (GS, None, None, None), ValueError, r"gate_up_global_scale: NVFP4 \(uint8\) weights need theirs"),
        ((GU, D4), (None, None, None, DT), ValueError, r"down_scale: NVFP4.*\(4, 32, 1\) float8_e4m3fn, got None"),
        ((GU, D4), (None, DS, None, None), ValueError, r"down_global_scale: NVFP4.*\(4,\) float32, got None"),
        ((GU, D), (GS, None, None, None), ValueError, "gate_up_scale: only float8_e4m3fn and NVFP4 .* float32"),
        ((GU, D), (None, None, GT, None), ValueError, "gate_up_global_scale: only NVFP4 .* gate_up is float32"),
        ((GU4, D), (GS.float(), None, GT, None), TypeError, "gate_up_scale: dtype must be one of float8_e4m3fn"),
        ((GU4, D), (GS[:, :-1], None, GT, None), ValueError, r"gate_up_scale: shape must be \(4, 32, 2\) \(one for"),
        ((GU4, D), (GS, None, GT.half(), None), TypeError, "gate_up_global_scale: dtype must be one of float32"),
        ((GU4, D), (GS, None, GT[:3], None), ValueError, r"gate_up_global_scale: shape must be \(4,\)"),
        ((GU4, D), (GS, None, GT[:, None], None), ValueError, r"gate_up_global_scale: shape must be \(4,\)"),
        ((GU4, D4), (GS, DS, GT, torch.stack([DT, DT], -1)), ValueError, r"down_global_scale: shape must be \(4,\)"),
        ((GU4, D), (GS, None, 1.0, None), TypeError, "gate_up_global_scale: a torch.Tensor expected, got float"),
        ((GU4, D), (GS, None, GT.to("meta"), None), ValueError, "gate_up_global_scale: must be on cpu like gate_up"),
        ((GU4, D), (GS.to("meta"), None, GT, None), ValueError, "gate_up_scale: must be on cpu like gate_up"),
        ((GU4[..., :-1], D), (GS, None, GT, None), ValueError, r"gate_up: shape must be \(4, 32, 16\)"),
        ((GU4, D4[..., :-1]), (GS, DS, GT, DT), ValueError, "down: NVFP4 weights need I to be a multiple of 16"),
        ((GU4, D4[0]), (GS, DS, GT, DT), ValueError, r"down: shape must be \[X, 32, I / 2\] like hidden"),
        ((GU4.view(torch.int8), D), (GS, None, GT, None), TypeError, "gate_up: dtype must be one of float32, float8"),
    ],
)  # fmt: skip
def test_bad_input(matrices, scales, error, text):
    with pytest.raises(error, match=text):
        dgemma_accel.experts(H, I, W, *matrices, **dict(zip(SCALES, scales)), backend="reference")


def test_columns_that_are_no_whole_groups():
    hidden, gate_up, down = torch.randn(3, 24), torch.zeros(4, 32, 12).to(torch.uint8), torch.randn(4, 24, 16)
    with pytest.raises(ValueError, match="gate_up: NVFP4 weights need E to be a multiple of 16, got 24"):
        dgemma_accel.experts(hidden, I, W, gate_up, down, gate_up_scale=GS, gate_up_global_scale=GT)


def test_opcheck(backend, device):
    case, scales = make_nvfp4_case(6, 2, 4, 16, 32, torch.float32, device)
    settings = ("gelu_tanh", False, backend, *(scales[name] for name in SCALES))
    # Whether arguments were written to is compared by arithmetic that torch does not have for FP8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.dgemma.experts.default, (*case, *settings), test_utils=tests)


def test_compiles_whole(backend, device):
    case, scales = make_nvfp4_case(6, 2, 4, 16, 32, torch.float32, device)
    compiled = torch.compile(
        lambda *c: dgemma_accel.experts(*c, **scales, backend=backend) * 2, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*case), run(case, backend, **scales)[0] * 2)
