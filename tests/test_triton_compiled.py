"""What the interpreter accepts and a compiler may not: every helper of the kernels, compiled for two architectures.

The compiler runs in a process of its own, because the rest of the tests may have set Triton to interpret.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton")

CAPABILITIES = ("9.0", "12.0")

HELPERS = r"""
import itertools, json, pkgutil, importlib, sys
import torch
import dgemma_accel.triton_kernels as package
from dgemma_accel.reference.commit import CommitCall
from dgemma_accel.reference.feed_forward import FeedForwardCall
from dgemma_accel.reference.progress import ProgressCall
from dgemma_accel.reference.quantization import scale_shape
from dgemma_accel.samplers.encoding import Flag, Measure, Select, Write
from dgemma_accel.triton_kernels import ahead_of_time, block_attention, commit, experts, feed_forward, head_stats
from dgemma_accel.triton_kernels import progress, quantize_rows, row_stats, sliced_scores, soft_embedding
from dgemma_accel.triton_kernels import top_k_top_p
from triton.compiler.code_generator import CodeGenerator
from triton.runtime.jit import JITFunction

reached = set()
call = CodeGenerator.call_JitFunction

def record(self, function, *args, **kwargs):
    reached.add(function.fn.__name__)
    return call(self, function, *args, **kwargs)

CodeGenerator.call_JitFunction = record

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def number(kind, batch, dtype=torch.float32):
    if kind == "value":
        return torch.tensor(1, dtype=dtype)
    return empty(*((batch,) if kind == "row" else ()), dtype=dtype)

def decide(kind, select, flags, measure, write, state):
    tokens, field, batch = empty(3, 4, dtype=torch.int64), empty(3, 4), 3
    seed = number("value" if kind == "value" else "0-d", batch, torch.int64)
    memory = (tokens, empty(1, 3, 4, dtype=torch.int64), empty(3, dtype=torch.bool), number(kind if kind != "row"
        else "0-d", batch)) if state else (None,) * 4
    commit.commit(CommitCall(tokens, tokens, tokens, field, field, field, field, None, int(measure), int(select),
        int(flags), number(kind, batch, torch.int64), number(kind, batch), number(kind, batch), 7, int(write), 9,
        seed, seed, *memory))

def decisions():
    # The seven selections take the measures and the writes in turn, so seven calls reach each of all three.
    for kind, states in (("value", (False,)), ("0-d", (False, True)), ("row", (False, True))):
        for state in states:
            for i, select in enumerate(Select):
                flags = Flag.GUMBEL if select == Select.TOP_K and state else Flag.NONE
                flags |= Flag.RELATIVE if select == Select.THRESHOLD else Flag.NONE
                decide(kind, select, flags, list(Measure)[i % len(Measure)], list(Write)[i % len(Write)], state)

def progresses():
    tokens, flags = empty(3, 4, dtype=torch.int64), empty(3, dtype=torch.bool)
    for finished, *how in itertools.product((None, flags), *[(False, True)] * 3):
        progress.progress(ProgressCall(tokens, tokens, empty(3, 4, dtype=torch.bool), empty(3, 4), flags, flags,
            empty(3, dtype=torch.int64), finished, 7, *how))

def statistics():
    logits, one, zero = empty(2, 3, 100, dtype=torch.bfloat16), torch.tensor(1.0), torch.tensor(0)
    each, seed = empty(6), empty(dtype=torch.int64)
    row_stats.row_stats(logits, one, None, None, zero, zero, 30.0)
    row_stats.row_stats(logits[:, :2], each[:4], each[:4], None, seed, seed, 30.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        row_stats.row_stats(empty(1, 2, 8192, dtype=dtype), one, None, None, zero, zero, 30.0, cutoff=each[:2])
    top_k_top_p.top_k_top_p(logits, each, 5, 0.9, True, 30.0)
    hidden, weight = empty(1, 6, 32, dtype=torch.bfloat16), empty(100, 32, dtype=torch.bfloat16)
    for run in (head_stats.head_stats, head_stats.head_stats_without_logits):
        run(hidden, weight, each, each, None, seed, seed, 30.0)
    for dtype in (torch.bfloat16, torch.float32):
        place = empty(2, 3, dtype=torch.int64)
        soft_embedding.soft_embedding(logits.to(dtype), place, empty(2, 3), weight[:, :16].to(dtype), each, 30.0)

def attention():
    query = empty(1, 2, 16, 512, dtype=torch.bfloat16)
    prefix, bound = empty(1, 2, 64, 512, dtype=torch.bfloat16), empty(1, dtype=torch.int32)
    block_attention.block_attention(
        query, query, query, prefix, prefix, bound, bound, 1.0, 30.0, True, None, splits=2)

def mixture():
    for activation in ("gelu_tanh", "silu"):
        experts.experts(empty(4, 32, dtype=torch.bfloat16), empty(4, 2, dtype=torch.int64), empty(4, 2),
            empty(3, 32, 32, dtype=torch.bfloat16), empty(3, 32, 16, dtype=torch.bfloat16), activation)
    shapes = ((3, 32, 32), (3, 32, 16))
    experts.experts(empty(4, 32, dtype=torch.bfloat16), empty(4, 2, dtype=torch.int64), empty(4, 2),
        *(empty(*shape, dtype=torch.float8_e4m3fn) for shape in shapes), "silu",
        *(empty(*scale_shape(shape)) for shape in shapes))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        experts.experts(empty(4, 32, dtype=dtype), empty(4, 2, dtype=torch.int64), empty(4, 2),
            *(empty(*shape[:2], shape[2] // 2, dtype=torch.uint8) for shape in shapes), "silu",
            *(empty(*shape[:2], shape[2] // 16, dtype=torch.float8_e4m3fn) for shape in shapes), empty(3), empty(3))
    rows = [empty(4, 32, dtype=torch.bfloat16) for _ in range(3)]
    feed_forward.feed_forward(FeedForwardCall(*rows, *[empty(24, 32, dtype=torch.bfloat16)] * 2,
        empty(32, 24, dtype=torch.bfloat16), empty(3, 32, dtype=torch.bfloat16), empty(3),
        empty(3, 32, 32, dtype=torch.bfloat16), empty(3, 32, 16, dtype=torch.bfloat16), 2, "silu"))
    quantize_rows.quantize_rows(rows[0])

capability = tuple(int(part) for part in sys.argv[1].split("."))
kernels = {}
with ahead_of_time.recording(capability) as compiled:
    for part in (decisions, progresses, statistics, attention, mixture):
        part()
for name, kernel in compiled:
    assert kernel.asm["cubin"], name
    kernels[name] = kernels.get(name, 0) + 1
written = {name for module in pkgutil.iter_modules(package.__path__)
    for name, value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).items()
    if isinstance(value, JITFunction)}
print(json.dumps({"written": sorted(written), "reached": sorted(reached), "kernels": kernels,
    "slices": block_attention.COMPILES}))
"""


def told_by(program: str, capability: str, **variables: str) -> dict:
    """What a program prints as JSON that compiles for an architecture, in a process with the real compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, capability],
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def helpers(tmp_path_factory) -> dict[str, dict]:
    """What `HELPERS` tells of each capability, side by side. What an earlier run has compiled would reach no helper."""
    with ThreadPoolExecutor(len(CAPABILITIES)) as pool:
        told = {
            capability: pool.submit(
                told_by, HELPERS, capability, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache"))
            )
            for capability in CAPABILITIES
        }
        return {capability: found.result() for capability, found in told.items()}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_helper_compiles_for_real(helpers, capability):
    found = helpers[capability]
    missing = set(found["written"]) - set(found["reached"]) - set(found["kernels"])
    # Only for compilers that can slice scores, on the architectures that do.
    if capability == "9.0" or not found["slices"]:
        missing -= {"load_sliced", "sum_slices"}
    assert not missing
    assert found["kernels"]["commit_kernel"] == 35
    assert found["kernels"]["progress_kernel"] == 16


EXPONENTS = r"""
import collections, json, re, sys
import torch
from dgemma_accel.triton_kernels import ahead_of_time, head_stats, row_stats

# [predicate] operation register, operands; several registers of one operation stand in braces.
LINE = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z0-9_.:]+)\s+(\{[^}]*\}|%[a-z]+\d+), (.*);")
REGISTER = re.compile(r"%[a-z]+\d+")
PASSED = ("mov", "selp", "max", "min", "mul")

def origins(register, written, seen):
    # The operations whose results reach a register through copies, choices and products.
    if register in seen:
        return set()
    seen.add(register)
    found = set()
    for operation, operands in written.get(register, ()):
        if operation.startswith(PASSED):
            for operand in operands:
                found |= set() if operand.startswith("%p") else origins(operand, written, seen)
        else:
            found.add(operation)
    return found

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

capability = tuple(int(part) for part in sys.argv[1].split("."))
t, zero = torch.tensor(0.01), torch.tensor(0)
hidden, weight = empty(1, 128, 64, dtype=torch.bfloat16), empty(8192, 64, dtype=torch.bfloat16)
with ahead_of_time.recording(capability) as compiled:
    for cutoff in (None, empty(4)):
        row_stats.row_stats(
            empty(1, 4, 16384, dtype=torch.bfloat16), t, None, None, zero, zero, 30.0, cutoff=cutoff)
    head_stats.head_stats(hidden, weight, t, None, None, zero, zero, 30.0)
    head_stats.head_stats_without_logits(hidden, weight, t, None, None, zero, zero, 30.0)
table = collections.defaultdict(lambda: {"exponents": 0, "of differences": 0, "fused": 0})
for name, kernel in compiled:
    written = collections.defaultdict(list)
    for line in kernel.asm["ptx"].splitlines():
        match = LINE.match(line)
        if match:
            for register in REGISTER.findall(match[2]):
                written[register].append((match[1], REGISTER.findall(match[3])))
    for register in list(written):
        for operation, operands in written[register]:
            if operation.startswith("ex2"):
                found = origins(operands[0], written, set())
                table[name]["exponents"] += 1
                table[name]["of differences"] += "sub.rn.f32" in found
                table[name]["fused"] += any(operation.startswith("fma") for operation in found)
print(json.dumps(table))
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_largest_logit_has_an_exponent_of_zero(capability):
    """Exponents are differences of two products, each rounded by itself: fused with the subtraction, the one of a logit
    would keep the rounding error of the reference's, which a temperature of 0.01 makes visible."""
    table = told_by(EXPONENTS, capability)
    assert {"tile_stats_kernel", "head_tile_kernel", "merge_kernel"} <= set(table)
    assert {"choose_sample_tile_kernel", "draw_in_tile_kernel"} <= set(table)
    for name, found in table.items():
        # Those of `choose_sample_tile_kernel` come through shared memory, where the operation is not seen.
        assert found["of differences"] > 0 or name == "choose_sample_tile_kernel", (name, found)
        assert found["fused"] == 0, (name, found)
