"""The CUDA kernels of experts, run thread by thread on the host under sanitizers: within the error budget."""

import math
import re
from typing import NamedTuple

import pytest
import torch
from emulated_kernels import build, planted, read_tensor, run, run_clean, skip_without_compiler, write_case
from test_experts import BLOCKS, PLAIN, ROWS, make_case, make_fp8_case
from test_experts_nvfp4 import make_nvfp4_case

from dgemma_accel.native.experts_cuda import matrix
from dgemma_accel.native.params import DTYPES
from dgemma_accel.reference.budget_experts import check_experts
from dgemma_accel.reference.experts import ACTIVATIONS

pytestmark = skip_without_compiler()

PROGRAM = "experts_emulated"
MATRIX = ("format", "", "scale", "scale_by_row", "global_scale", "global_scales")
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def write(folder, case, settings):
    """A case of the program; settings: keywords of the op."""
    hidden, index, weights, gate_up, down = case
    scales = {name: value for name, value in settings.items() if name != "activation"}
    numbers = {
        "dtype": DTYPES[hidden.dtype], "rows": len(hidden), "top_k": index.shape[1], "experts": len(down),
        "width": gate_up.shape[1] // 2, "embedding": hidden.shape[1],
        "activation": ACTIVATIONS.index(settings.get("activation", "gelu_tanh")), "hidden_stride": hidden.shape[1],
        "choice_dtype": DTYPES[weights.dtype], "choice_stride0": index.shape[1], "choice_stride1": 1,
    }  # fmt: skip
    tensors = {"hidden": hidden, "index": index, "choice_weights": weights}
    for name, weight in (("gate_up", gate_up), ("down", down)):
        parts = matrix(weight, scales.get(f"{name}_scale"), scales.get(f"{name}_global_scale"))
        for part, value in zip(MATRIX, parts):
            key = f"{name}_{part}".removesuffix("_")
            if isinstance(value, torch.Tensor):
                tensors[key] = value
            elif value is not None:
                numbers[key] = value
    return write_case(folder, numbers, tensors)


def output_of(folder, case):
    return read_tensor(folder, "output", case[0].dtype, case[0].shape)


def problems_of(folder, case, settings):
    return check_experts(output_of(folder, case), *case, **settings)


# Rows, K, X, I, E: a tile's edges in every direction, the stages of a pipeline from one on, up projections that begin
# inside a block of scales.
SHAPES = {
    "one": (1, 1, 1, 32, 32),
    "uneven": (19, 3, 5, 96, 160),
    "deep": (4, 2, 3, 160, 544),
    # More than 24 rows by expert.
    "many": (52, 2, 2, 96, 160),
}
KINDS = {
    "plain": lambda *arguments, **options: (make_case(*arguments, **options), {}),
    "blocks": lambda *arguments, **options: make_fp8_case(*arguments, **options, which=(BLOCKS, BLOCKS)),
    "rows": lambda *arguments, **options: make_fp8_case(*arguments, **options, which=(ROWS, ROWS)),
    "nvfp4": make_nvfp4_case,
}


@pytest.fixture(scope="module")
def program():
    return build(PROGRAM)


@pytest.mark.parametrize("kind", KINDS)
def test_within_budget(program, tmp_path, kind):
    made = []
    both = [(name, torch.bfloat16) for name in SHAPES] + [
        (name, torch.float16) for name in ("uneven", "many")
    ]
    for number, (name, dtype) in enumerate(both):
        case, settings = KINDS[kind](*SHAPES[name], dtype, "cpu")
        settings["activation"] = ACTIVATIONS[number % 2]
        made.append((write(tmp_path / str(number), case, settings), case, settings))
    run_clean(program, [folder for folder, *_ in made])
    for folder, case, settings in made:
        assert problems_of(folder, case, settings) == [], settings


@pytest.mark.parametrize("which", [(BLOCKS, PLAIN), (PLAIN, ROWS)], ids=["gate_up", "down"])
def test_matrices_of_two_kinds(program, tmp_path, which):
    case, settings = make_fp8_case(30, 3, 5, 96, 192, torch.bfloat16, "cpu", which=which)
    folder = write(tmp_path / "case", case, settings)
    run_clean(program, [folder])
    assert problems_of(folder, case, settings) == []


def test_global_scales_of_gate_and_up(program, tmp_path):
    case, settings = make_nvfp4_case(12, 2, 3, 64, 96, torch.bfloat16, "cpu")
    one = settings["gate_up_global_scale"]
    settings["gate_up_global_scale"] = torch.stack([one, one * 3], 1)
    folder = write(tmp_path / "case", case, settings)
    run_clean(program, [folder])
    assert problems_of(folder, case, settings) == []


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
def test_routing(program, tmp_path, dtype):
    """One expert with every row, some without any, choices of no expert whose weights are NaN, in each dtype."""
    hidden, index, weights, gate_up, down = make_case(100, 3, 12, 32, 64, torch.bfloat16, "cpu", skewed=True)
    weights = weights.to(dtype)
    index[::3, 1], weights[::3, 1] = 12, math.nan
    index[1::6, 2], weights[1::6, 2] = -5, math.inf
    index[2, 0], index[4] = 2**40, 12
    case = (hidden, index, weights, gate_up, down)
    folder = write(tmp_path / "case", case, {})
    run_clean(program, [folder])
    assert problems_of(folder, case, {}) == []
    assert not output_of(folder, case)[4].any()
    # Pairs by expert, ascending within one; what is unused is marked.
    order = read_tensor(folder, "order", torch.int32, (300,))
    own = ((index >= 0) & (index < 12)).flatten()
    flat = torch.where(own, index.flatten(), 12)
    assert torch.equal(order[: own.sum()].long(), flat.argsort(stable=True)[: own.sum()])
    expert, first, end = read_tensor(folder, "tiles", torch.int32, (3, -1))
    counts = flat.bincount(minlength=13)[:12]
    size, used = 64 if 300 > 24 * 12 else 32, []
    for number, last in enumerate(counts.cumsum(0).tolist()):
        used += [(number, place, last) for place in range(last - int(counts[number]), last, size)]
    assert list(zip(expert.tolist(), first.tolist(), end.tolist()))[: len(used)] == used
    assert (expert[len(used) :] == -1).all() and len(expert) >= len(used)


def test_more_pairs_than_a_block_counts_at_once(program, tmp_path):
    """Every warp has several passes, the last of which ends inside one."""
    case = make_case(601, 4, 7, 32, 32, torch.bfloat16, "cpu")
    folder = write(tmp_path / "case", case, {})
    run_clean(program, [folder])
    assert problems_of(folder, case, {}) == []


def test_a_row_of_nan_stays_alone(program, tmp_path):
    case = make_case(40, 2, 3, 32, 64, torch.bfloat16, "cpu")
    spoiled = (case[0].clone(), *case[1:])
    spoiled[0][7] = math.nan
    folders = [write(tmp_path / "case", case, {}), write(tmp_path / "spoiled", spoiled, {})]
    run_clean(program, folders)
    clean, result = output_of(folders[0], case), output_of(folders[1], case)
    assert result[7].isnan().all()
    clean[7] = result[7] = 0
    assert torch.equal(clean, result)


def test_large_gates(program, tmp_path):
    """Where e^-g overflows the gate is 0 or the identity, not NaN."""
    hidden, *others = make_case(8, 2, 3, 32, 32, torch.bfloat16, "cpu")
    made = []
    for activation in ACTIVATIONS:
        case, settings = (hidden * 300, *others), {"activation": activation}
        made.append((write(tmp_path / activation, case, settings), case, settings))
    run_clean(program, [folder for folder, *_ in made])
    for folder, case, settings in made:
        assert problems_of(folder, case, settings) == [] and output_of(folder, case).isfinite().all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_every_code(program, tmp_path, kind, dtype):
    """Each number of the format through a product that shows it, subnormal and negative ones included; scales too."""
    hidden, index, weights, _, _ = make_case(64, 1, 2, 32, 256, dtype, "cpu")
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    finite = codes[codes.view(torch.float8_e4m3fn).float().isfinite()]
    if kind == "fp8":
        gate_up = finite[torch.arange(2 * 64 * 256) % len(finite)].view(2, 64, 256).view(torch.float8_e4m3fn)
        down = finite[torch.arange(2 * 256 * 32) % len(finite)].view(2, 256, 32).view(torch.float8_e4m3fn)
        settings = {
            "gate_up_scale": torch.full((2, 1, 2), 2.0**-12),
            "down_scale": torch.full((2, 2, 1), 2.0**-20),
        }
    else:
        gate_up = codes[torch.arange(2 * 64 * 128) % 256].view(2, 64, 128)
        down = codes[torch.arange(2 * 256 * 16) % 256].view(2, 256, 16)
        scales = finite.view(torch.float8_e4m3fn)
        settings = {
            "gate_up_scale": scales[torch.arange(2 * 64 * 16) % len(scales)].view(2, 64, 16),
            "down_scale": scales[torch.arange(2 * 256 * 2) % len(scales)].view(2, 256, 2),
            "gate_up_global_scale": torch.full((2,), 2.0**-14), "down_global_scale": torch.full((2,), 2.0**-22),
        }  # fmt: skip
    case = (hidden, index, weights, gate_up, down)
    folder = write(tmp_path / "case", case, settings)
    run_clean(program, [folder])
    assert problems_of(folder, case, settings) == []


BARRIER = r"no barrier after|copy to it is running|copies are running"
ADDRESS = "AddressSanitizer"
# Where ANSWER is among the reports the kernels may run to their end, and then the budget has to fail.
ANSWER = "^$"


class Bug(NamedTuple):
    file: str
    passage: str
    replacement: str
    kind: str = "plain"
    report: str = ANSWER


BUGS = {
    "barrier dropped": Bug(
        "product.cuh",
        "    hw::sync_block();\n    if (stage + kAhead",
        "    if (stage + kAhead",
        report=BARRIER + "|" + "never written",
    ),
    "waits for a group less": Bug(
        "product.cuh", "wait_copies<kAhead - 1>", "wait_copies<kAhead>", report="copy to it is running"
    ),
    "refills the stage in use": Bug(
        "product.cuh", "copies.fill(filled, stage", "copies.fill(used, stage", report=BARRIER
    ),
    "last stage dropped": Bug(
        "product.cuh",
        "stage < stages; ++stage",
        "stage < stages - 1; ++stage",
        report="copies are running" + "|" + ANSWER,
    ),
    "swizzle on one side": Bug(
        "copies.cuh",
        "row_place = weight_place<kFormat, kPairs>(row, chunk)",
        "row_place = uint32_t(row) * Shape::kRowBytes + chunk * 16",
    ),
    "pairs' swizzle on one side": Bug(
        "copies.cuh",
        "pairs_place = pair_place<kFormat, kPairs>(pair, chunk)",
        "pairs_place = Shape::kPairsOffset + pair * Shape::kPairBytes + chunk * 16",
        "blocks",
    ),
    "reads beyond the row": Bug(
        "copies.cuh",
        "const bool inside = first + column < depth, pair_inside",
        "const bool inside = true, pair_inside",
        report=ADDRESS,
    ),
    "reads beyond the rows' end": Bug(
        "copies.cuh", "pair_inside && (valid >> (16 + i) & 1)", "(valid >> (16 + i) & 1)", report=ADDRESS
    ),
    "reads beyond the matrix": Bug(
        "copies.cuh",
        "const bool exists = column_of<kGated>(tile, row + i * kRowStep) < sides.columns",
        "const bool exists = true",
        report=ADDRESS,
    ),
    "a place too many": Bug(
        "product.cuh",
        "end < tile.begin + tile_pairs ? end",
        "end <= tile.begin + tile_pairs ? end + 1",
        report=ANSWER + "|" + ADDRESS,
    ),
    "up for gate": Bug(
        "copies.cuh",
        "kGated && row % 32 >= 16 ? sides.gate",
        "kGated && row % 32 < 16 ? sides.gate",
        report=ADDRESS,
    ),
    "columns exchanged": Bug(
        "product.cuh", "upper ? values[0] : values[1], 4", "upper ? values[1] : values[0], 4"
    ),
    "a neighbour's columns": Bug("product.cuh", "values[1], 4)", "values[1], 8)"),
    "order of the choices": Bug(
        "product.cuh",
        "return places.order[place] / top_k;",
        "return places.order[place];",
        report=ANSWER + "|" + ADDRESS,
    ),
    "steps exchanged": Bug(
        "product.cuh", "pairs.word[2 * step], pairs", "pairs.word[2 - 2 * step], pairs", "blocks"
    ),
    "columns of a step exchanged": Bug("product.cuh", "right[2], right[3]", "right[3], right[2]"),
    "swizzle of the wrong rows": Bug(
        "copies.cuh", "chunk ^ (row & 7)", "chunk ^ (row >> 1 & 7)", report="share banks"
    ),
    "scale of the first block": Bug(
        "scales.cuh", "half * half_step + stage * step]", "half * half_step]", "blocks"
    ),
    "scale of the gate for up": Bug("scales.cuh", "row(i) / kBlock", "row(0) / kBlock", "blocks"),
    "scale of eight rows before": Bug("scales.cuh", "matrix.scale_by_row ? 8 : 0", "0", "rows"),
    "group scale of the first stage": Bug(
        "product.cuh", "scales.load_next(stage + 1)", "scales.load_next(0)", "nvfp4"
    ),
    "group scale of another lane": Bug("scales.cuh", "row_bytes + column / 16;", "row_bytes;", "nvfp4"),
    "bytes exchanged": Bug("weights.cuh", "0x4440 + i % 4", "0x4440 + (i ^ 1) % 4", "nvfp4"),
    "high number for the low one": Bug("weights.cuh", "0x1001u << kShift", "0x1010u << kShift - 4", "nvfp4"),
    "exponent cut": Bug("weights.cuh", "0x00070007u << kShift", "0x00030003u << kShift", "nvfp4"),
    "one scale for 32 columns": Bug("weights.cuh", "scale[i / 8]", "scale[0]", "nvfp4"),
    "mantissa misplaced": Bug(
        "weights.cuh", "11 - FloatBits<T>::kMantissa", "10 - FloatBits<T>::kMantissa", "blocks"
    ),
    "sign lost": Bug("weights.cuh", "(upper & 0x80008000u) | ", "", "rows"),
    "without the global scale": Bug(
        "product.cuh", "kNvfp4Left * p.down.global_scale[tile.expert]", "kNvfp4Left", "nvfp4"
    ),
    "route without a barrier": Bug(
        "route.cuh", "  hw::sync_block();\n\n  // Pairs and", "\n  // Pairs and", report=BARRIER
    ),
    "sums without a barrier": Bug(
        "route.cuh", "  hw::sync_block();\n  int begin", "  int begin", report=BARRIER + "|" + "never written"
    ),
    "counts without order": Bug("route.cuh", "      hw::sync_warp();\n    }", "    }", report=BARRIER),
    "tiles of the own expert": Bug(
        "route.cuh", "expert < own; expert +=", "expert <= own; expert +=", report=ANSWER + "|" + ADDRESS
    ),
    "places of the warps in front": Bug("route.cuh", "if (i < warp) place += of_warp;", "", report=ADDRESS),
    "a choice dropped": Bug("combine.cuh", "first + i < p.top_k ?", "first + i < p.top_k - 1 ?"),
    "unweighted": Bug("combine.cuh", "weight[i], sum[j]);", "1.0f, sum[j]);"),
}
FORMATS = {"plain": 0, "blocks": 1, "rows": 1, "nvfp4": 2}


def planted_case(folder, kind):
    case, settings = KINDS[kind](30, 3, 5, 96, 352, torch.bfloat16, "cpu")
    case[1][::4, 1] = 5
    return write(folder, case, settings), case, settings


@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_kernels_pass_what_bugs_fail(program, tmp_path, kind):
    folder, case, settings = planted_case(tmp_path / "case", kind)
    run_clean(program, [folder])
    assert problems_of(folder, case, settings) == []


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(tmp_path, name):
    bug = BUGS[name]
    program = planted(
        PROGRAM,
        tmp_path,
        f"experts/{bug.file}",
        bug.passage,
        bug.replacement,
        sanitize=ADDRESS in bug.report,
        defines=(f"EMULATED_FORMAT={FORMATS[bug.kind]}",),
    )
    folder, case, settings = planted_case(tmp_path / "case", bug.kind)
    done = run(program, [folder])
    if done.returncode == 0:
        assert ANSWER in bug.report and problems_of(folder, case, settings)
    else:
        reports = bug.report.replace(ANSWER, "").strip("|")
        assert reports and re.search(reports, done.stderr), done.stderr
