"""Builds and runs CUDA kernels on the host: the kernels' own source over tests/csrc/emulation, thread by thread.

The ordinary build runs under AddressSanitizer and UndefinedBehaviorSanitizer. `planted` builds from a copy of the
sources with one passage replaced, to show that the emulation catches the bug.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TEST_CSRC = ROOT / "tests" / "csrc"
# As nvcc compiles: a * b + c in one instruction. GCC does it from -O2 on.
FUSED = ("-O2", "-mfma", "-ffp-contract=fast")
MACHINE = ("machine", "case_files")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def reason_to_skip() -> str | None:
    if not CSRC.is_dir() or not TEST_CSRC.is_dir():
        return "the C++ sources are not here"
    return None if shutil.which(compiler()[0]) else "no C++ compiler"


def _digest(folders: list[Path], command: list[str]) -> str:
    digest = hashlib.sha256(repr(command).encode())
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp"):
                digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(key: str, suffix: str, arguments: list[str | Path]) -> Path:
    """build/emulation/KEY, made by the compiler unless it is there."""
    target = ROOT / "build" / "emulation" / f"{key}{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        done = subprocess.run([*compiler(), *map(str, arguments), "-o", str(unfinished)])
        assert done.returncode == 0, f"{key} does not compile for the host"
        os.replace(unfinished, target)
    return target


def can_fuse() -> bool:
    """Whether this machine runs what `FUSED` makes."""
    try:
        return " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def build(
    name: str, csrc: Path = CSRC, sanitize: bool = True, fuse: bool = False, defines: tuple[str, ...] = ()
) -> Path:
    """The program of tests/csrc/NAME.cpp, compiled unless it is there for these very sources."""
    optimised = FUSED if fuse else ("-O1",)
    flags = ["-std=c++17", *optimised, "-g1", "-DDGEMMA_EMULATED", *(SANITIZERS if sanitize else ())]
    emulation = TEST_CSRC / "emulation"
    # What is the same in all programs, once: most of the time of compiling one goes into the standard library.
    machine = _compile(
        f"machine-{_digest([emulation, CSRC], [*compiler(), *flags])}",
        ".o",
        [*flags, f"-I{CSRC}", "-r", *(emulation / f"{name}.cpp" for name in MACHINE)],
    )
    includes = [f"-I{folder}" for folder in (csrc, TEST_CSRC, emulation)]
    flags += [f"-D{define}" for define in defines]
    key = _digest([csrc, TEST_CSRC], [name, *compiler(), *flags])
    return _compile(f"{name}-{key}", "", [*flags, *includes, TEST_CSRC / f"{name}.cpp", machine])


def planted(
    name: str,
    folder: Path,
    file: str,
    passage: str,
    replacement: str,
    sanitize: bool = True,
    fuse: bool = False,
    defines: tuple[str, ...] = (),
) -> Path:
    """The program built with `passage` of csrc/FILE, which stands there once, replaced."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy, ignore=shutil.ignore_patterns("*.txt"))
    text = (copy / file).read_text()
    assert text.count(passage) == 1, f"{file}: the passage stands {text.count(passage)} times"
    (copy / file).write_text(text.replace(passage, replacement))
    return build(name, copy, sanitize, fuse, defines)


def write_case(folder: Path, numbers: dict, tensors: dict[str, torch.Tensor | None]) -> Path:
    """A case: `numbers` as lines of a file, and the elements of each tensor in a file of its name."""
    folder.mkdir(parents=True)
    (folder / "case").write_text("".join(f"{name} {float(value)!r}\n" for name, value in numbers.items()))
    for name, tensor in tensors.items():
        if tensor is not None:
            (folder / name).write_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return folder


def read_tensor(folder: Path, name: str, dtype: torch.dtype, shape) -> torch.Tensor:
    data = bytearray((folder / name).read_bytes())
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def run(program: Path, cases: list[Path]) -> subprocess.CompletedProcess:
    """Runs the cases in one process; the caller looks at the return code."""
    # Kernels own no heap memory, and the fibers' stacks are not for the leak checker to walk.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([program, *cases], capture_output=True, text=True, env=environment, timeout=600)


def run_clean(program: Path, cases: list[Path]) -> None:
    done = run(program, cases)
    assert done.returncode == 0, done.stderr[-4000:]


def skip_without_compiler():
    return pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))
