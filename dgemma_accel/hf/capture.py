"""A denoising step recorded once and replayed: a CUDA graph over tensors that stay where they are.

A graph reads and writes the addresses it was recorded with. So a step's inputs are copied into tensors that belong to
the capture, the state that a step leaves is copied back into them inside the graph, and what a caller gets is copied
out. Two replays are one step and allocate nothing.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from . import graph

# Temperatures that a capture holds at a time; longer schedules are copied in parts.
SCHEDULE = 256


class Inputs(NamedTuple):
    """What a step reads besides weights, cache, temperature and offset."""

    state: graph.State
    prefixes: dict[str, graph.Prefix]
    seed: Tensor
    entropy_bound: Tensor
    confidence: Tensor
    pinned: Tensor | None

    def tensors(self) -> list[Tensor]:
        found = [*self.state]
        for kind in sorted(self.prefixes):
            found.extend(self.prefixes[kind])
        found += [self.seed, self.entropy_bound, self.confidence]
        return found if self.pinned is None else [*found, self.pinned]

    def like(self) -> Inputs:
        """Tensors of the same shapes at addresses of their own."""

        def fresh(tensor: Tensor | None) -> Tensor | None:
            return (
                None
                if tensor is None
                else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            )

        return Inputs(
            graph.State(*map(fresh, self.state)),
            {kind: graph.Prefix(*map(fresh, prefix)) for kind, prefix in self.prefixes.items()},
            fresh(self.seed),
            fresh(self.entropy_bound),
            fresh(self.confidence),
            fresh(self.pinned),
        )


class CapturedStep:
    """One step over tensors of its own. `load`, then `decide` and `condition` by turns as often as wanted, then
    `finish`; at last `close`, also after an exception.

    Its two halves are two graphs, so that what the first decided can be copied to the host before the second begins.

    Args:
        step: `graph.decide` and `graph.condition` with their model and settings, as methods of these names:
            (state, in_place, prefixes, numbers, pinned) -> decision; (decision, frozen, soft, temperature, pinned) ->
            soft.
        inputs: of the first run; their values warm the step up.
        in_place: the cache. Only its addresses are kept: whoever replays says that they still hold.
        offset: of the first draw. schedule: [N] fp32 on the host.
    """

    # While the second half runs there is time to launch the next step: no step runs past the end.
    AHEAD = 0

    def __init__(
        self,
        step,
        inputs: Inputs,
        in_place: graph.InPlace,
        offset: int,
        schedule: Tensor,
        recording: type,
        pool,
    ) -> None:
        device = inputs.state.canvas.device
        begun = time.perf_counter()
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = inputs.like()
            self.offset = torch.zeros((), dtype=torch.int64, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
            self.temperatures = torch.ones(SCHEDULE, dtype=torch.float32, device=device)
            self.frozen = torch.zeros_like(inputs.state.finished)
        self.schedule, self.taken, self.replays = schedule, 0, 0
        self._copy_in(inputs, offset, schedule)

        # Names of its own: a function that a recording keeps does not keep this object, nor its memory.
        held, offset_now, position, temperatures = self.inputs, self.offset, self.position, self.temperatures
        frozen, decided = self.frozen, []

        def temperature() -> Tensor:
            return temperatures.index_select(0, position)[0]

        def decide() -> None:
            numbers = graph.Numbers(held.seed, offset_now, temperature(), held.entropy_bound, held.confidence)
            decision = step.decide(held.state, in_place, held.prefixes, numbers, held.pinned)
            frozen.copy_(held.state.finished)
            after = decision.state(held.state.soft)
            for mine, fresh in zip(held.state, after):
                if mine is not fresh:
                    mine.copy_(fresh)
            decided[:] = [decision]

        def condition() -> None:
            soft = step.condition(decided[0], frozen, held.state.soft, temperature(), held.pinned)
            held.state.soft.copy_(soft)
            offset_now.add_(1)
            position.add_(1)

        first = recording(decide, device, pool)
        # What it has recorded it has not computed, and the warm-up of the second half reads it.
        first.replay()
        self.halves = first, recording(condition, device, pool)
        # The logits' memory is the pool's again. Between the halves nobody else takes it.
        decided.clear()
        self.seconds = time.perf_counter() - begun
        own = [*self.inputs.tensors(), self.offset, self.position, self.temperatures, self.frozen]
        self.bytes = sum(half.bytes for half in self.halves) + sum(tensor.nbytes for tensor in own)

    @property
    def state(self) -> graph.State:
        """After the last step. The next one overwrites it: copy what is to be kept."""
        return self.inputs.state

    def load(self, inputs: Inputs, offset: int, schedule: Tensor) -> None:
        """Everything that the next steps read; nothing of an earlier run is left."""
        self.halves[0].begin()
        self._copy_in(inputs, offset, schedule)

    def _copy_in(self, inputs: Inputs, offset: int, schedule: Tensor) -> None:
        for mine, given in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            mine.copy_(given, non_blocking=True)
        self.offset.fill_(offset)
        self.schedule, self.taken = schedule, 0
        self._load_temperatures()

    def _load_temperatures(self) -> None:
        part = self.schedule[self.taken : self.taken + SCHEDULE]
        self.temperatures[: len(part)].copy_(part, non_blocking=True)
        self.position.zero_()

    def decide(self) -> None:
        """The first half of a step: all of `state` but the soft embeddings."""
        if self.taken and self.taken % SCHEDULE == 0:
            self._load_temperatures()
        self.halves[0].replay()
        self.taken += 1
        self.replays += 1

    def condition(self) -> None:
        """The second half: the soft embeddings."""
        self.halves[1].replay()

    def finish(self) -> graph.State:
        """The state after the last step, in tensors that the next run leaves alone."""
        return graph.State(*(tensor.clone() for tensor in self.state))

    def close(self) -> None:
        """The run is over: others that share its memory may begin theirs."""
        self.halves[0].end()
