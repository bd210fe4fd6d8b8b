"""Fails where a step that could be recorded would wait for a GPU, or copy to it from the host's memory.

A recording does neither. Tensors without memory stand in for those of a GPU. In a process of its own, since torch keeps
the guard that makes them possible.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from recordings import Crossings
from test_samplers_recorded import LENGTH, MASK, SAMPLERS
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import step_launches

from dgemma_accel import cuda_graph
from dgemma_accel.samplers.recorded import RecordedStep
from dgemma_accel.samplers.strategies.base import BlockState


class Watched:
    """Runs what is to be recorded as the CUDA graph does, the last time with an eye on it."""

    bytes = 0
    make_pool = staticmethod(lambda device, products: None)

    def __init__(self, function, device, pool):
        for _ in range(cuda_graph.WARM_UP):
            function()
        with Crossings(numbers=True) as self.crossings:
            function()


def main() -> None:
    step_launches.load_guard()
    counted = 0
    for name, (sampler, model) in SAMPLERS.items():
        if sampler.kind is None:
            continue
        vocab = model(torch.full((1, LENGTH), MASK)).shape[-1]
        counted += 1
        # Numbers that are kept for later calls are no fake ones.
        tokens = torch.full((1, LENGTH), MASK)
        replace(sampler, backend="reference").step(torch.zeros(1, LENGTH, vocab), tokens)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():

            def empty(*shape, dtype=torch.int64):
                return torch.empty(shape, dtype=dtype, device="cuda:0")

            logits, tokens = empty(2, LENGTH, vocab, dtype=torch.bfloat16), empty(2, LENGTH)
            state = BlockState(
                open=empty(2, LENGTH, dtype=torch.bool),
                masked_at_start=empty(2),
                active=empty(2, dtype=torch.bool),
                stuck=empty(2, dtype=torch.bool),
                nfe=empty(2),
                committed=empty(2, LENGTH, dtype=torch.bool),
                seed=empty(),
                most_steps=LENGTH,
            )
            sampler.decider.start(state, tokens)
            crossings = RecordedStep(sampler, logits, tokens, state, Watched).recording.crossings
        assert crossings.operations > 20 and not crossings.seen, (name, crossings.seen)
    print(f"{counted} recordable")


if __name__ == "__main__":
    main()
