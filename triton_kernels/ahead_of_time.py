"""Compiles what a launcher would launch on an architecture, without a GPU, and reads the resources it takes.

The launchers themselves run, on meta tensors, under a driver that names the target; every kernel they
would launch is compiled with the arguments' own specialisation and recorded instead of launched.
Needs the compiler, so TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import common

# Shared memory one block may use, bytes (CUDA C++ programming guide, technical specifications by compute capability).
SHARED_LIMIT = {
    (8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376,
    (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376, (12, 1): 101_376,
}  # fmt: skip
# Shared memory of a multiprocessor, and the threads and blocks resident on one at most.
SHARED_PER_MULTIPROCESSOR = {
    (8, 0): 167_936, (8, 6): 102_400, (8, 9): 102_400,
    (9, 0): 233_472, (10, 0): 233_472, (12, 0): 102_400, (12, 1): 102_400,
}  # fmt: skip
THREADS_PER_MULTIPROCESSOR = {
    (8, 0): 2048, (8, 6): 1536, (8, 9): 1536, (9, 0): 2048, (10, 0): 2048, (12, 0): 1536, (12, 1): 1536,
}  # fmt: skip
BLOCKS_PER_MULTIPROCESSOR = {
    (8, 0): 32, (8, 6): 16, (8, 9): 24, (9, 0): 32, (10, 0): 32, (12, 0): 24, (12, 1): 24,
}  # fmt: skip
REGISTERS_PER_MULTIPROCESSOR = 65_536
# Columns of a multiprocessor's tensor memory, which sm_100 keeps accumulators in. A kernel that needs more compiles,
# to a trap, and Triton refuses to launch it.
TENSOR_MEMORY_LIMIT = 512
RESERVED_SHARED = 1024
# A branch of machine code, to an address.
JUMP = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    registers: by thread. shared: bytes of shared memory by block. tensor_memory: columns of it. spills: loads
    from and stores to local memory in the machine code. spills_in_loops: those of them that a loop repeats.
    matrix: the tensor-core instructions in it ("HMMA", "HGMMA", "UTCHMMA", ...), sorted.
    loads: how wide its loads from global memory into registers are, in bits, sorted.
    blocks: blocks resident on a multiprocessor. fused: whether a * b + c is one instruction.
    """

    kernel: str
    capability: tuple[int, int]
    warps: int
    registers: int
    shared: int
    tensor_memory: int
    spills: int
    spills_in_loops: int
    matrix: tuple[str, ...]
    loads: tuple[int, ...]
    blocks: int
    fused: bool


class _Driver:
    """Stands where Triton expects a GPU's driver; one device number per architecture keeps the caches apart."""

    def __init__(self, capability: tuple[int, int]):
        self.number = capability[0] * 10 + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list]:
    """Inside, kernels are compiled for `capability` and appended to the list instead of launched."""
    compiled: list = []
    run = JITFunction.run

    @functools.wraps(run)
    def record(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, getattr(kernel, "result", lambda: kernel)()))

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(capability))
    JITFunction.run = record
    common.target = capability
    try:
        yield compiled
    finally:
        JITFunction.run = run
        common.target = None
        triton.runtime.driver._active = active


def _cuobjdump(option: str, path: str, capability: tuple[int, int]) -> str:
    """What the cuobjdump in Triton's wheel prints of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True)
    if done.returncode != 0:
        # That of Triton 3.6 is of CUDA 12.8, before sm_121.
        number = "".join(map(str, capability))
        raise RuntimeError(
            f"cuobjdump of Triton {triton.__version__} cannot read sm_{number}: {done.stderr.strip()}"
        )
    return done.stdout


def resident_blocks(capability: tuple[int, int], warps: int, registers: int, shared: int) -> int:
    """Blocks resident on a multiprocessor by threads, registers (256 by warp at a time) and shared memory."""
    by_registers = REGISTERS_PER_MULTIPROCESSOR // (warps * 256 * -(-registers * 32 // 256))
    by_shared = SHARED_PER_MULTIPROCESSOR[capability] // (shared + RESERVED_SHARED)
    by_threads = THREADS_PER_MULTIPROCESSOR[capability] // (warps * 32)
    return min(by_registers, by_shared, by_threads, BLOCKS_PER_MULTIPROCESSOR[capability])


def spills_of(code: str) -> tuple[int, int]:
    """(loads from and stores to local memory in machine code as cuobjdump prints it, those of them inside loops)."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    addresses = [int(address, 16) for address, _ in lines]
    # A branch to an address before its own closes a loop; the last one of a kernel goes to itself.
    jumps = [
        (int(found[1], 16), at) for (_, text), at in zip(lines, addresses) if (found := JUMP.search(text))
    ]
    spills = [at for (_, text), at in zip(lines, addresses) if re.search(r"\b(?:LDL|STL)\b", text)]
    return len(spills), sum(any(start <= at < end for start, end in jumps) for at in spills)


def resources(name: str, kernel, capability: tuple[int, int]) -> Resources:
    """The resources of a compiled kernel, read from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name, capability) for option in ("-res-usage", "-sass"))
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spills, spills_in_loops = spills_of(code)
    matrix = sorted(set(re.findall(r"\b(HMMA|HGMMA|QGMMA|IMMA|DMMA|UTC[A-Z]*MMA)\b", code)))
    # What names no width is of 32 bits.
    widths = re.findall(r"\bLDG(?:\.[A-Z]+)*(?:\.[US]?(8|16|64|128))?\b", code)
    loads = tuple(sorted({int(width or 32) for width in widths}))
    # Warp specialisation launches more warps than the configuration names.
    warps = max(kernel.metadata.num_warps, getattr(kernel.metadata, "total_num_warps", 0) or 0)
    shared = kernel.metadata.shared
    tensor_memory = getattr(kernel.metadata, "tmem_size", 0) or 0
    blocks = resident_blocks(capability, warps, registers, shared)
    fused = kernel.metadata.enable_fp_fusion
    return Resources(
        name,
        capability,
        warps,
        registers,
        shared,
        tensor_memory,
        spills,
        spills_in_loops,
        tuple(matrix),
        loads,
        blocks,
        fused,
    )


def compile_launches(capability: tuple[int, int], launch: Callable[[], object]) -> list[Resources]:
    """The resources of every kernel that `launch()` would launch on `capability`."""
    with recording(capability) as compiled:
        launch()
    return [resources(name, kernel, capability) for name, kernel in compiled]
