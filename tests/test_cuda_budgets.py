"""Budgets of the machine code in the built extension, for every architecture, without a GPU.

cuobjdump, from the toolkit or from Triton's wheel, reads registers, shared memory and instructions. A kernel may not
spill, has to fit in the shared memory and registers of every architecture, and has to use the instructions that it
is written for.
"""

import collections
import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton

from dgemma_accel.native.params import extension, missing_extension

# Bytes of shared memory that a block can have, and 32-bit registers of a multiprocessor.
SHARED_LIMIT = {
    "80": 166_912, "86": 101_376, "89": 101_376, "90a": 232_448, "100": 232_448, "120": 101_376, "121": 101_376,
}  # fmt: skip
REGISTERS = 65_536

# Instructions that kernels are written for: {kernel: {pattern of opcodes: how many at least}}.
REQUIRED = {
    "row_stats_tile_kernel": {r"LDG\.E\S*\.128": 8, r"MUFU\.EX2": 32, r"SHFL": 25},
    "row_stats_row_kernel": {r"LDG\.E\S*\.128": 1, r"SHFL": 10},
    # Eight walks over a row, each with three vectors under way; e^x by logit of two of them, in three formulas.
    "top_k_top_p_kernel": {r"LDG\.E\S*\.128": 32, r"MUFU\.EX2": 3 * 2 * 4, r"C?REDUX": 16, r"SHFL": 100},
    "commit_kernel": {r"SHFL": 10, r"BAR": 4, r"MATCH": 1, r"LDS\.128": 8},
    "progress_kernel": {r"SHFL": 5},
    # What a thread keeps of its row, and what it reads again.
    "quantize_rows_kernel": {r"LDG\.E\S*\.128": 6, r"SHFL": 5, r"MUFU\.RCP": 4},
    # Of a round of two vectors, the next one's loads; three formulas write the probabilities.
    "soft_embedding_probabilities_kernel": {
        r"LDG\.E\S*\.128": 4,
        r"STG?\.E\S*\.128": 8,
        r"MUFU\.EX2": 48,
        r"VOTE": 2,
        r"SHFL": 5,
    },
    # Four columns of eight slices at once.
    "soft_embedding_sum_kernel": {r"LDG\.E\S*\.128": 8, r"SHFL": 5},
    "block_attention_kernel": {r"HMMA": 16, r"LDSM": 8, r"LDGSTS\.E\S*\.128": 2},
    # By warpgroup 32 products for scores of a tile, 4 with values; barriers of the cluster, stores to the other block.
    "block_attention_cluster_kernel": {
        r"HGMMA\.64": 72,
        r"UCGABAR_ARV": 5,
        r"ST\.E\.128": 6,
        r"LDGSTS\.E\S*\.128": 32,
    },
    "block_attention_wgmma_kernel": {r"HGMMA\.64": 40, r"LDGSTS\.E\S*\.128": 32},
    "block_attention_merge_kernel": {r"LDG\.E\S*\.128": 1},
    "experts_route_kernel": {r"MATCH": 4, r"VOTE": 4},
    # Of experts, by format of the weights: copies of the stages in front and of one in the loop. Numbers of FP8 and
    # NVFP4 are widened two at a time.
    "WeightFormatE0": {r"HMMA": 32, r"LDGSTS\.E\S*\.128": 40, r"LDSM": 16},
    "WeightFormatE1": {
        r"HMMA": 64,
        r"LDGSTS\.E\S*\.128": 48,
        r"LDS\.128": 16,
        r"PRMT": 32,
        r"H(FMA|MUL)2": 32,
    },
    "WeightFormatE2": {
        r"HMMA": 64,
        r"LDGSTS\.E\S*\.128": 24,
        r"LDS\.128": 16,
        r"PRMT": 64,
        r"H(FMA|MUL)2": 64,
    },
    "experts_combine_kernel": {r"LDG\.E\S*\.128": 8},
}
# Kernels of one architecture only, whose instructions no other has.
ONE_ARCHITECTURE = {"block_attention_cluster_kernel": "90a", "block_attention_wgmma_kernel": "90a"}
# Local memory means spills or arrays that did not fit in registers; the hardware tanh has only 11 bits.
FORBIDDEN = (r"LDL", r"STL", r"MUFU\.TANH")


def cuobjdump() -> str | None:
    homes = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        Path(triton.__file__).parent / "backends" / "nvidia",
    ]
    for place in ["cuobjdump", *(f"{home}/bin/cuobjdump" for home in homes if home)]:
        found = shutil.which(place)
        if found:
            return found
    return None


def reason_to_skip() -> str | None:
    if missing_extension() is not None:
        return missing_extension()
    if not hasattr(extension(), "CUDA_ARCHS"):
        return "the extension was built without CUDA"
    return None if cuobjdump() else "no cuobjdump"


pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))

Usage = collections.namedtuple("Usage", "arch kernel registers stack shared local")


def parse_usage(text: str) -> list[Usage]:
    """Rows of `cuobjdump -res-usage`."""
    rows, arch, kernel = [], None, None
    for line in text.splitlines():
        if found := re.match(r"\s*arch = sm_(\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            kernel = found[1]
        elif kernel and (found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)):
            rows.append(Usage(arch, kernel, *map(int, found.groups())))
            kernel = None
    return rows


def count_opcodes(lines) -> dict[tuple[str, str], collections.Counter]:
    """{(arch, kernel): how often each opcode stands} of `cuobjdump -sass`."""
    counts, arch, counter = {}, None, collections.Counter()
    opcode = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    for line in lines:
        if found := opcode.match(line):
            counter[found[1]] += 1
        elif found := re.match(r"\s*code for sm_(\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            counter = counts[arch, found[1]] = collections.Counter()
    return counts


def problems_of_usage(usage: Usage, threads: int, dynamic_shared: int) -> list[str]:
    where = f"sm_{usage.arch} {usage.kernel}"
    problems = []
    if usage.stack or usage.local:
        problems.append(f"{where}: {usage.stack} bytes of stack, {usage.local} of local memory")
    # sm_90 and above count 1 KB that the system keeps as static shared memory; the limit leaves it out.
    shared = usage.shared + dynamic_shared - (1024 if usage.arch.rstrip("a") not in ("80", "86", "89") else 0)
    if shared > SHARED_LIMIT[usage.arch]:
        problems.append(f"{where}: {shared} bytes of shared memory, the limit is {SHARED_LIMIT[usage.arch]}")
    # Registers are given out to warps in units of eight per thread.
    if -(-usage.registers // 8) * 8 * threads > REGISTERS:
        problems.append(f"{where}: {usage.registers} registers for each of {threads} threads")
    return problems


def problems_of_opcodes(arch: str, kernel: str, opcodes: collections.Counter) -> list[str]:
    problems = []
    for name, patterns in REQUIRED.items():
        if name not in kernel:
            continue
        for pattern, least in patterns.items():
            came = sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))
            if came < least:
                problems.append(
                    f"sm_{arch} {kernel}: {came} instructions {pattern}, at least {least} expected"
                )
    for pattern in FORBIDDEN:
        came = sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))
        if came:
            problems.append(f"sm_{arch} {kernel}: {came} instructions {pattern}")
    return problems


def launch_of(kernel: str) -> tuple[int, int]:
    """(threads, dynamic shared memory) by the extension's own account."""
    found = [launch for pattern, launch in extension().CUDA_KERNELS.items() if re.search(pattern, kernel)]
    assert len(found) == 1, f"{kernel}: described {len(found)} times in CUDA_KERNELS"
    return found[0]


@functools.cache
def usages() -> tuple[Usage, ...]:
    text = subprocess.run(
        [cuobjdump(), "-res-usage", extension().__file__], capture_output=True, text=True, check=True
    )
    return tuple(parse_usage(text.stdout))


def opcodes_of(arch: str) -> dict[tuple[str, str], collections.Counter]:
    command = [cuobjdump(), "-sass", "-arch", f"sm_{arch}", extension().__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        counts = count_opcodes(process.stdout)
    assert process.returncode == 0
    return counts


@functools.cache
def opcodes() -> dict[tuple[str, str], collections.Counter]:
    """Of all architectures, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return {key: counter for part in pool.map(opcodes_of, built_archs()) for key, counter in part.items()}


def built_archs() -> set[str]:
    return {arch.removesuffix("+PTX") for arch in extension().CUDA_ARCHS.split()}


def test_every_kernel_is_there_for_every_architecture():
    archs = collections.defaultdict(set)
    for usage in usages():
        archs[usage.kernel].add(usage.arch)
    assert archs
    for kernel, present in archs.items():
        only = [arch for name, arch in ONE_ARCHITECTURE.items() if name in kernel]
        assert present == (set(only) or built_archs()), kernel
    for name in ONE_ARCHITECTURE:
        assert any(name in kernel for kernel in archs) == ("90a" in built_archs())
    for pattern in extension().CUDA_KERNELS:
        assert any(re.search(pattern, kernel) for kernel in archs), pattern
    listed = subprocess.run(
        [cuobjdump(), "--list-ptx", extension().__file__], capture_output=True, text=True
    ).stdout
    for arch in extension().CUDA_ARCHS.split():
        if arch.endswith("+PTX"):
            assert f"sm_{arch.removesuffix('+PTX')}.ptx" in listed


def test_registers_and_shared_memory():
    problems = [line for usage in usages() for line in problems_of_usage(usage, *launch_of(usage.kernel))]
    assert not problems, "\n".join(problems)


def test_instructions():
    # The cuobjdump of CUDA 12 leaves the letter of sm_90a out.
    assert {arch.rstrip("a") for arch, _ in opcodes()} == {arch.rstrip("a") for arch in built_archs()}
    problems = []
    for (arch, kernel), counter in opcodes().items():
        problems += problems_of_opcodes(arch, kernel, counter)
    assert not problems, "\n".join(problems)


def test_a_tile_is_read_with_one_wide_load_per_sixteen_bytes():
    # 128 bytes per thread; two loops read tiles that reach over a row's end, or need another formula.
    for (arch, kernel), counter in opcodes().items():
        if "row_stats_tile_kernel" not in kernel:
            continue
        wide = sum(n for opcode, n in counter.items() if re.match(r"LDG\.E\S*\.128", opcode))
        assert wide == 8 + 2, (arch, kernel, wide)


# Of a kernel: how often its products are begun and waited for. Where ptxas cannot prove that nobody touches the sums
# it waits after each product, and says so in a message alone. Scores of the first tile come before the tiles, with a
# cluster those of the second one, too. Each warpgroup has a loop of its own, which begins scores and values of a tile,
# and behind it the values of the last tile, with a cluster of the last two.
WAITS = {"block_attention_wgmma_kernel": 1 + 2 * (2 + 1), "block_attention_cluster_kernel": 2 + 2 * (2 + 2)}


def test_products_of_a_tile_are_waited_for_together():
    for (arch, kernel), counter in opcodes().items():
        waits = next((count for name, count in WAITS.items() if name in kernel), None)
        if waits is None:
            continue
        for opcode in (r"WARPGROUP\.ARRIVE", r"WARPGROUP\.DEPBAR"):
            came = sum(n for name, n in counter.items() if re.match(opcode, name))
            assert came == waits, (arch, kernel, opcode, came)


def registers_of(opcode: str, operands: str) -> set[int]:
    """Numbers of the registers that an instruction names, with those behind them that a wider operand takes."""
    found = set()
    for place, width in re.findall(r"\[[^\]]*\bR(\d+)(\.64)?", operands):
        found |= set(range(int(place), int(place) + (2 if width else 1)))
    width = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
    for number in re.findall(r"\bR(\d+)\b", re.sub(r"\[[^\]]*\]", "", operands)):
        found |= set(range(int(number), int(number) + width))
    return found


def touched_in_flight(lines) -> tuple[list[int], list[str]]:
    """(registers in flight at each wait for products of wgmma, instructions before it that name one of them)."""
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);")
    # Of each group of products that was committed, and of those that were not.
    groups, flight, waits, touched = [], set(), [], []
    for line in lines:
        found = instruction.match(line)
        if found is None:
            continue
        opcode, operands = found.groups()
        if product := re.match(r"HGMMA\.64x(\d+)x16", opcode):
            sums, left = re.findall(r"(?:\bR\d+|gdesc\[\w+\])", operands)[:2]
            flight |= set(range(int(sums[1:]), int(sums[1:]) + int(product[1]) // 2))
            if left.startswith("R"):
                flight |= set(range(int(left[1:]), int(left[1:]) + 4))
            if "gsb0" in operands:
                groups, flight = [*groups, flight], set()
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            waits.append(len(set().union(*groups, flight)))
            under_way = int(operands.split(",")[1], 16)
            groups = groups[len(groups) - under_way :] if under_way else []
        elif set().union(*groups, flight) & registers_of(opcode, operands):
            touched.append(line.strip())
    return waits, touched


# Registers of sums and left operands: 64 x 64 scores, 64 x 32 with 64 columns of queries, 64 x 256 columns with 64 x 64
# probabilities of 16 bits.
SCORES, CLUSTER_SCORES, VALUES = 32, 16 + 16, 128 + 16
IN_FLIGHT = {
    # One warpgroup waits for scores and then for values, the other one for both, and for nothing a second time.
    "block_attention_wgmma_kernel": [SCORES, *[SCORES + VALUES] * 2, 0, *[VALUES] * 3],
    # One warpgroup starts values before it waits for scores, the other one after it.
    "block_attention_cluster_kernel": [*[CLUSTER_SCORES] * 3, CLUSTER_SCORES + VALUES, *[VALUES] * 6],
}


def test_nobody_touches_the_registers_of_products_in_flight():
    """What the emulation cannot see: scores ahead are multiplied while the code of the softmax runs."""
    kernels = [usage.kernel for usage in usages() if any(name in usage.kernel for name in ONE_ARCHITECTURE)]
    assert bool(kernels) == ("90a" in built_archs())
    for kernel in kernels:
        command = [cuobjdump(), "-sass", "-arch", "sm_90a", "-fun", kernel, extension().__file__]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        waits, touched = touched_in_flight(done.stdout.splitlines())
        expected = next(numbers for name, numbers in IN_FLIGHT.items() if name in kernel)
        assert sorted(waits) == sorted(expected), (kernel, waits)
        assert not touched, (kernel, touched)


SASS_OF_PRODUCTS = """
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR20], RZ, !UPT, gsb0 ;   /* 0x0 */
        /*0020*/              @!P0 LDG.E.128.CONSTANT R{load}, desc[UR8][R{address}.64] ;  /* 0x0 */
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, R184, gdesc[UR16].tnspB, R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;                         /* 0x0 */
        /*0050*/                   FADD R{sum}, R152, -R4 ;                                /* 0x0 */
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   FMUL R24, R24, R152 ;
"""


@pytest.mark.parametrize(
    "change, line",
    [
        ({}, None),
        ({"load": 149}, "LDG"),
        ({"load": 183}, "LDG"),
        ({"address": 151}, "LDG"),
        ({"address": 183}, "LDG"),
        ({"sum": 151}, "FADD"),
        ({"sum": 186}, "FADD"),
    ],
)
def test_registers_in_flight_are_found(change, line):
    text = SASS_OF_PRODUCTS.format(**{"load": 148, "address": 150, "sum": 188, **change})
    waits, touched = touched_in_flight(text.splitlines())
    assert waits == [32 + 132, 132]
    assert [line in one for one in touched] == ([True] if line else [])


USAGE = """
arch = sm_89
Resource usage:
 Function commit_kernel:
  REG:{registers} STACK:{stack} SHARED:{shared} LOCAL:0 CONSTANT[0]:704 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.mark.parametrize(
    "change, threads, dynamic, text",
    [
        ({}, 1024, 25_088, None),
        ({"stack": 8}, 1024, 25_088, "8 bytes of stack"),
        ({"shared": 90_000}, 1024, 25_088, "115088 bytes of shared memory"),
        ({"registers": 72}, 1024, 25_088, "72 registers for each of 1024 threads"),
    ],
)
def test_usage_over_budget_is_reported(change, threads, dynamic, text):
    (usage,) = parse_usage(USAGE.format(**{"registers": 40, "stack": 0, "shared": 0, **change}))
    problems = problems_of_usage(usage, threads, dynamic)
    assert (text is None and not problems) or (len(problems) == 1 and text in problems[0])


SASS = """
	code for sm_120
		Function : block_attention_kernel
        /*0000*/                   LDC R1, c[0x0][0x37c] ;   /* 0x0000df00ff017b82 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0020*/               @P1 {spill} [R1], R4 ;
"""


def test_missing_and_forbidden_instructions_are_reported():
    counts = count_opcodes(SASS.format(spill="STL.64").splitlines())
    assert counts["120", "block_attention_kernel"]["LDGSTS.E.BYPASS.128"] == 1
    problems = problems_of_opcodes("120", "block_attention_kernel", counts["120", "block_attention_kernel"])
    assert [("HMMA" in p, "LDSM" in p, "LDGSTS" in p, "STL" in p).index(True) for p in problems] == [
        0,
        1,
        2,
        3,
    ]


def test_a_gpu_here_is_among_the_architectures():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    major, minor = torch.cuda.get_device_capability()
    newest = max(int(re.sub(r"\D", "", arch)) for arch in built_archs())
    same_major = any(int(re.sub(r"\D", "", arch)) // 10 == major for arch in built_archs())
    assert same_major or major * 10 + minor > newest
