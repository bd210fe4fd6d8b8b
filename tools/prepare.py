"""Make a virtual environment ready: PyTorch, the extras, and the package itself with its compiled extension.

Nothing is done twice: a stamp in the environment remembers the inputs (setup.py, pyproject.toml, csrc/ and the
options) it was last made from. Without an NVIDIA GPU the releases of `tested` are installed; with one, the PyTorch of
the machine is used when it has CUDA, so that the environment matches the driver. A wheel needs the build tools alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the tests are known to pass with: a release of another day changes no result of theirs.
TESTED = {"torch": "2.13.0", "triton": "3.9.0", "transformers": "5.24.0"}
# The newest that there are for Python 3.10, where they are not the same.
TESTED_ON_PYTHON_3_10 = {"triton": "3.8.0", "transformers": "5.20.2"}
BUILD_TOOLS = ["setuptools>=77", "wheel", "pybind11>=2.13", "ninja>=1.11"]
EXTRAS = "hf,test,bench"
NEWEST = "newest"


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def python_has_cuda_torch(python: str) -> bool:
    code = "import torch, sys; sys.exit(0 if torch.version.cuda and torch.cuda.is_available() else 1)"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def digest(options: list[str]) -> str:
    state = hashlib.sha256(repr([sys.version, *options]).encode())
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "csrc").rglob("*"))]
    for path in files:
        if path.is_file():
            state.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return state.hexdigest()


def tested() -> dict[str, str]:
    """The tested releases for this Python."""
    return TESTED | (TESTED_ON_PYTHON_3_10 if sys.version_info < (3, 11) else {})


def pins(transformers: str | None, gpu: bool) -> list[str]:
    """The releases asked of pip. With a GPU its PyTorch decides which Triton fits."""
    own = {"transformers": transformers} if transformers else {}
    chosen = own if gpu else tested() | own
    return [f"{name}=={release}" for name, release in chosen.items() if release != NEWEST]


def torch_brings_triton(python: Path) -> bool:
    """Whether the installed PyTorch asks for one release of Triton, as builds with CUDA do."""
    code = """if True:
        import importlib.metadata, re, sys
        wanted = importlib.metadata.requires("torch") or ()
        sys.exit(0 if any(re.match(r"triton\\s*==", line) for line in wanted) else 1)
    """
    return subprocess.run([str(python), "-c", code]).returncode == 0


def pip_of(venv: Path) -> list[str | Path]:
    return [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def prepare_for_wheel(venv: Path) -> None:
    """The build tools alone: the extension does not link PyTorch."""
    stamp, wanted = venv / ".ready", digest(BUILD_TOOLS)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    say(f"the build tools into {venv.name}")
    if not (venv / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", venv)
    run(*pip_of(venv), *BUILD_TOOLS)
    stamp.write_text(wanted)


def prepare(venv: Path, transformers: str | None) -> None:
    compilers = ("CXX", "NVCC", "CUDA_HOME")
    build_options = [
        f"{k}={v}"
        for k, v in sorted(os.environ.items())
        if k.startswith("DGEMMA_ACCEL_CUDA") or k in compilers
    ]
    gpu = has_gpu()
    stamp, wanted = venv / ".ready", digest([EXTRAS, *pins(transformers, gpu), *build_options])
    built = any((ROOT / "dgemma_accel").glob("_C*.so"))
    if built and stamp.is_file() and stamp.read_text() == wanted:
        return
    python = venv / "bin" / "python"
    if not python.exists():
        inherit = gpu and python_has_cuda_torch(sys.executable)
        say(f"creating {venv.name}" + (" on top of this machine's PyTorch with CUDA" if inherit else ""))
        run(sys.executable, "-m", "venv", *(["--system-site-packages"] if inherit else []), venv)
    say("installing PyTorch and the build tools")
    pip = pip_of(venv)
    if not python_has_cuda_torch(str(python)):
        run(*pip, "torch>=2.11" if gpu else f"torch=={tested()['torch']}")
    run(*pip, *BUILD_TOOLS)
    asked = pins(transformers, gpu)
    if torch_brings_triton(python):
        asked = [pin for pin in asked if not pin.startswith("triton==")]
    say("building the extension and installing the extras")
    run(
        *pip,
        "--no-build-isolation",
        "--editable",
        f".[{EXTRAS}]",
        *asked,
    )
    stamp.write_text(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--transformers", help="a release instead of the tested one: 5.17.0, or newest")
    parser.add_argument("--for-wheel", action="store_true", help="install the build tools alone")
    options = parser.parse_args()
    try:
        if options.for_wheel:
            prepare_for_wheel(options.venv.resolve())
        else:
            prepare(options.venv.resolve(), options.transformers)
    except subprocess.CalledProcessError as error:
        say(f"failed with exit status {error.returncode}: {' '.join(map(str, error.cmd))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
