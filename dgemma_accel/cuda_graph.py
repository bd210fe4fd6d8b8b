"""A function recorded in a CUDA graph, and what the recordings on one device share.

A recording that fails leaves PyTorch as it was: the stream of the caller, the allocator, the default generator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch

from .branches import fresh_stream

# Calls on a side stream before the recording: they compile, load kernels and let libraries take their workspaces.
WARM_UP = 2

_quiet: dict[torch.device, threading.RLock] = {}
# One for all that is recorded on a device: two recordings never run at a time, and PyTorch's streams are few.
_streams: dict[torch.device, torch.cuda.Stream] = {}


def quiet(device: torch.device) -> threading.RLock:
    """The lock that a recording on `device` holds, whichever model it is of.

    Meanwhile no other thread may draw from the device's default generator, which in torch 2.11 is in capture mode for
    all of them, nor compile, which reads that generator and times kernels. So who does either takes it too.
    """
    return _quiet.setdefault(device, threading.RLock())


def is_recorded(device: torch.device) -> bool:
    """Whether what this thread launches now is recorded instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Recording(Protocol):
    """A function without arguments, recorded. Made from (function, device, pool); running it meanwhile is allowed.

    bytes: memory that the recording holds.
    """

    bytes: int

    @staticmethod
    def make_pool(device: torch.device, *, products: bool = True) -> object: ...

    def begin(self) -> None: ...

    def replay(self) -> None: ...

    def end(self) -> None: ...

    def wait(self) -> None: ...


class Pool:
    """Memory that recordings share, the stream they are recorded on, and an event after the last replay of any.

    The allocator gives a block only to the stream that it came from, so without one stream nothing would be shared.
    What is shared is written by each replay, so one has to be over before the next begins.

    products: whether cuBLAS has a part in what is recorded.
    """

    def __init__(self, device: torch.device, *, products: bool = True) -> None:
        self.products = products
        with torch.cuda.device(device):
            self.handle = torch.cuda.graph_pool_handle()
            self.stream = _streams.get(device) or _streams.setdefault(device, fresh_stream(device))
            self.done = torch.cuda.Event()


class CudaRecording:
    """A CUDA graph of `function`, whose memory comes from `pool`.

    bytes: memory that the recording added to the pool.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, pool: Pool) -> None:
        self.device, self.pool, self.graph = device, pool, torch.cuda.CUDAGraph()
        # The generator keeps tensors from its first recording on; those of inference mode could not be written later.
        with quiet(device), torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            current = torch.cuda.current_stream(device)
            try:
                self.bytes = self._record(function, current)
            except BaseException:
                self._clear_away(current)
                raise

    @staticmethod
    def make_pool(device: torch.device, *, products: bool = True) -> Pool:
        return Pool(device, products=products)

    def _record(self, function: Callable[[], None], current) -> int:
        side = self.pool.stream
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function()
        current.wait_stream(side)
        torch.cuda.synchronize(self.device)
        # A workspace that cuBLAS keeps from before would be written by replays while others use it, and one that
        # it keeps from the recording would be written by others. They are the whole process's, and a graph of somebody
        # else's may point to them, so where there is no need they stay.
        if self.pool.products:
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        # The allocations and waits of other threads do not end the recording.
        recording = torch.cuda.graph(
            self.graph, pool=self.pool.handle, stream=side, capture_error_mode="thread_local"
        )
        first: BaseException | None = None
        try:
            with recording:
                try:
                    function()
                except BaseException as error:
                    first = error
                    raise
        except BaseException:
            if first is None:
                raise
            # That such a recording cannot be ended says less than why.
            raise first from None
        finally:
            first = None
            if self.pool.products:
                torch._C._cuda_clearCublasWorkspaces()
        return max(0, torch.cuda.memory_reserved(self.device) - before)

    def _clear_away(self, current) -> None:
        """What `torch.cuda.graph` leaves undone where the recording cannot be ended."""
        # Should it stay in capture, what pools made later record does not begin on it.
        _streams.pop(self.device, None)
        torch.cuda.set_stream(current)
        try:
            # From torch 2.14 on a graph leaves the pool itself, at the latest in its destructor, which ends the process
            # where it was done before. So it goes first, and older releases leave the rest to us.
            self.graph.reset()
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool.handle)
            # The recording counts as a user of the pool, which there only a graph that was made gives up.
            torch._C._cuda_releasePool(self.device.index, self.pool.handle)
        except RuntimeError:
            # It was ended, or had not begun.
            pass
        try:
            release_generator(self.device, self.pool.stream)
        finally:
            torch.cuda.set_stream(current)

    def begin(self) -> None:
        """Before the inputs are written: the last replay of the pool is over, whichever stream it ran on."""
        torch.cuda.current_stream(self.device).wait_event(self.pool.done)

    def replay(self) -> None:
        self.graph.replay()

    def end(self) -> None:
        """After the last replay and what reads its results, also where either failed."""
        self.pool.done.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Until the last replay of the pool is over."""
        self.pool.done.synchronize()


# By device type; others run without a recording.
RECORDINGS: dict[str, type[Recording]] = {"cuda": CudaRecording}


def release_generator(device: torch.device, side) -> None:
    """Take the default generator of `device` out of capture mode, where a recording that failed left it there.

    In torch 2.11 the mode is the generator's, 2.13 has one for each recording. It ends only where a recording does:
    every draw would be refused, and the replay of every graph made before.
    """
    generator = torch.cuda.default_generators[device.index]
    state = generator.get_state()
    if _refuses_to_draw(device):
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"):
                torch.zeros(1, device=device)
        except RuntimeError:
            pass
        if _refuses_to_draw(device):
            # Graphs made before keep the state that they know, and go on refusing.
            generator.graphsafe_set_state(generator.clone_state())
    generator.set_state(state)


def _refuses_to_draw(device: torch.device) -> bool:
    try:
        torch.empty(1, device=device).uniform_()
    except RuntimeError:
        return True
    return False
