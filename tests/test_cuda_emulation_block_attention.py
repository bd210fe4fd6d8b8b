"""The CUDA kernels of block_attention on the host, thread by thread, under AddressSanitizer and UBSan.

tests/csrc/emulation/ carries out what the kernels ask of the hardware and reports every access to shared memory that
no barrier orders. Mutants of the kernels' source, each with one planted bug, have to be caught.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated_kernels import MACHINE
from test_block_attention import make_case

from dgemma_accel.native.block_attention_params import heads_view, is_aligned
from dgemma_accel.native.params import DTYPES
from dgemma_accel.reference.budget import check_block_attention

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EMULATION = ROOT / "tests" / "csrc" / "emulation"
CACHE = ROOT / "build" / "emulation"
TENSORS = ("query", "key", "value", "prefix_key", "prefix_value")

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-DDGEMMA_EMULATED"]
SANITIZED = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]

pytestmark = [
    pytest.mark.source_tree,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def compile_to(target: Path, csrc: Path, sources: list[Path], *flags: str) -> Path:
    command = [COMPILER, *FLAGS, *flags, f"-I{csrc}", f"-I{EMULATION}", *map(str, sources), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module")
def program() -> Path:
    """The emulated kernels, compiled unless that was done before from the same files."""
    digest = hashlib.sha256(repr((COMPILER, FLAGS, SANITIZED)).encode())
    sources = sorted(EMULATION.glob("*.cpp"))
    for path in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *EMULATION.glob("*.h"), *sources]):
        digest.update(path.name.encode() + path.read_bytes())
    result = CACHE / f"block_attention-{digest.hexdigest()[:16]}"
    if not result.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = compile_to(result.with_suffix(f".{os.getpid()}"), CSRC, sources, *SANITIZED)
        fresh.rename(result)
    return result


def write_case(
    folder: Path, case, scale: float, softcap: float | None, causal: bool, splits: int, window=None
) -> None:
    query, key = case[:2]
    lines = {
        "dtype": DTYPES[query.dtype], "batch": query.shape[0], "query_heads": query.shape[1],
        "kv_heads": key.shape[1], "length": query.shape[2], "head_dim": query.shape[3],
        "prefix_length": 0 if case[3] is None else case[3].shape[2], "scale": scale,
        "softcap": 0.0 if softcap is None else softcap, "causal": int(causal), "splits": splits,
    } | ({} if window is None else {"window": window})  # fmt: skip
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


def attend(program: Path, folder: Path, case, scale=None, softcap=None, causal=False, splits=1, window=None):
    """(output, lse, violations of the budget) of the emulated kernels; fails where they do."""
    scale = case[0].shape[-1] ** -0.5 if scale is None else scale
    write_case(folder, case, scale, softcap, causal, splits, window)
    done = execute(program, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    output, lse = read_result(folder, case[0])
    return output, lse, check_block_attention(output, lse, *case, scale, softcap, causal, window)


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
    "hd64_two_row_tiles": (
        dict(batch=1, query_heads=4, kv_heads=1, length=40, head_dim=64, prefix=170, ranges=[(1, 165)]),
        {"softcap": 30.0, "causal": True},
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
    "hd64_window_over_the_prefix_end": (
        dict(batch=2, query_heads=4, kv_heads=1, length=70, head_dim=64, prefix=90, ranges=[(1, 87), (40, 51)]),
        {"causal": True, "window": 41, "softcap": 30.0},
    ),
    "hd64_window_in_the_block": (
        dict(batch=1, query_heads=2, kv_heads=2, length=300, head_dim=64, prefix=20),
        {"causal": True, "window": 33, "splits": 3},
    ),
    "hd128_window_of_one": (
        dict(batch=1, query_heads=2, kv_heads=1, length=37, head_dim=128, prefix=50),
        {"causal": True, "window": 1},
    ),
    "hd256_sliding_window": (
        dict(batch=1, query_heads=4, kv_heads=2, length=40, head_dim=256, prefix=120, ranges=[(3, 119)]),
        {"causal": True, "window": 64, "splits": 2},
    ),
    "hd512_window": (
        dict(batch=1, query_heads=4, kv_heads=1, length=21, head_dim=512, prefix=40, ranges=[(2, 40)]),
        {"causal": True, "window": 19, "splits": 2},
    ),
    "hd64_no_such_window": (
        dict(batch=1, query_heads=2, kv_heads=2, length=40, head_dim=64, prefix=20),
        {"causal": True, "window": 0x7FFF0000},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_within_budget(program, tmp_path, name, dtype):
    shape, options = CASES[name]
    _, _, problems = attend(program, tmp_path, make_case(**shape, dtype=dtype), **options)
    assert not problems


def test_unaligned_rows_are_read_in_place(program, tmp_path):
    """Rows of 67 elements: no two start at the same place in 16 bytes, and the gaps between them hold NaN."""
    case = make_case(1, 4, 2, 19, 64, prefix=41, ranges=[(2, 40)], dtype=torch.bfloat16)
    for i, tensor in enumerate(case[:5]):
        wide = torch.full((*tensor.shape[:-1], 67), math.nan, dtype=tensor.dtype)
        wide[..., 1:65] = tensor
        case[i] = wide[..., 1:65]
        assert not is_aligned(case[i])
    assert is_aligned(torch.zeros(1, 3, 7, 64, dtype=torch.bfloat16).transpose(1, 2))
    assert not attend(program, tmp_path, case)[2]


def test_one_slot_has_no_stride(program, tmp_path):
    """What a tile reads beyond the only slot is nothing, from an address that is a multiple of 16 all the same."""
    case = make_case(1, 2, 1, 1, 64, prefix=1, dtype=torch.bfloat16)
    for i in range(1, 5):
        pitched = torch.randn(67).to(torch.bfloat16).as_strided((1, 1, 1, 64), (67, 67, 67, 1))
        case[i] = pitched
    assert not attend(program, tmp_path, case)[2]


def test_bounds_are_clamped_to_the_prefix(program, tmp_path):
    case = make_case(3, 2, 1, 5, 64, prefix=37, ranges=[(0, 37), (0, 0), (30, 37)], dtype=torch.float16)
    write_case(tmp_path, case, 0.125, None, False, 1)
    for name, values in (("prefix_start", [-9, 20, 30]), ("prefix_end", [99, 3, 2**31 - 1])):
        (tmp_path / name).write_bytes(torch.tensor(values, dtype=torch.int32).numpy().tobytes())
    done = execute(program, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not check_block_attention(*read_result(tmp_path, case[0]), *case, 0.125, None, False)


def test_large_scores_do_not_overflow(program, tmp_path):
    case = make_case(1, 4, 2, 16, 64, prefix=48, scale=8.0, dtype=torch.bfloat16)
    output, _, problems = attend(program, tmp_path, case, scale=1.0, splits=2)
    assert not problems and bool(output.isfinite().all())


def test_empty_prefix_gives_the_same_bits_as_none(program, tmp_path):
    query, key, value, *_ = make_case(2, 4, 2, 19, 64, dtype=torch.bfloat16)
    nowhere = torch.full((2, 2, 30, 64), math.nan, dtype=torch.bfloat16)
    bound = torch.full((2,), 9, dtype=torch.int32)
    alone = attend(program, tmp_path, [query, key, value, None, None, None, None])
    empty = attend(program, tmp_path, [query, key, value, nowhere, nowhere, bound, bound])
    assert torch.equal(alone[0], empty[0]) and torch.equal(alone[1], empty[1])


def test_splits_fill_the_gpu_and_share_long_prefixes_only():
    native = pytest.importorskip("dgemma_accel._C")
    params = native.BlockAttentionParams()
    params.batch, params.query_heads, params.kv_heads, params.length, params.head_dim = 1, 16, 2, 256, 512
    splits = []
    for params.prefix_length in (0, 1024, 8192, 32768):
        splits.append(native.block_attention_splits(params, 188))
    # 64 tiles of rows on 188 multiprocessors: at least two blocks fit for each as soon as it pays.
    assert splits[0] == 1 and splits[1] >= 2 and splits == sorted(splits)
    # A window of the sliding layers bounds what there is to share, whatever the context.
    params.causal, params.window = True, 1024
    bounded = native.block_attention_splits(params, 188)
    params.prefix_length = 1 << 20
    assert native.block_attention_splits(params, 188) == bounded < splits[-1]
    params.causal, params.batch, params.prefix_length = False, 64, 32768
    assert native.block_attention_splits(params, 188) == 1


BARRIER = r"no barrier after|copy to it is running"
# {name: (file, text that stands there once, what takes its place, head_dim, what the report says)}; where the report
# is empty, the kernel runs to its end and the error budget has to fail.
MUTANTS = {
    "first_barrier_dropped": ("kernel.cuh", "hw::sync_block();\n    if (tile", "if (tile", 64, BARRIER),
    "second_barrier_dropped": (
        "kernel.cuh", "hw::sync_block();\n    const uint32_t keys", "const uint32_t keys", 64, BARRIER,
    ),
    "exchange_without_barrier": (
        "kernel.cuh", "hw::sync_block();\n    const uint32_t keys", "const uint32_t keys", 512, "never written",
    ),
    "waits_for_one_group_less": (
        "kernel.cuh", "hw::wait_copies<kAhead - 1>();\n    hw::sync_block();\n    const",
        "hw::wait_copies<kAhead>();\n    hw::sync_block();\n    const", 64, "copy to it is running",
    ),
    "refills_the_buffer_in_use": (
        "kernel.cuh", "kHeadDim>(keys, tile_rows", "kHeadDim>(used, tile_rows", 512, BARRIER,
    ),
    "last_tile_dropped": (
        "kernel.cuh", "tile < walk.end; ++tile", "tile < walk.end - 1; ++tile", 64, "copies are running",
    ),
    "split_drops_a_tile": (
        "key_walk.cuh", "(hw::block_y() + 1) / p.splits)", "(hw::block_y() + 1) / p.splits) - 1", 64, "",
    ),
    "swizzle_on_one_side_only": (
        "key_walk.cuh", "swizzled<kHeadDim>(i, chunk), source", "i * Shape::kRowBytes + chunk * 16, source", 64, "",
    ),
    "swizzle_of_the_wrong_slots": (
        "key_walk.cuh", "(chunk ^ (slot & 7))", "(chunk ^ (slot >> 1 & 7))", 64, "share banks",
    ),
    "swizzle_by_half_a_chunk": ("key_walk.cuh", "uint32_t(chunks % 8 * 16)", "uint32_t(chunks % 8 * 8)", 512, ""),
    "steps_in_the_wrong_order": ("warp.cuh", "further(first, step * 2)", "further(first, (step ^ 1) * 2)", 128, ""),
    "reads_a_slot_too_many": ("key_walk.cuh", "stride, end - slot,", "stride, end - slot + 1,", 64, ""),
    "sees_a_key_too_many": ("warp.cuh", "key >= visible", "key > visible", 64, ""),
    "causal_sees_the_next_key": (
        "warp.cuh", "up_to_own < slots ? up_to_own", "up_to_own < slots ? up_to_own + 1", 64, "",
    ),
    "window_hides_a_key_too_many": ("warp.cuh", "|| key < hidden", "|| key <= hidden", 64, ""),
    "window_shows_a_key_too_many": ("warp.cuh", "|| key < hidden", "|| key < hidden - 1", 64, ""),
    "window_masks_too_few_tiles": ("warp.cuh", "tile * Shape::kKeys < Shape::kRows", "tile < 1", 64, ""),
    "walk_starts_a_key_late": (
        "key_walk.cuh", "first_position + 1 - int(p.window)", "first_position + 2 - int(p.window)", 64, "",
    ),
    "block_starts_a_key_late": (
        "key_walk.cuh", "furthest < 0 ? 0 : furthest;", "furthest < 0 ? 0 : furthest + 1;", 64, "",
    ),
    "adds_its_own_scores_twice": (
        "warp.cuh", "exchange(1 - column_warp).load", "exchange(column_warp).load", 512, "",
    ),
    "keeps_the_old_maximum": ("warp.cuh", "return hw::ballot(changed) != 0;", "return false;", 64, ""),
    "merges_without_weights": ("merge.cuh", "exp_device(lse - base)", "1.0f", 64, ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("machine") / "machine.o"
    return compile_to(target, CSRC, [EMULATION / f"{name}.cpp" for name in MACHINE], "-O1", "-r")


def mutate(folder: Path, file: str, text: str, replacement: str) -> Path:
    """A copy of the headers of csrc/ with one text of block_attention's exchanged."""
    csrc = folder / "csrc"
    for source in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]:
        target = csrc / source.relative_to(CSRC)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    path = csrc / "block_attention" / file
    original = path.read_text()
    assert original.count(text) == 1, f"{file} holds {original.count(text)} times: {text}"
    path.write_text(original.replace(text, replacement))
    return csrc


# A window that starts in the prefix for the first tile of rows and in the block for the others.
WINDOW, WINDOWED_LENGTH = 50, 150
WINDOW_MUTANTS = {name for name in MUTANTS if "window" in name or "starts_a_key_late" in name}


def run_mutant(folder: Path, machine: Path, csrc: Path, head_dim: int, window: int | None = None):
    """(the finished process, the violations of the budget) of a case that meets every branch."""
    source = EMULATION / "block_attention.cpp"
    program = compile_to(
        folder / "mutant", csrc, [source, machine], "-O0", f"-DEMULATED_HEAD_DIM={head_dim}", "-Wno-unused"
    )
    length, prefix = (19, 60) if head_dim == 512 else (40, 101) if window is None else (WINDOWED_LENGTH, 101)
    case = make_case(
        2, 4, 2, length, head_dim, prefix=prefix, ranges=[(3, prefix - 4), (0, 32)], dtype=torch.bfloat16
    )
    arguments = (head_dim**-0.5, None, True)
    write_case(folder, case, *arguments, splits=2, window=window)
    done = execute(program, folder)
    if done.returncode:
        return done, []
    return done, check_block_attention(*read_result(folder, case[0]), *case, *arguments, window)


@pytest.mark.parametrize("head_dim, window", [(64, None), (512, None), (64, WINDOW)])
def test_unchanged_kernels_pass_what_mutants_fail(machine, tmp_path, head_dim, window):
    done, problems = run_mutant(tmp_path, machine, CSRC, head_dim, window)
    assert done.returncode == 0 and not problems, done.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(machine, tmp_path, name):
    file, text, replacement, head_dim, report = MUTANTS[name]
    window = WINDOW if name in WINDOW_MUTANTS else None
    done, problems = run_mutant(
        tmp_path, machine, mutate(tmp_path, file, text, replacement), head_dim, window
    )
    if report:
        assert done.returncode == 3 and re.search(report, done.stderr), done.stderr
    else:
        assert done.returncode == 0 and problems, done.stderr
