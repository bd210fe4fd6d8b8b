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

# Steps of a kind that are launched one by one before one is recorded, which takes as long as some hundred of them.
PATIENCE = 8
# Tables above this many bytes are read where they lie: a GPU reads one no faster than the host launches a step.
LARGEST = 64 << 20
# Bytes that the recordings of a thread hold, and their number with the kinds that are still waited for.
BUDGET, KINDS = 128 << 20, 64

# Fields of a `BlockState` that a step reads, and those that it leaves anew, besides the strategy's memory.
READ = ("open", "masked_at_start", "active", "stuck", "nfe", "seed")
LEFT = ("active", "stuck", "nfe", "committed")


def _tensors(state: BlockState, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: getattr(state, name) for name in names} | state.memory


def kind_of(sampler) -> tuple | None:
    """What a recording of this sampler's steps depends on besides their shapes; None: they cannot be recorded."""
    decider = sampler.decider
    if not sampler.graph or not _is_recordable(decider) or not isinstance(sampler.temperature, (int, float)):
        return None
    proposal = sampler.proposal_at(sampler.temperature)
    # Filters ask the device how many rows they have settled; where the proposal is greedy they have nothing to do.
    if proposal.filtered and not (proposal.greedy and proposal.confidence == "untempered"):
        return None
    return decider, proposal, sampler.mask_id, sampler.steps, sampler.schedule


def _is_recordable(decider: Strategy) -> bool:
    # A class derived from one that says so may do anything.
    if "recordable" not in type(decider).__dict__ or not decider.recordable:
        return False
    parts = [decider]
    if isinstance(decider, EveryStep):
        if type(decider.fixed).__module__ != rules.__name__:
            return False
        parts.append(decider.fixed)
    # A tensor on the host would be a number for good, and one that changes its values is another sampler.
    return not any(isinstance(getattr(part, field.name), Tensor) for part in parts for field in fields(part))


class _Kept(threading.local):
    """Of each thread, so that no two write a recording's tensors at a time.

    kinds: kind -> steps that were taken, the recording, or None where it failed; the least recently used first.
    """

    def __init__(self) -> None:
        self.kinds: OrderedDict[tuple, int | RecordedStep | None] = OrderedDict()

    def add(self, kind: tuple, value) -> None:
        self.kinds[kind] = value
        self.kinds.move_to_end(kind)
        held = sum(one.bytes for one in self.kinds.values() if isinstance(one, RecordedStep))
        while len(self.kinds) > 1 and (len(self.kinds) > KINDS or held > BUDGET):
            _, oldest = self.kinds.popitem(last=False)
            held -= oldest.bytes if isinstance(oldest, RecordedStep) else 0


_kept = _Kept()


def clear() -> None:
    """Give up the recordings of this thread, and their memory."""
    _kept.kinds.clear()


def recorded_step(sampler, logits: Tensor, tokens: Tensor, state: BlockState) -> RecordedStep | None:
    """The recording that takes this step, or None: it is launched as any other."""
    if torch.compiler.is_compiling():
        return None
    device = tokens.device
    recording = RECORDINGS.get(device.type)
    if recording is None or sampler.kind is None or logits.device != device:
        return None
    # What ends a block for good is known on the host: the last step that it may have is none of the recorded ones.
    if state.step + 1 >= state.most_steps or not 0 < logits.nbytes <= LARGEST:
        return None
    if is_recorded(device) or (logits.requires_grad and torch.is_grad_enabled()):
        return None
    kind = (sampler.kind, backends.requested(sampler.backend), device, logits.shape, logits.dtype)
    known = _kept.kinds.get(kind, 0)
    if not isinstance(known, int):
        _kept.kinds.move_to_end(kind)
        return known
    made = _record(sampler, logits, tokens, state, recording) if known == PATIENCE else None
    _kept.add(kind, known + 1 if known < PATIENCE else made)
    return made


def _record(sampler, logits: Tensor, tokens: Tensor, state: BlockState, recording) -> RecordedStep | None:
    try:
        return RecordedStep(sampler, logits, tokens, state, recording)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        logger.warning("samplers: steps are launched one by one, since none could be recorded: %s", reason)
        return None


class RecordedStep:
    """A step of one sampler over tensors of its own, for any block of one shape."""

    def __init__(self, sampler, logits: Tensor, tokens: Tensor, state: BlockState, recording) -> None:
        device = tokens.device
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():

            def fresh(like: Tensor) -> Tensor:
                return torch.empty(like.shape, dtype=like.dtype, device=device)

            self.logits, self.tokens, self.new_tokens = fresh(logits), fresh(tokens), fresh(tokens)
            own = BlockState(
                **{name: fresh(getattr(state, name)) for name in (*READ, "committed")},
                memory={name: fresh(tensor) for name, tensor in state.memory.items()},
                most_steps=state.most_steps,
                offset=torch.zeros((), dtype=torch.int64, device=device),
                step=torch.zeros((), dtype=torch.int64, device=device),
            )
            self.own = own
            # (tensor of a caller's, its version) whose values `own` holds, by field.
            self._held: dict[str, tuple[Tensor, int]] = {}
            self._number: tuple[int, int] | None = None
            self._load(logits, tokens, state)

        # Names of its own: a function that a recording keeps does not keep this object.
        own_logits, own_tokens, new_tokens = self.logits, self.tokens, self.new_tokens
        self.left = left = _tensors(own, LEFT)

        def advance() -> None:
            after = copy.copy(own)
            after.memory = dict(own.memory)
            # `step` and `offset` are tensors here, which count themselves.
            new_tokens.copy_(sampler.take_step(own_logits, own_tokens, after, last=False))
            # What the strategy made for itself while it was run to warm up stays as long as the recording.
            own.memory = after.memory | own.memory
            for name, tensor in _tensors(after, LEFT).items():
                if name in left and tensor is not left[name]:
                    left[name].copy_(tensor)

        self.recording = recording(advance, device, recording.make_pool(device))
        # It was run to warm up.
        self._held, self._number = {}, None
        tensors = [self.logits, self.tokens, self.new_tokens, *_tensors(own, (*READ, "committed")).values()]
        self.bytes = self.recording.bytes + sum(tensor.nbytes for tensor in tensors)

    def _load(self, logits: Tensor, tokens: Tensor, state: BlockState) -> None:
        """Everything that the step reads; what the last one left is not copied again."""
        own = self.own
        self.logits.copy_(logits)
        self.tokens.copy_(tokens)
        held = _tensors(own, READ)
        for name, given in _tensors(state, READ).items():
            if self._holds(name, given):
                continue
            if given.ndim or not given.is_cpu:
                held[name].copy_(given, non_blocking=True)
            else:
                # A number needs no copy from the host's memory, which a GPU would be waited for.
                held[name].fill_(given.item())
            self._note(name, given)
        if self._number != (state.step, state.offset):
            own.step.fill_(state.step)
            own.offset.fill_(state.offset)

    def _holds(self, name: str, given: Tensor) -> bool:
        tensor, version = self._held.get(name, (None, 0))
        return given is tensor and given._version == version

    def _note(self, name: str, given: Tensor) -> None:
        # Tensors of inference mode do not say when they are written.
        if given.is_inference():
            self._held.pop(name, None)
        else:
            self._held[name] = (given, given._version)

    def take(self, logits: Tensor, tokens: Tensor, state: BlockState) -> Tensor:
        """`MaskedDiffusionSampler.take_step` of a step that is not the last one of its block."""
        with torch.inference_mode(False), torch.no_grad():
            self.recording.begin()
            try:
                self._load(logits, tokens, state)
                self.recording.replay()
                # The next replay writes its tensors again.
                new_tokens = self.new_tokens.clone()
                left = {name: tensor.clone() for name, tensor in self.left.items()}
            except BaseException:
                self._held, self._number = {}, None
                raise
            finally:
                self.recording.end()
        for name, tensor in left.items():
            if name in state.memory:
                state.memory[name] = tensor
            else:
                setattr(state, name, tensor)
            if name != "committed":
                self._note(name, tensor)
        state.tokens, state.step, state.offset = tokens, state.step + 1, state.offset + 1
        self._number = (state.step, state.offset)
        return new_tokens
