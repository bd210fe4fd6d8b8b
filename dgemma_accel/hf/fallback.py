"""Why the original sampler serves a call."""

from __future__ import annotations

from .call import Call
from .hooks import has_hooks
from .overrides import is_compiled, is_overridden, is_own
from .patches import patch_of


def why_original(model, call: Call | None, sampler, logits_processor, criteria) -> str | None:
    """Why the accelerated denoising step cannot serve a call, or None.

    Args:
        sampler, logits_processor, criteria: as `generate` prepares them, the temperature's schedule included.
    """
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    if call is not None and call.needs_logits:
        return "the streamer takes logits"
    if type(sampler) is not generation.EntropyBoundSampler:
        return f"the sampler is a {type(sampler).__name__}"
    # The class's own renoising is noise, which is drawn otherwise here; one in the instance is somebody's choice.
    replaced = [name for name in ("renoise_canvas", "initialize_canvas") if name in sampler.__dict__]
    if "accept_canvas" in sampler.__dict__ or not is_own(type(sampler).accept_canvas):
        replaced.append("accept_canvas")
    if replaced:
        return f"the sampler's {' and '.join(replaced)} is not transformers' own"
    schedules = [type(p) is generation.LinearTemperatureScheduleLogitsProcessor for p in logits_processor]
    if len(schedules) > 1 or not all(schedules):
        # The schedule that transformers adds itself is no reason, but a second one is.
        others = [p for p, own in zip(logits_processor, schedules) if not own] or logits_processor
        names = ", ".join(type(processor).__name__ for processor in others)
        return f"there are logits processors: {names}"
    if criteria is not None and type(criteria) is not generation.StableAndConfidentStoppingCriteria:
        return f"the diffusion stopping criterion is a {type(criteria).__name__}"
    called = {"list of logits processors": logits_processor, "diffusion stopping criterion": criteria}
    if logits_processor:
        called["temperature schedule"] = logits_processor[0]
    for name, part in called.items():
        # Plain lists and None are not called.
        if callable(part) and not is_own(type(part).__call__):
            return f"the __call__ of the {name} is not transformers' own"
    if has_hooks(model):
        return "the model has forward hooks"
    return _why_other_code(model)


def refusal(options: list[str], reason: str) -> str:
    """What a call with options of the accelerated `generate` is told that the original sampler would have to serve."""
    return f"{', '.join(options)}: only the accelerated sampler has it, but {reason}"


def _why_other_code(model) -> str | None:
    """Which method that the accelerated step goes round, or hands no logits to, is not transformers' own."""
    decoder = model.model.decoder
    # The inner two are handed self-conditioning logits, which the accelerated step does not make.
    for path, module in (("", model), ("model.", model.model), ("model.decoder.", decoder)):
        if is_overridden(module):
            return f"{path}forward of the model is not transformers' own"
        if path and is_compiled(module):
            return f"{path}forward is compiled, and takes self-conditioning as logits only"
    step = patch_of(model, "_denoising_step")
    # Where it is no patch, somebody put it there after `accelerate`.
    replaced = "_denoising_step" in model.__dict__ if step is None else step.overridden
    if replaced:
        return "_denoising_step of the model is not transformers' own"
    if patch_of(decoder.self_conditioning) is None:
        return "the self-conditioning block was replaced after accelerate(model); call that again"
    if decoder.embed_tokens.weight.is_meta:
        return "the embedding is offloaded"
    return None
