"""The CUDA kernel of top_k_top_p, run thread by thread on the host under sanitizers, within the budget."""

import itertools
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
from dgemma_accel.reference.budget import check_top_k_top_p

pytestmark = skip_without_compiler()

PROGRAM = "top_k_top_p_emulated"
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "top_k_first": False, "softcap": None}


def write(folder, logits, **settings):
    """Logits [N0, N1, V]; the storage is cut to what the view spans, so that one element beyond is out of bounds."""
    settings = {**DEFAULTS, **settings}
    rows0, rows1, vocab = logits.shape
    span = 1 + sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride()))
    storage = logits.as_strided((logits.storage_offset() + span,), (1,), 0)
    temperature = torch.as_tensor(settings["temperature"], dtype=torch.float32)
    numbers = {
        "dtype": DTYPES[logits.dtype], "storage_offset": logits.storage_offset(), "rows0": rows0, "rows1": rows1,
        "vocab": vocab, "stride0": logits.stride(0), "stride1": logits.stride(1),
        "temperature": temperature.ndim > 0, "top_k": settings["top_k"], "top_p": settings["top_p"],
        "top_k_first": settings["top_k_first"], "softcap": settings["softcap"] or 0.0,
    }  # fmt: skip
    tensors = {"logits": storage.view(torch.int16) if storage.itemsize == 2 else storage}
    return write_case(folder, numbers, {**tensors, "temperature": temperature})


def problems(folder, logits, **settings) -> list[str]:
    settings = {**DEFAULTS, **settings}
    if isinstance(settings["temperature"], torch.Tensor):
        settings["temperature"] = settings["temperature"].view(logits.shape[:2])
    found = read_tensor(folder, "cutoff", torch.float32, logits.shape[:2])
    return check_top_k_top_p(found, logits, **settings)


def at(offset, stride, rows, vocab, dtype, values=None):
    """Rows that begin `offset` elements after a multiple of 16 bytes, and lie `stride` apart."""
    storage = torch.full((offset + rows * stride,), math.nan, dtype=dtype)
    view = storage.as_strided((1, rows, vocab), (rows * stride, stride, 1), offset)
    view.copy_(torch.randn(rows, vocab) * 3 if values is None else values)
    return view


BOTH = {"top_k": 40, "top_p": 0.8}


def cases():
    """(logits, settings): rows of one logit and of many, that begin and end anywhere, flat, peaked, of few values."""
    # k is all of the row, and more.
    for k in (999, 1000, 1001):
        yield at(0, 1000, 1, 1000, torch.float32), {"top_k": k}
    for dtype, (vocab, offset, stride) in itertools.product(
        DTYPES, ((1, 0, 1), (7, 3, 11), (40, 1, 41), (2501, 5, 2503), (3 * 4096 + 16, 0, 13000))
    ):
        logits = at(offset, stride, 2, vocab, dtype)
        yield logits, {**BOTH, "top_k_first": True, "temperature": torch.tensor([0.0, 0.7])}
        if vocab > 100:
            yield logits[:, 1:], {"top_p": 0.9, "softcap": 5.0}
            yield logits[:, 1:], {"top_p": 0.9, "softcap": 40.0}
    flat, peaked = torch.randn(1, 4100) * 0.1, torch.randn(1, 4100)
    peaked[0, 2050], peaked[0, -1] = 25.0, 24.0
    masked, few = torch.randn(1, 4100), torch.randint(0, 9, (1, 4100)) - 4.0
    masked[:, torch.rand(4100) < 0.3] = -math.inf
    for values in (flat, peaked, masked, few):
        logits = at(2, 4101, 1, 4100, torch.float32, values)
        for settings in (
            {"top_k": 1}, {"top_k": 2}, {"top_k": 800}, {"top_p": 0.0}, {"top_p": 0.999, "softcap": 30.0},
            {"top_p": 0.8, "top_k": 2000}, {"top_p": 0.8, "top_k": 2000, "top_k_first": True},
        ):  # fmt: skip
            yield logits, settings
    # The largest logit in each of the places that only some threads look at.
    for place in (0, 1, 2, 3, 510, 2043, 2048, 4098, 4099):
        values = torch.zeros(1, 4100)
        values[0, place] = 3.0
        yield at(2, 4100, 1, 4100, torch.float32, values), {"top_k": 1}
    yield at(0, 4100, 1, 4100, torch.float32, flat * 0 - 1.5), {**BOTH}
    # A few finite logits, of which all are kept only if the count is right.
    sparse = torch.full((1, 900), -math.inf)
    sparse[0, ::100] = torch.arange(9.0) / 2
    for k, softcap in itertools.product((8, 9, 10), (None, 6.0)):
        yield at(0, 900, 1, 900, torch.float32, sparse), {"top_k": k, "top_p": 0.99, "softcap": softcap}
    # Around zeros of both signs, where the number below is no neighbour by bits.
    zeros = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.0]).repeat(200)[None]
    for k in (200, 201, 800, 801):
        yield at(0, 1000, 1, 1000, torch.float32, zeros), {"top_k": k}
    # Of numbers of all sizes evenly spread pivots find nothing.
    wide = torch.randn(1, 3000) * 10 ** torch.linspace(-38, 38, 3000)
    yield at(0, 3000, 1, 3000, torch.float32, wide), {"top_k": 1400}
    yield at(0, 3000, 1, 3000, torch.float32, wide.abs() * 1e-8), {"top_k": 1700}
    # Rows without a distribution, but for the softcap.
    odd = torch.randn(7, 3000)
    odd[0, 2999], odd[1, 3], odd[2, 2000], odd[3] = math.nan, math.nan, math.inf, -math.inf
    odd[4, 10:], odd[5] = -math.inf, math.nan
    for dtype, softcap in itertools.product((torch.float32, torch.bfloat16), (None, 20.0)):
        yield at(1, 3001, 7, 3000, dtype, odd), {"top_k": 20, "top_p": 0.6, "softcap": softcap}
    yield at(0, 300, 2, 300, torch.float32), {"top_p": 0.5, "temperature": 1e-44}
    # Two dimensions of rows.
    table = torch.randn(2, 3, 2, 500)
    yield table[:, :, 1], BOTH
    yield table.transpose(0, 1)[:, :, 0, :333], {**BOTH, "top_k_first": True}


def write_cases(folder):
    torch.manual_seed(0)
    return [
        (write(folder / str(i), logits, **settings), logits, settings)
        for i, (logits, settings) in enumerate(cases())
    ]


def test_within_budget(tmp_path):
    made = write_cases(tmp_path)
    run_clean(build(PROGRAM), [folder for folder, *_ in made])
    for folder, logits, settings in made:
        found = problems(folder, logits, **settings)
        assert not found, (logits.shape, logits.dtype, settings, found)


@pytest.mark.skipif(not can_fuse(), reason="this CPU has no fused products")
def test_with_fused_products(tmp_path):
    """As nvcc makes them: the largest logit still weighs 1, at any temperature."""
    torch.manual_seed(0)
    logits = at(0, 3000, 1, 3000, torch.float32)
    made = [
        (write(tmp_path / f"{t}-{c}", logits, top_p=0.5, temperature=t, softcap=c), t, c)
        for t, c in itertools.product((1.0, 1e-3, 1e-6), (None, 2.0, 30.0))
    ]
    run_clean(build(PROGRAM, fuse=True), [folder for folder, *_ in made])
    for folder, t, c in made:
        assert not problems(folder, logits, top_p=0.5, temperature=t, softcap=c), (t, c)


KERNEL = "top_k_top_p/kernel.cuh"
BUGS = {
    "no barrier": ("  hw::sync_block();\n", ""),
    "one half of shared memory": ("  turn ^= 1;\n", ""),
    "k instead of k - 1": ("int(params.top_k - 1)", "int(params.top_k)"),
    "not above its own pivot": ("x > pivots[j] ? sums[j] + own", "x >= pivots[j] ? sums[j] + own"),
    "the ends confused": ("(found.least >= found.most) return found.least", "(found.least >= found.most) return low"),
    "the least is not above low": ("x > low ? fminf", "x > high ? fminf"),
    "the most is below high": ("x <= high ? fmaxf", "x < high ? fmaxf"),
    "the target is not reached": ("const bool above = found.sum > target", "const bool above = found.sum >= target"),
    "low goes too far": ("low = fmaxf(below(found.least)", "low = fmaxf(found.least"),
    "the cutoff is above low": ("hw::shuffle(found.sum, kPivots - 1) <= target", "false"),
    "zero is its own neighbour": ("(x == 0.0f ? 2 : 1)", "1"),
    "a logit behind the row": ("thread < vocab - behind", "thread <= vocab - behind"),
    "a logit is left out": ("thread < vocab - behind", "thread < vocab - behind - 1"),
    "the head is left out": ("thread < head ? thread : behind + thread", "behind + thread"),
    "a vector beyond the row": ("return index < vectors ?", "return index <= vectors ?"),
    "every other vector": ("index += kTopKTopPThreads", "index += 2 * kTopKTopPThreads"),
    "vectors out of turn": ("vector(index + kTopKTopPAhead * kTopKTopPThreads)", "vector(index + kTopKTopPThreads)"),
    "rows that are not aligned": ("int(-reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T))", "0"),
    "NaN is lost": ("most = hw::larger_or_nan(most, logits.largest())", "most = fmaxf(most, logits.largest())"),
    "all that is +inf": ("fabsf(x) <= kLargestFloat", "x == x"),
    "a warp's sums are left out": ("i < kWarps * kPivots; i +=", "i < kWarps * kPivots / 2; i +="),
    "sums go to the wrong lane": ("(upper ? high : low) +", "(upper ? low : high) +"),
    "the mass of the row": ("params.top_k_first ? floor : least", "least"),
    "the mass of what top-k keeps": ("params.top_k_first ? floor : least", "floor"),
    "top-p forgets top-k": ("params.top_k_first ? floor : least, floor,", "params.top_k_first ? floor : least, least,"),
    "greedy rows have no temperature": ("given == 0.0f ? 1.0f : given", "given"),
    "the polynomial beyond the softcap": ("exponents.polynomial() && relative < 1.0f", "exponents.polynomial()"),
    "k beyond the row": ("params.top_k <= params.vocab", "true"),
}  # fmt: skip


def is_wrong(program, made) -> bool:
    done = run(program, [folder for folder, *_ in made])
    return done.returncode != 0 or any(
        problems(folder, logits, **settings) for folder, logits, settings in made
    )


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(tmp_path, bug):
    # What lies outside of a tensor shows under the sanitizers alone.
    outside = "behind" in bug or "beyond the row" in bug or "aligned" in bug
    program = planted(PROGRAM, tmp_path, KERNEL, *BUGS[bug], sanitize=outside)
    made = write_cases(tmp_path / "cases")
    # Most bugs show in the first few.
    assert any(is_wrong(program, made[i : i + 12]) for i in range(0, len(made), 12))
