"""The CUDA kernel of quantize_rows, run thread by thread on the host under sanitizers: the reference's bits."""

import pytest
import torch
from emulated_kernels import build, planted, read_tensor, run, run_clean, skip_without_compiler, write_case
from test_quantize_rows import between

from dgemma_accel.native.params import DTYPES
from dgemma_accel.reference.quantization import FP8, quantize_rows

pytestmark = skip_without_compiler()

PROGRAM = "quantize_rows_emulated"


def write(folder, rows):
    """A case: rows [R, K] of any stride that begin anywhere in their storage."""
    count, width = rows.shape
    held = torch.tensor([], dtype=rows.dtype).set_(rows.untyped_storage())
    numbers = {
        "dtype": DTYPES[rows.dtype], "count": count, "width": width, "stride": rows.stride(0),
        "first_byte": rows.storage_offset() * rows.itemsize,
    }  # fmt: skip
    return write_case(folder, numbers, {"rows": held})


def is_right(folder, rows) -> bool:
    expected, scales = quantize_rows(rows)
    found, scale = (
        read_tensor(folder, "numbers", FP8, rows.shape),
        read_tensor(folder, "scales", torch.float32, (len(rows), 1)),
    )
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(
        scale.nan_to_num(-1.0), scales.nan_to_num(-1.0)
    )


def cases(folder):
    """(folder, rows): of vectors and not, kept whole and not, aligned and not, with what is not finite."""
    for dtype in DTYPES:
        size = 16 // dtype.itemsize
        kept = 256 * 4 * size
        wide = torch.randn(4, kept + 300 * size) * torch.tensor([1.0, 1e-3, 100.0, 0.0])[:, None]
        wide[1, 5], wide[2, -1] = torch.nan, -torch.inf
        # The largest is what a thread reads that keeps no more, or the third vector of what it keeps.
        wide[0, kept + 256 * size + 3], wide[3, 2 * 256 * size + 5] = 9.0, 1.0
        short = torch.randn(3, 2 * 256 * size + 40)
        short[2] = 0
        for name, rows in {
            "more than is kept": wide, "vectors": short[:, : 256 * size + 16], "no vectors": short[:, : 256 * size + 7],
            "not aligned": short[:, 1 : 2 * size + 1], "every number": between(), "one": torch.randn(2, 1),
        }.items():  # fmt: skip
            yield (
                folder / f"{name} {dtype}",
                rows.to(dtype) if name != "not aligned" else short.to(dtype)[:, 1 : 2 * size + 1],
            )


def test_the_bits_of_the_reference(tmp_path):
    made = [(write(folder, rows), rows) for folder, rows in cases(tmp_path)]
    run_clean(build(PROGRAM), [folder for folder, _ in made])
    for folder, rows in made:
        assert is_right(folder, rows), folder.name


KERNEL, ROUNDING = "quantize_rows/kernel.cuh", "quantize_rows/e4m3.h"
BUGS = {
    "no barrier": (KERNEL, "  hw::sync_block();\n", ""),
    "a warp's largest is left out": (KERNEL, "i < kQuantizeRowsThreads / hw::kWarp; ++i) value", "i < 7; ++i) value"),
    "half of a warp": (KERNEL, "int mask = hw::kWarp / 2", "int mask = hw::kWarp / 4"),
    "a vector that is kept is left out": (KERNEL, "v < kQuantizeRowsKept; ++v) largest", "v < 1; ++v) largest"),
    "the rest is left out": (KERNEL, "i < vectors; i += kStep)\n    largest", "i < 0; i += kStep)\n    largest"),
    "a number behind the row": (KERNEL, "i < width; i += kStep)\n    largest", "i <= width; i += kStep)\n    largest"),
    "rows that are not aligned by vectors": (KERNEL, "reinterpret_cast<uintptr_t>(source) % 16 == 0", "true"),
    "vectors beyond the row": (KERNEL, "by_vector ? width / kNumbers : 0", "(width + kNumbers - 1) / kNumbers"),
    "NaN is lost": (KERNEL, "quotient < kSmallestNormal ? kSmallestNormal : quotient", "fmaxf(quotient, 0x1p-126f)"),
    "rows of zeros divide by zero": (KERNEL, "quotient < kSmallestNormal ? kSmallestNormal : quotient", "quotient"),
    "the first row's place": (KERNEL, "params.numbers + row * width", "params.numbers"),
    "codes in the other order": (KERNEL, "(i % 4 * 8);", "(24 - i % 4 * 8);"),
    "cut off": (ROUNDING, "size + 0x7ffffu + (size >> 20 & 1u)", "size"),
    "ties away from zero": (ROUNDING, "0x7ffffu + (size >> 20 & 1u)", "0x80000u"),
    "small numbers as normal ones": (ROUNDING, "size < 0x3c800000u", "size < 0x3c000000u"),
    "sign lost": (ROUNDING, "bits >> 24 & 0x80u", "0 * (bits >> 24 & 0x80u)"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(tmp_path, bug):
    # What lies outside of a tensor shows under the sanitizers alone.
    outside = "behind" in bug or "beyond" in bug or "aligned" in bug
    program = planted(PROGRAM, tmp_path, *BUGS[bug], sanitize=outside)
    made = [(write(folder, rows), rows) for folder, rows in cases(tmp_path / "cases")]
    done = run(program, [folder for folder, _ in made])
    assert done.returncode != 0 or not all(is_right(folder, rows) for folder, rows in made)
