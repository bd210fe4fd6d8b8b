"""The CUDA kernels of row_stats, run thread by thread on the host under sanitizers, within the error budget."""

import itertools
import math
import re

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
from test_row_stats import largest, without_left_out

from dgemma_accel.native.params import DTYPES
from dgemma_accel.ops.row_stats import RowStats
from dgemma_accel.reference import row_stats as reference
from dgemma_accel.reference.budget import check_row_stats

pytestmark = skip_without_compiler()

PROGRAM = "row_stats_emulated"
OUTPUTS = {"argmax": torch.int64, "sample": torch.int64} | dict.fromkeys(
    ("entropy", "logsumexp", "top1_prob", "top2_prob", "sample_prob"), torch.float32
)


def case(
    folder,
    logits,
    *,
    temperature=1.0,
    stats_temperature=None,
    softcap=None,
    uniform=None,
    seed=None,
    offset=0,
    cutoff=None,
):
    """Logits [N0, N1, V]; the storage is cut to what the view spans, so that one element beyond is out of bounds."""
    rows0, rows1, vocab = logits.shape
    span = 1 + sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride()))
    storage = logits.as_strided((logits.storage_offset() + span,), (1,), 0)
    tensors = {"logits": storage.view(torch.int16) if logits.dtype != torch.float32 else storage}
    numbers = {
        "dtype": DTYPES[logits.dtype], "storage_offset": logits.storage_offset(), "rows0": rows0, "rows1": rows1,
        "vocab": vocab, "stride0": logits.stride(0), "stride1": logits.stride(1), "softcap": softcap or 0.0,
    }  # fmt: skip
    parameters = {"temperature": temperature, "stats_temperature": stats_temperature}
    if uniform is None:
        parameters |= {"seed": torch.tensor(seed), "offset": torch.tensor(offset)}
    for name, value in parameters.items():
        if value is not None:
            tensors[name] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            numbers[name] = tensors[name].ndim > 0
    tensors |= {"uniform": uniform, "cutoff": cutoff}
    return write_case(folder, numbers, tensors)


def result(folder, logits) -> RowStats:
    return RowStats(*(read_tensor(folder, name, dtype, logits.shape[:2]) for name, dtype in OUTPUTS.items()))


@pytest.fixture(scope="module")
def program():
    return build(PROGRAM)


SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.6, "softcap": 30.0},
    {"temperature": 0.7, "stats_temperature": 1.3, "softcap": 5.0},
    {"temperature": torch.tensor([0.0, 0.3, 1.2])},
)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_within_budget(program, tmp_path, dtype):
    cases = []
    # One element, one vector, a tile and a bit, and rows that start anywhere in a 16-byte vector.
    for vocab, offset, stride in ((1, 0, 1), (7, 3, 11), (8200, 0, 8200), (8199, 5, 8203)):
        for scale in (0.01, 25.0) if vocab < 100 else (8.0,):
            storage = (torch.randn(offset + 3 * stride) * scale).to(dtype)
            logits = storage.as_strided((1, 3, vocab), (3 * stride, stride, 1), offset)
            for kwargs in SETTINGS:
                uniform = torch.tensor([0.0, 1 - 2.0**-24, torch.rand(()).item()])
                cases.append((tmp_path / str(len(cases)), logits, {**kwargs, "uniform": uniform}))
    run_clean(program, [case(folder, logits, **kwargs) for folder, logits, kwargs in cases])
    for folder, logits, kwargs in cases:
        checked = {**kwargs, "uniform": kwargs["uniform"][None]}
        if isinstance(checked["temperature"], torch.Tensor):
            checked["temperature"] = checked["temperature"][None]
        problems = check_row_stats(result(folder, logits), logits, **checked)
        assert not problems, (logits.shape, logits.stride(), kwargs, problems)


CUTOFF_SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.7, "stats_temperature": 1.3, "softcap": 5.0},
    {"temperature": torch.tensor([0.0, 0.3, 1e3, 1.0, 1.0]), "softcap": 30.0},
    {"temperature": 2.0, "softcap": 80.0},
)


def cutoff_problems(program, cases):
    """Cases (folder, logits [1, 5, V], settings with the cutoff [5]): what of their results exceeds the budget."""
    run_clean(program, [case(folder, logits, **settings) for folder, logits, settings in cases])
    problems = []
    for folder, logits, settings in cases:
        kept = dict(settings)
        truth = without_left_out(logits, kept.pop("cutoff")[None], kept.pop("softcap", None))
        checked = {
            name: value[None] if isinstance(value, torch.Tensor) else value for name, value in kept.items()
        }
        problems += check_row_stats(result(folder, logits), truth, **checked)
    return problems


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_within_budget_with_a_cutoff(program, tmp_path, dtype):
    cases = []
    for vocab, offset, stride in ((1, 0, 1), (7, 3, 11), (8200, 0, 8200), (8199, 5, 8203)):
        for settings in CUTOFF_SETTINGS:
            storage = (torch.randn(offset + 5 * stride) * 3).to(dtype)
            logits = storage.as_strided((1, 5, vocab), (5 * stride, stride, 1), offset)
            # One logit, a few, whole tiles that are left out, those of the largest value in one tile, nothing.
            logits[0, 3, vocab // 2 : vocab // 2 + 3] = logits[0, 3].max() + 1
            cutoff = torch.stack(
                [largest(row, min(k, vocab)) for row, k in zip(logits[0], (1, 4, 200, 1, 9))]
            )
            cutoff[4] += 100.0
            uniform = torch.tensor([0.0, 1 - 2.0**-24, torch.rand(()).item(), 0.5, 0.5])
            settings = {**settings, "uniform": uniform, "cutoff": cutoff}
            cases.append((tmp_path / str(len(cases)), logits, settings))
    assert not cutoff_problems(program, cases)
    for folder, logits, _ in cases:
        assert result(folder, logits).entropy.isinf().tolist() == [[False] * 4 + [True]]


def test_cutoffs_that_are_no_numbers_and_nan_among_the_logits(program, tmp_path):
    logits = torch.randn(1, 5, 9000)
    logits[0, 0, 7], logits[0, 3, 8999], logits[0, 4, ::2] = math.nan, math.inf, -math.inf
    cutoff, uniform = torch.tensor([9.0, math.nan, -math.inf, math.inf, -math.inf]), torch.full((5,), 0.5)
    cases = [
        (tmp_path / str(softcap), logits, {"cutoff": cutoff, "uniform": uniform, "softcap": softcap})
        for softcap in (None, 30.0)
    ]
    assert not cutoff_problems(program, cases)


def test_strides_of_two_dimensions_and_draws(program, tmp_path):
    table = torch.randn(2, 3, 2, 500)
    views = [table[:, :, 1], table.transpose(0, 1)[:, :, 0, :333]]
    folders = [
        case(tmp_path / str(i), view, seed=2**40 + 7, offset=3, softcap=30.0) for i, view in enumerate(views)
    ]
    run_clean(program, folders)
    for folder, view in zip(folders, views):
        one, seed, offset = torch.tensor(1.0), torch.tensor(2**40 + 7), torch.tensor(3)
        expected = RowStats(*reference(view.contiguous(), one, None, None, seed, offset, 30.0))
        actual = result(folder, view)
        assert torch.equal(actual.argmax, expected.argmax)
        assert torch.equal(actual.sample, expected.sample)
        torch.testing.assert_close(actual.entropy, expected.entropy, rtol=1e-5, atol=1e-5)


def test_rows_without_a_distribution_and_minus_infinity(program, tmp_path):
    logits = torch.randn(1, 7, 9000)
    logits[0, 0] = float("-inf")
    logits[0, 1, 77] = float("nan")
    logits[0, 2, 8999] = float("inf")
    logits[0, 3, :8999] = float("-inf")
    logits[0, 4, :8500] = float("-inf")
    logits[0, 5] = float("nan")
    logits[0, 6] = 2.0
    uniform = torch.tensor([0.0, 0.5, 0.9, 0.0, 0.0, 0.5, 0.5])
    cases = [
        (tmp_path / f"{temperature}-{softcap}", temperature, softcap)
        for temperature in (0.0, 1.0)
        for softcap in (None, 30.0)
    ]
    run_clean(program, [case(f, logits, temperature=t, softcap=c, uniform=uniform) for f, t, c in cases])
    for folder, temperature, softcap in cases:
        t = torch.tensor(temperature)
        expected = RowStats(*reference(logits, t, None, uniform, None, torch.tensor(0), softcap))
        for name, actual, wanted in zip(OUTPUTS, result(folder, logits), expected):
            same = torch.allclose(actual.double(), wanted.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
            assert same, (name, temperature, softcap, actual, wanted)


@pytest.mark.parametrize("stats_temperature", [1.0, 1e-6])
def test_what_is_ruled_out_takes_no_mass_at_any_temperature(program, tmp_path, stats_temperature):
    logits, uniform = torch.randn(1, 24, 31), torch.rand(24)
    logits[torch.rand(1, 24, 31) < 0.3] = -math.inf
    logits[..., 3] = 0.0
    cases = [(tmp_path / str(temperature), temperature) for temperature in (1e20, 1e30, 3e38)]
    settings = {"stats_temperature": stats_temperature, "uniform": uniform}
    run_clean(program, [case(folder, logits, temperature=t, **settings) for folder, t in cases])
    for folder, temperature in cases:
        temperatures = torch.tensor(temperature), torch.tensor(stats_temperature)
        expected = reference(logits, *temperatures, uniform, None, torch.tensor(0), None)
        assert torch.equal(result(folder, logits).sample, expected[1])


def test_a_row_of_minus_infinity_has_a_first_token_wherever_it_begins(program, tmp_path):
    """The softcap makes it a distribution; what its first vector holds before it is no token."""
    logits = torch.full((3 * 401 + 5,), float("-inf")).as_strided((1, 3, 401), (3 * 401, 401, 1), 5)
    folder = case(tmp_path / "case", logits, softcap=30.0, temperature=torch.tensor([1.0, 0.0, 1.0]),
                  uniform=torch.tensor([0.0, 0.5, 0.5]))  # fmt: skip
    run_clean(program, [folder])
    found = result(folder, logits)
    assert found.argmax.tolist() == [[0, 0, 0]] and found.sample.tolist() == [[0, 0, 200]]


# The last coefficient of the polynomial below the softcap has its twelfth power; 1e30 / 1e-9 is no fp32 number.
@pytest.mark.parametrize("softcap", [0.01, 300.0, 3e3, 3e4, 1e30])
def test_softcaps_of_any_size(program, tmp_path, softcap):
    uniform = torch.tensor([0.25, 0.75])
    cases = []
    for share, temperature in itertools.product((0.4, 0.9), (1.0, softcap / 50, 1e-9)):
        logits = (torch.rand(1, 2, 8192) * 2 - 1) * share * min(softcap, 1e20)
        cases.append((tmp_path / f"{share}-{temperature}", logits, temperature))
    run_clean(program, [case(f, x, temperature=t, softcap=softcap, uniform=uniform) for f, x, t in cases])
    for folder, logits, temperature in cases:
        settings = {"temperature": temperature, "softcap": softcap, "uniform": uniform[None]}
        assert not check_row_stats(result(folder, logits), logits, **settings), temperature


NARROW = (1.0, 1e-3, 1e-5, 1e-7, 1e-9)


def narrow_cases(folder, lowest):
    """(folder, logits, settings) at temperatures that leave one token, softcapped, in tiles that a row fills."""
    logits, uniform = torch.randn(1, 2, 8192) * 3, torch.tensor([0.25, 0.75])
    logits[..., ::128] = lowest
    return [
        (folder / str(t), logits, {"temperature": t, "softcap": 30.0, "uniform": uniform}) for t in NARROW
    ]


def narrow_problems(program, folder, lowest):
    cases = narrow_cases(folder, lowest)
    run_clean(program, [case(path, logits, **settings) for path, logits, settings in cases])
    problems = []
    for path, logits, settings in cases:
        found = result(path, logits)
        problems += check_row_stats(found, logits, **{**settings, "uniform": settings["uniform"][None]})
        problems += [] if bool((found.top1_prob <= 1).all()) else ["top1_prob above 1"]
    return problems


# By the lowest logit, which formula a tile's exponents have: polynomials of two degrees below the softcap, and the one
# for all numbers, whose product is chosen before it is subtracted from.
ROUNDED = {
    -5.0: ("common/exponents.cuh", "hw::multiply_rounded(x, p) - reference", "x * p - reference"),
    -25.0: ("common/exponents.cuh", "hw::multiply_rounded(x, p) - reference", "x * p - reference"),
    -60.0: None,
}  # fmt: skip


@pytest.mark.skipif(not can_fuse(), reason="this processor has no fused multiply-add")
@pytest.mark.parametrize("lowest", ROUNDED)
def test_the_largest_logit_has_no_difference_from_itself_where_products_are_fused(tmp_path, lowest):
    """nvcc fuses a product with what is subtracted from it; at low temperatures that difference is all there is."""
    assert not narrow_problems(build(PROGRAM, sanitize=False, fuse=True), tmp_path / "right", lowest)
    if ROUNDED[lowest] is None:
        return
    unrounded = planted(PROGRAM, tmp_path, *ROUNDED[lowest], sanitize=False, fuse=True)
    assert narrow_problems(unrounded, tmp_path / "wrong", lowest)


def test_two_runs_give_the_same_bits(program, tmp_path):
    logits = torch.randn(1, 2, 20_000)
    folders = [case(tmp_path / name, logits, seed=1) for name in ("one", "two")]
    run_clean(program, folders)
    for name in OUTPUTS:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


# What a race is reported as depends on which thread comes first.
RACE = "no barrier after|never written"
BUGS = {
    "no barrier before the plan is read": (
        "  hw::sync_block();\n  const RowPlan plan", "  const RowPlan plan", RACE,
    ),
    "no barrier before ranks and sums are read": (
        "  hw::sync_block();\n  if (thread == 0) write", "  if (thread == 0) write", RACE,
    ),
    "a vector may end one element behind the row": (
        "if (token >= 0 && token + kElements <= row.vocab) return",
        "if (token >= 0 && token + kElements <= row.vocab + 1) return",
        "heap-buffer-overflow",
    ),
    "an element before the row counts": (
        "if (token + i >= 0 && token + i < row.vocab)", "if (token + i < row.vocab)", "budget",
    ),
    "the sums of a pair of lanes are not added": (
        "  for (int mask = 1; mask < hw::kWarp; mask *= 2) {\n    sums.z +=",
        "  for (int mask = 2; mask < hw::kWarp; mask *= 2) {\n    sums.z +=",
        "budget",
    ),
    "the largest logit of a pair of lanes is not found": (
        "  for (int mask = 1; mask < hw::kWarp; mask *= 2)\n    rank = better",
        "  for (int mask = 2; mask < hw::kWarp; mask *= 2)\n    rank = better",
        "budget",
    ),
}  # fmt: skip


CUTOFF_BUGS = {
    "powers of what is left out": ("exponents.left_out(x) ? kLowestDifference : below", "below"),
    "draws of what is left out": ("return left_out(x) || d <", "return d <"),
    "the second of one": ("params.vocab > 1 && !exponents.left_out(second)", "params.vocab > 1"),
    "ties are left out": ("return x < cutoff;", "return x <= cutoff;"),
}


@pytest.mark.parametrize("bug", CUTOFF_BUGS)
def test_planted_bugs_of_cutoffs_are_caught(tmp_path, bug):
    program = planted(PROGRAM, tmp_path, "row_stats/kernel.cuh", *CUTOFF_BUGS[bug], sanitize=False)
    logits, uniform = torch.randn(1, 5, 4600), torch.linspace(0, 0.9, 5)
    settings = {"softcap": 5.0, "uniform": uniform, "cutoff": largest(logits[0], 1)}
    assert cutoff_problems(program, [(tmp_path / "case", logits, settings)])


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(tmp_path, bug):
    passage, replacement, report = BUGS[bug]
    program = planted(
        PROGRAM, tmp_path, "row_stats/kernel.cuh", passage, replacement, report.startswith("heap")
    )
    # 402 elements from the sixth on: the first vector begins before the row, the last one ends one element behind it.
    storage = torch.randn(5 + 402) * 3
    storage[:5] = 50.0
    logits = storage.as_strided((1, 1, 402), (402, 402, 1), 5)
    uniform = torch.tensor([0.9])
    folder = case(tmp_path / "case", logits, uniform=uniform)
    done = run(program, [folder])
    if report == "budget":
        assert done.returncode != 0 or check_row_stats(result(folder, logits), logits, uniform=uniform[None])
    else:
        assert done.returncode != 0 and re.search(report, done.stderr), done.stderr
