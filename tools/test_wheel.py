"""Install the wheel of dist/ into an empty environment and run doctor, the demo and the tests against it.

Nothing of the repository is on the path: tests and examples are copied beside the environment, and a package named
`triton_kernels` is installed next to ours to show that it still imports as itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "torch==2.13.0"
OTHER_PACKAGE = """[project]
name = "triton-kernels"
version = "0.0.1"
[tool.setuptools]
packages = ["triton_kernels"]
"""


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pytest_args", nargs="*", help="passed to pytest, e.g. -k row_stats (after --)")
    options = parser.parse_args()
    wheels = list((ROOT / "dist").glob("dgemma_accel-*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"dist/ holds {len(wheels)} wheels of this package; `make wheel` leaves one")

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        python = base / "venv" / "bin" / "python"
        # No PYTHONPATH and another working directory: the installed package is the only one there is.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment["OMP_NUM_THREADS"] = "1"

        def run(*command: str | Path) -> None:
            subprocess.run([str(part) for part in command], cwd=base, env=environment, check=True)

        say(f"an empty environment with {wheels[0].name}")
        run(sys.executable, "-m", "venv", base / "venv")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run(*pip, "torch>=2.11" if shutil.which("nvidia-smi") else CPU_TORCH)
        run(*pip, f"{wheels[0]}[hf,test]")

        say("another package named triton_kernels beside it")
        other = base / "other"
        (other / "triton_kernels").mkdir(parents=True)
        (other / "pyproject.toml").write_text(OTHER_PACKAGE)
        (other / "triton_kernels" / "__init__.py").write_text('NAME = "the other one"\n')
        run(*pip, other)
        shutil.rmtree(other)
        run(
            python, "-c",
            "import triton_kernels, dgemma_accel, dgemma_accel.triton_kernels as ours\n"
            "assert triton_kernels.NAME == 'the other one' and ours.__name__ == 'dgemma_accel.triton_kernels'\n"
            "assert 'site-packages' in dgemma_accel.__file__, dgemma_accel.__file__",
        )  # fmt: skip

        for name in ("tests", "examples", "pyproject.toml"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, base / name)
        say("doctor")
        run(python, "-m", "dgemma_accel", "doctor")
        say("the demo")
        run(python, "examples/demo.py")
        say("the tests")
        run(
            python,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "-m",
            "not source_tree",
            "tests",
            *options.pytest_args,
        )
    say(f"{wheels[0].name} passes")


if __name__ == "__main__":
    main()
