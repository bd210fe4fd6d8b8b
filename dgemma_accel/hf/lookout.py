"""Watching a canvas from the host without making the device wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors that the host can read at once."""

    def __init__(self, tensors: list[Tensor]) -> None:
        # A step that is replayed writes its results into the same tensors each time.
        self.tensors = [tensor.to("cpu", copy=True) for tensor in tensors]

    def ready(self) -> bool:
        return True

    def wait(self) -> list[Tensor]:
        return self.tensors


class PinnedCopy:
    """Tensors on their way from a CUDA device to pinned memory."""

    def __init__(self, tensors: list[Tensor]) -> None:
        # The caching host allocator reuses pinned blocks, so this does not stop the device.
        self.tensors = [torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True) for t in tensors]
        for host, tensor in zip(self.tensors, tensors):
            host.copy_(tensor, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record(torch.cuda.current_stream(tensors[0].device))

    def ready(self) -> bool:
        return self.event.query()

    def wait(self) -> list[Tensor]:
        self.event.synchronize()
        return self.tensors


def copy_of(tensors: list[Tensor]) -> HostCopy | PinnedCopy:
    return PinnedCopy(tensors) if tensors[0].is_cuda else HostCopy(tensors)


class Lookout:
    """Learns when every row of a canvas is finished, and hands the drafts up to then to a streamer, in order.

    Finished rows do not change, so what runs past the end changes nothing, and its drafts are dropped.

    ahead: how many steps behind the one that it waits for the host launches at most. As many run past the end.
    in_step: take as many steps whatever the device's pace. Ranks that exchange something in a step need it: one that
    knows of the end earlier than another would leave that one waiting.
    """

    def __init__(
        self, put_draft: Callable | None, may_finish: bool, ahead: int, in_step: bool = False
    ) -> None:
        self.put_draft, self.may_finish, self.in_step = put_draft, may_finish, in_step
        # Where nothing can end, the host waits for drafts alone, and those of a step while the next is under way.
        self.ahead = ahead if may_finish else max(1, ahead)
        self.pending: deque = deque()
        self.drafts: deque[Tensor] = deque()
        self.over = False

    def note(self, finished: Tensor, draft: Tensor) -> None:
        """What a step decided: [B] bool and [B, C] int64."""
        if self.put_draft is not None or self.may_finish:
            self.pending.append(copy_of([finished] if self.put_draft is None else [finished, draft]))

    def hand_over(self) -> None:
        """Drafts that have come to the streamer. Where the host is no step ahead, this waits for the launch of the next
        one, whose time on the device hides it."""
        while self.drafts:
            self.put_draft(value=self.drafts.popleft())

    def is_over(self) -> bool:
        """Whether the canvas is known to be finished; waits for all steps noted but the last `ahead` ones."""
        while self.pending and not self.over and (len(self.pending) > self.ahead or self._ready()):
            self._take()
        if self.ahead:
            self.hand_over()
        return self.over

    def _ready(self) -> bool:
        return not self.in_step and self.pending[0].ready()

    def close(self) -> None:
        """After the last step: deliver what is still on its way."""
        while self.pending and not self.over:
            self._take()
        self.hand_over()

    def _take(self) -> None:
        finished, *draft = self.pending.popleft().wait()
        self.drafts.extend(draft)
        # Through numpy: reading host memory is no operation of torch, on any device.
        self.over = self.may_finish and bool(finished.numpy().all())
