"""One denoising step: decoder, lm_head, one `row_stats`, one `commit`. No fp32 logits, no wait for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.commit import commit
from ..ops.row_stats import RowStats, row_stats
from ..samplers import CanvasState, EntropyBound, Renoise, StableAndConfident
from .call import Call, current_call
from .conditioning import StepCarry, given_soft_embeddings
from .patches import Acceleration, Patch


def denoising_step(
    patch: Patch,
    *,
    decoder_forward,
    current_canvas: Tensor,
    argmax_canvas: Tensor,
    input_ids: Tensor,
    decoder_position_ids: Tensor,
    self_conditioning_logits: Tensor | StepCarry | None,
    mask_mapping: dict,
    past_key_values,
    finished_denoising: Tensor,
    cur_step: int,
    sampler,
    logits_processor,
    diffusion_stopping_criteria,
    **model_kwargs,
):
    """`DiffusionGemmaGenerationMixin._denoising_step`, the same decisions from the same noise.

    Returns:
        (canvas [B, C] int64, argmax canvas [B, C] int64, `StepCarry` for the next step, finished [B] bool).
    """
    model, acceleration = patch.owner, patch.acceleration
    reason = _reason_for_reference(
        model, past_key_values, sampler, logits_processor, diffusion_stopping_criteria
    )
    call = current_call()
    if reason is not None:
        if options := call.options_in_use():
            raise ValueError(f"{', '.join(options)}: only the accelerated sampler has it, but {reason}")
        acceleration.say("sampler", reason)
        return patch.original()(
            decoder_forward=decoder_forward,
            current_canvas=current_canvas,
            argmax_canvas=argmax_canvas,
            input_ids=input_ids,
            decoder_position_ids=decoder_position_ids,
            self_conditioning_logits=self_conditioning_logits,
            mask_mapping=mask_mapping,
            past_key_values=past_key_values,
            finished_denoising=finished_denoising,
            cur_step=cur_step,
            sampler=sampler,
            logits_processor=logits_processor,
            diffusion_stopping_criteria=diffusion_stopping_criteria,
            **model_kwargs,
        )

    embed_tokens = model.model.decoder.embed_tokens
    carry = self_conditioning_logits
    if not isinstance(carry, StepCarry):
        carry = StepCarry.start(call, current_canvas, carry, embed_tokens)
    softcap = model.final_logit_softcapping
    soft = carry.soft_embeddings(
        current_canvas, embed_tokens, softcap, acceleration.backend_of("soft_embedding")
    )

    logits = _logits(
        model, current_canvas, soft, decoder_position_ids, mask_mapping, past_key_values, model_kwargs
    )
    temperature = temperature_of_step(logits_processor, cur_step)
    stats = row_stats(
        logits,
        temperature=temperature,
        softcap=softcap,
        seed=carry.seed,
        offset=carry.offset,
        backend=acceleration.backend_of("row_stats"),
    )
    stats = _as_given(
        RowStats(*(field.to(current_canvas.device) for field in stats)), current_canvas, carry.pinned
    )
    canvas, argmax, finished = _decide(
        acceleration, carry, stats, current_canvas, argmax_canvas, finished_denoising, sampler,
        diffusion_stopping_criteria,
    )  # fmt: skip
    _report(call, stats, argmax, finished_denoising)
    if call.max_steps is not None and carry.step + 1 >= call.max_steps:
        finished = torch.ones_like(finished)
    # A single row that is finished ends its canvas, so nothing of it can be frozen.
    frozen = finished_denoising if current_canvas.shape[0] > 1 else None
    left = StepCarry(
        carry.seed, carry.first_offset, carry.step + 1, soft, logits, stats, temperature, frozen, carry.pinned
    )
    return canvas, argmax, left, finished


def _logits(model, canvas, soft, position_ids, masks, cache, model_kwargs: dict) -> Tensor:
    """lm_head of the decoder's last hidden states, [B, C, V] in the model's dtype, before softcap and temperature."""
    mask = model_kwargs.get("self_conditioning_mask")
    if soft is not None and mask is not None:
        soft = soft * mask.to(soft.dtype)[:, None, None]
    with given_soft_embeddings(soft):
        output = model.model(
            decoder_input_ids=canvas,
            self_conditioning_logits=None,
            decoder_attention_mask=masks,
            past_key_values=cache,
            decoder_position_ids=position_ids,
            **model_kwargs,
        )
    return model.lm_head(output.last_hidden_state)


def temperature_of_step(logits_processor, cur_step: int) -> Tensor:
    """The schedule's temperature with `cur_step` steps left, 0-d fp32 on the host; 1 without a schedule.

    Computed in fp32 in the order of LinearTemperatureScheduleLogitsProcessor, whose step number is a tensor.
    """
    if not logits_processor:
        return torch.tensor(1.0)
    schedule = logits_processor[0]
    share = torch.tensor(cur_step, dtype=torch.int32) / schedule.max_denoising_steps
    return schedule.t_min + (schedule.t_max - schedule.t_min) * share


def _decide(
    acceleration: Acceleration, carry: StepCarry, stats: RowStats, canvas: Tensor, argmax_canvas: Tensor,
    finished: Tensor, sampler, criteria,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Canvas, argmax canvas and finished rows after the step; sampler and criteria are left as after their own step."""
    canvas = canvas.to(torch.int64)
    stop, history = None, None
    if criteria is not None:
        stop = StableAndConfident(criteria.stability_threshold, criteria.confidence_threshold)
        history = criteria.argmax_canvas_history
    if history is None:
        history = CanvasState.start(canvas, stop).history
    result = commit(
        canvas,
        stats,
        EntropyBound(sampler.entropy_bound),
        Renoise(sampler.vocab_size),
        candidates=None if carry.pinned is None else ~carry.pinned,
        seed=carry.seed,
        offset=carry.offset,
        state=CanvasState(argmax_canvas.to(torch.int64), history, finished),
        stop=stop,
        backend=acceleration.backend_of("commit"),
    )
    sampler.accepted_token_mask = result.committed
    if criteria is not None and criteria.stability_threshold > 0:
        criteria.argmax_canvas_history = result.state.history
    return result.tokens, result.state.draft, result.state.finished


def _as_given(stats: RowStats, canvas: Tensor, pinned: Tensor | None) -> RowStats:
    """Statistics in which a pinned position is certain of its token."""
    if pinned is None:
        return stats
    return stats._replace(
        argmax=torch.where(pinned, canvas, stats.argmax),
        sample=torch.where(pinned, canvas, stats.sample),
        entropy=torch.where(pinned, 0.0, stats.entropy),
        top1_prob=torch.where(pinned, 1.0, stats.top1_prob),
        top2_prob=torch.where(pinned, 0.0, stats.top2_prob),
        sample_prob=torch.where(pinned, 1.0, stats.sample_prob),
    )


def _report(call: Call, stats: RowStats, draft: Tensor, frozen: Tensor) -> None:
    """Note the step in the report of its canvas; rows that were finished before it keep what they had."""
    if not call.reports:
        return
    report = call.reports[-1]
    report.steps = report.steps + ~frozen
    report.draft = draft
    if call.with_confidence:
        for name, now in (("confidence", stats.top1_prob), ("entropy", stats.entropy)):
            before = getattr(report, name)
            setattr(report, name, now if before is None else torch.where(frozen[:, None], before, now))


def _reason_for_reference(model, cache, sampler, logits_processor, criteria) -> str | None:
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    if current_call().needs_logits:
        return "the streamer takes logits"
    if cache.is_compileable:
        return f"{type(cache).__name__} is compiled by transformers"
    if type(sampler) is not generation.EntropyBoundSampler:
        return f"the sampler is a {type(sampler).__name__}"
    schedules = [type(p) is generation.LinearTemperatureScheduleLogitsProcessor for p in logits_processor]
    if len(schedules) > 1 or not all(schedules):
        names = ", ".join(type(processor).__name__ for processor in logits_processor)
        return f"logits processors {names}"
    if criteria is not None and type(criteria) is not generation.StableAndConfidentStoppingCriteria:
        return f"the diffusion stopping criterion is a {type(criteria).__name__}"
    if model._forward_hooks or model._forward_pre_hooks:
        return "the model has forward hooks"
    if model.model.decoder.embed_tokens.weight.is_meta:
        return "the embedding is offloaded"
    return None
