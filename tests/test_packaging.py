"""What is installed to try the package and to build it, and what its source distribution carries."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.source_tree

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def prepare(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return pytest.importorskip("prepare")


@pytest.mark.parametrize(
    "python, expected",
    [
        ((3, 10), ["torch==2.13.0", "triton==3.8.0", "transformers==5.20.2"]),
        ((3, 11), ["torch==2.13.0", "triton==3.9.0", "transformers==5.24.0"]),
        ((3, 14), ["torch==2.13.0", "triton==3.9.0", "transformers==5.24.0"]),
    ],
)
def test_pins_are_of_releases_for_this_python(prepare, monkeypatch, python, expected):
    monkeypatch.setattr(sys, "version_info", python)
    assert prepare.pins(None, gpu=False) == expected
    assert prepare.pins("5.17.0", gpu=False) == [*expected[:2], "transformers==5.17.0"]
    assert prepare.pins("newest", gpu=False) == expected[:2]
    # The PyTorch of a machine with a GPU says which Triton fits.
    assert prepare.pins("5.17.0", gpu=True) == ["transformers==5.17.0"] and prepare.pins(None, gpu=True) == []


def test_a_wheel_needs_the_build_tools_alone(prepare, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(prepare, "run", lambda *command: commands.append(command))
    for _ in range(2):
        prepare.prepare_for_wheel(tmp_path)
    create, install = commands
    assert create[1:] == ("-m", "venv", tmp_path)
    assert [part for part in install[4:] if not part.startswith("-")] == prepare.BUILD_TOOLS


def test_a_source_distribution_is_the_whole_tree(tmp_path):
    """So that the targets of make and the tests are there for whoever builds from it."""
    pytest.importorskip("setuptools")
    command = [sys.executable, ROOT / "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    carried = set((tmp_path / "dgemma_accel.egg-info" / "SOURCES.txt").read_text().splitlines())
    tree = [ROOT / name for name in ("LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py")]
    for folder in "bench csrc dgemma_accel docs examples tests tools triton_kernels".split():
        tree += (path for path in (ROOT / folder).rglob("*.*") if "__pycache__" not in path.parts)
    files = {str(path.relative_to(ROOT)) for path in tree if path.is_file() and path.suffix != ".so"}
    assert sorted(files - carried) == []
    assert not [name for name in carried if name.endswith((".so", ".pyc"))]
