"""Quantized experts as a quantization of transformers': what its `from_pretrained` and `save_pretrained` ask for.

Importing this module imports transformers, and makes the method "dgemma_accel" known to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..reference.quantization import scales_by_row
from . import published
from .check import check_model
from .quantize import (
    WEIGHTS,
    QuantizedExperts,
    check_experts,
    check_format,
    layers_of,
    parameters_of,
    quantized,
)

METHOD = "dgemma_accel"
GATE_UP_GLOBAL = "gate_up_proj_global_scale"


@register_quantization_config(METHOD)
class QuantizedExpertsConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a checkpoint's config.json.

    Args:
        format: "fp8" or "nvfp4", as in `quantize_experts`.
        gate_up_global_scales: of NVFP4, how many an expert's gate and up have: 1, or 2 where each has its own.
        scales: of FP8, what shares one: "blocks" of 128 x 128 or "rows".
        read_from: a key of `published.NAMES` while such a checkpoint is read.
    """

    def __init__(
        self,
        format: str = "fp8",
        quant_method: str = METHOD,
        gate_up_global_scales: int = 1,
        scales: str = "blocks",
        read_from: str | None = None,
    ) -> None:
        check_format(format)
        self.format, self.quant_method = format, quant_method
        self.gate_up_global_scales, self.scales, self.read_from = gate_up_global_scales, scales, read_from

    @classmethod
    def of(cls, experts: QuantizedExperts) -> QuantizedExpertsConfig:
        """What a layer's experts were read or made with."""
        if experts.format == "nvfp4":
            return cls("nvfp4", gate_up_global_scales=experts.gate_up_proj_global_scale[0].numel())
        by_row = scales_by_row(experts.gate_up_proj, experts.gate_up_proj_scale_inv)
        return cls("fp8", scales="rows" if by_row else "blocks")

    def to_dict(self) -> dict:
        entry = {"format": self.format, "quant_method": self.quant_method}
        if self.gate_up_global_scales != 1:
            entry["gate_up_global_scales"] = self.gate_up_global_scales
        if self.scales != "blocks":
            entry["scales"] = self.scales
        return entry if self.read_from is None else entry | {"read_from": self.read_from}


@register_quantizer(METHOD)
class ExpertsQuantizer(HfQuantizer):
    """Puts `QuantizedExperts` into a model before its weights are read, and rounds those that are not quantized yet.

    alone: no other part of the model is quantized by another method, which a checkpoint could not name as well.
    """

    alone = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        check_model(model)
        format = self.quantization_config.format
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
                    parameters[f"{name}_scale_inv"] = nn.Parameter(by_row, requires_grad=False)
            if not self.pre_quantized:
                # transformers 5.17 casts what it reads to the dtype that it finds here, before it is rounded.
                for name in WEIGHTS:
                    dtype = getattr(layer.experts, name).dtype
                    parameters[name] = nn.Parameter(parameters[name].to(dtype), requires_grad=False)
            layer.experts = QuantizedExperts(layer.experts, format, parameters)
        tie_scales(model)
        if self.quantization_config.read_from is not None:
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, *published.LEFT_OUT}
        return model

    def get_weight_conversions(self) -> list:
        if self.quantization_config.read_from is None:
            return []
        self._conversions = published.conversions(self.quantization_config.read_from)
        return self._conversions

    def _process_model_after_weight_loading(self, model, **kwargs):
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
        return (
            not self.pre_quantized
            and name in WEIGHTS
            and isinstance(model.get_submodule(path), QuantizedExperts)
        )

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeExperts(self.quantization_config.format)

    def is_serializable(self) -> bool:
        return self.alone

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class QuantizeExperts(ConversionOps):
    """The weights of a layer's experts, as read from a checkpoint, to the parameters that stand for them."""

    def __init__(self, format: str) -> None:
        self.format = format

    def convert(self, input_dict: dict[str, Tensor | list[Tensor]], **kwargs) -> dict[str, Tensor]:
        result = {}
        path, _, name = kwargs["full_layer_name"].rpartition(".")
        for weight in input_dict.values():
            weight = weight[0] if isinstance(weight, list) else weight
            for key, tensor in quantized(weight, name, self.format).items():
                result[f"{path}.{key}"] = tensor
        return result


def in_two(scale: nn.Parameter) -> nn.Parameter:
    """[X] as [X, 2]."""
    return nn.Parameter(scale[:, None].expand(-1, 2).contiguous(), requires_grad=False)


def tie_scales(model) -> None:
    """Let the encoder's scales be the decoder's, as the weights are already.

    The patterns of `_tied_weights_keys` match the names of the scales too. They were matched with the names that the
    model had when it was made.
    """
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def can_be_saved(model) -> None:
    """Let `save_pretrained` write a model whose experts `quantize_experts` has replaced, or refuse to where another
    method has quantized the rest of it."""
    config = QuantizedExpertsConfig.of(layers_of(model)[0].experts)
    quantizer = model.hf_quantizer = ExpertsQuantizer(config, pre_quantized=True)
    other = getattr(model.config, "quantization_config", None)
    quantizer.alone = other is None or isinstance(other, QuantizedExpertsConfig)
    if quantizer.alone:
        model.config.quantization_config = config
    tie_scales(model)
