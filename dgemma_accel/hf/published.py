"""Checkpoints whose NVFP4 or FP8 weights others made: ModelOpt (NVIDIA's), compressed-tensors (llm-compressor's).

They hold one matrix for each expert and projection. Those of a layer become the parameters of a `QuantizedExperts`, bit
for bit; a matrix outside the experts is widened to the model's dtype, or with FP8 linears becomes a `QuantizedLinear`,
bit for bit where it is FP8. Scales of inputs and of the KV cache are left out: rows of experts and the cache stay in
the model's dtype, and a linear's rows get scales of their own. FP8 weights have a scale for each row, or one for a
matrix, which all its rows get.

Source of the names: ModelOpt's torch/export/moe_utils.py, and compressed-tensors' formats "nvfp4-pack-quantized" and
"float-quantized".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from ..ops.checks import FLOAT_DTYPES
from ..reference.quantization import FP8, SCALE_GROUP, dequantize
from .linear import QuantizedLinear, quantized


class Names(NamedTuple):
    """What the tensors of a matrix are called. inverse: the global scale is what weights were multiplied with."""

    format: str
    weight: str
    scale: str
    global_scale: str | None = None
    inverse: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.scale, self.global_scale) if name is not None)


# FP8's are the same for both.
NAMES = {
    "modelopt": Names("nvfp4", "weight", "weight_scale", "weight_scale_2"),
    "compressed-tensors": Names("nvfp4", "weight_packed", "weight_scale", "weight_global_scale", True),
    "fp8": Names("fp8", "weight", "weight_scale"),
}
# What a checkpoint may hold besides.
LEFT_OUT = (r"\.input_scale$", r"\.input_global_scale$", r"\.[kv]_scale$", r"\.weight_shape$")
# ModelOpt's formats with nothing but these tensors (NVFP4_AWQ has another factor for each input), and the sizes of the
# groups of weights that share a scale.
ALGORITHMS = {
    "NVFP4": ("modelopt", {SCALE_GROUP}),
    "W4A16_NVFP4": ("modelopt", {SCALE_GROUP}),
    "FP8": ("fp8", set()),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", set()),
}
# compressed-tensors' names for a scale of each row and of a whole matrix.
STRATEGIES = ("channel", "tensor")


def form_of(quantization: dict) -> str | None:
    """The key of `NAMES` for what a checkpoint's config says of its quantization, None where it is none of these.

    Raises:
        ValueError: one of ModelOpt's other formats.
    """
    # Older files of ModelOpt name it as their producer only.
    method = quantization.get("quant_method") or (quantization.get("producer") or {}).get("name")
    groups = (quantization.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    if method == "compressed-tensors":
        formats = {quantization.get("format"), *(group.get("format") for group in groups)}
        formats -= {None, "mixed-precision"}
        if formats == {"nvfp4-pack-quantized"}:
            return method
        rowwise = all(
            each.get("type") == "float" and each.get("num_bits") == 8 and each.get("strategy") in STRATEGIES
            for each in weights
        )
        return "fp8" if formats == {"float-quantized"} and weights and rowwise else None
    if method != "modelopt":
        return None
    algorithm = quantization.get("quant_algo")
    sizes = {quantization.get("group_size"), *(each.get("group_size") for each in weights)} - {None}
    form, allowed = ALGORITHMS.get(algorithm, (None, set()))
    if form is None or sizes - allowed:
        raise ValueError(
            f"checkpoint: of ModelOpt's formats {', '.join(ALGORITHMS)} are read, NVFP4 with groups of {SCALE_GROUP}, "
            f"got {algorithm!r} with {sorted(sizes)}"
        )
    return form


def settings(form: str) -> dict:
    """The arguments of the `QuantizedWeightsConfig` under which such a checkpoint is read."""
    own = {"gate_up_global_scales": 2} if NAMES[form].format == "nvfp4" else {"scales": "rows"}
    return {"format": NAMES[form].format, "read_from": form, **own}


def conversions(form: str) -> list[WeightConverter]:
    """What transformers does with the tensors of such a checkpoint; the first that matches a name takes it."""
    names = NAMES[form]

    def of_experts(name: str, ending: str, *operations: ConversionOps) -> list[WeightConverter]:
        both = [f"experts.*.{projection}.{name}$" for projection in ("gate_proj", "up_proj")]
        one = f"experts.*.down_proj.{name}$"
        return [
            WeightConverter(
                both, f"experts.gate_up_proj{ending}", [*operations] or [MergeModulelist(), Concatenate(1)]
            ),
            WeightConverter(one, f"experts.down_proj{ending}", [*operations] or [MergeModulelist()]),
        ]

    if names.format == "fp8":
        scales = of_experts(names.scale, "_scale_inv", RowScales())
    else:
        scales = of_experts(names.scale, "_scale")
        scales += of_experts(names.global_scale, "_global_scale", GlobalScales(names.inverse))
    # Some may not be quantized, which have no other name then.
    found = dict.fromkeys((*names.tensors, "weight"))
    widened = WeightConverter([f"{name}$" for name in found], "weight", [Widen(names)])
    return [*of_experts(names.weight, ""), *scales, widened]


def by_row(scale: Tensor, rows: int) -> Tensor:
    """[rows, 1] fp32 of one number, or of one for each row ([rows] or [rows, 1])."""
    return scale.float().reshape(-1, 1).expand(rows, 1)


class RowScales(ConversionOps):
    """[X, N, 1]: the scales of one projection's rows, or of gate's and up's one after the other."""

    def convert(
        self, input_dict, source_patterns, target_patterns, *, full_layer_name, model, **kwargs
    ) -> dict[str, Tensor]:
        path, _, name = full_layer_name.rpartition(".")
        rows = getattr(model.get_submodule(path), name).shape[1] // len(source_patterns)
        parts = [torch.stack([by_row(scale, rows) for scale in input_dict[each]]) for each in source_patterns]
        result = torch.cat(parts, 1)
        if not result.isfinite().all():
            raise ValueError("a scale is not finite")
        return {target_patterns[0]: result}


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
    """A matrix outside the experts in the dtype of its parameter, or in FP8 where a `QuantizedLinear` takes it."""

    # transformers hands such an operation its tensors in the dtypes of the checkpoint.
    hf_quantizer = True

    def __init__(self, names: Names) -> None:
        self.names = names

    def convert(self, input_dict, *, full_layer_name, model, **kwargs) -> dict[str, Tensor]:
        parts = {
            pattern.removesuffix("$"): tensors[0] if isinstance(tensors, list) else tensors
            for pattern, tensors in input_dict.items()
        }
        weight = parts.get(self.names.weight, parts.get("weight"))
        path, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        takes_fp8 = isinstance(module, QuantizedLinear)
        if self.names.scale in parts:
            if takes_fp8 and self.names.format == "fp8":
                return self._in_fp8(path, weight, by_row(parts[self.names.scale], len(weight)))
            scale, total = parts[self.names.scale], None
            if self.names.format == "fp8":
                scale = by_row(scale, len(weight))
            else:
                total = parts[self.names.global_scale].float().reshape(())
                total = 1 / total if self.names.inverse else total
            weight = dequantize(weight, scale, torch.float32, total)
        elif weight.dtype not in FLOAT_DTYPES:
            raise ValueError(f"a weight of {weight.dtype} has no scale")
        if takes_fp8:
            return self._in_fp8(path, *quantized(weight, path.rpartition(".")[2]))
        return {full_layer_name: weight.to(getattr(module, name).dtype)}

    @staticmethod
    def _in_fp8(path: str, weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
        if not scale.isfinite().all():
            raise ValueError("a scale is not finite")
        return {f"{path}.weight": weight.to(FP8).contiguous(), f"{path}.weight_scale": scale.contiguous()}
