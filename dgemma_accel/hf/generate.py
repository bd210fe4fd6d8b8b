"""`generate` of an accelerated model: the original's, and options that the original does not have."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..cuda_graph import quiet
from ..ops import checks
from .call import Call, active_call, calling
from .fallback import refusal, why_original
from .naming import takes_cache
from .patches import Patch
from .split_head import crosses_ranks
from .undisturbed import is_undisturbed


@takes_cache
def generate(
    patch: Patch,
    input_ids: Tensor | None = None,
    cache=None,
    streamer=None,
    generation_config=None,
    logits_processor=None,
    stopping_criteria=None,
    *,
    seed: int | None = None,
    pinned=None,
    max_steps: int | None = None,
    return_confidence: bool = False,
    return_steps: bool = False,
    return_logprobs=None,
    **kwargs,
):
    """`DiffusionGemmaGenerationMixin.generate` with a seed, pinned positions, a cap on steps and a report.

    Args:
        seed: in [0, 2**63): makes this call repeatable, whatever torch's generators hold. The starting canvas that the
            original draws from them is drawn all the same, and not used.
        pinned: positions of the first canvas that keep the token which `decoder_input_ids` gives them, while
            the rest is written around them: a bool tensor [C] or [B, C], or a sequence of positions.
        max_steps: >= 1; a canvas is taken as it is after that many steps. Unlike `max_denoising_steps` it does not
            stretch the temperature schedule.
        return_confidence: the output has `confidence` and `entropy`, each [B, new tokens] fp32: probability of
            each token and entropy (nats) of its position in the row's last decoder pass, at that step's
            temperature. NaN where `generate` put padding over the model's token; 1 and 0 where pinned.
        return_steps: the output has `steps` [B, canvases] int64: decoder passes until the row's canvas was finished;
            0 for those behind the row's end, which nobody waits for (unless a streamer takes drafts, or there is no
            padding).
        return_logprobs: K token ids, a sequence or a tensor [K]. The output has `logprobs` [B, new tokens, K] fp32: ln
            softmax of the model's logits at these tokens in the row's last decoder pass, not tempered; where a token
            is pinned, what the model says of its position. NaN as for `return_confidence`. Steps run uncompiled then.
        The others are those of the original.

    Returns:
        What the original returns; with `return_confidence`, `return_steps` or `return_logprobs` a `GenerationOutput`.

    Raises:
        TypeError, ValueError: an option of a wrong type, shape or value, or one that the call's streamer, logits
            processors, sampler, stopping criterion or cache, or code of the caller's in the model, leave no room for.
            Nothing has been read or written then.
    """
    model = patch.owner
    canvas_length, vocab = model.config.canvas_length, model.config.text_config.vocab_size
    canvas = kwargs.get("decoder_input_ids")
    if isinstance(canvas, Tensor) and input_ids is not None:
        _check_canvas(canvas, (input_ids.shape[0], canvas_length), vocab)
    call = Call(
        seed=None if seed is None else checks.seed_and_offset(seed, 0, torch.device("cpu"))[0],
        seed_given=seed is not None,
        pinned=None if pinned is None else _pinned_mask(pinned, canvas, canvas_length),
        max_steps=_checked_steps(max_steps),
        with_confidence=checks.is_bool("return_confidence", return_confidence),
        with_steps=checks.is_bool("return_steps", return_steps),
        logprobs_of=None if return_logprobs is None else _token_list(return_logprobs, vocab),
        given_mask=kwargs.get("attention_mask"),
    )
    call.undisturbed = is_undisturbed(patch, streamer, stopping_criteria, logits_processor)
    if call.logprobs_of is not None and isinstance(input_ids, Tensor):
        # Once, and not in every step, which would wait for the device.
        call.logprobs_of = call.logprobs_of.to(input_ids.device)
    if hasattr(streamer, "put_draft"):
        call.put_draft = streamer.put_draft
        call.needs_logits = bool(getattr(streamer, "_takes_logits", False))
        streamer = _DraftsOnce(streamer, call)
    if call.options_in_use():
        _check_served(model, call, generation_config, logits_processor, kwargs)
    bank = patch.acceleration.bank
    with calling(call):
        if cache is not None and bank.hold(cache):
            call.leased.append((bank, cache))
        output = patch.original()(
            input_ids=input_ids,
            streamer=streamer,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            **patch.acceleration.as_argument(cache),
            **kwargs,
        )
    if not call.reporting:
        return output
    return _with_reports(output, call)


def prepare_denoiser_inputs(patch: Patch, **kwargs):
    """`_prepare_denoiser_inputs` with the starting canvas of the call's seed."""
    given = "decoder_input_ids" in kwargs["model_kwargs"]
    # It draws from the device's generator.
    with quiet(kwargs["device"]):
        canvas, *rest = patch.original()(**kwargs)
    call = active_call()
    if call is not None and call.seed_given and not given:
        sampler = kwargs["sampler"]
        canvas = call.starting_canvas(*canvas.shape, sampler.vocab_size, canvas.device)
    return canvas, *rest


def finalize_canvas(patch: Patch, input_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    """`_finalize_canvas`, but padding behind an end token leaves pinned positions alone.

    The streamer, the next canvas and the cache read the same tokens. Rows that have ended are noted: all that they
    write from now on becomes padding.
    """
    call = active_call()
    if call is None:
        return patch.original()(input_ids=input_ids, **kwargs)
    pinned = call.pinned if call.canvases_begun == 1 else None
    canvas = None if pinned is None else input_ids[:, -pinned.shape[1] :].clone()
    input_ids, finished = patch.original()(input_ids=input_ids, **kwargs)
    if pinned is not None:
        new = input_ids[:, -pinned.shape[1] :]
        new.copy_(torch.where(pinned.to(new.device), canvas, new))
    padded = getattr(kwargs.get("generation_config"), "pad_token_id", None) is not None
    # Whoever looks at drafts sees those of all rows.
    call.finished = finished
    call.ended = finished if padded and call.put_draft is None and not patch.overridden else None
    return input_ids, finished


def compute_tokens_per_forward(
    patch: Patch, input_ids: Tensor, decoder_forward_passes: Tensor, initial_input_ids_len: int, pad_token_id
):
    """`_compute_tokens_per_forward` with the passes that were made; of a canvas that was denoised in one call the
    original's loop saw one."""
    call = active_call()
    for report in [] if call is None else call.reports:
        unseen = torch.where(report.counted, report.steps - 1, 0)
        decoder_forward_passes = decoder_forward_passes + unseen.to(decoder_forward_passes.dtype)
    return patch.original()(input_ids, decoder_forward_passes, initial_input_ids_len, pad_token_id)


class _DraftsOnce:
    """A streamer as `generate` sees it: drafts that the accelerated sampler has delivered are not put again."""

    def __init__(self, streamer, call: Call) -> None:
        self._streamer, self._call = streamer, call

    def __getattr__(self, name: str):
        return getattr(self._streamer, name)

    def put_draft(self, *args, **kwargs) -> None:
        if not self._call.drafts_taken:
            self._streamer.put_draft(*args, **kwargs)


def _with_reports(output, call: Call):
    from .output import GenerationOutput

    # Without a canvas, where the prompt fills the length already, all of them are [B, 0].
    nothing = output.sequences[:, :0]
    # No token is -1: what rows wrote that had ended is padding, whatever it is.
    parts = (
        report.draft if report.ended is None else report.draft.masked_fill(report.ended[:, None], -1)
        for report in call.reports
    )
    drafts = torch.cat([nothing, *parts], -1)
    kept = output.sequences[:, output.sequences.shape[1] - drafts.shape[1] :] == drafts
    extras = {}
    if call.with_confidence:
        for name in ("confidence", "entropy"):
            values = torch.cat([nothing.float(), *(getattr(report, name) for report in call.reports)], -1)
            extras[name] = torch.where(kept, values, float("nan"))
    if call.logprobs_of is not None:
        nowhere = nothing.float()[..., None].expand(-1, -1, len(call.logprobs_of))
        values = torch.cat([nowhere, *(report.logprobs for report in call.reports)], 1)
        extras["logprobs"] = torch.where(kept[..., None], values, float("nan"))
    if call.with_steps:
        extras["steps"] = torch.cat([nothing.long(), *(report.steps[:, None] for report in call.reports)], -1)
    return GenerationOutput(**output, **extras)


def _check_served(model, call: Call, generation_config, logits_processor, kwargs: dict) -> None:
    """Refuse a call whose options could not be kept, before its prompt goes into a cache.

    The preparations are those of the original `generate`, which makes them again.
    """
    config, _ = model._prepare_generation_config(generation_config, **kwargs)
    if call.reporting and not getattr(config, "return_dict_in_generate", True):
        raise ValueError(
            "return_confidence, return_steps, return_logprobs: need return_dict_in_generate=True"
        )
    if call.logprobs_of is not None and crosses_ranks(model):
        raise ValueError(
            "return_logprobs: no rank has all the logits of a vocabulary that is split over ranks"
        )
    # A copy: the schedule is appended to a list of the caller's.
    processors = model._prepare_logits_processor(config, copy.copy(logits_processor))
    sampler = model._prepare_sampler(config)
    reason = why_original(
        model, call, sampler, processors, model._prepare_diffusion_stopping_criteria(config)
    )
    if reason is not None:
        raise ValueError(refusal(call.options_in_use(), reason))


def _check_canvas(canvas: Tensor, shape: tuple[int, int], vocab: int) -> None:
    checks.has_dtype("decoder_input_ids", canvas, (torch.int64, torch.int32))
    checks.has_shape("decoder_input_ids", canvas, shape, "[B, canvas_length]")
    outside = (canvas < 0) | (canvas >= vocab)
    if bool(outside.any()):
        raise ValueError(f"decoder_input_ids: tokens must be in [0, {vocab}), got {int(canvas[outside][0])}")


def _pinned_mask(pinned, canvas: Tensor | None, length: int) -> Tensor:
    """[B, C] bool from a mask or from positions."""
    if canvas is None:
        raise ValueError("pinned: needs decoder_input_ids [B, canvas_length], which holds the pinned tokens")
    checks.is_tensor("decoder_input_ids", canvas)
    if not isinstance(pinned, Tensor):
        try:
            pinned = torch.as_tensor(pinned, dtype=torch.int64 if len(pinned) == 0 else None, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"pinned: a bool tensor or a sequence of positions expected, got {type(pinned).__name__}"
            ) from error
    if pinned.dtype == torch.bool:
        if tuple(pinned.shape) not in ((length,), tuple(canvas.shape)):
            raise ValueError(
                f"pinned: shape must be ({length},) or {tuple(canvas.shape)}, got {tuple(pinned.shape)}"
            )
        return pinned.to(canvas.device).expand(canvas.shape)
    checks.has_dtype("pinned", pinned, (torch.int64, torch.int32))
    if pinned.ndim != 1:
        raise ValueError(f"pinned: positions must be a flat sequence, got shape {tuple(pinned.shape)}")
    outside = (pinned < 0) | (pinned >= length)
    if bool(outside.any()):
        raise ValueError(f"pinned: positions must be in [0, {length}), got {int(pinned[outside][0])}")
    mask = torch.zeros(length, dtype=torch.bool, device=canvas.device)
    mask[pinned.long().to(canvas.device)] = True
    return mask.expand(canvas.shape)


def _token_list(tokens, vocab: int) -> Tensor:
    """[K] int64 of a caller's sequence of token ids."""
    try:
        tokens = torch.as_tensor(tokens, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"return_logprobs: token ids expected, got {type(tokens).__name__}") from error
    checks.has_dtype("return_logprobs", tokens, (torch.int64, torch.int32))
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(
            f"return_logprobs: a flat sequence of token ids expected, got shape {tuple(tokens.shape)}"
        )
    outside = (tokens < 0) | (tokens >= vocab)
    if bool(outside.any()):
        raise ValueError(f"return_logprobs: tokens must be in [0, {vocab}), got {int(tokens[outside][0])}")
    return tokens.long()


def _checked_steps(max_steps: int | None) -> int | None:
    if max_steps is None:
        return None
    number = checks.plain_number(max_steps, integer=True)
    if number is None:
        raise TypeError(f"max_steps: an int expected, got {type(max_steps).__name__}")
    if number < 1:
        raise ValueError(f"max_steps: must be at least 1, got {max_steps}")
    return number
