"""Cases of `block_attention`: the two kinds of layer of the model, from an empty neighbourhood to 128k of context."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dgemma_accel
from dgemma_accel.backends import compute_capability
from dgemma_accel.native import block_attention_sm_90a
from dgemma_accel.native.block_attention_launch import launch
from dgemma_accel.reference.budget import check_block_attention

from . import planted
from .cases import CANVAS, BenchError, Case, Sizes, Variant, implementations

QUERY_HEADS = 16
SLIDING = {"head_dim": 256, "kv_heads": 8, "prefix": 1023}
GLOBAL = {"head_dim": 512, "kv_heads": 2}
CONTEXTS = (1024, 8192, 32_768, 131_072)
SCALE = 1.0


class Inputs(NamedTuple):
    """query [B, Hq, C, D]; key, value [B, Hkv, C, D]; prefix_key, prefix_value [B, Hkv, L, D]; start [B] or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    start: Tensor | None


def prefix_lengths(batch: int, prefix: int) -> Tensor:
    """[batch] lengths of left-padded prompts, from a quarter of the buffer to all of it."""
    return (torch.linspace(0.25, 1.0, batch) * prefix).round()


def make_inputs(
    batch: int,
    kv_heads: int,
    head_dim: int,
    prefix: int,
    padded: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Inputs:
    noise = planted.generator(device, seed)

    def heads(count: int, length: int, deviation: float) -> Tensor:
        shape = (batch, count, length, head_dim)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, deviation, generator=noise)

    # The model norms q and k to unit deviation and uses scale 1: scores of deviation sqrt(D) would leave one key per
    # query. Its learned norm weights make them milder, which a smaller deviation of q stands for.
    query = heads(QUERY_HEADS, CANVAS, 2.0 * head_dim**-0.5)
    key, value = heads(kv_heads, CANVAS, 1.0), heads(kv_heads, CANVAS, 1.0)
    prefix_key, prefix_value = heads(kv_heads, prefix, 1.0), heads(kv_heads, prefix, 1.0)
    start = None
    if padded:
        # Left padding: each row's prompt fills another part of the buffer.
        start = (prefix - prefix_lengths(batch, prefix)).to(torch.int32).to(device)
    return Inputs(query, key, value, prefix_key, prefix_value, start)


def variant(backend: str) -> Variant:
    def prepare(inputs: Inputs):
        return lambda: dgemma_accel.block_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.prefix_key,
            inputs.prefix_value,
            prefix_start=inputs.start,
            scale=SCALE,
            return_lse=True,
            backend=backend,
        )

    return Variant(backend, prepare, capturable=backend != "reference")


def other_variant(device: torch.device, head_dim: int) -> Variant | None:
    """Of two CUDA kernels the one that backend "cuda" does not take: that of all architectures, or wgmma's."""
    special = block_attention_sm_90a
    if special.unavailable() or compute_capability(device) != (9, 0):
        return None
    if head_dim not in special.FEATURES["head_dim"]:
        return None
    taken = special.wanted(head_dim)
    kernel = "block_attention_cuda" if taken else "block_attention_sm_90a"

    def prepare(inputs: Inputs):
        prefix = (inputs.prefix_key, inputs.prefix_value)
        return lambda: launch(
            kernel, inputs.query, inputs.key, inputs.value, *prefix, inputs.start, None, SCALE, None, False
        )

    return Variant("cuda portable" if taken else "cuda sm_90a", prepare)


def check(result, inputs: Inputs) -> list[str]:
    output, lse = result
    problems = []
    # Row by row: the fp64 scores of a long prefix are the largest thing in the whole bench.
    for b in range(inputs.query.shape[0]):
        row = [tensor[b : b + 1] for tensor in inputs[:5]]
        start = None if inputs.start is None else inputs.start[b : b + 1]
        lines = check_block_attention(
            output[b : b + 1], lse[b : b + 1], *row, start, None, SCALE, None, False
        )
        problems += [f"batch row {b}: {line}" for line in lines]
    return problems


def expected(inputs: Inputs) -> dict[str, Tensor]:
    output = dgemma_accel.block_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.prefix_key,
        inputs.prefix_value,
        prefix_start=inputs.start,
        scale=SCALE,
        backend="reference",
    )
    return {"output": output}


def _case(
    layer: dict,
    prefix: int,
    batch: int,
    padded: bool,
    dtype: torch.dtype,
    backends: list[Variant],
    device: torch.device,
) -> Case:
    head_dim, kv_heads = layer["head_dim"], layer["kv_heads"]
    keys = prefix + CANVAS
    # Slots that padding excludes need not be read or multiplied.
    visible = int(prefix_lengths(batch, prefix).sum() if padded else batch * prefix) + batch * CANVAS
    size = dtype.itemsize
    moved = size * head_dim * (2 * visible * kv_heads + 2 * batch * QUERY_HEADS * CANVAS)
    other = other_variant(device, head_dim)
    backends = [*backends, other] if other else backends
    kv_bytes = 2 * batch * kv_heads * keys * head_dim * size
    return Case(
        op="block_attention",
        label="padded" if padded else "",
        shape=f"B{batch} Hq{QUERY_HEADS} Hkv{kv_heads} C{CANVAS} D{head_dim} prefix {prefix}",
        dtype=dtype,
        bytes=moved,
        flops=4 * QUERY_HEADS * CANVAS * visible * head_dim,
        # Truth in fp64 for one batch row (scores, weights and one temporary), and the peers' expanded cache.
        memory=kv_bytes + 3 * QUERY_HEADS * CANVAS * keys * 8 + 2 * kv_bytes * QUERY_HEADS // kv_heads,
        make=lambda device, seed: make_inputs(batch, kv_heads, head_dim, prefix, padded, dtype, device, seed),
        backends=tuple(backends),
        check=check,
        expected=expected,
    )


def cases(device: torch.device, sizes: Sizes) -> tuple[list[Case], list[str]]:
    present, lines = implementations("block_attention", device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    # A CPU takes seconds for what a GPU does in a millisecond: the short contexts, unless asked for more.
    default = CONTEXTS if device.type == "cuda" else CONTEXTS[:2]
    contexts = sizes.context or (default[:1] if sizes.quick else default)
    if any(context < 1 for context in contexts):
        raise BenchError(f"--context: must be at least 1, got {min(contexts)}")
    if sizes.batch or sizes.quick:
        batches = [(sizes.batch or 1, False)]
    elif device.type == "cuda":
        batches = [(1, False), (4, False), (4, True)]
    else:
        batches = [(1, False), (4, True)]
    backends = [variant(name) for name in present]
    found = []
    # One canvas first, and of it the longest prefixes: what a budget may not reach is the least asked for.
    for batch, padded in batches:
        for context in sorted(contexts, reverse=True):
            # A batch at 128k does not fit beside the copies that its peers expand.
            if batch == 1 or context <= 32_768 or sizes.batch:
                found.append(_case(GLOBAL, context, batch, padded, dtype, backends, device))
        found.append(_case(SLIDING, SLIDING["prefix"], batch, padded, dtype, backends, device))
    return found, lines
