"""quantize_rows: the same bits from every backend."""

import pytest
import torch

from dgemma_accel.ops.quantize_rows import quantize_rows
from dgemma_accel.reference.quantization import FP8
from dgemma_accel.reference.quantization import quantize_rows as by_operators

OP = "quantize_rows"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(numbers):
    return numbers.view(torch.uint8)


def assert_equal(backend, rows):
    numbers, scale = quantize_rows(rows, backend)
    expected, scales = by_operators(rows.cpu())
    assert numbers.dtype == FP8 and numbers.shape == rows.shape and numbers.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (*rows.shape[:-1], 1)
    assert torch.equal(scale.cpu(), scales) and torch.equal(bits(numbers.cpu()), bits(expected))
    return numbers, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 96), (2, 3, 40), (4, 7), (3, 4100), (1, 1), (0, 8), (2, 8192)], ids=str
)
def test_the_same_bits(backend, device, dtype, shape):
    """Also of rows of zeros, and of rows a thousandth or a thousand times as large as others."""
    rows = torch.randn(shape, device=device) * torch.logspace(-3, 3, max(shape[0], 1), device=device)[
        : shape[0]
    ].view(-1, *[1] * (len(shape) - 1))
    if shape[0] > 2:
        rows[2] = 0
    assert_equal(backend, rows.to(dtype))


def between():
    """[1, K]: every number of FP8, every middle of two, and what fp32 has beside it. The largest makes the scale 1."""
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (codes[1:] + codes[:-1]) / 2
    near = [middle, middle.nextafter(middle * 0), middle.nextafter(middle * 2), codes]
    return torch.cat([*near, *(-x for x in near), codes[-1:]])[None]


def test_every_place_between_two_numbers(backend, device):
    """Ties go to the even code, numbers below 2^-6 have the spacing of 2^-9, and nothing passes 448."""
    numbers, scale = assert_equal(backend, between().to(device))
    assert scale.item() == 1 and numbers.float().abs().max() == 448


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_rows_that_do_not_lie_on_vectors(backend, device, dtype):
    wide = torch.randn(6, 131, device=device).to(dtype)
    for rows in (wide[:, 3:67], wide[::2, :64], wide.T, wide[:, ::2], wide[1:, :128].unflatten(1, (2, 64))):
        assert_equal(backend, rows)


def test_a_row_that_is_not_finite_stays_alone(backend, device):
    rows = torch.randn(4, 200, device=device)
    clean = quantize_rows(rows, backend)
    rows[1, 3], rows[2, 100] = float("nan"), float("-inf")
    numbers, scale = quantize_rows(rows, backend)
    assert scale[1].isnan().all() and scale[2].isinf().all()
    assert numbers[1].float().isnan().all() and numbers[2, 100].float().isnan()
    for row in (0, 3):
        assert torch.equal(bits(numbers[row]), bits(clean[0][row])) and scale[row] == clean[1][row]


def test_traced_it_is_operators_that_a_compiler_fuses():
    seen = []

    def keep(module, inputs):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    rows = torch.randn(3, 40)
    compiled = torch.compile(lambda x: quantize_rows(x), fullgraph=True, backend=keep)
    for mine, other in zip(compiled(rows), by_operators(rows), strict=True):
        assert torch.equal(mine.float(), other.float())
    assert seen and not any("dgemma" in name for name in seen)
