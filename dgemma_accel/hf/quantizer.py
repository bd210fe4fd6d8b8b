"""Quantized weights as a quantization of transformers': what its `from_pretrained` and `save_pretrained` ask for.

Importing this module imports transformers, and makes the method "dgemma_accel" known to it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..reference.quantization import scales_by_row
from . import linear, published
from .check import check_model
from .linear import QuantizedLinear
from .quantize import (
    WEIGHTS,
    QuantizedExperts,
    check_experts,
    check_format,
    layers_of,
    parameters_of,
    quantized,
)
from .quantized import Quantized, parameter

METHOD = "dgemma_accel"
GATE_UP_GLOBAL = "gate_up_proj_global_scale"


@register_quantization_config(METHOD)
class QuantizedWeightsConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a checkpoint's config.json.

    Args:
        format: of the experts, "fp8" or "nvfp4", as in `quantize_experts`; None where they are not quantized.
        gate_up_global_scales: of NVFP4, how many an expert's gate and up have: 1, or 2 where each has its own.
        scales: of FP8 experts, what shares one: "blocks" of 128 x 128 or "rows".
        linears: of attention projections and dense MLPs, "fp8", as in `quantize_linears`; None where they are not.
        read_from: a key of `published.NAMES` while such a checkpoint is read.
    """

    def __init__(
        self,
        format: str | None = "fp8",
        quant_method: str = METHOD,
        gate_up_global_scales: int = 1,
        scales: str = "blocks",
        read_from: str | None = None,
        linears: str | None = None,
    ) -> None:
        if format is not None:
            check_format(format)
        if linears is not None:
            check_format(linears, "linears", linear.FORMATS)
        self.format, self.quant_method, self.linears = format, quant_method, linears
        self.gate_up_global_scales, self.scales, self.read_from = gate_up_global_scales, scales, read_from

    @classmethod
    def of(cls, model) -> QuantizedWeightsConfig:
        """What a model's experts and linears were read or made with."""
        experts = layers_of(model)[0].experts
        all_linear = all(isinstance(getattr(*place), QuantizedLinear) for place in linear.places_of(model))
        linears = "fp8" if all_linear else None
        if not isinstance(experts, QuantizedExperts):
            return cls(None, linears=linears)
        if experts.format == "nvfp4":
            numbers = experts.gate_up_proj_global_scale[0].numel()
            return cls("nvfp4", gate_up_global_scales=numbers, linears=linears)
        by_row = scales_by_row(experts.gate_up_proj, experts.gate_up_proj_scale_inv)
        return cls("fp8", scales="rows" if by_row else "blocks", linears=linears)

    def to_dict(self) -> dict:
        entry = {"format": self.format, "quant_method": self.quant_method}
        if self.gate_up_global_scales != 1:
            entry["gate_up_global_scales"] = self.gate_up_global_scales
        if self.scales != "blocks":
            entry["scales"] = self.scales
        if self.linears is not None:
            entry["linears"] = self.linears
        return entry if self.read_from is None else entry | {"read_from": self.read_from}


@register_quantizer(METHOD)
class WeightsQuantizer(HfQuantizer):
    """Puts `QuantizedExperts` and `QuantizedLinear` into a model before its weights are read, and rounds those that are
    not quantized yet.

    alone: no other part of the model is quantized by another method, which a checkpoint could not name as well.
    """

    alone = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        check_model(model)
        if self.quantization_config.format is not None:
            self._replace_experts(model, self.quantization_config.format)
        if self.quantization_config.linears is not None:
            for holder, name in linear.places_of(model):
                original = getattr(holder, name)
                linear.check_linear(original, name)
                # transformers 5.17 casts what it reads to the dtype that it finds here, before it is rounded. Of a
                # published checkpoint some may not be FP8; those that are stay what they are in the model's dtype.
                as_saved = self.pre_quantized and self.quantization_config.read_from is None
                dtype = {} if as_saved else {"dtype": original.weight.dtype}
                setattr(holder, name, linear.unread(original, **dtype))
        tie_scales(model)
        if self.quantization_config.read_from is not None:
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, *published.LEFT_OUT}
        return model

    def _replace_experts(self, model, format: str) -> None:
        for layer in layers_of(model):
            check_experts(layer.experts, format)
            parameters = parameters_of(layer.experts, format)
            if self.quantization_config.gate_up_global_scales == 2:
                parameters[GATE_UP_GLOBAL] = in_two(parameters[GATE_UP_GLOBAL])
            if self.quantization_config.scales == "rows":
                for name in WEIGHTS:
                    by_row = parameters[name].new_empty(
                        (*parameters[name].shape[:-1], 1), dtype=torch.float32
                    )
                    parameters[f"{name}_scale_inv"] = parameter(by_row)
            if not self.pre_quantized:
                # What transformers 5.17 reads has to find the dtype that it had, as with linears.
                for name in WEIGHTS:
                    dtype = getattr(layer.experts, name).dtype
                    parameters[name] = parameter(parameters[name].to(dtype))
            layer.experts = QuantizedExperts(layer.experts, format, parameters)

    def get_weight_conversions(self) -> list:
        if self.quantization_config.read_from is None:
            return []
        self._conversions = published.conversions(self.quantization_config.read_from)
        return self._conversions

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, Quantized):
                # transformers makes parameters of what it read, as if they were to be trained.
                module.requires_grad_(False)
        if self.quantization_config.read_from is not None:
            # From now on it is a model like any with such experts, and is saved as one.
            self.quantization_config.read_from = None
            model._weight_conversions = [
                each for each in model._weight_conversions if each not in self._conversions
            ]
        return model

    def param_element_size(self, model, param_name: str, param: Tensor) -> float:
        """Bytes that an element will have, for transformers' estimate of a model's memory."""
        return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        path, _, name = param_name.rpartition(".")
        if self.pre_quantized or name not in (*WEIGHTS, "weight"):
            return False
        kind = QuantizedLinear if name == "weight" else QuantizedExperts
        return isinstance(model.get_submodule(path), kind)

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeWeights(self.quantization_config.format)

    def is_serializable(self) -> bool:
        return self.alone

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class QuantizeWeights(ConversionOps):
    """Weights of a layer, as read from a checkpoint, to the parameters that stand for them; format: of the experts."""

    def __init__(self, format: str | None) -> None:
        self.format = format

    def convert(self, input_dict: dict[str, Tensor | list[Tensor]], **kwargs) -> dict[str, Tensor]:
        result = {}
        path, _, name = kwargs["full_layer_name"].rpartition(".")
        for weight in input_dict.values():
            weight = weight[0] if isinstance(weight, list) else weight
            if name == "weight":
                made = dict(zip((name, "weight_scale"), linear.quantized(weight, path.rpartition(".")[2])))
            else:
                made = quantized(weight, name, self.format)
            result |= {f"{path}.{key}": tensor for key, tensor in made.items()}
        return result


def in_two(scale: Tensor) -> Tensor:
    """[X] as [X, 2]."""
    return parameter(scale[:, None].expand(-1, 2).contiguous())


def tie_scales(model) -> None:
    """Let the encoder's scales be the decoder's, as the weights are already.

    The patterns of `_tied_weights_keys` match the names of the scales too. They were matched with the names that the
    model had when it was made.
    """
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def can_be_saved(model) -> None:
    """Let `save_pretrained` write a model whose weights `quantize_experts` or `quantize_linears` has replaced.

    Where another method has quantized the rest of it, it refuses to.
    """
    config = QuantizedWeightsConfig.of(model)
    quantizer = model.hf_quantizer = WeightsQuantizer(config, pre_quantized=True)
    other = getattr(model.config, "quantization_config", None)
    quantizer.alone = other is None or isinstance(other, QuantizedWeightsConfig)
    if quantizer.alone:
        model.config.quantization_config = config
    tie_scales(model)
