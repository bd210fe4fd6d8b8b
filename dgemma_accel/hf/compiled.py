"""Running the steps of a canvas through their compiled halves, captured where the device can."""

from __future__ import annotations

import time
import types
import weakref
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..cuda_graph import RECORDINGS, is_recorded, quiet
from . import graph
from .capture import CapturedStep, Inputs
from .lookout import Lookout
from .patches import Acceleration
from .products import side_by_side
from .registry import STEP, UNCAPTURED, fingerprint, modules_of


def run(denoiser, canvas: Tensor, argmax: Tensor, carry, finished: Tensor, temperatures: Tensor):
    """All steps of a canvas, as `Denoiser.run`; `temperatures` [N] fp32 on the host has one
    for each step that may be taken."""
    call, criteria = denoiser.call, denoiser.criteria
    inputs = _inputs(denoiser, canvas, argmax, carry, finished)
    keys = [layer.key_buffer for layer in denoiser.cache.layers]
    values = [layer.value_buffer for layer in denoiser.cache.layers]
    for buffer in (*keys, *values):
        # Only the attention's own kernel reads how long a buffer is, so a longer cache is not compiled anew.
        torch._dynamo.maybe_mark_dynamic(buffer, 2)
    step = _step_for(denoiser, inputs, keys)
    taken = 0
    with _running(denoiser, step, inputs, keys, values, carry.offset, temperatures) as steps:
        lookout = Lookout(call.take_drafts(), may_finish=criteria is not None, ahead=steps.AHEAD)
        for _ in range(len(temperatures)):
            steps.decide()
            # Between the halves: the host knows what was decided while the device goes on with the second.
            lookout.note(steps.state.finished, steps.state.draft)
            steps.condition()
            lookout.hand_over()
            taken += 1
            if lookout.is_over():
                break
        lookout.close()
        state = steps.finish()

    if criteria is not None and criteria.stability_threshold:
        criteria.argmax_canvas_history = state.history
    report = call.reports[-1]
    report.steps, report.draft = state.steps, state.draft
    if call.with_confidence:
        report.confidence, report.entropy = state.confidence, state.entropy
    carry.step, carry.soft = carry.step + taken, state.soft
    return state.canvas, state.draft, carry, torch.ones_like(finished)


class Half:
    """`graph.decide` or `graph.condition` compiled for one shape, and as it is where it cannot be compiled.

    seconds: of the first call, the compiler's time and one run; None before it. failure: why it runs uncompiled.
    """

    def __init__(self, function: Callable, acceleration: Acceleration) -> None:
        # It holds the steps.
        self.function, self._acceleration = function, weakref.ref(acceleration)
        self.seconds: float | None = None
        self.failure: str | None = None
        # A code object of its own, so that no limit on recompiling counts across shapes or models.
        code = function.__code__.replace()
        own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
        try:
            # A graph within the graph that is captured here, if the process has turned inductor's own on.
            options = {"triton.cudagraphs": False}
            self.compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options)
        except Exception as error:
            self._give_up(error)

    def __call__(self, device: torch.device, *arguments):
        if self.failure is not None:
            return self.function(*arguments)
        if self.seconds is not None:
            return self._run(device, arguments)
        with quiet(device):
            begun = time.perf_counter()
            result = self._run(device, arguments)
            self.seconds = time.perf_counter() - begun
        return result

    def _run(self, device: torch.device, arguments: tuple):
        try:
            return self.compiled(*arguments)
        except Exception as error:
            if torch.OutOfMemoryError in (type(error), type(getattr(error, "inner_exception", None))):
                # Says nothing about the compiler, and the uncompiled step takes more.
                raise
            if self.seconds is not None and not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            if is_recorded(device):
                # Half of the step may be in the recording already.
                raise
            # What is wrong with the step itself is raised once more here, as the caller should see it.
            result = self.function(*arguments)
            self._give_up(error)
            return result

    def _give_up(self, error: Exception) -> None:
        self.failure = one_line(error)
        self._acceleration().say("graph", f"torch.compile: {self.failure}", "the step, uncompiled, serves")


class Step:
    """A denoising step in its two halves, compiled for one shape. shape: (B, C). calls: steps taken."""

    def __init__(
        self, model, settings: graph.Settings, acceleration: Acceleration, shape: torch.Size
    ) -> None:
        # It holds this step.
        self._model = weakref.ref(model)
        self.settings, self.shape, self.calls = settings, tuple(shape), 0
        self.halves = Half(graph.decide, acceleration), Half(graph.condition, acceleration)

    def decide(self, state, in_place, prefixes, numbers, pinned) -> graph.Decision:
        self.calls += 1
        arguments = (self._model(), state, in_place, prefixes, numbers, pinned, self.settings)
        return self.halves[0](state.canvas.device, *arguments)

    def condition(self, decision: graph.Decision, frozen, soft, temperature, pinned) -> Tensor:
        arguments = (self._model(), decision, frozen, soft, temperature, pinned, self.settings)
        return self.halves[1](soft.device, *arguments)

    @property
    def seconds(self) -> float | None:
        """Of the first step, the compiler's time included; None before it."""
        spent = [half.seconds for half in self.halves]
        return None if None in spent else sum(spent)

    @property
    def failure(self) -> str | None:
        """Why it runs uncompiled, or None."""
        return next((half.failure for half in self.halves if half.failure is not None), None)


class Stepwise:
    """Steps called one by one, as `CapturedStep` without a capture."""

    # The host launches each operator, which takes long enough to begin with the next step before this one is over.
    AHEAD = 1

    def __init__(
        self, step: Step, inputs: Inputs, in_place: graph.InPlace, offset: int, schedule: Tensor
    ) -> None:
        device = inputs.state.canvas.device
        self.step, self.inputs, self.in_place, self.state = step, inputs, in_place, inputs.state
        # One copy to the device for all steps.
        offsets = torch.arange(offset, offset + len(schedule), device="cpu").to(device, non_blocking=True)
        self.left = zip(offsets.unbind(), schedule.to(device, non_blocking=True).unbind())

    def decide(self) -> None:
        offset, self.temperature = next(self.left)
        held, before = self.inputs, self.state
        numbers = graph.Numbers(held.seed, offset, self.temperature, held.entropy_bound, held.confidence)
        self.decision = self.step.decide(before, self.in_place, held.prefixes, numbers, held.pinned)
        self.frozen, self.state = before.finished, self.decision.state(before.soft)

    def condition(self) -> None:
        held = self.inputs
        soft = self.step.condition(self.decision, self.frozen, self.state.soft, self.temperature, held.pinned)
        # With it the logits go.
        self.decision, self.state = None, self.state._replace(soft=soft)

    def finish(self) -> graph.State:
        return self.state


@contextmanager
def _running(denoiser, step: Step, inputs: Inputs, keys, values, offset: int, schedule: Tensor):
    """A `CapturedStep` that is loaded, or a `Stepwise` where nothing can be captured."""
    device, acceleration = inputs.state.canvas.device, denoiser.acceleration

    def in_place() -> graph.InPlace:
        layers = layers_of(denoiser.model.model.decoder)
        return graph.InPlace(keys, values, side_by_side(layers, acceleration.backend))

    recording = RECORDINGS.get(device.type)
    if recording is None:
        yield Stepwise(step, inputs, in_place(), offset, schedule)
        return
    modules = [denoiser.model.lm_head, *modules_of(denoiser.model.model.decoder)]
    key = capture_key(STEP, device, step, inputs.state.canvas, inputs.tensors(), keys, values)

    def make(pool) -> CapturedStep:
        return CapturedStep(step, inputs, in_place(), offset, schedule, recording, pool)

    with ExitStack() as stack:
        captured = leased(stack, denoiser.model, acceleration, recording, key, modules, make)
        if captured is not None:
            captured.load(inputs, offset, schedule)
        yield Stepwise(step, inputs, in_place(), offset, schedule) if captured is None else captured


def capture_key(kind: str, device, what, canvas: Tensor, inputs: list[Tensor], keys, values) -> tuple:
    """What a capture is known by: `what` runs, on inputs of which shapes, over which buffers of the cache."""
    addresses = tuple(buffer.data_ptr() for buffer in (*keys, *values))
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
    lengths = tuple(buffer.shape[2] for buffer in keys)
    return kind, device, what, lengths, tuple(canvas.shape), shapes, addresses


def leased(
    stack: ExitStack, model, acceleration: Acceleration, recording, key: tuple, modules: list, make: Callable
):
    """The capture for `key`, until `stack` is closed; None where there is none, which is said once."""
    captures = acceleration.captures
    try:
        weights = fingerprint(model, modules)
        found = stack.enter_context(captures.lease(key, weights, recording.make_pool, make))
    except Exception as error:
        captures.failures[key] = one_line(error)
        acceleration.say("graph", f"not captured: {one_line(error)}", UNCAPTURED[key[0]])
        return None
    if found is not None:
        stack.callback(found.close)
    return found


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _inputs(denoiser, canvas: Tensor, argmax: Tensor, carry, finished: Tensor) -> Inputs:
    device, criteria = canvas.device, denoiser.criteria
    state = _first_state(denoiser, canvas, argmax, carry, finished)
    fixed = (denoiser.sampler.entropy_bound, 1.0 if criteria is None else criteria.confidence_threshold)
    bound, confidence = (torch.full((), value, dtype=torch.float32, device=device) for value in fixed)
    seed = carry.seed.to(device, non_blocking=True)
    prefixes = prefixes_of(
        denoiser.model.model.decoder, denoiser.cache, denoiser.masks, denoiser.position_ids, state.soft
    )
    return Inputs(state, prefixes, seed, bound, confidence, carry.pinned)


def _settings(denoiser) -> graph.Settings:
    names = ("block_attention", "head_stats", "commit", "soft_embedding")
    return graph.Settings(
        softcap=denoiser.model.final_logit_softcapping,
        vocab=denoiser.sampler.vocab_size,
        depth=None if denoiser.criteria is None else denoiser.criteria.stability_threshold,
        exact=denoiser.acceleration.exact,
        backends=tuple(denoiser.acceleration.backend_of(name) for name in names),
    )


def _first_state(denoiser, canvas: Tensor, argmax: Tensor, carry, finished: Tensor) -> graph.State:
    embeddings = denoiser.model.model.decoder.embed_tokens.weight
    depth = 0 if denoiser.criteria is None else denoiser.criteria.stability_threshold
    soft = carry.soft
    if soft is None:
        soft = embeddings.new_zeros(*canvas.shape, embeddings.shape[1])
    return graph.State(
        canvas=canvas,
        # Two inputs that are one tensor would be a graph of their own.
        draft=argmax.clone(),
        history=canvas.new_full((depth, *canvas.shape), -1),
        finished=finished,
        soft=soft,
        confidence=torch.zeros(canvas.shape, device=canvas.device),
        entropy=torch.zeros(canvas.shape, device=canvas.device),
        steps=torch.zeros(canvas.shape[0], dtype=torch.int64, device=canvas.device),
    )


def layers_of(text_model) -> list[torch.nn.Module]:
    """Those of a decoder's or a text encoder's layers that its forward runs."""
    config = getattr(text_model, "text_config", text_model.config)
    return list(text_model.layers[: config.num_hidden_layers])


def prefixes_of(
    text_model, cache, masks: dict, position_ids: Tensor, like: Tensor
) -> dict[str, graph.Prefix]:
    """Range in the buffers and rotary embedding of each layer kind of a decoder or a text encoder.

    Args:
        masks: a `PrefixRange` by kind; None, or one without a range, for all that the cache holds.
        like: [B, ...] on the device and in the dtype of the hidden states.
    """
    batch, prefixes = like.shape[0], {}
    for index, layer in enumerate(layers_of(text_model)):
        kind = layer.self_attn.layer_type
        if kind in prefixes:
            continue
        held, mask = cache.layers[index], masks[kind]
        if mask is None or mask.start is None:
            ends = (held.first, held.first + held.keys.shape[2])
            start, end = (torch.full((batch,), e, dtype=torch.int32, device=like.device) for e in ends)
        else:
            start, end = (bound + held.first for bound in mask.on(like.device))
        cos, sin = text_model.rotary_emb(like, position_ids, kind)
        prefixes[kind] = graph.Prefix(start, end, cos, sin)
    return prefixes


def _step_for(denoiser, inputs: Inputs, keys: list[Tensor]) -> Step:
    """The step for these shapes. How long a cache is does not count: it is a number that the compiled code reads."""
    model, acceleration, settings = denoiser.model, denoiser.acceleration, _settings(denoiser)
    key = (
        tuple((buffer.shape[:2], buffer.shape[3]) for buffer in keys),
        keys[0].dtype,
        keys[0].device,
        model.lm_head.weight.dtype,
        tuple(inputs.state.history.shape),
        inputs.pinned is None,
        settings,
    )
    if key not in acceleration.compiled:
        acceleration.compiled[key] = Step(model, settings, acceleration, inputs.state.canvas.shape)
    return acceleration.compiled[key]
