"""The parts the Triton kernels share: Philox words, tanh, and arguments that change without a recompilation."""

import os
import subprocess
import sys

import pytest
import torch

common = pytest.importorskip("dgemma_accel.triton_kernels.common")
pairs = pytest.importorskip("dgemma_accel.triton_kernels.pairs")
softcap = pytest.importorskip("dgemma_accel.triton_kernels.softcap")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from dgemma_accel.reference.philox import random_words  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(common.unavailable() is not None, reason=str(common.unavailable()))


@triton.jit(do_not_specialize=["seed_value", "offset_value"])
def words_kernel(rows, words, seed, seed_value: tl.int64, offset, offset_value: tl.int64, N: tl.constexpr):
    o = tl.arange(0, N)
    s = common.int_parameter(seed, seed_value, 0, 0)
    f = common.int_parameter(offset, offset_value, 0, 0)
    a, b, c, d = common.philox(s, f, tl.load(rows + o))
    tl.store(words + o, a.to(tl.int64))
    tl.store(words + N + o, b.to(tl.int64))
    tl.store(words + 2 * N + o, c.to(tl.int64))
    tl.store(words + 3 * N + o, d.to(tl.int64))


@triton.jit
def tanh_kernel(x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, common.tanh(tl.load(x + o)))


@triton.jit
def scaled_tanh_kernel(x, y, scale, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, softcap.scaled_tanh(tl.load(x + o), scale))


@triton.jit
def scaled_tanh_near_0_kernel(x, y, scale, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, softcap.scaled_tanh_near_0(tl.load(x + o), scale))


@triton.jit
def tanh_below_kernel(x, y, rate, inverse_softcap, HALF: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    if HALF:
        tl.store(
            y + o,
            softcap.odd_polynomial(tl.load(x + o), softcap.coefficients_below_half(rate, inverse_softcap), 5),
        )
    else:
        tl.store(
            y + o,
            softcap.odd_polynomial(tl.load(x + o), softcap.coefficients_below_1(rate, inverse_softcap), 7),
        )


@triton.jit
def pairs_kernel(a, b, large, small, wide, N: tl.constexpr):
    o = tl.arange(0, N)
    first, second = tl.load(a + o), tl.load(b + o)
    tl.store(large + o, pairs.larger(first, second))
    tl.store(small + o, pairs.smaller(first, second))
    tl.store(wide + o, pairs.widened(first))


@needs_triton
@pytest.mark.parametrize(
    "seed, offset",
    [
        (0, 0),
        (1, 2**33 + 5),
        (2**45 + 3, 7),
        (2**63 - 1, 2**62),
        # What 32 bits hold without a sign, and not with one.
        (2**31, 0),
        (1, 2**31),
        (2**32 - 1, 2**32 - 1),
    ],
)
def test_philox_words_equal_the_reference(seed, offset):
    rows = torch.tensor([0, 1, 2, 255, 2**31, 2**32 - 1, 2**32 + 9, 2**40], device=DEVICE)
    words = torch.empty(4, 8, dtype=torch.int64, device=DEVICE)
    seed, offset = torch.tensor(seed), torch.tensor(offset)
    (s, s_value, _), (f, f_value, _) = common.int_by_value(seed), common.int_by_value(offset)
    words_kernel[(1,)](rows, words, s, s_value, f, f_value, N=8)
    assert torch.equal(words.cpu(), torch.stack(random_words(seed, offset, rows.cpu())))


def everywhere():
    near = torch.linspace(-1.5, 1.5, 2048)
    small = torch.logspace(-30, 0, 1024)
    far = torch.cat([torch.linspace(-40, 40, 1020), torch.tensor([torch.inf, -torch.inf, 0.0, 3e38])])
    return torch.cat([near, small, far]).to(DEVICE)


def relative_error(y, truth):
    return float(((y.double() - truth) / truth.abs().clamp_min(1e-35)).abs().max())


@needs_triton
def test_tanh_is_accurate_everywhere():
    x = everywhere()
    y = torch.empty_like(x)
    tanh_kernel[(1,)](x, y, N=4096)
    assert relative_error(y, torch.tanh(x.double())) < 4 * torch.finfo(torch.float32).eps
    assert y[-4:].tolist() == [1.0, -1.0, 0.0, 1.0]


@needs_triton
@pytest.mark.parametrize("cap, rate", [(30.0, 2.404), (5.0, 1.2e7), (500.0, 0.01)])
def test_tanh_with_softcap_and_temperature_in_its_coefficients_is_accurate(cap, rate):
    for half in (True, False):
        x = torch.linspace(-cap, cap, 4096, device=DEVICE) * (0.5 if half else 1.0)
        y = torch.empty_like(x)
        tanh_below_kernel[(1,)](x, y, rate, 1 / cap, HALF=half, N=4096)
        truth = torch.tensor(rate).double() * cap * torch.tanh(x.double() / cap)
        assert relative_error(y, truth) < 4 * torch.finfo(torch.float32).eps


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pairs(dtype):
    numbers = [0.0, 1.5, -2.0, 3e-5, torch.inf, -torch.inf, torch.nan, 1000.0]
    a = torch.tensor(numbers, dtype=dtype, device=DEVICE).repeat_interleave(8).repeat(4)
    b = torch.tensor(numbers, dtype=dtype, device=DEVICE).repeat(8).repeat(4)
    large, small, wide = torch.empty_like(a), torch.empty_like(a), torch.empty_like(a, dtype=torch.float32)
    pairs_kernel[(1,)](a, b, large, small, wide, N=256, num_warps=1)
    assert torch.equal(
        large.nan_to_num(nan=7.0), torch.fmax(a.float(), b.float()).to(dtype).nan_to_num(nan=7.0)
    )
    assert torch.equal(
        small.nan_to_num(nan=7.0), torch.fmin(a.float(), b.float()).to(dtype).nan_to_num(nan=7.0)
    )
    assert torch.equal(wide.nan_to_num(nan=7.0), a.float().nan_to_num(nan=7.0))


@needs_triton
@pytest.mark.parametrize("scale", [1.0, 108.2, 4.3e7])
def test_scaled_tanh_is_accurate_everywhere(scale):
    x = everywhere()
    y = torch.empty_like(x)
    scaled_tanh_kernel[(1,)](x, y, scale, N=4096)
    scale = torch.tensor(scale).double()
    assert relative_error(y, scale * torch.tanh(x.double())) < 5 * torch.finfo(torch.float32).eps
    assert torch.equal(y[-4:].cpu(), (scale * torch.tensor([1.0, -1.0, 0.0, 1.0])).float())

    x = torch.linspace(-1, 1, 4096, device=DEVICE)
    y = torch.empty_like(x)
    scaled_tanh_near_0_kernel[(1,)](x, y, float(scale), N=4096)
    assert relative_error(y, scale * torch.tanh(x.double())) < 4 * torch.finfo(torch.float32).eps


RECOMPILATION = """
import torch
from dgemma_accel.triton_kernels import ahead_of_time, commit, row_stats, block_attention, head_stats, soft_embedding
from triton.runtime.jit import JITFunction

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def stats(t, seed, offset, softcap, rows):
    logits = empty(1, rows, 32768, dtype=torch.bfloat16)
    row_stats.row_stats(logits, torch.tensor(t), None, None, torch.tensor(seed), torch.tensor(offset), softcap)

def decide(k, value, value2, seed, mask, batch):
    tokens, field = empty(batch, 64, dtype=torch.int64), empty(batch, 64)
    commit.commit(commit.CommitCall(tokens, tokens, tokens, field, field, field, field, None, 0, 1, 0,
        torch.tensor(k), torch.tensor(value), torch.tensor(value2), mask, 0, mask, torch.tensor(seed), torch.tensor(0),
        None, None, None, None))

def attend(length, canvas, scale, softcap, splits, causal=False, window=None):
    query, prefix = empty(1, 2, canvas, 64, dtype=torch.bfloat16), empty(1, 2, length, 64, dtype=torch.bfloat16)
    block_attention.block_attention(
        query, query, query, prefix, prefix, None, None, scale, softcap, causal, window, splits=splits)

def attend_causally(*arguments):
    attend(*arguments[:5], True, arguments[5])

cases = [
    (stats, (0.5, 1, 0, 30.0, 256), (1.0, 2**62 + 3, 16, 1.0, 257), (0.0, 0, 2**40, 29.0, 1024)),
    (decide, (1, 0.5, 0.0, 1, 7, 1), (16, 1.0, 1.0, 2**50, 2**30, 16), (2**40, 0.0, 0.25, 0, 1, 3)),
    # Canvases and prompts of any length from a whole tile of rows on.
    (attend, (4096, 256, 1.0, 30.0, 2), (8191, 333, 0.3, 1.0, 16), (1, 128, 2.0, 50.0, 5)),
    (attend_causally, (4096, 128, 1.0, 30.0, 2, None), (8191, 1001, 0.3, 1.0, 16, 1024), (1, 334, 2.0, 50.0, 5, 1)),
]
for function, *calls in cases:
    seen = set()
    for arguments in calls:
        with ahead_of_time.recording((9, 0)) as compiled:
            function(*arguments)
        seen.add(tuple(kernel.hash for _, kernel in compiled))
    print(function.__name__, len(seen))

# Numbers on the device that are elements of one tensor, aligned to 16 bytes or not.
def place(i):
    numbers, many = empty(16, dtype=torch.int64), empty(16)
    assert numbers[i].data_ptr() % 16 == 8 * (i % 2), "alignment is what differs"
    seed, offset, k = numbers[i], numbers[i + 1], numbers[i : i + 2]
    logits, one = empty(1, 4, 4096, dtype=torch.bfloat16), torch.tensor(1.0)
    row_stats.row_stats(logits, many[i], many[i + 1], None, seed, offset, 30.0, cutoff=many[i : i + 4])
    hidden, weight = empty(1, 4, 32, dtype=torch.bfloat16), empty(4096, 32, dtype=torch.bfloat16)
    head_stats.head_stats_without_logits(hidden, weight, many[i], many[i + 1], None, seed, offset, 30.0)
    tokens, field = empty(2, 16, dtype=torch.int64), empty(2, 16)
    commit.commit(commit.CommitCall(tokens, tokens, tokens, field, field, field, field, None, 0, 1, 0,
        k, many[i : i + 2], many[i], 7, 0, 7, seed, offset, tokens, empty(1, 2, 16, dtype=torch.int64),
        empty(2, dtype=torch.bool), many[i + 1]))
    bounds, query = empty(32, dtype=torch.int32), empty(1, 2, 32, 64, dtype=torch.bfloat16)
    prefix = empty(1, 2, 100, 64, dtype=torch.bfloat16)
    block_attention.block_attention(
        query, query, query, prefix, prefix, bounds[i : i + 1], bounds[i + 1 : i + 2], 1.0, None, False, splits=1)

seen = set()
for i in (0, 1, 2, 5):
    with ahead_of_time.recording((9, 0)) as compiled:
        place(i)
    seen.add(tuple(kernel.hash for _, kernel in compiled))
print("place", len(seen))

# All slices of a vocabulary, of any number of rows.
seen = set()
for rows, temperature, softcap in ((256, 1.0, 30.0), (300, 0.5, 1.0), (2048, 0.1, 50.0)):
    weight = empty(3 * 65536, 64, dtype=torch.bfloat16)
    with ahead_of_time.recording((9, 0)) as compiled:
        soft_embedding.soft_embedding(empty(1, rows, 3 * 65536, dtype=torch.bfloat16),
            empty(1, rows, dtype=torch.int64), empty(1, rows), weight, torch.tensor(temperature), softcap)
    hashes = [kernel.hash for name, kernel in compiled if name == "probabilities_kernel"]
    assert len(hashes) == 3
    seen.update(hashes)
print("slices", len(seen))
"""


def test_values_do_not_recompile():
    """Temperature, softcap, seed, step, threshold, k, scale, lengths and batch size reach one compiled kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RECOMPILATION], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == "stats 1 decide 1 attend 1 attend_causally 1 place 1 slices 1".split()


def test_features_show_what_they_allow():
    assert (
        (8, 0) in common.CAPABILITIES and (12, 1) in common.CAPABILITIES and (7, 5) not in common.CAPABILITIES
    )
    assert str(common.CAPABILITIES) == "8.0 and newer"
    assert 512 in common.UpTo(512) and 513 not in common.UpTo(512) and 0 not in common.UpTo(512)


@needs_triton
def test_parameters_on_the_cpu_go_by_value():
    assert common.by_value(torch.tensor(0.25)) == (0.25, False, 0)
    rows = torch.ones(3)
    assert common.by_value(rows)[1:] == (True, 1)
    assert common.by_value(None, 1.0) == (1.0, False, 0)


NO_COMPILER = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
from dgemma_accel import backends
needs = {"device": "cuda", "compute_capability": (12, 0), "dtype": torch.bfloat16}
print(backends.choose("soft_embedding", "auto", needs).implementation.backend)
print(backends.load("experts", "triton")[1])
"""


def test_where_triton_cannot_build_its_launcher_it_is_not_taken(tmp_path):
    """It compiles kernels by itself and its launcher with a C compiler, which many images do not have."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")
    }
    # The last names a folder for libcuda.so, which Triton looks for first.
    environment |= {"PATH": "", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", NO_COMPILER], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    backend, reason = done.stdout.splitlines()
    assert backend == "cuda"
    assert "a C compiler and Python's headers" in reason and "Failed to find C compiler" in reason
