"""A denoising step recorded once and replayed: a CUDA graph over tensors that stay where they are.

A graph reads and writes the addresses it was recorded with. So a step's inputs are copied into tensors that belong to
the capture, the state that a step leaves is copied back into them inside the graph, and what a caller gets is copied
out. One replay is one step and allocates nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
    """One step over tensors of its own. `load`, then `advance` as often as wanted, then `finish`; at last `close`,
    also after an exception.

    Args:
        step: `graph.take_step` with its model and settings: (state, in_place, prefixes, numbers, pinned) -> state.
        inputs: of the first run; their values warm the step up.
        in_place: the cache. Only its addresses are kept: whoever replays says that they still hold.
        offset: of the first draw. schedule: [N] fp32 on the host.
    """

    def __init__(
        self,
        step: Callable,
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
        self.schedule, self.taken, self.replays = schedule, 0, 0
        self._copy_in(inputs, offset, schedule)

        # Names of its own: a function that a recording keeps does not keep this object, nor its memory.
        held, offset_now, position, temperatures = self.inputs, self.offset, self.position, self.temperatures

        def advance() -> None:
            numbers = graph.Numbers(
                held.seed,
                offset_now,
                temperatures.index_select(0, position)[0],
                held.entropy_bound,
                held.confidence,
            )
            after = step(held.state, in_place, held.prefixes, numbers, held.pinned)
            for mine, fresh in zip(held.state, after):
                mine.copy_(fresh)
            offset_now.add_(1)
            position.add_(1)

        self.recording = recording(advance, device, pool)
        self.seconds = time.perf_counter() - begun
        own = [*self.inputs.tensors(), self.offset, self.position, self.temperatures]
        self.bytes = self.recording.bytes + sum(tensor.nbytes for tensor in own)

    @property
    def state(self) -> graph.State:
        """After the last step. The next one overwrites it: copy what is to be kept."""
        return self.inputs.state

    def load(self, inputs: Inputs, offset: int, schedule: Tensor) -> None:
        """Everything that the next steps read; nothing of an earlier run is left."""
        self.recording.begin()
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

    def advance(self) -> None:
        if self.taken and self.taken % SCHEDULE == 0:
            self._load_temperatures()
        self.recording.replay()
        self.taken += 1
        self.replays += 1

    def finish(self) -> graph.State:
        """The state after the last step, in tensors that the next run leaves alone."""
        return graph.State(*(tensor.clone() for tensor in self.state))

    def close(self) -> None:
        """The run is over: others that share its memory may begin theirs."""
        self.recording.end()
