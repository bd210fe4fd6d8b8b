"""PyTorch's FlexAttention, compiled, with tiles small enough for head_dim 512."""

from __future__ import annotations

import torch

from ..bench_block_attention import SCALE
from ..cases import Case, Skipped, Variant
from .sdpa import concatenated

NAME = "flex_attention"

# The defaults ask for 266,240 bytes of shared memory at head_dim 512, more than any GPU has.
KERNEL_OPTIONS = {
    256: {"BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 1},
    512: {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1},
}


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "flex_attention needs a GPU: its compiled CPU kernel does not take these head sizes"
    return None


def variants(case: Case, inputs) -> list[Variant]:
    if case.op != "block_attention":
        return []
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    head_dim = inputs.query.shape[-1]
    if head_dim not in KERNEL_OPTIONS:
        raise Skipped(f"no kernel options for head_dim {head_dim}")
    compiled = torch.compile(flex_attention, dynamic=False)

    def prepare(inputs):
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
            kernel_options=KERNEL_OPTIONS[head_dim],
        )

    return [Variant("compiled, small tiles, no cat", prepare, lambda result: {"output": result})]
