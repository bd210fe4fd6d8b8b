"""What the public tests of experts with NVFP4 weights do not reach in the Triton kernels."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

triton_experts = pytest.importorskip("dgemma_accel.triton_kernels.experts")
from dgemma_accel.triton_kernels import expert_weights  # noqa: E402
from test_experts_nvfp4 import SCALES, make_nvfp4_case  # noqa: E402
from test_triton_experts import poisoned, small_tiles  # noqa: E402, F401

from dgemma_accel.reference.budget_experts import check_experts  # noqa: E402
from dgemma_accel.reference.quantization import FP8, unpack  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32}
pytestmark = pytest.mark.skipif(
    triton_experts.unavailable() is not None, reason=str(triton_experts.unavailable())
)

load_group_scales, nvfp4_quarter = expert_weights.load_group_scales, expert_weights.nvfp4_quarter


@triton.jit
def multiply_halves(b_w, b_s, DTYPE: tl.constexpr):
    """`multiply_pairs` without its instructions."""
    if DTYPE == tl.bfloat16:
        # By way of fp32's upper half, since the interpreter widens no subnormal bf16.
        b_low = (b_w << 16).to(tl.float32, bitcast=True) * (b_s << 16).to(tl.float32, bitcast=True)
        b_high = (b_w & -0x10000).to(tl.float32, bitcast=True) * (b_s & -0x10000).to(tl.float32, bitcast=True)
        b_low, b_high = b_low.to(tl.int32, bitcast=True), b_high.to(tl.int32, bitcast=True)
        return ((b_low >> 16) & 0xFFFF) | (b_high & -0x10000)
    b_low = b_w.to(tl.int16).to(DTYPE, bitcast=True) * b_s.to(tl.int16).to(DTYPE, bitcast=True)
    b_high = (b_w >> 16).to(tl.int16).to(DTYPE, bitcast=True) * (b_s >> 16).to(tl.int16).to(
        DTYPE, bitcast=True
    )
    b_low, b_high = b_low.to(tl.int16, bitcast=True), b_high.to(tl.int16, bitcast=True)
    return (b_low.to(tl.int32) & 0xFFFF) | (b_high.to(tl.int32) << 16)


@pytest.fixture
def pairs(monkeypatch):
    """The arithmetic on two numbers at once runs under the interpreter too."""
    if triton_experts.INTERPRET:
        monkeypatch.setattr(expert_weights, "multiply_pairs", multiply_halves)


@triton.jit
def quarter_kernel(
    words, scales, output, J: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    o_n, o_8, o_16, o_k = (
        tl.arange(0, ROWS),
        tl.arange(0, WORDS),
        tl.arange(0, WORDS // 2),
        tl.arange(0, 2 * WORDS),
    )
    p_s = scales + (o_n * (WORDS // 2))[:, None] + o_16[None, :]
    b_s = load_group_scales(p_s, o_16, WORDS // 2, True, DTYPE, PAIRS)
    b_w = tl.load(words + (o_n * WORDS)[:, None] + o_8[None, :])
    b = nvfp4_quarter(b_w, b_s, J, DTYPE, PAIRS).to(tl.float32)
    tl.store(output + (o_n * 2 * WORDS)[:, None] + o_k[None, :], b)


@pytest.mark.parametrize(
    "dtype, by_pairs",
    [(tl.bfloat16, True), (tl.float16, True), (tl.bfloat16, False), (tl.float16, False), (tl.float32, False)],
    ids=str,
)
def test_every_number_with_every_scale_in_its_place(pairs, dtype, by_pairs):
    """256 rows, of which row n has the scale n in its second group; the numbers of a row are all 16, shuffled."""
    rows = torch.arange(256, device=DEVICE)
    numbers = torch.rand(256, 64, device=DEVICE).unflatten(1, (-1, 16)).argsort(-1).flatten(1).to(torch.uint8)
    weight = numbers[:, ::2] | numbers[:, 1::2] << 4
    scale = (rows[:, None] + torch.tensor([1, 0, 77, 130], device=DEVICE)).to(torch.uint8)
    # Codes of NaN are none that a checkpoint holds.
    scale = torch.where((scale & 127) == 127, 3, scale).to(torch.uint8)
    wide = unpack(weight, torch.float64).unflatten(-1, (-1, 16)) * scale.view(FP8).double()[..., None]
    ordered = expert_weights.by_quarters(wide.flatten(-2)) / 256
    assert torch.equal(ordered[:, :2], wide.flatten(-2)[:, [0, 4]] / 256)
    for quarter in range(4):
        output = torch.full((256, 16), torch.nan, device=DEVICE)
        quarter_kernel[(1,)](
            triton_experts.as_words(weight), scale.view(torch.int8), output,
            J=quarter, DTYPE=dtype, PAIRS=by_pairs, ROWS=256, WORDS=8,
        )  # fmt: skip
        assert torch.equal(output.double(), ordered[:, quarter * 16 : quarter * 16 + 16])


@triton.jit
def place_kernel(output, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(output + expert_weights.quarter_place(o, COLUMNS), o, mask=o < COLUMNS)


@pytest.mark.parametrize("columns", [16, 48, 704])
def test_results_are_put_where_the_next_product_reads_them(columns):
    output = torch.full((columns,), -1, dtype=torch.int32, device=DEVICE)
    place_kernel[(1,)](output, COLUMNS=columns, BLOCK=triton.next_power_of_2(columns))
    rows = torch.arange(columns, dtype=torch.int32, device=DEVICE)[None]
    assert torch.equal(output, expert_weights.by_quarters(rows)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [48, 112, 192])
def test_many_tiles(small_tiles, poisoned, dtype, width):  # noqa: F811
    """Several passes, whole and not, and several tiles of rows and of columns."""
    case, scales = make_nvfp4_case(50, 3, 5, width, 144, dtype, DEVICE, skewed=width == 192)
    result = triton_experts.experts(*case, "gelu_tanh", *(scales[name] for name in SCALES))
    assert not check_experts(result, *case, **scales)


def test_pairs_reach_the_products(pairs, monkeypatch, small_tiles):  # noqa: F811
    """fp16 by pairs: the interpreter multiplies fp16 as it is."""
    case, scales = make_nvfp4_case(20, 2, 4, 48, 80, torch.float16, DEVICE)
    order = [scales[name] for name in SCALES]
    plain = triton_experts.experts(*case, "gelu_tanh", *order)
    monkeypatch.setattr(triton_experts, "INTERPRET", False)
    assert torch.equal(triton_experts.experts(*case, "gelu_tanh", *order), plain)


def test_weights_and_scales_of_experts_that_nobody_chose_are_not_read(small_tiles, poisoned):  # noqa: F811
    case, scales = make_nvfp4_case(40, 3, 8, 32, 48, torch.float32, DEVICE, skewed=True)
    order = [scales[name] for name in SCALES]
    truth = triton_experts.experts(*case, "gelu_tanh", *order)
    for scale in order:
        scale[4:] = torch.nan
    assert torch.equal(triton_experts.experts(*case, "gelu_tanh", *order), truth)


def test_a_row_with_nan_stays_alone(small_tiles, poisoned):  # noqa: F811
    case, scales = make_nvfp4_case(40, 2, 3, 32, 48, torch.float32, DEVICE)
    order = [scales[name] for name in SCALES]
    truth = triton_experts.experts(*case, "gelu_tanh", *order)
    case[0][17] = torch.nan
    result = triton_experts.experts(*case, "gelu_tanh", *order)
    assert result[17].isnan().all()
    others = torch.arange(40) != 17
    assert torch.equal(result[others], truth[others])


def test_words_that_are_not_aligned_are_copied():
    weight = torch.arange(67).to(torch.uint8)[3:].view(2, 4, 8)
    words = triton_experts.as_words(weight)
    assert words.shape == (2, 4, 2) and torch.equal(words.view(torch.uint8), weight)
    aligned = torch.arange(64).to(torch.uint8).view(2, 4, 8)
    assert triton_experts.as_words(aligned).data_ptr() == aligned.data_ptr()
