"""`from_pretrained`: a DiffusionGemma whose weights are quantized as they are read, or were before it was saved."""

from __future__ import annotations

import copy
import os

from . import linear
from .check import check_transformers
from .linear import QuantizedLinear, quantize_linears
from .quantize import FORMATS, QuantizedExperts, check_format, quantize_experts

# What says where a checkpoint's config is found.
WHERE = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip
CONFIG_LACKS = "config: needs the quantization_config of the checkpoint, whose {} are {!r}"
SHARDED = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


def from_pretrained(checkpoint, *, experts: str | None = None, linears: str | None = None, **options):
    """A transformers `DiffusionGemmaForBlockDiffusion`, with quantized weights where asked for or saved so.

        model = dgemma_accel.from_pretrained(name, experts="nvfp4", dtype="bfloat16", device_map="cuda")
        model.save_pretrained("quantized")
        model = dgemma_accel.from_pretrained("quantized", device_map="cuda")
        model = dgemma_accel.from_pretrained("nvidia/diffusiongemma-26B-A4B-it-NVFP4", device_map="cuda")
        model = dgemma_accel.from_pretrained(name, experts="fp8", linears="fp8", dtype="bfloat16", device_map="cuda")

    A layer's weights go to their device as they are in the checkpoint and are rounded there, one layer after the other;
    so the device needs room for the quantized model and one layer, and the host for one layer. Only where a checkpoint
    was saved with one of `experts` and `linears` and is asked for with the other, that is done behind reading it.
    transformers alone does
    not know the form that is saved. It warns of an unknown quantization then, refuses NVFP4, and takes FP8 numbers
    without their scales.

    NVFP4 and FP8 checkpoints of ModelOpt and of compressed-tensors, as the last line but one reads one, keep their
    numbers: see `published`.

    Args:
        checkpoint: a name or a folder, as transformers' `from_pretrained` takes it.
        experts: "fp8", "nvfp4" (`quantize_experts`), or None for the experts as the checkpoint has them.
        linears: "fp8" (`quantize_linears`), or None for attention projections and dense MLPs as they were saved by
            `save_pretrained`, or as they are in another checkpoint, where quantized widened to the model's dtype.
        options: for transformers' `from_pretrained`: dtype, device_map, ... A device_map needs `accelerate`.

    Returns:
        The model in eval mode; `accelerate` comes after. It is not trainable.

    Raises:
        ValueError: a checkpoint of another model; a format that is not known, or not that of the checkpoint; a
            checkpoint quantized otherwise, or a `quantization_config` besides `experts`; a `config` that does not say
            how the checkpoint is quantized; another format of ModelOpt's than its NVFP4 and FP8; a plan that shards the
            experts or linears; with "nvfp4" a width that is no multiple of 16.
        RuntimeError: weights that are not finite, or that a checkpoint with quantized weights lacks (but with
            transformers 5.17 the scale of a published FP8 matrix outside the experts, unseen there); transformers'
            report, which is logged, names them.
        ImportError: transformers is missing or older than 5.17.
        OSError: there is no such checkpoint.
    """
    for name, format, formats in (("experts", experts, FORMATS), ("linears", linears, linear.FORMATS)):
        if format is None:
            continue
        check_format(format, name, formats)
        if options.get("quantization_config") is not None:
            raise ValueError(
                f"{name}: a model takes one quantization, and a quantization_config was given as well"
            )
    check_transformers()
    import transformers

    from . import published
    from .quantizer import METHOD, QuantizedWeightsConfig

    where = {name: options[name] for name in WHERE if name in options}
    given = config = options.pop("config", None)
    if given is None or isinstance(given, str | os.PathLike):
        found = given or checkpoint
        kind = transformers.DiffusionGemmaConfig.get_config_dict(found, **where)[0].get("model_type")
        if kind not in (None, transformers.DiffusionGemmaConfig.model_type):
            # transformers warns and goes on, with weights of its own making where the checkpoint has none by a name.
            raise ValueError(f"checkpoint: a DiffusionGemma's expected, got model_type {kind!r}")
        config = transformers.DiffusionGemmaConfig.from_pretrained(found, **where)
    saved = _saved_quantization(config)
    form = None if saved is None else published.form_of(saved)
    if form is not None:
        saved = QuantizedWeightsConfig(**published.settings(form), linears=linears).to_dict()
        config = copy.deepcopy(config)
        config.quantization_config = saved
    quantized = saved is not None and saved.get("quant_method") == METHOD
    if given is not None and saved is None and checkpoint is not None:
        own = _quantization_of(checkpoint, where)
        if own is not None and own.get("quant_method") != METHOD:
            form = published.form_of(own)
            own = None if form is None else published.settings(form)
        if own is not None:
            # Without their scales the numbers are another model.
            what = ("linears", own["linears"]) if own["format"] is None else ("experts", own["format"])
            raise ValueError(CONFIG_LACKS.format(*what))
    if given is not None and quantized and form is None and checkpoint is not None:
        own = _quantization_of(checkpoint, where) or {}
        if own.get("linears") is not None and saved.get("linears") is None:
            raise ValueError(CONFIG_LACKS.format("linears", own["linears"]))
    if experts is not None or linears is not None:
        asked_for = "linears" if experts is None else "experts"
        if quantized and experts is not None and saved["format"] not in (None, experts):
            raise ValueError(f"experts: the checkpoint's are {saved['format']!r}, got {experts!r}")
        if saved is not None and not quantized:
            raise ValueError(
                f"{asked_for}: the checkpoint is quantized already, as {saved.get('quant_method')!r}"
            )
        if saved is None:
            options["quantization_config"] = QuantizedWeightsConfig(experts, linears=linears)
    sharded = [name for name in SHARDED if options.get(name) is not None]
    if sharded and (quantized or experts is not None or linears is not None):
        raise ValueError(f"{sharded[0]}: quantized weights cannot be sharded")
    read = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained
    if not (quantized or experts is not None or linears is not None):
        return read(checkpoint, config=config, **options)
    with_info = options.pop("output_loading_info", False)
    model, info = read(checkpoint, config=config, output_loading_info=True, **options)
    _check_complete(model, info["missing_keys"])
    if quantized:
        # Saved with the one, and asked for with the other.
        if experts is not None and saved["format"] is None:
            quantize_experts(model, format=experts)
        if linears is not None and saved.get("linears") is None:
            quantize_linears(model, format=linears)
    return (model, info) if with_info else model


def _check_complete(model, missing_keys) -> None:
    """Raise where a checkpoint lacks something of its quantized weights.

    transformers warns, and goes on with numbers that nobody made; 5.17 takes a stack that is an expert too short.
    """
    missing = {name for name in missing_keys if ".experts." in name}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            missing |= {f"{path}.{name}" for name, _ in module.named_parameters()} & set(missing_keys)
        if isinstance(module, QuantizedExperts):
            own = module.named_parameters(path)
            missing |= {name for name, parameter in own if len(parameter) != module.num_experts}
    if missing:
        raise RuntimeError(
            f"checkpoint: it lacks quantized weights or scales in {len(missing)} tensors, such as {min(missing)}"
        )


def _quantization_of(checkpoint, where: dict) -> dict | None:
    """What the checkpoint's own config says of it; None where it has no config."""
    import transformers

    try:
        return _saved_quantization(transformers.DiffusionGemmaConfig.from_pretrained(checkpoint, **where))
    except OSError:
        return None


def _saved_quantization(config) -> dict | None:
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()
