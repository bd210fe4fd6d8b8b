"""Triton's launches on CPU tensors: compiled for an architecture, then carried out as PTX."""

from __future__ import annotations

import functools
import importlib
import sys

import torch
import triton
from dgemma_accel.triton_kernels import ahead_of_time, common
from triton.runtime.jit import JITFunction

from dgemma_accel import backends

from .kernel import Kernel, pack, stretches_of
from .program import parse


@functools.cache
def kernel_of(ptx: str) -> Kernel:
    return Kernel(parse(ptx))


def launch(kernel, grid: tuple, arguments: dict) -> None:
    """Carries out a compiled kernel; `arguments` are those of the Python function, by name."""
    kinds = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
    values = [pack(kind, arguments[name]) for name, kind in kinds.items()]
    program = kernel_of(kernel.asm["ptx"])
    # Scratch memory, which no kernel here asks for, comes last.
    values += [b"\0" * size for _, size in list(program.program.parameters.values())[len(values) :]]
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    size = (*grid, 1, 1)[:3]
    program.launch(
        size, kernel.metadata.num_warps * 32, kernel.metadata.shared, values, stretches_of(tensors)
    )


def install(capability: tuple[int, int]) -> None:
    """From here on every launch of a Triton kernel in this process runs here, as on a GPU of that architecture.

    The kernels' modules, which decide at import what they are compiled with, must not have been imported.
    """
    imported = [name for name in sys.modules if name.startswith("dgemma_accel.triton_kernels.")]
    assert not set(imported) - {common.__name__, ahead_of_time.__name__}, imported
    common.DEVICES = frozenset({"cuda", "cpu"})
    for modules in backends.MODULES.values():
        if "triton" in modules:
            importlib.import_module(modules["triton"])
    # Only from now on: what it decides by itself is whether the backend is there.
    common.INTERPRET = True
    driver = ahead_of_time._Driver(capability)
    run = JITFunction.run

    @functools.wraps(run)
    def carry_out(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = getattr(kernel, "result", lambda: kernel)()
        bound, *_ = self.device_caches[driver.get_current_device()][-1](*args, **kwargs)
        launch(kernel, grid(bound) if callable(grid) else grid, dict(bound))
        return kernel

    triton.runtime.driver.set_active(driver)
    JITFunction.run = carry_out
    common.target = capability
