"""PyTorch's FlexAttention, compiled: as it comes at head_dim 256, with tiles small enough for head_dim 512."""

from __future__ import annotations

import functools

import torch

from ..bench_block_attention import SCALE
from ..cases import Case, Skipped, Variant
from .sdpa import concatenated

NAME = "flex_attention"
SLOW_START = True

# The defaults ask for 266,240 bytes of shared memory at head_dim 512, more than any GPU has.
SMALL_TILES = (
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 1, "num_warps": 8},
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1},
)


def kernel_options(head_dim: int, shared_memory: int) -> list[dict]:
    """The two largest shapes that fit in a block's shared memory; what PyTorch chooses up to head_dim 256."""
    if head_dim <= 256:
        return [{}]

    # Queries, and keys and values of each stage, two bytes a number.
    def needs(shape: dict) -> int:
        return 2 * head_dim * (shape["BLOCK_M"] + 2 * shape["num_stages"] * shape["BLOCK_N"])

    return [shape for shape in SMALL_TILES if needs(shape) <= shared_memory][:2]


def tiles(options: dict) -> str:
    if not options:
        return "its own tiles"
    return f"{options['BLOCK_M']} x {options['BLOCK_N']} tiles, stages {options['num_stages']}"


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "flex_attention needs a GPU: its compiled CPU kernel does not take these head sizes"
    return None


def variants(case: Case, inputs) -> list[Variant]:
    if case.op != "block_attention":
        return []
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    properties = torch.cuda.get_device_properties(inputs.query.device)
    shapes = kernel_options(inputs.query.shape[-1], properties.shared_memory_per_block_optin)
    if not shapes:
        raise Skipped(f"no tiles fit at head_dim {inputs.query.shape[-1]}")
    # Dynamo counts compilations by function, over all cases: beyond eight it would run the eager form in silence.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def prepare(inputs, options):
        key, value = concatenated(inputs)
        mask = None
        if inputs.start is not None:
            start = inputs.start
            mask = create_block_mask(
                lambda b, h, q, kv: kv >= start[b],
                inputs.query.shape[0],
                None,
                inputs.query.shape[2],
                key.shape[2],
                device=inputs.query.device,
            )
        return lambda: compiled(
            inputs.query,
            key,
            value,
            scale=SCALE,
            enable_gqa=True,
            block_mask=mask,
            kernel_options=options,
        )

    return [
        Variant(
            f"compiled, {tiles(options)}, no cat",
            functools.partial(prepare, options=options),
            lambda result: {"output": result},
        )
        for options in shapes
    ]
