"""The CUDA kernels of block_attention on the host, thread by thread, under AddressSanitizer and UBSan.

tests/csrc/emulation/ carries out what the kernels ask of the hardware and reports every access to shared memory that
no barrier orders. Mutants of the kernels' source, each with one planted bug, have to be caught.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_block_attention import make_case

from dgemma_accel.native.block_attention_params import heads_view
from dgemma_accel.native.params import DTYPES
from dgemma_accel.reference.budget import check_block_attention

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "csrc" / "emulation"
CACHE = ROOT / "build" / "emulation"
TENSORS = ("query", "key", "value", "prefix_key", "prefix_value")

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-DDGEMMA_EMULATED", "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip

pytestmark = [
    pytest.mark.source_tree,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def build(csrc: Path, folder: Path, flags: list[str]) -> Path:
    """The program that runs the kernels of a csrc/, compiled in `folder` unless it is there already."""
    digest = hashlib.sha256(repr((COMPILER, flags)).encode())
    files = [*csrc.rglob("*.h"), *csrc.rglob("*.cuh"), *EMULATION.iterdir()]
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    program = folder / f"block_attention-{digest.hexdigest()[:16]}"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = program.with_suffix(f".{os.getpid()}")
        command = [COMPILER, *flags, f"-I{csrc}", f"-I{EMULATION}", *map(str, sorted(EMULATION.glob("*.cpp"))), "-o", str(fresh)]
        subprocess.run(command, check=True)
        fresh.rename(program)
    return program


@pytest.fixture(scope="module")
def program() -> Path:
    return build(ROOT / "csrc", CACHE, FLAGS)


def write_case(folder: Path, case, scale: float, softcap: float | None, causal: bool, splits: int) -> None:
    query, key = case[:2]
    lines = {
        "dtype": DTYPES[query.dtype], "batch": query.shape[0], "query_heads": query.shape[1],
        "kv_heads": key.shape[1], "length": query.shape[2], "head_dim": query.shape[3],
        "prefix_length": 0 if case[3] is None else case[3].shape[2], "scale": scale,
        "softcap": 0.0 if softcap is None else softcap, "causal": int(causal), "splits": splits,
    }  # fmt: skip
    for name, tensor in zip(TENSORS, case):
        if tensor is None:
            continue
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        (folder / name).write_bytes(storage.view(torch.int16).numpy().tobytes())
        _, *strides, aligned = heads_view(tensor)
        lines[name] = " ".join(map(str, [tensor.storage_offset(), *strides, int(aligned)]))
    for name, bound in zip(("prefix_start", "prefix_end"), case[5:]):
        if bound is not None:
            (folder / name).write_bytes(bound.numpy().tobytes())
    (folder / "case").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))


def execute(program: Path, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([program, folder], capture_output=True, text=True, timeout=300)


def attend(program: Path, folder: Path, case, scale=None, softcap=None, causal=False, splits=1):
    """(output, lse, violations of the budget) of the emulated kernels; fails where they do."""
    scale = case[0].shape[-1] ** -0.5 if scale is None else scale
    write_case(folder, case, scale, softcap, causal, splits)
    done = execute(program, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    output, lse = read_result(folder, case[0])
    return output, lse, check_block_attention(output, lse, *case, scale, softcap, causal)


def read_result(folder: Path, query: torch.Tensor):
    batch, heads, length, head_dim = query.shape
    output = torch.frombuffer(bytearray((folder / "output").read_bytes()), dtype=query.dtype)
    lse = torch.frombuffer(bytearray((folder / "lse").read_bytes()), dtype=torch.float32)
    return output.view(batch, length, heads, head_dim).transpose(1, 2), lse.view(batch, heads, length)


CASES = {
    "hd64_square": (dict(batch=1, query_heads=2, kv_heads=2, length=32, head_dim=64), {}),
    "hd64_ranges": (
        dict(
            batch=4, query_heads=4, kv_heads=2, length=17, head_dim=64, prefix=70,
            ranges=[(0, 70), (13, 70), (5, 31), (40, 40)],
        ),
        {"splits": 2},
    ),
    "hd64_one_query": (dict(batch=1, query_heads=4, kv_heads=1, length=1, head_dim=64, prefix=33), {}),
    "hd128_odd_group": (
        dict(batch=1, query_heads=6, kv_heads=2, length=37, head_dim=128, prefix=101, ranges=[(3, 99)]),
        {"causal": True, "softcap": 20.0, "scale": 0.3},
    ),
    "hd256_sliding": (
        dict(batch=1, query_heads=4, kv_heads=2, length=24, head_dim=256, prefix=63),
        {"softcap": 5.0},
    ),
    "hd512_global": (
        dict(batch=1, query_heads=8, kv_heads=1, length=16, head_dim=512, prefix=50, ranges=[(2, 50)]),
        {"scale": 0.1},
    ),
    "hd512_split_causal": (
        dict(batch=2, query_heads=2, kv_heads=1, length=21, head_dim=512, prefix=40, ranges=[(0, 40), (7, 9)]),
        {"causal": True, "splits": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_within_budget(program, tmp_path, name, dtype):
    shape, options = CASES[name]
    _, _, problems = attend(program, tmp_path, make_case(**shape, dtype=dtype), **options)
    assert not problems
