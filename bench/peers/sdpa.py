"""PyTorch's scaled_dot_product_attention with its backend pinned: as transformers calls it, and bare."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..bench_block_attention import SCALE, Inputs
from ..cases import Case, Variant

NAME = "sdpa"

# In the order of a GPU's preference; PyTorch's own choice differs between cards and versions.
ON_CUDA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_CPU = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def unavailable(device: torch.device) -> str | None:
    return None


def padding_mask(inputs: Inputs) -> torch.Tensor | None:
    """[B, 1, 1, L + C] bool, True where a key may be seen; None without padding."""
    if inputs.start is None:
        return None
    length, canvas = inputs.prefix_key.shape[2], inputs.key.shape[2]
    slot = torch.arange(length + canvas, device=inputs.query.device)
    return (slot >= inputs.start[:, None])[:, None, None]


def concatenated(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([inputs.prefix_key, inputs.key], -2), torch.cat([inputs.prefix_value, inputs.value], -2)


def repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Every KV head `times` times, copied, as transformers expands them."""
    batch, heads, length, dim = tensor.shape
    return (
        tensor[:, :, None].expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)
    )


def _outputs(result: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"output": result}


def _pinned(backend: SDPBackend, call):
    def run():
        with sdpa_kernel(backend):
            return call()

    return run


def variants(case: Case, inputs) -> list[Variant]:
    if case.op != "block_attention":
        return []
    backends = ON_CUDA if inputs.query.is_cuda else ON_CPU
    # transformers' use_gqa_in_sdpa: no mask, and a head size that the fused kernels take.
    copies = inputs.start is not None or inputs.query.shape[-1] > 256
    found = []
    for name, backend in backends.items():

        def as_transformers(inputs, backend=backend):
            mask, group = padding_mask(inputs), inputs.query.shape[1] // inputs.key.shape[1]

            def call():
                key, value = concatenated(inputs)
                if copies:
                    key, value = repeated(key, group), repeated(value, group)
                return F.scaled_dot_product_attention(
                    inputs.query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=not copies
                )

            return _pinned(backend, call)

        def bare(inputs, backend=backend):
            mask = padding_mask(inputs)
            key, value = concatenated(inputs)
            return _pinned(
                backend,
                lambda: F.scaled_dot_product_attention(
                    inputs.query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True
                ),
            )

        expanded = "repeat_kv" if copies else "enable_gqa"
        found.append(Variant(f"cat, {expanded}, {name}", as_transformers, _outputs))
        found.append(Variant(f"{name}, enable_gqa, no cat", bare, _outputs))
    return found
