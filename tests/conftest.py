"""Without an NVIDIA GPU the Triton kernels run under Triton's interpreter, which has to be set before its import."""

import importlib.util
import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "0" if "DGEMMA_ACCEL_TEST_PTX" in os.environ else "1")

import interpreted_kernels
import pytest

from dgemma_accel import backends

# Instead of being interpreted they are compiled for this compute capability ("9.0"), and what came out is carried out.
PTX = os.environ.get("DGEMMA_ACCEL_TEST_PTX")
if PTX:
    from ptx import triton_driver

    triton_driver.install(tuple(int(part) for part in PTX.split(".")))
# The same of the extension's CUDA kernels, where there is nvcc.
CUDA_PTX = os.environ.get("DGEMMA_ACCEL_TEST_CUDA_PTX")
if CUDA_PTX:
    from ptx import cuda_driver

    NO_CUDA_PTX = cuda_driver.reason_to_skip()
    if NO_CUDA_PTX is None:
        cuda_driver.install(tuple(int(part) for part in CUDA_PTX.split(".")))
    else:
        CUDA_PTX = None

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreted_kernels.patch_once_a_launch()

# The bench is no part of an installed package; without the repository on the path its tests cannot even be imported.
collect_ignore_glob = [] if importlib.util.find_spec("bench") else ["test_bench*.py"]

DEVICES = {
    "reference": "cpu",
    "cpp": "cpu",
    "triton": "cuda" if torch.cuda.is_available() else "cpu",
    "cuda": "cpu" if CUDA_PTX else "cuda",
}


def backend_params(op: str, without: tuple[str, ...] = ()) -> list:
    """One parameter per implementation of an op; those that need a GPU carry the mark `gpu`."""
    params = []
    for name in backends.MODULES[op]:
        if name in without:
            continue
        on_gpu = DEVICES[name] == "cuda"
        params.append(pytest.param(name, marks=[pytest.mark.gpu] if on_gpu else []))
    return params


def pytest_report_header(config):
    lines = [f"Triton kernels are compiled for {PTX} and carried out on the host"] if PTX else []
    if CUDA_PTX:
        lines.append(f"CUDA kernels are compiled for {CUDA_PTX} and carried out on the host")
    elif "DGEMMA_ACCEL_TEST_CUDA_PTX" in os.environ:
        lines.append(f"CUDA kernels are not carried out: {NO_CUDA_PTX}")
    return lines


def pytest_generate_tests(metafunc):
    """A test that asks for `backend` runs once per implementation of the op that its module names, except `WITHOUT`."""
    if "backend" in metafunc.fixturenames:
        without = getattr(metafunc.module, "WITHOUT", ())
        metafunc.parametrize("backend", backend_params(metafunc.module.OP, without))


def pytest_itemcollected(item):
    """What a module of tests runs on its DEVICE needs a GPU where that is one."""
    if getattr(item.module, "DEVICE", "cpu") == "cuda":
        item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device(request) -> str:
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else "reference"
    return DEVICES[backend]


# Files of half a minute and more go first: a worker that begins with one when the other has nothing left is waited for.
LONG = {
    f"test_{name}.py"
    for name in (
        "triton_generate", "triton_head", "triton_experts_nvfp4", "triton_experts", "hf_quantize", "hf_overrides",
        "hf_tiny", "hf_parts", "hf_graph", "row_stats", "demo", "bench_step", "experts_nvfp4",
        "step_launches", "cuda_emulation_top_k_top_p",
    )
}  # fmt: skip


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords and not (CUDA_PTX and "ptx" in item.keywords):
            item.add_marker(skip)


def pytest_runtest_logreport(report):
    """A line at once for each failure on a GPU: a run that its time limit ends prints no list of them."""
    if report.failed and "gpu" in report.keywords:
        crash = getattr(report.longrepr, "reprcrash", None)
        print(
            f"\nfailed: {report.nodeid}: {crash.message.splitlines()[0] if crash else report.longrepr}",
            flush=True,
        )


@pytest.fixture(autouse=True)
def _the_gpu_survives(request):
    """Ends the process whose CUDA context an illegal access has ended, lest every later test fails for it.

    pytest-xdist reports the test and goes on with another worker.
    """
    yield
    if "gpu" in request.keywords and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if hasattr(request.config, "workerinput"):
                os._exit(70)
            pytest.exit(f"the GPU was lost in {request.node.nodeid}: {error}", returncode=70)


def far_apart(near: torch.Tensor, stride: int) -> torch.Tensor:
    """The same matrix with its rows `stride` elements apart.

    What is not touched of the memory between them is never there on a CPU; where so much cannot even be asked for, the
    test is skipped.
    """
    try:
        storage = near.new_empty((near.shape[0] - 1) * stride + near.shape[1])
    except RuntimeError as error:
        pytest.skip(f"no room for it: {str(error).splitlines()[0]}")
    return storage.as_strided(near.shape, (stride, 1)).copy_(near)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny models, whose operators would spend their time on threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def uncompiled(monkeypatch):
    """What `torch.compile` is given, without the compiler's minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


# PyTorch's first seed is another in each process.
def pytest_collectstart(collector):
    """The constants of a module of tests are the same in every run, whatever was imported before it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """What several tests share is made before `_seeded` of the first of them, whichever that is."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_compiled():
    """What other modules of tests have compiled counts towards the compiler's limit on variants of a function."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
