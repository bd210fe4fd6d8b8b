"""Builds `dgemma_accel._C` with ninja: host C++ always, CUDA when nvcc is found.

Environment:
    DGEMMA_ACCEL_CUDA: 0, 1 or auto (the default: CUDA if nvcc is found).
    DGEMMA_ACCEL_CUDA_ARCHS: e.g. "80;90a;120+PTX". Default: every supported architecture for a wheel; for an
        editable build the GPUs of this machine that the kernels are for, or a representative set where there is none.
    CUDA_HOME, NVCC, CXX, MAX_JOBS: as elsewhere.

The package folder `triton_kernels` installs as `dgemma_accel.triton_kernels`.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_ARCH = 80
# What no machine code below is for takes the newest PTX that is not newer than itself: 11.0 that of 100.
WHEEL_ARCHS = ("80", "86", "89", "90a", "100+PTX", "120", "121+PTX")
EDITABLE_ARCHS = ("80", "89", "90a", "100+PTX", "120+PTX")

# Files compiled once per instruction set, and the flags of each set.
PER_ISA_SOURCES = ("csrc/row_stats/row_stats_host.cpp", "csrc/top_k_top_p/top_k_top_p_host.cpp")
ISA_FLAGS = {"plain": ["-DDGEMMA_ISA_PLAIN"]}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-DDGEMMA_ISA_AVX2", "-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        "-DDGEMMA_ISA_AVX512", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma",
        "-mprefer-vector-width=512",
    ]  # fmt: skip


def find_nvcc() -> str | None:
    """Path of nvcc by NVCC, CUDA_HOME, PATH and the usual place, in that order; None without CUDA."""
    wish = os.environ.get("DGEMMA_ACCEL_CUDA") or "auto"
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"DGEMMA_ACCEL_CUDA: must be 0, 1 or auto, got {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        found = place and shutil.which(place)
        if found:
            return found
    if wish == "1":
        raise SystemExit("DGEMMA_ACCEL_CUDA=1, but nvcc is not found (set CUDA_HOME or NVCC)")
    return None


def local_gpu_archs() -> list[str]:
    """Supported architectures of the GPUs of this machine, asked from the driver's tool; empty without one."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = subprocess.run(
        [smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
    )
    archs = {found.replace(".", "") for found in re.findall(r"^\s*(\d+\.\d)\s*$", query.stdout, re.MULTILINE)}
    return [{"90": "90a"}.get(arch, arch) for arch in sorted(archs, key=int) if int(arch) >= OLDEST_ARCH]


def answer_of(nvcc: str, option: str) -> str:
    return subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout


def cuda_archs(nvcc: str, editable: bool) -> list[str]:
    asked = os.environ.get("DGEMMA_ACCEL_CUDA_ARCHS")
    if asked:
        archs = [arch for arch in re.split(r"[;,\s]+", asked) if arch]
        bad = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch)]
        if bad or not archs:
            raise SystemExit(f"DGEMMA_ACCEL_CUDA_ARCHS: such as '80;90a;120+PTX' expected, got {asked!r}")
        if any(int(re.match(r"\d+", arch)[0]) < OLDEST_ARCH for arch in archs):
            raise SystemExit(
                f"DGEMMA_ACCEL_CUDA_ARCHS: {OLDEST_ARCH} is the oldest architecture supported, got {asked!r}"
            )
        return archs
    known = answer_of(nvcc, "--list-gpu-code").split()
    default = (local_gpu_archs() if editable else []) or list(EDITABLE_ARCHS if editable else WHEEL_ARCHS)
    # Architectures with a letter came with CUDA 12, and the list names none.
    release = re.search(r"release (\d+)\.", answer_of(nvcc, "--version"))
    if release and int(release[1]) < 12:
        default = [arch.replace("90a", "90") for arch in default]
    archs = [arch for arch in default if f"sm_{arch.removesuffix('+PTX').rstrip('af')}" in known]
    if not archs:
        raise SystemExit(
            f"{nvcc} knows none of the architectures {', '.join(default)}; set DGEMMA_ACCEL_CUDA_ARCHS"
        )
    # A GPU that comes later needs PTX, also where this nvcc is too old for the last of the list. That of an
    # architecture with a letter runs on no other one.
    general = [arch for arch in archs if arch.removesuffix("+PTX").isdigit()]
    if general and not any(arch.endswith("+PTX") for arch in general):
        archs[archs.index(general[-1])] += "+PTX"
    return archs


def gencode_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def ninja_program() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("ninja is not installed (pip install ninja)") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def ninja_path(path: Path) -> str:
    """A path as ninja reads it in a build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(folder: Path, target: Path, nvcc: str | None, archs: list[str]) -> str:
    """The text of build.ninja: rules, one edge per object, one link."""
    import pybind11

    common = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]
    python_includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    cxx = shlex.split(os.environ.get("CXX") or "c++")
    # The compiler behind a `ccache`, without options of its own.
    host = [word for word in cxx if not word.startswith("-")][-1]
    # CUDA sources know nothing of Python, so another environment of the same tree does not compile them again.
    warnings = ["-Wall", "-Wextra", "-Wno-psabi"]
    cxx_flags = [*common, *python_includes, "-fPIC", "-fvisibility=hidden", "-pthread", *warnings]
    with_cuda = ["-DDGEMMA_WITH_CUDA"]
    # Sources in a folder named after an architecture are compiled for that one only, and say that they are there.
    if "90a" in [arch.removesuffix("+PTX") for arch in archs]:
        with_cuda.append("-DDGEMMA_WITH_SM_90A")
    if nvcc:
        cxx_flags += [*with_cuda, f'-DDGEMMA_CUDA_ARCHS="{" ".join(archs)}"']
    lines = [
        "ninja_required_version = 1.8",
        "rule cxx",
        f"  command = {shlex.join([*cxx, *cxx_flags])} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = C++ $out",
        "rule link",
    ]
    if nvcc:
        cuda = [
            nvcc, "-ccbin", host, *common, *with_cuda,
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi,-Wno-unknown-pragmas",
            "-Xcudafe=--diag_suppress=177",
        ]  # fmt: skip
        link = [nvcc, "-ccbin", host, "-shared", "-cudart=static", *gencode_flags(archs)[:1]]
        lines += [
            f"  command = {shlex.join(link)} -Xcompiler=-pthread"
            " -Xlinker=--exclude-libs,ALL,--gc-sections,-s $in -ldl -o $out",
            "  description = link $out",
            "rule cuda",
            f"  command = {shlex.join(cuda)} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CUDA $out",
        ]
    else:
        lines += [
            f"  command = {shlex.join(cxx)} -shared -pthread -Wl,--gc-sections,-s $in -ldl -o $out",
            "  description = link $out",
        ]
    objects = []

    def edge(rule: str, source: Path, suffix: str = "", flags: list[str] | None = None) -> None:
        obj = folder / f"{source.relative_to(ROOT)}{suffix}.o"
        objects.append(ninja_path(obj))
        lines.append(f"build {ninja_path(obj)}: {rule} {ninja_path(source)}")
        if flags:
            lines.append(f"  flags = {shlex.join(flags)}")

    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        if str(source.relative_to(ROOT)) in PER_ISA_SOURCES:
            for isa, flags in ISA_FLAGS.items():
                edge("cxx", source, f".{isa}", flags)
        else:
            edge("cxx", source)
    if nvcc:
        for source in sorted((ROOT / "csrc").rglob("*.cu")):
            only = re.fullmatch(r"sm_(\w+)", source.parent.name)
            own = [arch for arch in archs if only is None or arch.removesuffix("+PTX") == only[1]]
            if own:
                edge("cuda", source, flags=gencode_flags(own))
    lines += [f"build {ninja_path(target)}: link {' '.join(objects)}", f"default {ninja_path(target)}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """Compiles all of csrc/ in build/native-<python>-<architectures>.

    Objects stay there, so only what changed is built again, and a wheel and an editable build keep their own.
    """

    def run(self) -> None:
        # setuptools clears `inplace` while it builds.
        self.editable = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        nvcc = find_nvcc()
        archs = cuda_archs(nvcc, self.editable) if nvcc else []
        print(f"building with {nvcc} for {', '.join(archs)}" if nvcc else "building without CUDA", flush=True)
        variant = "_".join(arch.replace("+", "") for arch in archs) or "host"
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{platform.machine()}-{variant}"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / output.name
        (folder / "build.ninja").write_text(ninja_file(folder, target, nvcc, archs))
        jobs = os.environ.get("MAX_JOBS")
        command = [ninja_program(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode != 0:
            raise SystemExit("dgemma_accel._C: the build failed; the compiler's messages stand above")
        output.parent.mkdir(parents=True, exist_ok=True)
        # Replaced as a whole: a process that has the old file mapped keeps it.
        fresh = output.with_suffix(".new")
        shutil.copy2(target, fresh)
        os.replace(fresh, output)


setup(
    packages=[*find_packages(include=["dgemma_accel", "dgemma_accel.*"]), "dgemma_accel.triton_kernels"],
    package_dir={"dgemma_accel.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("dgemma_accel._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
