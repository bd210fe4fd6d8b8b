"""Without an NVIDIA GPU the Triton kernels run under Triton's interpreter, which has to be set before its import."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from dgemma_accel import backends

# The bench is no part of an installed package; without the repository on the path its tests cannot even be imported.
collect_ignore_glob = [] if importlib.util.find_spec("bench") else ["test_bench*.py"]

DEVICES = {
    "reference": "cpu",
    "cpp": "cpu",
    "triton": "cuda" if torch.cuda.is_available() else "cpu",
    "cuda": "cuda",
}


def backend_params(op: str) -> list:
    """One parameter per implementation of an op; those that need a GPU carry the mark `gpu`."""
    params = []
    for name in backends.MODULES[op]:
        on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
        params.append(pytest.param(name, marks=[pytest.mark.gpu] if on_gpu else []))
    return params


def pytest_generate_tests(metafunc):
    """A test that asks for `backend` runs once per implementation of the op its module names as `OP`."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backend_params(metafunc.module.OP))


@pytest.fixture
def device(request) -> str:
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else "reference"
    return DEVICES[backend]


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
