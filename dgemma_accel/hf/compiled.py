"""Running the steps of a canvas through their compiled parts, captured where the device can."""

from __future__ import annotations

import functools
import time
import types
import weakref
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..cuda_graph import RECORDINGS, is_recorded, quiet
from . import graph
from .call import Call
from .capture import CapturedStep, Inputs
from .eager import ask_ahead
from .lookout import Lookout
from .patches import Acceleration
from .products import side_by_side
from .registry import STEP, UNCAPTURED, fingerprint


def run(denoiser, canvas: Tensor, argmax: Tensor, carry, finished: Tensor, temperatures: Tensor):
    """All steps of a canvas, as `Denoiser.run`; `temperatures` [N] fp32 on the host has one
    for each step that may be taken."""
    call, criteria = denoiser.call, denoiser.criteria
    inputs = _inputs(denoiser, canvas, argmax, carry, finished)
    keys, values = buffers_of(denoiser.cache)
    step = _step_for(denoiser, inputs, keys)
    taken, device = 0, canvas.device
    with _running(denoiser, step, inputs, keys, values, carry.offset, temperatures) as steps:
        lookout = Lookout(call.take_drafts(), may_finish=criteria is not None, ahead=steps.AHEAD)
        for _ in range(len(temperatures)):
            steps.decide()
            # Between the halves: the host knows what was decided while the device goes on with the second.
            lookout.note(steps.state.finished, steps.state.draft)
            steps.condition()
            lookout.hand_over()
            taken += 1
            if taken == 1 and call.undisturbed and device.type in RECORDINGS:
                # The device is at work, and when the canvas is finished it is not.
                ask_ahead(denoiser.model, denoiser.acceleration, call, canvas)
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


class Part:
    """A function compiled for one shape, and as it is where it cannot be compiled.

    what: it is a part of, for the log. seconds: of the first call with each module, the compiler's time and one run;
    None before any. failure: why it runs uncompiled.
    """

    def __init__(self, function: Callable, what: str, acceleration: Acceleration) -> None:
        # It holds what is compiled.
        self.function, self.what, self._acceleration = function, what, weakref.ref(acceleration)
        self.seconds: float | None = None
        self.failure: str | None = None
        self._seen: set[tuple[int, bool]] = set()
        # A code object of its own, so that no limit on recompiling counts across shapes or models.
        code = function.__code__.replace()
        own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
        try:
            # A graph within the graph that is captured here, if the process has turned inductor's own on.
            options = {"triton.cudagraphs": False}
            self.compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options)
        except Exception as error:
            self.give_up(error)

    def __call__(self, device: torch.device, module, *arguments):
        if self.failure is not None:
            return self.function(module, *arguments)
        called = id(module), torch.is_inference_mode_enabled()
        if called in self._seen:
            return self._run(device, (module, *arguments), first=False)
        # A module that differs from those before in more than its weights is compiled anew.
        with quiet(device):
            begun = time.perf_counter()
            result = self._run(device, (module, *arguments), first=True)
            self.seconds = (self.seconds or 0.0) + time.perf_counter() - begun
        self._seen.add(called)
        return result

    def _run(self, device: torch.device, arguments: tuple, first: bool):
        try:
            return self.compiled(*arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            raise
        except Exception as error:
            if torch.OutOfMemoryError in (type(error), type(getattr(error, "inner_exception", None))):
                # Says nothing about the compiler, and the uncompiled step takes more.
                raise
            if not first and not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            if is_recorded(device):
                # Part of the step may be in the recording already.
                raise
            # What is wrong with the step itself is raised once more here, as the caller should see it.
            result = self.function(*arguments)
            self.give_up(error)
            return result

    def give_up(self, error: Exception) -> None:
        self.failure = one_line(error)
        reason = f"torch.compile: {self.failure}"
        self._acceleration().say("graph", reason, f"a part of the {self.what}, uncompiled, serves")


class Parts:
    """The parts of a step or of a pass, compiled for one shape as they are first called. Layers of one kind share one.

    what: "step", say. shape: (B, C). calls: of the whole.
    """

    def __init__(self, what: str, acceleration: Acceleration, shape: torch.Size) -> None:
        # It holds these.
        self._acceleration = weakref.ref(acceleration)
        self.what, self.shape, self.calls = what, tuple(shape), 0
        self.parts: dict[tuple, Part] = {}
        self._alone: set[tuple[Callable, int]] = set()

    def run(self, device: torch.device, function: Callable, module, *arguments):
        """`function(module, *arguments)`, compiled.

        Args:
            module: a layer, or what the parts that are no layers have to do with.
        """
        if (function, id(module)) not in self._alone:
            try:
                return self._part(function, kind_of(module))(device, module, *arguments)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                # Of layers that are all different the compiler takes only so many for one function.
                self._alone.add((function, id(module)))
        part = self._part(function, id(module))
        try:
            return part(device, module, *arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            # One that is different each time.
            part.give_up(error)
            return part(device, module, *arguments)

    def _part(self, function: Callable, kind) -> Part:
        if (function, kind) not in self.parts:
            self.parts[function, kind] = Part(function, self.what, self._acceleration())
        return self.parts[function, kind]

    @property
    def seconds(self) -> float | None:
        """Of the first call, the compiler's time included; None before it."""
        spent = [part.seconds for part in self.parts.values() if part.seconds is not None]
        return sum(spent) if spent else None

    @property
    def failure(self) -> str | None:
        """Why a part runs uncompiled, or None."""
        return next((part.failure for part in self.parts.values() if part.failure is not None), None)


def kind_of(module: nn.Module) -> tuple | None:
    """What is compiled for one layer serves those of its kind; None for what is no layer."""
    attention = getattr(module, "self_attn", None)
    if attention is None:
        return None
    # Inductor takes the weights of others to be aligned as those that it has seen.
    aligned = all(weight.storage_offset() * weight.itemsize % 16 == 0 for weight in module.parameters())
    return attention.layer_type, aligned


class Step(Parts):
    """A denoising step in its two halves, compiled for one shape: in parts where it is recorded, else by half."""

    def __init__(
        self, model, settings: graph.Settings, acceleration: Acceleration, shape: torch.Size
    ) -> None:
        super().__init__(STEP, acceleration, shape)
        # It holds this step.
        self._model, self.settings = weakref.ref(model), settings

    def decide(self, state, in_place, prefixes, numbers, pinned) -> graph.Decision:
        self.calls += 1
        device = state.canvas.device
        arguments = (self._model(), state, in_place, prefixes, numbers, pinned, self.settings)
        if device.type in RECORDINGS:
            return graph.decide(*arguments, functools.partial(self.run, device))
        # In every step the host calls what is compiled, and compares what it was compiled for: few calls are best.
        return self.run(device, graph.decide, *arguments)

    def condition(self, decision: graph.Decision, frozen, soft, temperature, pinned) -> Tensor:
        arguments = (self._model(), decision, frozen, soft, temperature, pinned, self.settings)
        return self.run(soft.device, graph.condition, *arguments)


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
        layers, dtype = graph.layers_of(denoiser.model.model.decoder), inputs.state.soft.dtype
        return graph.InPlace(keys, values, side_by_side(layers, acceleration.backend, dtype))

    recording = RECORDINGS.get(device.type)
    if recording is None:
        yield Stepwise(step, inputs, in_place(), offset, schedule)
        return
    key = capture_key(STEP, device, step, inputs.state.canvas, inputs.tensors(), keys, values)

    def make(pool) -> CapturedStep:
        return CapturedStep(step, inputs, in_place(), offset, schedule, recording, pool)

    with ExitStack() as stack:
        modules = denoiser.model.lm_head, denoiser.model.model.decoder
        captured = leased(stack, denoiser.call, acceleration, recording, key, modules, make)
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
    stack: ExitStack,
    call: Call,
    acceleration: Acceleration,
    recording,
    key: tuple,
    modules: tuple[nn.Module, ...],
    make: Callable,
):
    """The capture for `key`, until `stack` is closed; None where there is none, which is said once.

    Args:
        modules: what it runs, with all that is in them.
    """
    captures, question = acceleration.captures, (fingerprint, acceleration.model, *modules)

    def weigh() -> tuple:
        return call.once(*question)

    def recorded(pool):
        # The modules run, and may write attributes of their own.
        call.forget(*question)
        return make(pool)

    try:
        found = stack.enter_context(captures.lease(key, weigh, recording.make_pool, recorded))
    except Exception as error:
        captures.failed(key, one_line(error))
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
        confidence=torch.zeros(canvas.shape, dtype=torch.float32, device=canvas.device),
        entropy=torch.zeros(canvas.shape, dtype=torch.float32, device=canvas.device),
        steps=torch.zeros(canvas.shape[0], dtype=torch.int64, device=canvas.device),
    )


def buffers_of(cache) -> tuple[list[Tensor], list[Tensor]]:
    """A cache's buffers of keys and of values [B, Hkv, capacity, D], by layer, for compiled parts."""
    keys = [layer.key_buffer for layer in cache.layers]
    values = [layer.value_buffer for layer in cache.layers]
    for buffer in (*keys, *values):
        # Only the attention's own kernel reads how long a buffer is, so a longer cache is not compiled anew.
        torch._dynamo.maybe_mark_dynamic(buffer, 2)
    return keys, values


def prefixes_of(
    text_model, cache, masks: dict, position_ids: Tensor, like: Tensor
) -> dict[str, graph.Prefix]:
    """Range in the buffers and rotary embedding of each layer kind of a decoder or a text encoder.

    Args:
        masks: a `PrefixRange` by kind; None, or one without a range, for all that the cache holds.
        like: [B, ...] on the device and in the dtype of the hidden states.
    """
    batch, prefixes = like.shape[0], {}
    for index, layer in enumerate(graph.layers_of(text_model)):
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
