"""Branches of work on a GPU: launches that run beside each other instead of one after the other.

A canvas has few rows, so many products and all small kernels of a layer leave most of a GPU idle. What does not need
each other goes to streams of its own and comes together again before an op returns, so nobody outside knows of them; a
CUDA graph that records such an op gets branches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# PyTorch has so many streams of a priority by device, which it hands out in turn, again and again.
STREAMS = 32

# By device and the stream whose work they share, so that nothing else of this package launches on them meanwhile.
_companions: dict[tuple[torch.device, int], list[torch.cuda.Stream]] = {}
_taken: set[tuple[torch.device, int]] = set()
_in_turn = False


def fresh_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of `device` that this package has not taken before, while there are such.

    PyTorch hands out its streams to everybody, so others may launch on it too.
    """
    for _ in range(STREAMS):
        stream = torch.cuda.Stream(device)
        if (device, stream.cuda_stream) not in _taken:
            break
    _taken.add((device, stream.cuda_stream))
    return stream


@contextlib.contextmanager
def beside(tensor: Tensor, count: int = 1) -> Iterator[list[contextlib.AbstractContextManager]]:
    """`count` contexts: what is launched within one of them runs beside the others and beside what is launched in none.

    All of it follows what was launched on the device of `tensor` before, and what is launched after the block follows
    all of it. Tensors that a branch reads or writes have to be allocated outside of it and outlive the block. Without a
    GPU everything runs in turn.
    """
    if _in_turn or not tensor.is_cuda:
        yield [contextlib.nullcontext() for _ in range(count)]
        return
    current = torch.cuda.current_stream(tensor.device)
    key = (tensor.device, current.cuda_stream)
    _taken.add(key)
    companions = _companions.setdefault(key, [])
    while len(companions) < count:
        companions.append(fresh_stream(tensor.device))
    used = companions[:count]
    try:
        for companion in used:
            companion.wait_stream(current)
        yield [torch.cuda.stream(companion) for companion in used]
    except BaseException:
        # A recording cannot end with a branch that leads nowhere. One that is broken says so here once more, and the
        # first error is the one to raise.
        with contextlib.suppress(RuntimeError):
            _join(current, used)
        raise
    _join(current, used)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Within it there are no branches, in any thread: what they are worth is the difference."""
    global _in_turn
    before, _in_turn = _in_turn, True
    try:
        yield
    finally:
        _in_turn = before


def _join(current: torch.cuda.Stream, companions: list[torch.cuda.Stream]) -> None:
    for companion in companions:
        current.wait_stream(companion)
