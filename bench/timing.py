"""Time of calls: all variants of a case in turn, on inputs that the cache has forgotten."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dgemma_accel.cuda_graph import CudaRecording

from . import memory

# A graph holds this many calls where one alone is too short for the clock.
CALLS_IN_GRAPH = 50
# Clock cycles for which the device is kept busy before a call that is not in a graph, about 1 ms: the host's work for
# the call falls into them instead of between the two events.
HEAD_START = 2_000_000
SHORT_CALL_US = 300.0


@dataclass(frozen=True)
class Timing:
    """Microseconds a call.

    method: "graph" (CUDA graph replay), "events" (CUDA events; with the reason where a graph was tried) or "clock".
    """

    median: float
    p20: float
    p80: float
    runs: int
    method: str


def summarize(samples: list[float], method: str) -> Timing:
    ordered = sorted(samples)

    def quantile(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return Timing(statistics.median(ordered), quantile(0.2), quantile(0.8), len(ordered), method)


def input_sets(set_bytes: int, device: torch.device, spare: int) -> int:
    """How many sets of inputs are rotated: enough to pass through twice the L2 cache, within `spare` bytes."""
    if device.type != "cuda":
        return 1
    cache = memory.cache_size(device)
    wanted = -(-2 * cache // max(set_bytes, 1)) + 1
    return max(1, min(wanted, 64, spare // max(set_bytes, 1)))


class _HostTimer:
    method = "clock"
    calls_a_sample = 1

    def __init__(self, calls: list[Callable[[], object]]):
        self.calls = calls
        self.next = 0
        self.sample()

    def sample(self) -> float:
        call = self.calls[self.next % len(self.calls)]
        self.next += 1
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6


class _DeviceTimer:
    """CUDA events around one call or around a graph of several."""

    def __init__(self, calls: list[Callable[[], object]], capturable: bool):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.calls = calls
        self.next = 0
        self.method = "events"
        self.graph = None
        self.calls_a_sample = 1
        for _ in range(3):
            for call in calls:
                call()
        torch.cuda.synchronize()
        # One sample alone may have waited for another process.
        if capturable and min(self.sample() for _ in range(3)) < SHORT_CALL_US:
            self._capture()

    def _capture(self) -> None:
        calls = [self.calls[i % len(self.calls)] for i in range(max(CALLS_IN_GRAPH, len(self.calls)))]

        def all_calls() -> None:
            for call in calls:
                call()

        try:
            recording = CudaRecording(all_calls, self.device, CudaRecording.make_pool(self.device))
        except Exception as error:
            torch.cuda.synchronize()
            self.method = f"events, not captured: {str(error).splitlines()[0]}"
            return
        recording.begin()
        recording.replay()
        torch.cuda.synchronize()
        self.graph, self.calls_a_sample, self.method = recording, len(calls), "graph"

    def sample(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.graph is not None:
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3 / self.calls_a_sample
        call = self.calls[self.next % len(self.calls)]
        self.next += 1
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def forget_frames(error: Exception) -> Exception:
    """The error without the frames it passed, whose tensors would stay in memory while others are timed."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def measure(
    variants: dict[str, tuple[list[Callable[[], object]], bool]],
    device: torch.device,
    *,
    seconds: float,
    least: int = 3,
    most: int = 200,
) -> dict[str, Timing | Exception]:
    """Time variants against each other: one sample of each in turn, so that a drifting clock meets all alike.

    Args:
        variants: name -> (the same call on each set of inputs, whether a CUDA graph can hold it).
        seconds: time that each variant may take once it has its `least` samples.

    Returns:
        name -> its timing, or the exception that it raised.
    """
    results: dict[str, Timing | Exception] = {}
    timers = {}
    for name, (calls, capturable) in variants.items():
        try:
            timers[name] = _DeviceTimer(calls, capturable) if device.type == "cuda" else _HostTimer(calls)
        except Exception as error:
            results[name] = forget_frames(error)
    samples: dict[str, list[float]] = {name: [] for name in timers}
    active = set(timers)
    while active:
        for name in sorted(active):
            try:
                samples[name].append(timers[name].sample())
            except Exception as error:
                results[name] = forget_frames(error)
                active.discard(name)
                continue
            spent = sum(samples[name]) * timers[name].calls_a_sample / 1e6
            if len(samples[name]) >= most or (len(samples[name]) >= least and spent >= seconds):
                active.discard(name)
    for name, timer in timers.items():
        if name not in results:
            results[name] = summarize(samples[name], timer.method)
    return {name: results[name] for name in variants}
