"""Whether a model is one that the drop-in is for."""

from __future__ import annotations

MINIMUM_TRANSFORMERS = (5, 17)


def check_transformers() -> None:
    """Raise ImportError if transformers is missing or older than 5.17."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "dgemma_accel needs transformers >= 5.17: pip install 'dgemma-accel[hf]'"
        ) from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < MINIMUM_TRANSFORMERS:
        raise ImportError(f"dgemma_accel needs transformers >= 5.17, got {transformers.__version__}")


def check_model(model) -> None:
    """Raise unless `model` is a DiffusionGemma of a transformers that is new enough.

    Raises:
        TypeError: a model of another class.
        ImportError: transformers is missing or older than 5.17.
    """
    check_transformers()
    import transformers

    if not isinstance(model, transformers.DiffusionGemmaForBlockDiffusion):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        # PEFT's wrapper says where the model is, with its adapters in it.
        hint = "; pass model.get_base_model()" if hasattr(model, "get_base_model") else ""
        raise TypeError(f"model: a transformers DiffusionGemmaForBlockDiffusion expected, got {kind}{hint}")
