"""Steps of a sampler recorded once and replayed: one launch where a step is a dozen.

At a block of 32 a GPU has read the logits before the host has launched what follows, so the launches are what a step
takes. A recording knows nothing but the tensors it was made with: logits and tokens are copied into tensors of its own,
and so is what the sampler carries from step to step where it is not what the last replay left there.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from dataclasses import fields

import torch
from torch import Tensor

from .. import backends
from ..cuda_graph import RECORDINGS, is_recorded
from . import rules
from .strategies.base import BlockState, EveryStep, Strategy

logger = logging.getLogger("dgemma_accel")

# Steps of a kind that are launched one by one before one is recorded, and as many as a recording takes the time of:
# a kind whose recording had to make room, or found no memory, waits for so many more, and one that seemed to need too
# much, which may have been another thread's, for many times more.
PATIENCE, LONGER, LONGEST = 8, 200, 5000
# Tables above this many bytes are read where they lie: at 1.8 TB/s a copy of one takes 0.11 ms.
LARGEST = 96 << 20
# Bytes that all recordings hold, one of them half of it at most; and kinds of which something is remembered.
BUDGET, KINDS = 256 << 20, 64

# Fields of a `BlockState` that a step reads, and those that it leaves anew, besides the strategy's memory.
READ = ("open", "masked_at_start", "active", "stuck", "nfe", "committed", "seed")
LEFT = ("active", "stuck", "nfe", "committed")
MEMORY = "memory."


def _tensors(state: BlockState, names: tuple[str, ...]) -> dict[str, Tensor]:
    memory = {MEMORY + name: tensor for name, tensor in state.memory.items()}
    return {name: getattr(state, name) for name in names} | memory


def _put(state: BlockState, name: str, tensor: Tensor) -> None:
    if name.startswith(MEMORY):
        state.memory[name.removeprefix(MEMORY)] = tensor
    else:
        setattr(state, name, tensor)


def kind_of(sampler) -> tuple | None:
    """What a recording of this sampler's steps depends on besides their shapes; None: they cannot be recorded."""
    decider = sampler.decider
    if not sampler.graph or not _is_recordable(decider) or not isinstance(sampler.temperature, (int, float)):
        return None
    kind = (
        decider,
        sampler.proposal_at(sampler.temperature),
        sampler.mask_id,
        sampler.steps,
        sampler.schedule,
    )
    try:
        hash(kind)
    except TypeError:
        return None
    return kind


def _is_recordable(decider: Strategy) -> bool:
    # A class derived from one that says so may do anything.
    if "recordable" not in type(decider).__dict__ or not decider.recordable:
        return False
    if not isinstance(decider, EveryStep):
        return _says_what_it_is(decider)
    return type(decider.fixed).__module__ == rules.__name__ and _says_what_it_is(decider.fixed)


def _says_what_it_is(part) -> bool:
    """Whether two that are equal do the same, for good: a tensor may change its values."""
    return "__dataclass_fields__" in type(part).__dict__ and all(
        field.compare and not isinstance(getattr(part, field.name), Tensor) for field in fields(part)
    )


class _Kept:
    """Recordings by kind, of all threads, and how often a kind came that has none; None: it never will.

    Recording is known to other threads as a count that is never reached.
    """

    def __init__(self) -> None:
        self.lock, self.cleared = threading.Lock(), 0
        self.steps: OrderedDict[tuple, RecordedStep] = OrderedDict()
        self.counts: OrderedDict[tuple, int | None] = OrderedDict()

    def find(self, kind: tuple) -> tuple[RecordedStep | None, bool]:
        """The recording, or whether it is time to make it."""
        with self.lock:
            step = self.steps.get(kind)
            if step is not None:
                self.steps.move_to_end(kind)
                return step, False
            count = self.counts.get(kind, 0)
            due = count == PATIENCE
            if count is not None:
                self._count(kind, count + 1)
            return None, due

    def _count(self, kind: tuple, count: int | None) -> None:
        self.counts[kind] = count
        self.counts.move_to_end(kind)
        if len(self.counts) > KINDS:
            self.counts.popitem(last=False)

    def refuse(self, kind: tuple, steps: int | None) -> None:
        """Nothing is recorded for so many steps; None: ever."""
        with self.lock:
            self._count(kind, None if steps is None else PATIENCE - steps)

    def add(self, kind: tuple, step: RecordedStep, cleared: int) -> None:
        """cleared: how often that had been done when the recording began."""
        with self.lock:
            gone = [self.steps.pop(kind)] if kind in self.steps else []
            if cleared == self.cleared:
                self.steps[kind] = step
                self.counts.pop(kind, None)
            else:
                gone.append(step)
            while len(self.steps) > 1 and sum(one.bytes for one in self.steps.values()) > BUDGET:
                oldest, evicted = self.steps.popitem(last=False)
                self._count(oldest, PATIENCE - LONGER)
                gone.append(evicted)
        for evicted in gone:
            evicted.close()

    def clear(self) -> None:
        with self.lock:
            self.cleared += 1
            gone, self.steps = self.steps, OrderedDict()
            self.counts.clear()
        for step in gone.values():
            step.close()


_kept = _Kept()


def clear() -> None:
    """Give up all recordings, and their memory."""
    _kept.clear()


def recorded_step(sampler, logits: Tensor, tokens: Tensor, state: BlockState) -> RecordedStep | None:
    """The recording that takes this step, or None: it is launched as any other."""
    if torch.compiler.is_compiling():
        return None
    device = tokens.device
    recording = RECORDINGS.get(device.type)
    if recording is None or sampler.kind is None or logits.device != device or tokens.dtype != torch.int64:
        return None
    # What ends a block for good is known on the host: the last step that it may have is none of the recorded ones.
    if state.step + 1 >= state.most_steps or not 0 < logits.nbytes <= LARGEST:
        return None
    if is_recorded(device) or (logits.requires_grad and torch.is_grad_enabled()):
        return None
    backend = backends.requested(sampler.backend)
    # The specification is written for reading: it asks its device for values.
    if device.type != "cpu" and backend == "reference":
        return None
    layout = ()
    if state.memory:
        if not all(isinstance(one, Tensor) and one.device == device for one in state.memory.values()):
            return None
        layout = tuple((name, one.shape, one.dtype) for name, one in state.memory.items())
    kind = (sampler.kind, backend, device, logits.shape, logits.dtype, layout)
    step, due = _kept.find(kind)
    return _record(kind, sampler, logits, tokens, state, recording) if due else step


def _record(kind: tuple, sampler, logits, tokens, state, recording) -> RecordedStep | None:
    cleared = _kept.cleared
    try:
        step = RecordedStep(sampler, logits, tokens, state, recording)
    except torch.OutOfMemoryError:
        _kept.refuse(kind, LONGER)
        return None
    except Exception as error:
        _kept.refuse(kind, None)
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        logger.warning("samplers: steps are launched one by one, since none could be recorded: %s", reason)
        return None
    except BaseException:
        _kept.refuse(kind, LONGER)
        raise
    if step.bytes > BUDGET // 2:
        _kept.refuse(kind, LONGEST)
        return None
    _kept.add(kind, step, cleared)
    return step


class RecordedStep:
    """A step of one sampler over tensors of its own, for any block of one shape.

    bytes: memory that it holds.
    """

    def __init__(self, sampler, logits: Tensor, tokens: Tensor, state: BlockState, recording) -> None:
        device = tokens.device
        self.sampler, self.lock, self.closed = sampler, threading.Lock(), False
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():

            def fresh(like: Tensor) -> Tensor:
                return torch.empty(like.shape, dtype=like.dtype, device=device)

            self.logits, self.tokens, self.new_tokens = fresh(logits), fresh(tokens), fresh(tokens)
            self.own = own = BlockState(
                **{name: fresh(getattr(state, name)) for name in READ},
                memory={name: fresh(tensor) for name, tensor in state.memory.items()},
                most_steps=state.most_steps,
                offset=torch.zeros((), dtype=torch.int64, device=device),
                step=torch.zeros((), dtype=torch.int64, device=device),
            )
            self.held, self.left = _tensors(own, READ), _tensors(own, LEFT)
            self._forget()
            self._load(logits, tokens, state)

        # Names of its own: a function that a recording keeps does not keep this object.
        own_logits, own_tokens, new_tokens, left = self.logits, self.tokens, self.new_tokens, self.left
        memories = {tensor.untyped_storage()._cdata for tensor in self.held.values()}

        def advance() -> None:
            after = copy.copy(own)
            after.memory = dict(own.memory)
            # `step` and `offset` are tensors here, which count themselves.
            tokens = sampler.take_step(own_logits, own_tokens, after, last=False)
            new_tokens.copy_(tokens)
            # What the strategy made for itself while it was run to warm up stays as long as the recording.
            own.memory = after.memory | own.memory
            found = {name: tensor for name, tensor in _tensors(after, LEFT).items() if name in left}
            for name, tensor in found.items():
                # One that only moved to another name would be overwritten before it is copied.
                if tensor is not left[name] and tensor.untyped_storage()._cdata in memories:
                    found[name] = tensor.clone()
            for name, tensor in found.items():
                if tensor is not left[name]:
                    left[name].copy_(tensor)

        self.recording = recording(advance, device, recording.make_pool(device, products=False))
        # It was run to warm up.
        self._forget()
        tensors = [self.logits, self.tokens, self.new_tokens, *self.held.values()]
        self.bytes = self.recording.bytes + sum(tensor.nbytes for tensor in tensors)

    def _forget(self) -> None:
        # (tensor of a caller's, its version) whose values are held, by field; and numbers.
        self._known: dict[str, tuple[Tensor, int]] = {}
        self._number: tuple[int, int] | None = None
        self._seed: int | None = None

    def _load(self, logits: Tensor, tokens: Tensor, state: BlockState) -> None:
        """Everything that the step reads; what the last one left is not copied again."""
        own = self.own
        self.logits.copy_(logits)
        self.tokens.copy_(tokens)
        for name, given in _tensors(state, READ).items():
            if name == "seed" or self._knows(name, given):
                continue
            self.held[name].copy_(given)
            self._note(name, given)
        # The caller's own tensor, which may be written by whatever tells its version nothing.
        if not state.seed.is_cpu:
            own.seed.copy_(state.seed)
            self._seed = None
        elif self._seed != (seed := state.seed.item()):
            own.seed.fill_(seed)
            self._seed = seed
        if self._number != (state.step, state.offset):
            own.step.fill_(state.step)
            own.offset.fill_(state.offset)

    def _knows(self, name: str, given: Tensor) -> bool:
        tensor, version = self._known.get(name, (None, 0))
        return given is tensor and given._version == version

    def _note(self, name: str, given: Tensor) -> None:
        # Tensors of inference mode do not say when they are written.
        if given.is_inference():
            self._known.pop(name, None)
        else:
            self._known[name] = (given, given._version)

    def take(self, logits: Tensor, tokens: Tensor, state: BlockState) -> Tensor:
        """`MaskedDiffusionSampler.take_step` of a step that is not the last one of its block."""
        new_tokens = self._replay(logits, tokens, state)
        if new_tokens is None:
            return self.sampler.take_step(logits, tokens, state, last=False)
        return new_tokens

    def _replay(self, logits: Tensor, tokens: Tensor, state: BlockState) -> Tensor | None:
        """`take`, or None and nothing changed where the step has to be launched."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            if self.closed:
                return None
            self.recording.begin()
            try:
                self._load(logits, tokens, state)
                # What it leaves is known again only when all of it has arrived.
                self._number = None
                for name in self.left:
                    self._known.pop(name, None)
                self.recording.replay()
                # The next replay writes its tensors again.
                new_tokens = self.new_tokens.clone()
                left = {name: tensor.clone() for name, tensor in self.left.items()}
            finally:
                self.recording.end()
            for name, tensor in left.items():
                _put(state, name, tensor)
                self._note(name, tensor)
            state.tokens, state.step, state.offset = tokens, state.step + 1, state.offset + 1
            self._number = (state.step, state.offset)
        return new_tokens

    def close(self) -> None:
        """Nobody replays it from now on, and its memory may go to whoever asks."""
        with self.lock:
            self.closed = True
            self.recording.wait()
