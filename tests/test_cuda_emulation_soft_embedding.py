"""The CUDA kernels of soft_embedding, run thread by thread on the host under sanitizers, within the error budget.

Workspaces and results are NaN before them. The product between them rounds nothing but its result.
"""

import math

import pytest
import torch
from emulated_kernels import (
    build,
    can_fuse,
    planted,
    read_tensor,
    run,
    run_clean,
    skip_without_compiler,
    write_case,
)

from dgemma_accel.native.params import DTYPES
from dgemma_accel.reference import row_stats as row_stats_reference
from dgemma_accel.reference import soft_embedding as reference
from dgemma_accel.reference.budget import check_soft_embedding

pytestmark = skip_without_compiler()

PROGRAM, TILE = "soft_embedding_emulated", 2048
HALVES = (torch.bfloat16, torch.float16)


def peaks_of(logits, temperature=1.0, softcap=None):
    """(argmax, top1_prob) [N0, N1] by the specification."""
    t = torch.as_tensor(temperature, dtype=torch.float32)
    uniform = torch.zeros(logits.shape[0] * logits.shape[1])
    fields = row_stats_reference(logits.contiguous(), t, None, uniform, None, torch.tensor(0), softcap)
    return fields[0], fields[4]


def case(folder, logits, weight, peaks=None, *, temperature=1.0, softcap=None, columns=TILE):
    """Logits [N0, N1, V]; the storage is cut to what the view spans, so that one element beyond is out of bounds."""
    rows0, rows1, vocab = logits.shape
    argmax, top1_prob = peaks or peaks_of(logits, temperature, softcap)
    span = 1 + sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride()))
    storage = logits.as_strided((logits.storage_offset() + span,), (1,), 0)
    t = torch.as_tensor(temperature, dtype=torch.float32)
    numbers = {
        "dtype": DTYPES[logits.dtype], "storage_offset": logits.storage_offset(), "rows0": rows0, "rows1": rows1,
        "vocab": vocab, "stride0": logits.stride(0), "stride1": logits.stride(1), "softcap": softcap or 0.0,
        "columns": columns, "embedding": weight.shape[1], "temperature": t.ndim > 0,
    }  # fmt: skip
    tensors = {
        "logits": storage.view(torch.int16), "weight": weight.view(torch.int16), "argmax": argmax,
        "top1_prob": top1_prob, "temperature": t,
    }  # fmt: skip
    return write_case(folder, numbers, tensors)


def result(folder, logits, weight):
    return read_tensor(folder, "output", logits.dtype, (*logits.shape[:2], weight.shape[1]))


def problems(folder, logits, weight, *, temperature=1.0, softcap=None, **_):
    return check_soft_embedding(result(folder, logits, weight), logits, weight, temperature, softcap)


@pytest.fixture(scope="module")
def program():
    return build(PROGRAM)


# By the size of logits beside the softcap of 30: polynomials of two degrees, and the formula for all numbers.
SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.6, "softcap": 30.0},
    {"temperature": torch.tensor([0.2, 0.9, 1.7]), "softcap": 30.0},
)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale", [0.5, 6.0, 25.0])
def test_within_budget(program, tmp_path, dtype, scale):
    cases = []
    # One element, a vector and a bit, tiles that a row fills, and rows that start anywhere in a 16-byte vector.
    for vocab, offset, stride, embedding in (
        (1, 0, 1, 4), (13, 0, 16, 5), (2 * TILE, 8, 2 * TILE + 8, 260), (4999, 3, 5003, 7), (TILE + 1, 5, TILE + 6, 3),
    ):  # fmt: skip
        storage = torch.full((offset + 3 * stride,), math.nan, dtype=dtype)
        logits = storage.as_strided((1, 3, vocab), (3 * stride, stride, 1), offset)
        logits.copy_((torch.randn(1, 3, vocab) * scale).clamp(-100, 100))
        logits[0, 1, vocab // 2] = min(60.0, 4 * scale)  # settled
        weight = torch.randn(vocab, embedding).to(dtype)
        for i, settings in enumerate(SETTINGS):
            columns = TILE * (1 + i % 2)
            cases.append((tmp_path / str(len(cases)), logits, weight, {**settings, "columns": columns}))
    run_clean(program, [case(f, x, w, **settings) for f, x, w, settings in cases])
    for folder, logits, weight, settings in cases:
        assert not problems(folder, logits, weight, **settings), (logits.shape, settings)
        tiles = -(-logits.shape[-1] // TILE)
        masses = read_tensor(folder, "masses", torch.float32, (3, tiles)).sum(-1)
        one = 2.0**14 if dtype == torch.float16 else 1.0
        assert torch.allclose(masses / one, torch.ones(3), atol=2e-3 if dtype == torch.float16 else 1e-2)


def test_a_tile_left_out_or_another_temperature_fails_the_budget(program, tmp_path):
    logits, weight = torch.randn(1, 4, 3 * TILE).bfloat16(), torch.randn(3 * TILE, 8).bfloat16()
    dropped = weight.clone()
    dropped[TILE : TILE + 512] = 0
    folders = [
        case(tmp_path / "right", logits, weight), case(tmp_path / "dropped", logits, dropped),
        case(tmp_path / "warm", logits, weight, temperature=1.1),
    ]  # fmt: skip
    run_clean(program, folders)
    assert [bool(problems(folder, logits, weight)) for folder in folders] == [False, True, True]


def test_strides_of_two_dimensions_and_a_temperature_by_row(program, tmp_path):
    table = torch.full((3, 11, 2100), math.nan).bfloat16()
    views = [table[:, 1:10:2, 20:2085], table[:, 1:10:2, 24:2096].transpose(0, 1)]
    temperature = torch.linspace(0.3, 2.0, 15)
    for i, view in enumerate(views):
        view.copy_(torch.randn(view.shape) * 3)
        weight = torch.randn(view.shape[-1], 9).bfloat16()
        settings = {"temperature": temperature, "softcap": 20.0}
        folder = case(tmp_path / f"view{i}", view, weight, **settings)
        run_clean(program, [folder])
        assert not problems(folder, view, weight, **settings)


def test_rows_without_a_distribution_and_minus_infinity(program, tmp_path):
    weight = torch.randn(2500, 6).bfloat16()
    weight[3, 5], weight[2400, 2], weight[2401, 2] = math.nan, math.inf, -math.inf
    clean = torch.randn(2500, 6).bfloat16()
    logits = torch.randn(1, 6, 2500).bfloat16()
    logits[0, 0] = -math.inf
    logits[0, 1, 77] = math.nan
    logits[0, 2, 2499] = math.inf
    logits[0, 3, :2499] = -math.inf
    logits[0, 4, ::2] = -math.inf
    cases = [
        (tmp_path / f"{softcap}-{number}", softcap, table)
        for softcap in (None, 30.0)
        for number, table in enumerate((weight, clean))
    ]
    run_clean(program, [case(folder, logits, table, softcap=softcap) for folder, softcap, table in cases])
    for folder, softcap, table in cases:
        found = result(folder, logits, table)
        expected = reference(logits, *peaks_of(logits, softcap=softcap), table, torch.tensor(1.0), softcap)
        assert torch.equal(found.isnan(), expected.isnan())
        empty = [0, 1, 2] if softcap is None else [1]
        assert (found[0, empty] == 0).all() and found[0, 5].any()
        if table is clean:
            assert torch.allclose(found.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_statistics_of_other_logits(program, tmp_path):
    """A place outside the row reads inside it; NaN among logits with a distribution is NaN in that row alone."""
    logits, weight = torch.randn(1, 5, 2100).bfloat16(), torch.randn(2100, 4).bfloat16()
    argmax, top1_prob = peaks_of(logits)
    # At this temperature most logits are infinitely far above these.
    argmax[0, 0], argmax[0, 1] = -5, 2**40
    logits[0, 0, 0] = logits[0, 1, 2099] = -2.0
    top1_prob[0, 2], top1_prob[0, 3] = math.nan, -1.0
    logits[0, 4, 2099] = math.nan
    folder = case(tmp_path / "case", logits, weight, (argmax, top1_prob), temperature=1e-3)
    run_clean(program, [folder])
    found = result(folder, logits, weight)
    assert found[0, :2].isfinite().all() and not found[0, 2:4].any() and found[0, 4].isnan().all()


LOW = (1e-3, 1e-5, 1e-7, 1e-9, 1e-20, 1e-36)


def low_cases(folder, dtype, softcap):
    logits = (torch.randn(1, 3, 2 * TILE) * 8).to(dtype)
    logits[0, 2, 11] = logits[0, 2, 3001] = logits[0, 2].max()
    weight = torch.randn(2 * TILE, 5).to(dtype)
    return [(folder / str(t), logits, weight, {"temperature": t, "softcap": softcap}) for t in LOW]


def low_problems(program, folder, dtype, softcap):
    """Where logits over the temperature pass all digits of fp32 a row is its argmax, or the mean of those that tie."""
    cases = low_cases(folder, dtype, softcap)
    run_clean(program, [case(path, x, w, **settings) for path, x, w, settings in cases])
    found = []
    for path, logits, weight, settings in cases:
        x = logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)
        truth = torch.softmax((x - x.amax(-1, keepdim=True)) / settings["temperature"], -1) @ weight.double()
        off = (result(path, logits, weight) - truth).abs().amax(-1) / truth.abs().amax(-1)
        found += [settings["temperature"]] if not off.max() < 4 * torch.finfo(dtype).eps else []
    return found


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("softcap", [None, 300.0, 40.0, 12.0, 1e30])
def test_low_temperatures(program, tmp_path, dtype, softcap):
    assert not low_problems(program, tmp_path, dtype, softcap)


@pytest.mark.skipif(not can_fuse(), reason="this processor has no fused multiply-add")
def test_the_largest_logit_has_no_difference_from_itself_where_products_are_fused(tmp_path):
    """nvcc fuses a product with what is subtracted from it; at low temperatures that difference is all there is."""
    fused = {"sanitize": False, "fuse": True}
    assert not low_problems(build(PROGRAM, **fused), tmp_path / "right", torch.bfloat16, 300.0)
    passage = ("common/exponents.cuh", "hw::multiply_rounded(x, p) - reference", "x * p - reference")
    assert low_problems(
        planted(PROGRAM, tmp_path, *passage, **fused), tmp_path / "wrong", torch.bfloat16, 300.0
    )


@pytest.mark.parametrize("softcap", [None, 1e-30, 1e-3, 3e3, 1e30])
def test_temperatures_and_softcaps_of_any_size(program, tmp_path, softcap):
    weight = torch.randn(TILE + 9, 3).bfloat16()
    cases = []
    for temperature in (1e-38, 1e-3, 1.0, 1e4, 1e20, 3e38):
        # Of the temperature's size, so that a row is neither flat nor one token.
        size = min(max(temperature, 1e-30), 1e30) if softcap is None else softcap
        logits = (torch.randn(1, 2, TILE + 9) * min(size, 1e20)).bfloat16()
        logits[0, 0, 5] = -math.inf
        cases.append((tmp_path / str(temperature), logits, temperature))
    run_clean(program, [case(f, x, weight, temperature=t, softcap=softcap) for f, x, t in cases])
    for folder, logits, temperature in cases:
        peaks = peaks_of(logits, temperature, softcap)
        expected = reference(logits.double(), *peaks, weight.double(), torch.tensor(temperature), softcap)
        found, valid = result(folder, logits, weight), peaks[1][0] > 0
        assert not found[0, ~valid].any()
        off = (found - expected).abs().amax(-1)[0]
        assert (
            off[valid] <= 2e-2 * weight.abs().max() * expected.abs().amax(-1)[0][valid].clamp(min=0.05)
        ).all()


def test_half_precision_of_flat_rows(program, tmp_path):
    """Probabilities far below fp16's normal numbers keep their digits."""
    logits = torch.randn(1, 2, 9000).half()
    logits[..., 0] = 14.0
    weight = torch.ones(9000, 4).half()
    weight[0] = 0.0
    folder = case(tmp_path / "case", logits, weight)
    run_clean(program, [folder])
    truth = torch.softmax(logits.double(), -1) @ weight.double()
    assert ((result(folder, logits, weight) - truth).abs() <= 1e-3 * truth).all()


def test_settled_rows_keep_no_rounding_of_their_one_probability(program, tmp_path):
    """bf16 holds 0.9973 as 0.9961 or 1: only the result itself may be rounded, not that probability too."""
    logits = torch.zeros(1, 8, 512).bfloat16()
    logits[0, :, 5] = torch.linspace(11, 13, 8)
    weight = torch.zeros(512, 12).bfloat16()
    weight[5] = torch.linspace(1, 2, 12)
    folder = case(tmp_path / "case", logits, weight)
    run_clean(program, [folder])
    truth = torch.softmax(logits.double(), -1) @ weight.double()
    spacing = torch.exp2(truth.log2().floor() - 7)
    assert ((result(folder, logits, weight) - truth).abs() <= 0.51 * spacing).all()


def test_two_runs_give_the_same_bits(program, tmp_path):
    logits, weight = torch.randn(1, 2, 9000).bfloat16(), torch.randn(9000, 9).bfloat16()
    folders = [case(tmp_path / name, logits, weight) for name in ("one", "two")]
    run_clean(program, folders)
    for name in ("output", "masses"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


KERNEL = "soft_embedding/kernel.cuh"
BUGS = {
    "the last tile of a slice is dropped": (
        KERNEL, "if (row >= rows) return;", "if (row >= rows || tile == 1) return;",
    ),
    "the last logit of a row counts as none": (
        KERNEL, "if (token + i < left) words", "if (token + i + 1 < left) words",
    ),
    "one logit behind the row is read": (
        KERNEL, "if (token + i < left) words", "if (token + i <= left) words",
    ),
    "a tile may end one logit behind the row": (
        KERNEL, "left == kSoftEmbeddingTile &&", "left >= kSoftEmbeddingTile - 1 &&",
    ),
    "what lies behind the row has mass": (KERNEL, "2 * i < count ? low : 0.0f", "low"),
    "an unaligned row is read by vectors": (KERNEL, "reinterpret_cast<uintptr_t>(logits) % 16 == 0", "true"),
    "the mass is that of the numbers before rounding": (
        KERNEL, "sums[0] += element<T>(result, 2 * i);", "sums[0] += low;",
    ),
    "a pair of lanes does not add its mass": (
        "common/device/warp_sum.cuh", "mask > 0; mask /= 2", "mask > 1; mask /= 2",
    ),
    "every slice leaves its masses where the first one does": (KERNEL, "+ token / kSoftEmbeddingTile]", "+ tile]"),
    "the last tile's mass is not added": (
        KERNEL, "t < tiles; t += hw::kWarp", "t < tiles - 1; t += hw::kWarp",
    ),
    "a later round reads the first one's logits": (KERNEL, "words[v] = next[v];", ";"),
    "all rows have the first one's temperature": (
        KERNEL, "of_row(params.temperature, row)", "of_row(params.temperature, 0)",
    ),
    "the temperature is a tenth too high": (KERNEL, "fminf(kLog2E / of", "fminf(0.9f * kLog2E / of"),
    "the formula does not hold for the largest logit": (
        KERNEL, "fmaxf(extremes_of<T>(words).magnitude, fabsf(peak))", "0.4f",
    ),
    "the last slice is not added": (KERNEL, "s < slices; s +=", "s < slices - 1; s +="),
    "every slice is the first one": (
        KERNEL, "hw::load_streaming(partial + i * stride)", "hw::load_streaming(partial)",
    ),
    "a column behind the embedding is written": (KERNEL, "if (j < left) output", "if (j <= left) output"),
    "a row without a distribution takes the weight's NaN": (KERNEL, "valid ? hw::pack", "true ? hw::pack"),
    "fp16 is not scaled": (KERNEL, "16384.0f : 1.0f", "1.0f : 1.0f"),
    "a difference above 0 is kept": (KERNEL, "hw::smaller_or_nan(exponent(x), 0.0f)", "exponent(x)"),
    "NaN is taken for the largest logit": (
        "common/exponents.cuh", "return (x - max) * rate;", "return x == x ? (x - max) * rate : 0.0f;",
    ),
}  # fmt: skip


def bug_cases(folder):
    """(folder, logits, weight, settings): each bug shows in one of them."""
    flat = torch.randn(1, 2, TILE + 402)
    settled = flat.clone()
    settled[..., -1] = 9.0
    wide = torch.randn(1, 3, 2 * TILE)
    # Beyond the softcap, and no more than the others together at its temperature.
    wide[0, 2, 7] = 60.0
    three = torch.tensor([0.5, 1.0, 30.0])
    short = torch.full((3 * 403 + 5,), math.nan).bfloat16().as_strided((1, 3, 402), (3 * 403, 403, 1), 5)
    short.copy_(torch.randn(1, 3, 402))
    almost = torch.zeros(1, 4, 2 * TILE - 1)
    almost[0, :, 5] = torch.linspace(11, 13, 4)
    half = torch.randn(1, 2, 9000).half()
    half[..., 0] = 14.0
    for name, logits, embedding, settings in (
        ("settled", settled.bfloat16(), 5, {}), ("two slices", flat.bfloat16(), 8, {"columns": TILE}),
        ("by row", wide.bfloat16(), 4, {"temperature": three, "softcap": 30.0}), ("short", short, 6, {}),
        ("almost a tile", almost.bfloat16(), 4, {"columns": 2 * TILE}), ("fp16", half, 4, {}),
        ("one row", torch.randn(1, 1, 2 * TILE - 1).bfloat16(), 4, {}),
    ):  # fmt: skip
        weight = torch.randn(logits.shape[-1], embedding).to(logits.dtype)
        # What is left of the fp16 case is flat.
        weight[0] = 0.0
        yield folder / name, logits, weight, settings


def caught(program, folder) -> bool:
    """Whether a sanitizer, the budget or one of the bits below finds something wrong."""
    made = list(bug_cases(folder))
    folders = [case(path, logits, weight, **settings) for path, logits, weight, settings in made]
    special = torch.randn(1, 3, 2 * TILE).bfloat16()
    weight = torch.randn(2 * TILE, 4).bfloat16()
    peaks = peaks_of(special)
    peaks[0][0, 2] = special[0, 2].argmin()
    peaks[1][0, 0], special[0, 1, 9], weight[4, 1] = 0.0, math.nan, math.nan
    folders.append(case(folder / "special", special, weight, peaks, temperature=1e-3))
    if run(program, folders).returncode != 0:
        return True
    for path, logits, table, settings in made:
        if problems(path, logits, table, **settings):
            return True
    # Settled rows are rounded once, so the mass is that of the rounded numbers.
    path, logits, table, _ = made[4]
    truth = torch.softmax(logits.double(), -1) @ table.double()
    exact = (result(path, logits, table) - truth).abs() <= 0.52 * torch.exp2(truth.abs().log2().floor() - 7)
    path, logits, table, _ = made[5]
    flat = torch.softmax(logits.double(), -1) @ table.double()
    scaled = (result(path, logits, table) - flat).abs() <= 1e-3 * flat.abs().amax(-1, keepdim=True)
    found = result(folders[-1], special, weight)
    right = (
        not found[0, 0].any()
        and found[0, 1].isnan().all()
        and (found[0, 2].isfinite() == torch.tensor([1, 0, 1, 1])).all()
    )
    return not (exact.all() and scaled.all() and right)


def test_without_a_bug_nothing_is_caught(program, tmp_path):
    assert not caught(program, tmp_path)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(tmp_path, bug):
    file, passage, replacement = BUGS[bug]
    # Out of bounds shows under the sanitizers alone; the others do without them.
    sanitize = "read" in bug or "behind" in bug
    program = planted(PROGRAM, tmp_path, file, passage, replacement, sanitize)
    assert caught(program, tmp_path / "cases")
