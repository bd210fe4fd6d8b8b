"""Compile what the Triton tests launch, for an architecture, without a GPU.

    python tools/compile_tests.py 9.0

The interpreter, in which these tests run where there is no GPU, takes programs that the compiler refuses. Here the
same tests run with every launch compiled for the compute capability and none executed. So their own results mean
nothing and are not shown; what counts is whether every variant compiles and fits the architecture's memories.
Exit status 1 if one does not. Takes some minutes; `make compile-tests CAPABILITY=12.0` does it in the project's
environment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import triton
from dgemma_accel.triton_kernels import ahead_of_time, common

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "test_row_stats.py", "test_commit.py", "test_progress.py", "test_block_attention.py", "test_head_stats.py",
    "test_soft_embedding.py", "test_experts.py", "test_experts_nvfp4.py", "test_triton_block_attention.py",
    "test_triton_head.py", "test_triton_experts.py", "test_triton_experts_nvfp4.py",
)  # fmt: skip


class Refusals:
    """A pytest plugin: the errors of tests that the compiler raised, with the number of tests that met each."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.tests = 0

    def pytest_runtest_makereport(self, item, call) -> None:
        if call.when != "call":
            return
        self.tests += 1
        if call.excinfo is None:
            return
        frames = traceback.extract_tb(call.excinfo.value.__traceback__)
        compiler = str(Path(triton.__file__).parent)
        if any(frame.filename.startswith(compiler) for frame in frames):
            lines = str(call.excinfo.value).strip().splitlines()
            self.found[f"{call.excinfo.typename}: {lines[-1] if lines else ''} ({item.name})"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {".".join(map(str, capability)): capability for capability in ahead_of_time.SHARED_LIMIT}
    parser.add_argument("capability", choices=known, help="for example 9.0")
    capability = known[parser.parse_args().capability]

    # The kernels' modules take these names when they are imported, which the tests do.
    common.DEVICES, common.unavailable = frozenset({"cuda", "cpu"}), lambda: None
    refusals = Refusals()
    files = [str(ROOT / "tests" / name) for name in TESTS]
    with ahead_of_time.recording(capability) as compiled, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere):
            pytest.main(["-q", "-p", "no:cacheprovider", "-k", "triton", *files], plugins=[refusals])

    variants = {kernel.hash: (name, kernel.metadata) for name, kernel in compiled}
    limit, columns = ahead_of_time.SHARED_LIMIT[capability], ahead_of_time.TENSOR_MEMORY_LIMIT
    too_large = set()
    for name, metadata in variants.values():
        if metadata.shared > limit:
            too_large.add(f"{name}: {metadata.shared} bytes of shared memory, {limit} allowed")
        if (metadata.tmem_size or 0) > columns:
            too_large.add(f"{name}: {metadata.tmem_size} columns of tensor memory, {columns} allowed")
    for name, count in sorted(Counter(name for name, _ in variants.values()).items()):
        print(f"{name:32} {count:4} variants")
    for line in [*refusals.found, *sorted(too_large)]:
        print(f"REFUSED {line}")
    print(f"{refusals.tests} tests launched {len(compiled)} kernels: {len(variants)} variants", end="")
    print(f", {len(refusals.found)} errors of the compiler, {len(too_large)} kinds of kernel too large")
    return 1 if refusals.found or too_large or not variants else 0


if __name__ == "__main__":
    sys.exit(main())
