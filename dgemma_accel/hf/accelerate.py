"""`accelerate`, `restore` and `accelerated`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ..backends import MODULES, BackendError, load, requested
from .attention import decoder_attention_forward, encoder_attention_forward
from .cache import leave_uncompiled, prepare_cache, prepare_static_cache
from .check import check_model
from .conditioning import self_conditioning_forward
from .copies import reduce_ex, shares_layers_with
from .denoising import denoising_step
from .experts import experts_forward
from .generate import compute_tokens_per_forward, finalize_canvas, generate, prepare_denoiser_inputs
from .layer import layer_forward
from .masks import create_decoder_masks, create_encoder_masks, next_canvas_arguments
from .naming import cache_argument, unknown_names
from .overrides import is_compiled_module
from .patches import ATTRIBUTE, Acceleration, acceleration_of
from .storing import text_encoder_forward

logger = logging.getLogger("dgemma_accel")

# The ops that the drop-in calls.
OPS = ("block_attention", "row_stats", "commit", "head_stats", "soft_embedding", "experts")


def accelerate(model, *, backend: str = "auto", exact: bool = False, graph: bool | None = None):
    """Run a DiffusionGemma model's attention and sampler through this package.

    `model.generate(...)` is called as before and gives the same tokens from the same noise; its noise is drawn
    from a seed that torch's default generator gives once per call, so `torch.manual_seed` makes a run
    repeatable. Only this instance changes; config, weights and what `save_pretrained` writes do not. Calling it
    again, also with another backend, replaces the earlier call.

    What the fast path does not serve is served by the original code and logged once per model: user logits
    processors, streamers that take logits, other samplers or stopping criteria, forwards of the caller's own, attention
    masks with holes, caches that cannot be read in place, training.

    Args:
        model: a transformers `DiffusionGemmaForBlockDiffusion`.
        backend: "auto", "reference", "cpp", "triton" or "cuda"; an op that has no such implementation takes "auto".
        exact: False computes self-conditioning from fp32, nearer the truth than the original. True repeats the
            original's roundings (bf16 logits, bf16 probabilities), for comparing a bf16 model's tokens with the
            original's. Neither makes a table of the vocabulary in fp32, except with backend="reference".
        graph: compile the whole step (`torch.compile(fullgraph=True)`), once per batch size, and on a GPU capture it in
            CUDA graphs, once per batch size and cache size; calls without a cache of their own then get a
            `PreallocatedCache`. None: on a GPU and not on a CPU, where only the compiler's minutes would be felt. What
            cannot be compiled or captured runs without, and says so once.

    Returns:
        The model.

    Raises:
        TypeError: a model of another class, or one in which `torch.compile` of a module stands for its encoder or
            decoder; an `exact` that is no bool, a `graph` that is neither a bool nor None.
        ImportError: transformers is missing, older than 5.17, or a later one whose methods are not known here.
        ValueError: an unknown backend.
        backends.BackendError: the backend cannot run on this machine.
    """
    check_backend(backend)
    if not isinstance(exact, bool):
        raise TypeError(f"exact: a bool expected, got {type(exact).__name__}")
    if not (graph is None or isinstance(graph, bool)):
        raise TypeError(f"graph: a bool or None expected, got {type(graph).__name__}")
    check_model(model)
    restore(model)
    other = shares_layers_with(model)
    if other is not None:
        # Of which, after copies of parts, the caller may know nothing.
        logger.info("accelerate: restored another model, which shares its layers with this one")
        restore(other)
    for module in (model.model, model.model.encoder, model.model.decoder):
        if is_compiled_module(module):
            raise TypeError(
                "model: a part of it is what torch.compile made of a module; accelerate(model) compiles the step itself"
            )
    acceleration = Acceleration(backend, exact, graph, cache_argument())
    replacements = list(_replacements(model))
    _check_methods(replacements)
    for owner, name, function in replacements:
        acceleration.replace(owner, name, function)
    model.__dict__[ATTRIBUTE] = acceleration
    return model


def restore(model):
    """Put back exactly what `accelerate` replaced; a model that is not accelerated stays as it is.

    Memory for captures and cache buffers is let go; caches that earlier calls returned keep theirs.

    Returns:
        The model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: a DiffusionGemmaForBlockDiffusion expected, got {type(model).__name__}")
    acceleration = acceleration_of(model)
    if acceleration is not None:
        acceleration.undo()
        del model.__dict__[ATTRIBUTE]
    return model


@contextmanager
def accelerated(model, *, backend: str = "auto", exact: bool = False, graph: bool | None = None) -> Iterator:
    """`accelerate(model)` for the length of a `with` block; then the model is as it was, also after an exception.

    A model that was accelerated before comes back accelerated, with the options it had.
    """
    before = acceleration_of(model) if isinstance(model, nn.Module) else None
    options = ("backend", "exact", "graph")
    earlier = None if before is None else {name: getattr(before, name) for name in options}
    accelerate(model, backend=backend, exact=exact, graph=graph)
    try:
        yield model
    finally:
        restore(model)
        if earlier is not None:
            accelerate(model, **earlier)


def _replacements(model) -> Iterator[tuple[nn.Module, str, Callable]]:
    """(module, name of its method, what stands in front of it)."""
    encoder, decoder = model.model.encoder, model.model.decoder
    for layer in encoder.language_model.layers:
        yield layer.self_attn, "forward", encoder_attention_forward
    yield encoder, "create_masks_for_generate", create_encoder_masks
    yield encoder.language_model, "forward", text_encoder_forward
    for layer in decoder.layers:
        yield layer.self_attn, "forward", decoder_attention_forward
    for layer in (*encoder.language_model.layers, *decoder.layers):
        yield layer, "forward", layer_forward
        yield layer.experts, "forward", experts_forward
    yield decoder, "create_diffusion_decoder_attention_mask", create_decoder_masks
    yield decoder.self_conditioning, "forward", self_conditioning_forward
    yield model, "_denoising_step", denoising_step
    yield model, "_prepare_cache_for_generation", prepare_cache
    yield model, "_prepare_static_cache", prepare_static_cache
    yield model, "_compile_functions", leave_uncompiled
    yield model, "_prepare_denoiser_inputs", prepare_denoiser_inputs
    yield model, "_finalize_canvas", finalize_canvas
    yield model, "_prepare_kwargs_for_next_canvas", next_canvas_arguments
    yield model, "_compute_tokens_per_forward", compute_tokens_per_forward
    yield model, "__reduce_ex__", reduce_ex
    yield model, "generate", generate


def _check_methods(replacements: list[tuple[nn.Module, str, Callable]]) -> None:
    """Refuse a transformers whose methods are not those that the replacements stand for."""
    import transformers

    problems = {}
    for kind, name, function in {
        (type(owner), name, function): None for owner, name, function in replacements
    }:
        original = getattr(kind, name, None)
        # A class of the caller's own may name its arguments as it likes: the original serves it.
        if not getattr(original, "__module__", "transformers.").startswith("transformers."):
            continue
        reason = "is gone" if original is None else unknown_names(original, function)
        if reason is not None:
            problems[f"{kind.__name__}.{name}"] = reason
    if problems:
        raise ImportError(
            f"transformers {transformers.__version__} is newer than this release of dgemma-accel knows: "
            + "; ".join(f"{method} {reason}" for method, reason in problems.items())
        )


def check_backend(backend: str) -> None:
    """Raise TypeError, ValueError or BackendError unless `accelerate` can take this backend on this machine."""
    if not isinstance(backend, str):
        raise TypeError(f"backend: a string expected, got {type(backend).__name__}")
    name = requested(backend)
    if name == "auto":
        return
    # Ops that lack the same thing are named together.
    missing: dict[str, list[str]] = {}
    for op in OPS:
        implementation, reason = load(op, name) if name in MODULES[op] else (True, None)
        if implementation is None:
            missing.setdefault(reason, []).append(op)
    if missing:
        lines = (f"{', '.join(ops)}: {reason}" for reason, ops in missing.items())
        raise BackendError(f"backend {name!r} cannot accelerate a model here: " + "; ".join(lines))
