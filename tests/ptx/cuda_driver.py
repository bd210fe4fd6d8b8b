"""Launches of the extension's CUDA kernels on CPU tensors: built for an architecture, then carried out as PTX.

The extension is compiled as always, but for PTX alone, and linked with tests/csrc/recording_cudart.cpp instead of the
CUDA runtime. So its bindings, its dispatch and its launches are those of the product.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib.machinery
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
import types
import weakref
from pathlib import Path
from unittest import mock

import setuptools
import torch
from dgemma_accel.triton_kernels.ahead_of_time import SHARED_LIMIT

import dgemma_accel
from dgemma_accel import backends

from .kernel import Kernel, stretches_of
from .program import entries_of

ROOT = Path(__file__).resolve().parent.parent.parent
RUNTIME = ROOT / "tests" / "csrc" / "recording_cudart.cpp"
# By which a long prefix is split.
MULTIPROCESSORS = 4
TENSORS = (torch.Tensor, torch.nn.Parameter)


def setup_functions() -> dict:
    """What setup.py defines, without its setup."""
    with mock.patch.object(setuptools, "setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def reason_to_skip() -> str | None:
    if not (ROOT / "setup.py").is_file():
        return "the sources are not here"
    return None if setup_functions()["find_nvcc"]() else "no nvcc"


def build(capability: tuple[int, int]) -> tuple[Path, Path]:
    """(the extension, the folder of its PTX) in build/ptx-..., made by ninja, by one process at a time."""
    functions = setup_functions()
    nvcc = functions["find_nvcc"]()
    number = "".join(map(str, capability)) + ("a" if capability == (9, 0) else "")
    folder = ROOT / "build" / f"ptx-{sys.implementation.cache_tag}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    text = functions["ninja_file"](folder, target, nvcc, [f"{number}+PTX"])
    # No machine code, and another runtime.
    text = re.sub(rf"-gencode=arch=compute_{number},code=sm_{number}(?= |$)", "", text, flags=re.M)
    runtime = folder / "recording_cudart.o"
    text = text.replace("-cudart=static", "-cudart=none").replace(": link ", f": link {runtime} ")
    cuda = re.search(r"rule cuda\n  command = (.*?) -MD ", text)[1].replace(
        "$flags", f"-arch=compute_{number}"
    )
    compiler = shlex.join(shlex.split(os.environ.get("CXX") or "c++"))
    lines = [
        "rule ptx",
        f"  command = {cuda} -MD -MF $out.d -ptx $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule runtime",
        f"  command = {compiler} -std=c++17 -O1 -fPIC -fvisibility=hidden -c $in -o $out",
        f"build {runtime}: runtime {RUNTIME}",
    ]
    modules = []
    for line in re.findall(r"^build (\S+)\.o: cuda (\S+)$", text, re.M):
        modules.append(f"{line[0]}.ptx")
        lines.append(f"build {modules[-1]}: ptx {line[1]}")
    lines += [f"default {' '.join(modules)}", ""]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(text + "\n".join(lines))
        done = subprocess.run(
            [functions["ninja_program"](), "-C", str(folder)], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout[-3000:]
    return target, folder


class Launches:
    """Takes what the extension launches."""

    def __init__(self, folder: Path):
        self.programs = {
            name: entry
            for path in sorted(folder.rglob("*.ptx"))
            for name, entry in entries_of(path.read_text()).items()
        }
        self.kernels: dict[str, Kernel] = {}
        self.tensors = LiveTensors()
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_size_t,
            ctypes.POINTER(ctypes.c_void_p),
        )  # fmt: skip
        self.function = kind(self.take)

    def kernel(self, name: str) -> Kernel:
        if name not in self.kernels:
            self.kernels[name] = Kernel(self.programs[name]())
        return self.kernels[name]

    def take(self, name, grid, threads, shared, arguments) -> int:
        try:
            kernel = self.kernel(name.decode())
            sizes = [size for _, size in kernel.program.parameters.values()]
            values = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)]
            kernel.launch(
                (grid[0], grid[1], grid[2]), threads, shared, values, stretches_of(self.tensors.all())
            )
        except BaseException:
            # No exception crosses the extension, which says that the kernel failed.
            traceback.print_exc()
            return 1
        return 0


class LiveTensors:
    """All CPU tensors that Python holds: a launch's pointers do not say how far they reach.

    To look through every object of a session at each launch would take most of its time. So what has lived for long is
    looked through once, frozen, and of it only the tensors are remembered, weakly.
    """

    # Objects since the last time that are worth it.
    MANY = 20_000

    def __init__(self):
        self.old: list[weakref.ref] = []
        # At the end of the process all of it is garbage like any other.
        atexit.register(gc.unfreeze)

    def all(self) -> list[torch.Tensor]:
        objects = gc.get_objects()
        found = [one for one in objects if type(one) in TENSORS and one.device.type == "cpu"]
        known = [one for one in (reference() for reference in self.old) if one is not None]
        if len(objects) > self.MANY:
            del objects
            gc.collect()
            gc.freeze()
            self.old = [weakref.ref(one) for one in (*known, *found)]
        return known + found


def install(capability: tuple[int, int]) -> None:
    """From here on the "cuda" backend of every op runs in this process on CPU tensors, as on that architecture."""
    assert "dgemma_accel._C" not in sys.modules
    target, folder = build(capability)
    spec = importlib.util.spec_from_file_location("dgemma_accel._C", target)
    module = importlib.util.module_from_spec(spec)
    sys.modules["dgemma_accel._C"] = dgemma_accel._C = module
    spec.loader.exec_module(module)
    launches = Launches(folder)
    library = ctypes.CDLL(str(target))
    library.take_launches.argtypes = [type(launches.function), ctypes.c_size_t]
    library.take_launches(launches.function, SHARED_LIMIT[capability])
    # The function has to outlive the process's last launch.
    module.launches = launches

    from dgemma_accel.native import block_attention_launch, block_attention_sm_90a, soft_embedding_cuda

    for modules in backends.MODULES.values():
        if "cuda" in modules:
            native = importlib.import_module(modules["cuda"])
            native.unavailable = lambda: None
            native.FEATURES["device"] = {"cuda", "cpu"}
    block_attention_sm_90a.FEATURES["device"] = {"cuda", "cpu"}
    block_attention_sm_90a.compute_capability = lambda device: capability
    soft_embedding_cuda.missing_kernels = lambda device: None
    block_attention_launch._multiprocessors = lambda device: MULTIPROCESSORS
    device, stream = torch.cuda.device, torch.cuda.current_stream
    torch.cuda.device = lambda where: contextlib.nullcontext() if _on_cpu(where) else device(where)
    torch.cuda.current_stream = lambda where=None: (
        types.SimpleNamespace(cuda_stream=0) if _on_cpu(where) else stream(where)
    )


def _on_cpu(device) -> bool:
    return isinstance(device, torch.device) and device.type == "cpu"
