"""The denoising of a canvas: decoder, one `head_stats` and one `commit` a step, and no wait for the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.commit import commit
from ..ops.row_stats import RowStats
from ..samplers import CanvasState, EntropyBound, Renoise, StableAndConfident
from . import compiled
from .call import Call, active_call
from .conditioning import StepCarry, given_soft_embeddings
from .eager import why_eager
from .fallback import refusal, why_original
from .head import logits_and_stats
from .lookout import Lookout
from .naming import takes_cache
from .patches import Acceleration, Patch
from .split_head import crosses_ranks
from .statistics import as_given, token_logprobs

# Launched one by one, the operators of a step may take the host longer than the device.
AHEAD = 1


@takes_cache
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
    cache,
    finished_denoising: Tensor,
    cur_step: int,
    sampler,
    logits_processor,
    diffusion_stopping_criteria,
    **model_kwargs,
):
    """`DiffusionGemmaGenerationMixin._denoising_step`, the same decisions from the same noise.

    Inside an accelerated `generate` one call takes all steps of the canvas, so that the loop of the original, which
    asks the device after every step whether to go on, asks once a canvas. Elsewhere it takes one step.

    Returns:
        (canvas [B, C] int64, argmax canvas [B, C] int64, `StepCarry` for the next step, finished [B] bool).
    """
    model, acceleration = patch.owner, patch.acceleration
    call = active_call()
    reason = why_original(model, call, sampler, logits_processor, diffusion_stopping_criteria)
    if reason is not None:
        if call is not None:
            call.disturb()
            if options := call.options_in_use():
                raise ValueError(refusal(options, reason))
            call.leave_step(cur_step)
        acceleration.say("sampler", reason)
        return patch.original()(
            decoder_forward=decoder_forward,
            current_canvas=current_canvas,
            argmax_canvas=argmax_canvas,
            input_ids=input_ids,
            decoder_position_ids=decoder_position_ids,
            self_conditioning_logits=self_conditioning_logits,
            mask_mapping=mask_mapping,
            finished_denoising=finished_denoising,
            cur_step=cur_step,
            sampler=sampler,
            logits_processor=logits_processor,
            diffusion_stopping_criteria=diffusion_stopping_criteria,
            **acceleration.as_argument(cache),
            **model_kwargs,
        )

    denoiser = Denoiser(
        model, acceleration, call or Call(), decoder_position_ids, mask_mapping, cache, model_kwargs,
        sampler, logits_processor, diffusion_stopping_criteria,
    )  # fmt: skip
    carry = self_conditioning_logits
    if not isinstance(carry, StepCarry):
        carry = StepCarry.start(denoiser.call, current_canvas, carry, model.model.decoder.embed_tokens)
    if call is not None:
        report, finished = call.reports[-1], call.finished
        report.counted = ~(finished_denoising if finished is None else finished_denoising | finished)
        if call.ended is not None:
            # Nobody waits for what becomes padding.
            finished_denoising = finished_denoising | call.ended
            report.ended = call.ended
    state = current_canvas.to(torch.int64), argmax_canvas.to(torch.int64), carry, finished_denoising
    if call is None:
        return denoiser.step(*state, cur_step)
    return denoiser.run(*state, cur_step)


@dataclass(eq=False)
class Denoiser:
    """What stays the same over the steps of one canvas."""

    model: torch.nn.Module
    acceleration: Acceleration
    call: Call
    position_ids: Tensor
    masks: dict
    cache: object
    model_kwargs: dict
    sampler: object
    logits_processor: object
    criteria: object

    def run(self, canvas: Tensor, argmax: Tensor, carry: StepCarry, finished: Tensor, steps: int):
        """All steps until every row is finished; `finished` comes back all True, which ends the caller's loop too."""
        last = 1 if self.call.max_steps is None else max(1, steps - self.call.max_steps + 1)
        if self.acceleration.graph_on(canvas.device):
            reason = why_eager(self, canvas)
            if reason is None:
                left = torch.arange(steps, last - 1, -1, dtype=torch.int32, device="cpu")
                temperatures = temperature_of_step(self.logits_processor, left).expand(len(left))
                return compiled.run(self, canvas, argmax, carry, finished, temperatures)
            self.call.disturb()
            self.acceleration.say("graph", reason, "step by step without compilation goes")
        lookout = Lookout(
            self.call.take_drafts(),
            may_finish=self.criteria is not None,
            ahead=AHEAD,
            in_step=crosses_ranks(self.model),
        )
        for cur_step in range(steps, last - 1, -1):
            canvas, argmax, carry, finished = self.step(canvas, argmax, carry, finished, cur_step)
            lookout.note(finished, argmax)
            if lookout.is_over():
                break
        lookout.close()
        return canvas, argmax, carry, torch.ones_like(finished)

    def step(self, canvas: Tensor, argmax: Tensor, carry: StepCarry, finished: Tensor, cur_step: int):
        """One step with `cur_step` steps left; returns what it was given, one step on."""
        embed_tokens, softcap = self.model.model.decoder.embed_tokens, self.model.final_logit_softcapping
        backend_of = self.acceleration.backend_of
        soft = carry.soft_embeddings(
            canvas, embed_tokens, softcap, self.acceleration.exact, backend_of("soft_embedding")
        )
        temperature = temperature_of_step(self.logits_processor, cur_step)
        logits, stats = logits_and_stats(
            self.model.lm_head,
            self._last_hidden_states(canvas, soft),
            temperature=temperature,
            softcap=softcap,
            seed=carry.seed,
            offset=carry.offset,
            backend=backend_of("head_stats"),
        )
        stats = RowStats(*(field.to(canvas.device) for field in stats))
        given = as_given(stats, canvas, carry.pinned)
        new_canvas, new_argmax, new_finished = self._decide(carry, given, canvas, argmax, finished)
        asked, logprobs = self.call.logprobs_of, None
        if asked is not None:
            logprobs = token_logprobs(logits, asked, softcap, backend_of("head_stats")).to(canvas.device)
        self.call.note_step(given, new_argmax, finished, logprobs)
        # A single row that is finished ends its canvas, so nothing of it has to be frozen.
        frozen = finished if canvas.shape[0] > 1 else None
        left = StepCarry(
            carry.seed,
            carry.first_offset,
            carry.step + 1,
            soft,
            logits,
            stats,
            temperature,
            frozen,
            carry.pinned,
        )
        return new_canvas, new_argmax, left, new_finished

    def _last_hidden_states(self, canvas: Tensor, soft: Tensor | None) -> Tensor:
        """[B, C, E] of the decoder, its self-conditioning given as soft embeddings."""
        mask = self.model_kwargs.get("self_conditioning_mask")
        if soft is not None and mask is not None:
            soft = soft * mask.to(soft.dtype)[:, None, None]
        with given_soft_embeddings(soft):
            output = self.model.model(
                decoder_input_ids=canvas,
                self_conditioning_logits=None,
                decoder_attention_mask=self.masks,
                decoder_position_ids=self.position_ids,
                **self.acceleration.as_argument(self.cache),
                **self.model_kwargs,
            )
        return output.last_hidden_state

    def _decide(
        self, carry: StepCarry, stats: RowStats, canvas: Tensor, argmax: Tensor, finished: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Canvas, argmax canvas and finished rows after the step; sampler and criteria are left as after their own."""
        criteria, sampler = self.criteria, self.sampler
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
            state=CanvasState(argmax, history, finished),
            stop=stop,
            backend=self.acceleration.backend_of("commit"),
        )
        sampler.accepted_token_mask = result.committed
        if criteria is not None and criteria.stability_threshold > 0:
            criteria.argmax_canvas_history = result.state.history
        return result.tokens, result.state.draft, result.state.finished


def temperature_of_step(logits_processor, cur_step: int | Tensor) -> Tensor:
    """The schedule's temperature with `cur_step` steps left (int32), fp32 on the host; 0-d 1 without a schedule.

    Computed in fp32 in the order of LinearTemperatureScheduleLogitsProcessor, whose step number is a tensor.
    """
    if not logits_processor:
        return torch.tensor(1.0, device="cpu")
    schedule = logits_processor[0]
    share = torch.as_tensor(cur_step, dtype=torch.int32, device="cpu") / schedule.max_denoising_steps
    return schedule.t_min + (schedule.t_max - schedule.t_min) * share
