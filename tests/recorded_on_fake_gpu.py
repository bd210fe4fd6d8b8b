"""Fails where a step that could be recorded would wait for a GPU, or copy to it from the host's memory.

A recording does neither. Tensors without memory stand in for those of a GPU. In a process of its own, since torch keeps
the guard that makes them possible.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_samplers_recorded import FILTERS, LENGTH, MASK, STEPS, STRATEGIES, VOCAB, WIDE, sampler_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import step_launches

from dgemma_accel import cuda_graph
from dgemma_accel.samplers.recorded import RecordedStep
from dgemma_accel.samplers.strategies.base import BlockState


class Crossings(TorchDispatchMode):
    """Operators that take or return tensors of the host with dimensions; numbers go into a launch by value."""

    def __init__(self):
        super().__init__()
        self.seen, self.operations = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [t for t in tree_iter((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        copied = (
            func.overloadpacket.__name__ in ("_to_copy", "copy_") and len({t.device for t in tensors}) > 1
        )
        if copied or any(t.device.type == "cpu" and t.ndim for t in tensors):
            self.seen.append(func.overloadpacket.__name__)
        return result


class Watched:
    """Runs what is to be recorded as the CUDA graph does, the last time with an eye on it."""

    bytes = 0
    make_pool = staticmethod(lambda device, products: None)

    def __init__(self, function, device, pool):
        for _ in range(cuda_graph.WARM_UP):
            function()
        with Crossings() as self.crossings:
            function()


def main() -> None:
    step_launches.load_guard()
    counted = 0
    samplers = {
        (name, temperature): sampler_of(
            STRATEGIES[name][0], temperature=temperature, schedule=STRATEGIES[name][1]
        )
        for name, temperature in STEPS
    }
    samplers |= {name: sampler_of(strategy, **options) for name, (strategy, options) in FILTERS.items()}
    for name, sampler in samplers.items():
        if sampler.kind is None:
            continue
        vocab = WIDE if name in FILTERS else VOCAB
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
