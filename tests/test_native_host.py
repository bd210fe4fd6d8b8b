"""The compiled extension: what the public ops cannot show. Instruction sets, threads, memory, loading, errors."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_row_stats import largest, run_with_cutoff

import dgemma_accel
from dgemma_accel.backends import BackendError
from dgemma_accel.native import params as native_params
from dgemma_accel.native import row_stats_cpp
from dgemma_accel.native.params import BuiltCapability, extension, missing_extension, row_parameter
from dgemma_accel.native.row_stats_params import outputs, row_stats_params
from dgemma_accel.reference.budget import check_row_stats, check_top_k_top_p
from dgemma_accel.reference.commit import CommitCall
from dgemma_accel.samplers import Keep, TopK

pytestmark = pytest.mark.skipif(missing_extension() is not None, reason=str(missing_extension()))

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTION_SETS = [] if missing_extension() else extension().host_instruction_sets().split()


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert tuple(extension().philox4x32(counter, key)) == words


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_nearly_constant_rows_do_not_add_up_their_roundings(monkeypatch, isa):
    """Where all powers are the same, each addition rounds the same way."""
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    uniform = torch.full((2,), 0.5)
    for level in torch.linspace(-3, -0.01, 12).tolist():
        logits = torch.full((2, 20_000), level)
        logits[:, 7] = 0.0
        logits[1] += torch.randn(20_000) * 1e-3
        stats = dgemma_accel.row_stats(logits, uniform=uniform, backend="cpp")
        assert not check_row_stats(stats, logits, uniform=uniform)
        truth = torch.logsumexp(logits.double(), -1)
        # Half a unit in the last place of the result, and little more than that of the powers.
        assert (stats.logsumexp.double() - truth).abs().max() < 1e-6, level


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 15, 17, 4095, 4097, 12_289])
def test_each_instruction_set_is_within_budget(monkeypatch, isa, dtype, vocab):
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    uniform = torch.rand(5)
    uniform[0] = 0.0
    # From logits where tanh is a straight line to logits where it is flat.
    for scale in (1e-3, 1.0, 60.0, 1e4):
        logits = (torch.randn(5, vocab) * scale).to(dtype)
        logits[1, vocab // 2] = float("-inf") if vocab > 1 else 0.0
        for kwargs in (
            {"softcap": 30.0},
            {"temperature": 0.6},
            {"temperature": 0.6, "stats_temperature": 1.4},
        ):
            stats = dgemma_accel.row_stats(logits, uniform=uniform, backend="cpp", **kwargs)
            problems = check_row_stats(stats, logits, uniform=uniform, **kwargs)
            assert not problems, (scale, kwargs, problems)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [3, 17, 4097, 12_289])
def test_each_instruction_set_is_within_budget_with_a_cutoff(monkeypatch, isa, dtype, vocab):
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    for scale in (1e-3, 1.0, 60.0):
        logits = (torch.randn(5, vocab) * scale).to(dtype)
        cutoff = torch.stack([largest(row, min(k, vocab)) for row, k in zip(logits, (1, 3, 20, 2000, vocab))])
        for kwargs in (
            {"softcap": 30.0},
            {"temperature": 0.6},
            {"temperature": 0.6, "stats_temperature": 1.4},
        ):
            _, problems = run_with_cutoff(logits, cutoff, "cpp", **kwargs)
            assert not problems, (scale, kwargs, problems)
        greedy = dgemma_accel.row_stats(
            logits, temperature=0.0, softcap=30.0, cutoff=cutoff, statistics=False, backend="cpp"
        )
        assert torch.equal(logits.gather(-1, greedy.argmax[:, None]), logits.amax(-1, keepdim=True))
        above = dgemma_accel.row_stats(
            logits,
            temperature=0.0,
            softcap=30.0,
            cutoff=logits.float().amax(-1) + 1.0,
            statistics=False,
            backend="cpp",
        )
        assert bool(above.entropy.isinf().all()) and not above.argmax.any()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 17, 255, 257, 9_011])
def test_each_instruction_set_finds_the_cutoffs(monkeypatch, isa, dtype, vocab):
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    # From rows whose tokens weigh nearly the same, of which many are candidates, to rows with one.
    for scale in (0.0, 1e-2, 2.0, 60.0):
        logits = (torch.randn(4, vocab) * scale).to(dtype)
        logits[1, vocab // 2] += 8.0
        logits[2, vocab // 3 :] = float("-inf") if vocab > 2 else 1.0
        logits[3] = (logits[3].float() / 2).round().to(dtype)
        for more in ({"temperature": 0.7}, {"temperature": 1.5, "softcap": 20.0}):
            for k, p, first in ((0, 0.95, False), (5, 1.0, False), (vocab // 2, 0.5, True), (50, 0.9, False)):
                call = {"top_k": k, "top_p": p, "top_k_first": first, **more}
                cutoff = dgemma_accel.top_k_top_p(logits, backend="cpp", **call)
                options = {"softcap": None, **call}
                assert not check_top_k_top_p(cutoff, logits, **options), (scale, call)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_mass_of_nearly_constant_rows_does_not_add_up_its_roundings(monkeypatch, isa):
    """100 000 equal tokens, and one by which a share is just reached or just not."""
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    count = 100_000
    for level in torch.linspace(-3, -0.01, 12).tolist():
        logits = torch.full((1, count + 1), level)
        logits[0, 7] = 0.0
        logits[0, count // 2 :] -= 1e-3
        x = logits[0].double()
        share = x[: count // 2].exp().sum() / x.exp().sum()
        for p, expected in ((share - 1e-6, x[0]), (share + 1e-6, x[-1])):
            assert dgemma_accel.top_k_top_p(logits, top_p=float(p), backend="cpp") == expected.float()


def test_the_best_instruction_set_is_the_default(monkeypatch):
    logits = torch.randn(4, 9000)
    best = dgemma_accel.row_stats(logits, seed=1, backend="cpp")
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, INSTRUCTION_SETS[0])
    named = dgemma_accel.row_stats(logits, seed=1, backend="cpp")
    assert all(torch.equal(a, b) for a, b in zip(best, named))


def test_unknown_instruction_set_names_those_there_are(monkeypatch):
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match=r"'mmx'.*plain"):
        dgemma_accel.row_stats(torch.randn(1, 8), backend="cpp")
    with pytest.raises(ValueError, match=r"top_k_top_p: .*'mmx'"):
        dgemma_accel.top_k_top_p(torch.randn(1, 8), top_k=2, backend="cpp")


def test_every_half_precision_number_is_read_exactly(monkeypatch):
    # logsumexp of a vocabulary of one is the logit itself: subnormals, both signs, all finite values.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = bits.view(dtype)
        numbers = numbers[numbers.isfinite()]
        for isa in INSTRUCTION_SETS:
            monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
            stats = dgemma_accel.row_stats(numbers[:, None], backend="cpp")
            assert torch.equal(stats.logsumexp, numbers.float())


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(threads):
    logits = torch.randn(37, 20_000)
    tokens = torch.randint(50, (37, 300))
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        stats = dgemma_accel.row_stats(logits, seed=5, softcap=30.0, backend="cpp")
        wide = type(stats)(*(field[:, None].expand(37, 300).contiguous() for field in stats))
        committed = dgemma_accel.commit(tokens, wide, TopK(5), Keep(), backend="cpp")
        cutoff = dgemma_accel.top_k_top_p(logits, top_k=9000, top_p=0.9, backend="cpp")
        results.append((*stats, committed.tokens, committed.committed, cutoff))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_python_threads_may_call_at_once(threads):
    threads(2)
    logits = torch.randn(8, 30_000)

    def results():
        cutoff = dgemma_accel.top_k_top_p(logits, top_p=0.9, backend="cpp")
        return *dgemma_accel.row_stats(logits, seed=5, backend="cpp"), cutoff

    expected = results()
    wrong = []

    def call():
        for _ in range(5):
            stats = results()
            if not all(torch.equal(a, b) for a, b in zip(expected, stats)):
                wrong.append(stats)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


SHARED = """
import os, torch, dgemma_accel
torch.set_num_threads(3)
logits = torch.randn(8, 200_000)
logits.softmax(-1)
before = len(os.listdir("/proc/self/task"))
stats = dgemma_accel.row_stats(logits, seed=5, backend="cpp")
assert before >= 3 and len(os.listdir("/proc/self/task")) == before, before
torch.set_num_threads(1)
alone = dgemma_accel.row_stats(logits, seed=5, backend="cpp")
assert all(torch.equal(a, b) for a, b in zip(stats, alone))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc")
def test_work_is_done_by_the_threads_that_pytorch_has():
    """Threads of its own would share the cores with PyTorch's, which go on spinning after each operator."""
    subprocess.run([sys.executable, "-c", SHARED], check=True, timeout=120)


FORKED = """
import os, sys, torch, dgemma_accel
torch.set_num_threads(2)
logits = torch.randn(8, 30_000)
expected = dgemma_accel.row_stats(logits, seed=5, backend="cpp")
child = os.fork()
if child == 0:
    stats = dgemma_accel.row_stats(logits, seed=5, backend="cpp")
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(expected, stats)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_threads_of_its_own():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


def test_extra_memory_is_below_a_hundredth_of_the_table():
    logits = torch.empty(1, 1, 1).expand(1, 256, 262_144)
    uniform, zero = torch.rand(256), torch.tensor(0)
    params = row_stats_params(logits, torch.tensor(1.0), None, uniform, None, zero, None, outputs(logits))
    assert 0 < extension().row_stats_host_workspace(params) < logits.numel() * 4 / 100


LOADED_ALONE = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(module)
assert module.host_instruction_sets()
mapped = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if ".so" in line}
strangers = [name for name in mapped if name.startswith(("libcuda", "libtorch", "libc10", "libnv", "libgomp"))]
assert not strangers and "torch" not in sys.modules, strangers
"""


def test_the_extension_needs_neither_torch_nor_a_driver():
    path = importlib.util.find_spec("dgemma_accel._C").origin
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", LOADED_ALONE, path], check=True, timeout=60, env=environment)


with_cuda = pytest.mark.skipif(
    missing_extension() is not None or not hasattr(extension(), "row_stats_cuda"), reason="built without CUDA"
)


@with_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_that_fails_names_the_op_the_error_and_the_sizes():
    logits = torch.randn(1, 2, 100)
    out = outputs(logits)
    params = row_stats_params(
        logits, torch.tensor(1.0), None, torch.rand(2), None, torch.tensor(0), None, out
    )
    workspace = torch.empty(extension().row_stats_cuda_workspace(params), dtype=torch.uint8)
    params.workspace = workspace.data_ptr()
    text = r"row_stats: kernel launch with grid \(1, 1, 1\), block 128.*\(cudaError\w+\)"
    with pytest.raises(RuntimeError, match=text):
        extension().row_stats_cuda(params, 0)


def test_cuda_backend_says_what_is_missing():
    if torch.cuda.is_available() and hasattr(extension(), "row_stats_cuda"):
        text = "device: required cpu, supported {cuda}"
    elif hasattr(extension(), "row_stats_cuda"):
        text = "no CUDA device"
    else:
        text = "built without CUDA"
    with pytest.raises(BackendError, match=text):
        dgemma_accel.row_stats(torch.randn(2, 8), backend="cuda")


@pytest.mark.parametrize(
    "archs, runs, fails",
    [
        ("80 90a", [(8, 0), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        ("86 100f", [(8, 6), (10, 0), (10, 3)], [(8, 0), (11, 0)]),
        ("90a+PTX", [(9, 0)], [(8, 0), (12, 0)]),
        ("90a 100+PTX", [(9, 0), (10, 3), (11, 0), (13, 0)], [(8, 0)]),
        ("", [(8, 0), (11, 0)], [(7, 5)]),
    ],
)
def test_capabilities_are_those_that_there_is_code_for(monkeypatch, archs, runs, fails):
    monkeypatch.setattr(extension(), "CUDA_ARCHS", archs, raising=False)
    supported = BuiltCapability(8, 0)
    assert all(capability in supported for capability in runs)
    assert not any(capability in supported for capability in fails)
    assert str(supported) == "8.0 and above" + (f", with code for {archs}" if archs else "")


@pytest.mark.parametrize(
    "driver, line",
    [
        (12040, r"built with CUDA 13\.0, the driver's newest is 12\.4: .* a build with CUDA 12"),
        (13000, None),
        (14010, None),
    ],
)
def test_a_driver_too_old_for_the_extension_is_said_before_a_launch(monkeypatch, driver, line):
    built = SimpleNamespace(
        row_stats_cuda=None, cuda_runtime_version=lambda: 13000, cuda_driver_version=lambda: driver
    )
    monkeypatch.setattr(native_params, "extension", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    missing = native_params.missing_cuda()
    assert missing is None if line is None else re.search(line, missing)


def archs_of_a_build(monkeypatch, folder, release, known, here, editable):
    """What setup.py builds for, by an nvcc of that release that knows these architectures, where these GPUs are."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.delenv("DGEMMA_ACCEL_CUDA_ARCHS", raising=False)
    version = f"echo Cuda compilation tools, release {release}, V{release}.89"
    codes = "; ".join(f"echo sm_{arch}" for arch in known.split())
    programs = {
        "nvcc": f"case $1 in --version) {version};; --list-gpu-code) {codes};; esac\n",
        "nvidia-smi": "".join(f"echo {capability}\n" for capability in here.split()),
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    spec = importlib.util.spec_from_file_location("build_of_the_extension", ROOT / "setup.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return " ".join(build.cuda_archs(str(folder / "nvcc"), editable))


@pytest.mark.source_tree
@pytest.mark.parametrize(
    "known, here, editable, archs",
    [
        ("80 86 89 90 100 103 110 120 121", "", False, "80 86 89 90a 100+PTX 120 121+PTX"),
        ("80 86 89 90 100 120", "", False, "80 86 89 90a 100+PTX 120"),
        # PTX of 90a is for 9.0 alone.
        ("80 86 89 90", "", False, "80 86 89+PTX 90a"),
        ("80 86 89 90", "", True, "80 89+PTX 90a"),
        ("80 86 89 90 100 120", "9.0", True, "90a"),
        ("80 86 89 90 100 120", "12.0 9.0 8.6", True, "86 90a 120+PTX"),
        # The kernels are for 8.0 and newer.
        ("75 80 86 89 90 100 120", "7.5", True, "80 89 90a 100+PTX 120+PTX"),
        ("75 80 86 89 90 100 120", "7.5 8.6", True, "86+PTX"),
    ],
)
def test_a_gpu_that_comes_later_finds_ptx_in_the_build(monkeypatch, tmp_path, known, here, editable, archs):
    assert archs_of_a_build(monkeypatch, tmp_path, "12.8", known, here, editable) == archs


@pytest.mark.source_tree
@pytest.mark.parametrize(
    "here, editable, archs",
    [("", False, "80 86 89 90+PTX"), ("", True, "80 89 90+PTX"), ("9.0", True, "90+PTX")],
)
def test_an_nvcc_before_12_builds_90_for_90a_which_it_does_not_know(
    monkeypatch, tmp_path, here, editable, archs
):
    known = "50 60 70 75 80 86 87 89 90"
    assert archs_of_a_build(monkeypatch, tmp_path, "11.8", known, here, editable) == archs


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_without_statistics_argmax_and_sample_stay_and_the_rest_is_nan(monkeypatch, isa):
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    logits = torch.randn(9, 9_001)
    logits[1] = float("-inf")
    logits[2, 8_999] = float("nan")
    logits[3, 5_000] = float("inf")
    logits[4, [4_097, 8_990]] = 9.0
    logits[5, 9_000] = 9.5
    logits[6] = 3e38
    for dtype in (torch.float32, torch.bfloat16):
        for kwargs in ({"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.0, "softcap": 5.0}):
            table = logits.to(dtype)
            whole = dgemma_accel.row_stats(table, seed=3, backend="cpp", **kwargs)
            for backend in ("cpp", "reference"):
                bare = dgemma_accel.row_stats(table, seed=3, statistics=False, backend=backend, **kwargs)
                if backend == "cpp" or kwargs == {"temperature": 0.0}:
                    assert torch.equal(bare.argmax, whole.argmax) and torch.equal(bare.sample, whole.sample)
                assert all(bool(field.isnan().all()) for field in bare[3:])
                # The one thing that is said about a row all the same.
                assert torch.equal(bare.entropy.isinf(), whole.logsumexp.isnan())
                assert bool((bare.entropy.isinf() | bare.entropy.isnan()).all())
            if "softcap" not in kwargs:
                assert whole.argmax[1:4].tolist() == [0, 0, 0]
                assert whole.argmax[4:7].tolist() == [4_097, 9_000, 0]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_tile_without_mass_is_left_out_but_its_nan_is_not(monkeypatch, isa):
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    logits = torch.randn(3, 40_000)
    logits[:, 10] = 200.0
    logits[1, 30_000] = 199.0
    logits[2, 20_000] = float("nan")
    uniform = torch.tensor([0.999, 0.9, 0.5])
    stats = dgemma_accel.row_stats(logits, uniform=uniform, backend="cpp")
    assert not check_row_stats(stats, logits, uniform=uniform)
    assert stats.sample.tolist() == [10, 30_000, 0] and bool(stats.logsumexp[2].isnan())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("places", [[], [20_000], [3, 9_000, 9_001, 40_001]], ids=len)
@pytest.mark.parametrize(
    "kwargs", [{"temperature": 0.04}, {"temperature": 0.9, "stats_temperature": 0.05}], ids=str
)
def test_tokens_ruled_out_by_any_number_are_the_same(monkeypatch, isa, places, kwargs):
    """Powers of the other logits lie on both sides of the least normal number, and are summed by other instructions
    from the first -inf on."""
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    uniform = torch.linspace(0, 0.999, 6)
    logits = torch.rand(6, 40_002) * 6 - 6
    logits[:, 30_000] = 0.0
    found = []
    for number in (float("-inf"), torch.finfo(torch.float32).min, -1e4):
        logits[:, places] = number
        stats = dgemma_accel.row_stats(logits, uniform=uniform, backend="cpp", **kwargs)
        problems = check_row_stats(stats, logits, uniform=uniform, **kwargs)
        assert not problems, (number, problems)
        found.append(stats)
    for others in found[1:]:
        assert torch.equal(others.sample, found[0].sample)
        torch.testing.assert_close(others, found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("kwargs", [{"temperature": 1e-38}, {"stats_temperature": 1e-38}], ids=str)
def test_differences_that_are_no_normal_numbers_count_at_tiny_temperatures(monkeypatch, isa, kwargs):
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    logits = torch.full((2, 200), -1.0)
    logits[0, [3, 130]] = torch.tensor([0.0, -1e-38])
    logits[1, [3, 130]] = torch.tensor([1.05e-37, 1e-37])
    uniform = torch.full((2,), 0.6)
    stats = dgemma_accel.row_stats(logits, uniform=uniform, backend="cpp", **kwargs)
    assert not check_row_stats(stats, logits, uniform=uniform, **kwargs)
    torch.testing.assert_close(stats.top1_prob + stats.top2_prob, torch.ones(2))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_tokens_without_mass_leave_an_entropy_of_exactly_zero(monkeypatch, isa):
    monkeypatch.setenv(row_stats_cpp.ISA_VARIABLE, isa)
    logits = torch.full((2, 5_000), float("-inf"))
    logits[:, 77] = 3.0
    logits[1, 78:] = -90.0
    stats = dgemma_accel.row_stats(logits, uniform=torch.full((2,), 1 - 2.0**-24), backend="cpp")
    assert stats.entropy.tolist() == [0.0, 0.0] and stats.top1_prob.tolist() == [1.0, 1.0]
    assert stats.sample.tolist() == [77, 77]


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_without_statistics_the_op_is_still_a_torch_op(name):
    logits = torch.randn(2, 3, 50)
    arguments = (
        logits,
        torch.tensor(0.0),
        None,
        None,
        torch.tensor(1),
        torch.tensor(0),
        None,
        False,
        name,
        False,
    )
    # Results that hold NaN are not compared with themselves.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dgemma.row_stats.default, arguments, test_utils=tests)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def argmax(logits):
        return (
            dgemma_accel.row_stats(logits * 2, temperature=0.0, seed=1, statistics=False, backend=name).argmax
            + 1
        )

    assert torch.equal(argmax(logits), logits.argmax(-1) + 1)
    with pytest.raises(TypeError, match="statistics: a bool expected, got str"):
        dgemma_accel.row_stats(logits, statistics="no", backend=name)
    with pytest.raises(ValueError, match="check: needs statistics=True"):
        dgemma_accel.row_stats(logits, statistics=False, check=True, backend=name)


def test_the_struct_of_commit_takes_a_call_as_it_is():
    fields = extension().CommitParams.FIELDS
    assert fields[2 : 2 + len(CommitCall._fields)] == CommitCall._fields
    with pytest.raises(TypeError, match=f"{len(fields)} values expected"):
        extension().CommitParams(1)


def test_structs_take_tensors_for_addresses():
    params = extension().RowStatsParams()
    rows = torch.tensor([0.5, 1.0])
    params.temperature, params.stats_temperature, params.uniform = 0.25, rows, rows
    assert params.temperature == (0, 0, 0.25)
    assert params.stats_temperature == (rows.data_ptr(), 1, 0.0) and params.uniform == rows.data_ptr()
    params.temperature, params.uniform = rows[0], None
    assert params.temperature == (rows.data_ptr(), 0, 0.0) and params.uniform == 0
    with pytest.raises(AttributeError, match="data_ptr"):
        params.uniform = "here"


def test_parameters_go_by_value_from_the_cpu_and_by_address_from_the_device():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    number, rows = torch.tensor(0.25), torch.ones(3)
    assert row_parameter(None, cpu) is None and row_parameter(number, meta) == 0.25
    assert row_parameter(rows, cpu) is rows
    there = number.to("meta")
    assert row_parameter(there, meta) is there
    for value, device in ((rows, meta), (there, cpu), (rows.to("meta"), cpu)):
        with pytest.raises(ValueError, match="a parameter per row must be on"):
            row_parameter(value, device)
