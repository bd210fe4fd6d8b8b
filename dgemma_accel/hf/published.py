"""Checkpoints whose NVFP4 weights others made: ModelOpt (NVIDIA's) and compressed-tensors (llm-compressor's).

They hold one matrix for each expert and projection. Those of a layer become the parameters of a `QuantizedExperts`, bit
for bit; a matrix outside the experts is widened to the model's dtype, as no op here takes it as it is. Scales of inputs
and of the KV cache are left out: rows and cache stay in the model's dtype.

Source of the names: ModelOpt's torch/export/moe_utils.py, and compressed-tensors' format "nvfp4-pack-quantized".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from ..reference.quantization import SCALE_GROUP, dequantize


class Names(NamedTuple):
    """What the tensors of a matrix are called. inverse: the global scale is what weights were multiplied with."""

    weight: str
    scale: str
    global_scale: str
    inverse: bool


NAMES = {
    "modelopt": Names("weight", "weight_scale", "weight_scale_2", False),
    "compressed-tensors": Names("weight_packed", "weight_scale", "weight_global_scale", True),
}
# What a checkpoint may hold besides.
LEFT_OUT = (r"\.input_scale$", r"\.input_global_scale$", r"\.[kv]_scale$", r"\.weight_shape$")
# Weights by `weight`, `weight_scale` and `weight_scale_2` alone; NVFP4_AWQ has another factor for each input.
ALGORITHMS = ("NVFP4", "W4A16_NVFP4")


def method_of(quantization: dict) -> str | None:
    """The key of `NAMES` for what a checkpoint's config says of its quantization, None where transformers knows it.

    Raises:
        ValueError: one of ModelOpt's other formats.
    """
    method = quantization.get("quant_method")
    groups = (quantization.get("config_groups") or {}).values()
    if method == "compressed-tensors":
        formats = {quantization.get("format"), *(group.get("format") for group in groups)}
        return method if formats - {None, "mixed-precision"} == {"nvfp4-pack-quantized"} else None
    if method != "modelopt":
        return None
    algorithm = quantization.get("quant_algo")
    sizes = {
        quantization.get("group_size"),
        *((group.get("weights") or {}).get("group_size") for group in groups),
    }
    if algorithm not in ALGORITHMS or sizes - {None, SCALE_GROUP}:
        raise ValueError(
            f"checkpoint: of ModelOpt's formats {' and '.join(ALGORITHMS)} with groups of {SCALE_GROUP} are read, "
            f"got {algorithm!r} with {sorted(sizes - {None})}"
        )
    return method


def conversions(method: str) -> list[WeightConverter]:
    """What transformers does with the tensors of such a checkpoint; the first that matches a name takes it."""
    names = NAMES[method]

    def of_experts(name: str, ending: str, *operations: ConversionOps) -> list[WeightConverter]:
        both = [f"experts.*.{projection}.{name}$" for projection in ("gate_proj", "up_proj")]
        one = f"experts.*.down_proj.{name}$"
        return [
            WeightConverter(
                both, f"experts.gate_up_proj{ending}", [*operations] or [MergeModulelist(), Concatenate(1)]
            ),
            WeightConverter(one, f"experts.down_proj{ending}", [*operations] or [MergeModulelist()]),
        ]

    return [
        *of_experts(names.weight, ""),
        *of_experts(names.scale, "_scale"),
        *of_experts(names.global_scale, "_global_scale", GlobalScales(names.inverse)),
        WeightConverter([f"{name}$" for name in names[:3]], "weight", [Widen(names)]),
    ]


class GlobalScales(ConversionOps):
    """The numbers of one projection [X], or of gate and up side by side [X, 2]."""

    def __init__(self, inverse: bool) -> None:
        self.inverse = inverse

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs) -> dict[str, Tensor]:
        columns = [
            torch.stack([number.float().reshape(()) for number in input_dict[name]])
            for name in source_patterns
        ]
        result = columns[0] if len(columns) == 1 else torch.stack(columns, -1)
        if self.inverse:
            result = 1 / result
        if not result.isfinite().all():
            raise ValueError("a global scale is not finite")
        return {target_patterns[0]: result}


class Widen(ConversionOps):
    """A matrix outside the experts in the dtype of its parameter, and what is no NVFP4 as it is."""

    # transformers hands such an operation its tensors in the dtypes of the checkpoint.
    hf_quantizer = True

    def __init__(self, names: Names) -> None:
        self.names = names

    def convert(self, input_dict, *, full_layer_name, model, **kwargs) -> dict[str, Tensor]:
        parts = {
            pattern.removesuffix("$"): tensors[0] if isinstance(tensors, list) else tensors
            for pattern, tensors in input_dict.items()
        }
        weight = parts[self.names.weight]
        if self.names.scale in parts:
            total = parts[self.names.global_scale].float().reshape(())
            total = 1 / total if self.names.inverse else total
            weight = dequantize(weight, parts[self.names.scale], torch.float32, total)
        path, _, name = full_layer_name.rpartition(".")
        return {full_layer_name: weight.to(getattr(model.get_submodule(path), name).dtype)}
