"""What happens inside a step: time by component, launches and waits for the host."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dgemma_accel.hf.patches import acceleration_of

from .schema import COMPONENTS

# Where the ops of this package belong, wherever the denoising loop calls them.
OP_COMPONENT = {
    "block_attention": "attention",
    "experts": "experts",
    "feed_forward": "experts",
    "head_stats": "head",
    "row_stats": "sampler",
    "commit": "sampler",
    "progress": "sampler",
    "soft_embedding": "self-conditioning",
}

# Ops that give a tensor its memory or another view of it: nothing runs on the device for them.
_FREE = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias")
# Ops whose result the host waits for.
_HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "item")


class Timeline:
    """Attributes the time between marks to the component on top of a stack.

    Before the first decoder call everything is the prompt's and counts for no component.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stack = ["prompt"]
        self.marks: list[tuple[str, object]] = []

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _mark(self) -> None:
        self.marks.append((self.stack[-1], self._now()))

    def enter(self, component: str) -> None:
        self._mark()
        self.stack.append(component)

    def leave(self) -> None:
        self._mark()
        self.stack.pop()

    def become(self, component: str) -> None:
        self._mark()
        self.stack[-1] = component

    def milliseconds(self) -> dict[str, float]:
        """component -> time of all steps together."""
        self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        totals: dict[str, float] = defaultdict(float)
        for (_, start), (component, end) in zip(self.marks, self.marks[1:]):
            spent = start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3
            totals[component] += spent
        return {name: totals[name] for name in COMPONENTS}


@contextlib.contextmanager
def ops_wrapped(wrap: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Within it each op of this package runs `wrap(op, implementation)` in place of its implementation."""

    def wrapped(pick: Callable) -> Callable:
        return lambda op, backend, requirements: wrap(op, pick(op, backend, requirements))

    with contextlib.ExitStack() as stack:
        for op in OP_COMPONENT:
            module = importlib.import_module(f"dgemma_accel.ops.{op}")
            stack.enter_context(mock.patch.object(module, "pick", wrapped(module.pick)))
        yield


def _marked(timeline: Timeline, op: str, run: Callable) -> Callable:
    """The implementation of an op, marked on a timeline."""
    component = OP_COMPONENT[op]

    def call(*arguments):
        if timeline.stack[0] == "prompt":
            return run(*arguments)
        timeline.enter(component)
        try:
            return run(*arguments)
        finally:
            timeline.leave()
            if component == "sampler" and len(timeline.stack) == 1:
                # A fused head has no end of its own: the decision begins with the first of its ops.
                timeline.become("sampler")

    return call


@contextlib.contextmanager
def component_timeline(model: nn.Module) -> Iterator[Timeline]:
    """A timeline fed by hooks on the decoder's modules; the time between two decoder calls is head and sampler."""
    timeline = Timeline(model.device)
    decoder = model.model.decoder

    def decoder_starts(*_):
        if timeline.stack[0] == "prompt":
            timeline.become("sampler")
        timeline.enter("self-conditioning")

    def decoder_ends(*_):
        timeline.leave()
        # lm_head and softcap follow at once, until the whole model's forward is over.
        timeline.become("head")

    # The accelerated step does not call it, and one that is not the model's own would keep that step away.
    replaces = acceleration_of(model) is None
    forward = model.forward

    def forward_and_mark(*arguments, **options):
        result = forward(*arguments, **options)
        timeline.become("sampler")
        return result

    handles = [
        decoder.register_forward_pre_hook(decoder_starts),
        decoder.layers[0].register_forward_pre_hook(lambda *_: timeline.become("rest")),
        decoder.register_forward_hook(decoder_ends),
    ]
    for layer in decoder.layers:
        parts = {"attention": [layer.self_attn], "experts": [layer.router, layer.experts]}
        for component, module in ((name, one) for name, found in parts.items() for one in found):
            handles.append(module.register_forward_pre_hook(lambda *_, c=component: timeline.enter(c)))
            handles.append(module.register_forward_hook(lambda *_: timeline.leave()))
    try:
        # `generate` calls `forward` itself, past the hooks of the whole model.
        marks = ops_wrapped(functools.partial(_marked, timeline))
        with (
            mock.patch.object(model, "forward", forward_and_mark) if replaces else contextlib.nullcontext(),
            marks,
        ):
            yield timeline
    finally:
        for handle in handles:
            handle.remove()


class LaunchCounter(TorchDispatchMode):
    """Counts non-view aten ops, calls of compiled kernels, and reads by the host."""

    def __init__(self):
        super().__init__()
        self.launches = 0
        self.host_reads = 0
        self.inside_compiled = False
        self.by_op: dict[str, int] = defaultdict(int)

    def count(self, name: str) -> None:
        self.launches += 1
        self.by_op[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if name in _HOST_READS:
            self.host_reads += 1
        if func.namespace != "dgemma" and not name.startswith(_FREE) and not _is_view(func):
            self.count(name)
        return func(*args, **(kwargs or {}))


def _is_view(func) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


@contextlib.contextmanager
def counting(inside: bool = True) -> Iterator[LaunchCounter]:
    """Counts the ops of this package, which a dispatch mode by itself does not tell apart.

    With `inside` what they call counts too: the reference backend is counted by the aten ops it calls, a compiled
    backend as one launch and the aten ops around it. Without, each is one launch, as a kernel on a GPU is, whatever its
    host implementation does.
    """
    counter = LaunchCounter()

    def counted(op: str, run: Callable) -> Callable:
        def call(*arguments):
            if counter.inside_compiled:
                return run(*arguments)
            if not inside or not run.__module__.startswith("dgemma_accel.reference"):
                counter.count(f"dgemma::{op}")
            if not inside:
                return run(*arguments)
            with counter:
                return run(*arguments)

        return call

    with ops_wrapped(counted), counter:
        yield counter


@contextlib.contextmanager
def reading_compiled_code() -> Iterator[None]:
    """Within it our compiled steps remember how many launches the code has that inductor wrote for them.

    A dispatch trace does not see fused kernels. Must be entered before the step is compiled.
    """
    from torch._inductor.graph import GraphLowering

    from dgemma_accel.hf.compiled import Part

    written: list[str] = []
    right = Part.__call__

    def call(part, *arguments):
        written.clear()
        result = right(part, *arguments)
        if written:
            part.launches_in_code = launches_of(written[-1])
        return result

    remember = mock.patch.object(GraphLowering, "save_output_code", written.append)
    with remember, mock.patch.object(Part, "__call__", call):
        yield


def launches_of(code: str) -> int:
    """Calls of fused kernels, library products and other operators in the function that inductor wrote."""
    body = code[code.rindex("def call(") :]
    patterns = (
        r"^\s*(?:\w+\.)?cpp_fused\w*\(",
        r"^\s*extern_kernels\.\w+\(",
        r"^\s*\w+ = torch\.ops\.[\w.]+\(",
    )
    return sum(len(re.findall(pattern, body, re.MULTILINE)) for pattern in patterns)


@contextlib.contextmanager
def _compiled_steps_counted(counter: LaunchCounter) -> Iterator[None]:
    """Calls of our compiled step count as what is in its code; inside them the trace is off, as it would undo them."""
    from torch.utils._python_dispatch import _disable_current_modes

    from dgemma_accel.hf.compiled import Part

    right = Part.__call__

    def call(part, *arguments):
        launches = getattr(part, "launches_in_code", None)
        if launches is None:
            return right(part, *arguments)
        for _ in range(launches):
            counter.count("compiled step")
        counter.inside_compiled = True
        try:
            with _disable_current_modes():
                return right(part, *arguments)
        finally:
            counter.inside_compiled = False

    with mock.patch.object(Part, "__call__", call):
        yield


def count_on_cpu(call: Callable[[], object]) -> tuple[float, float]:
    """(launches, host reads) of a call, by dispatch trace; an op of this package is one launch."""
    with counting(inside=False) as counter, _compiled_steps_counted(counter):
        call()
    return counter.launches, counter.host_reads


def count_on_cuda(call: Callable[[], object]) -> tuple[float, float]:
    """(kernels and graphs launched by the host, host synchronisations) of a call, by profiler and sync debug mode."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    launches = sum(
        event.count
        for event in profiler.key_averages()
        if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"))
    )
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return launches, sum("synchroniz" in str(warning.message) for warning in caught)


def kernels_on_cuda(call: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """{name: (how often it ran, microseconds in all)} of the kernels and copies of a call, those in graphs included."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            runs, spent = found.get(event.name, (0, 0.0))
            found[event.name] = runs + 1, spent + event.time_range.elapsed_us()
    return found


def kernels_of_a_step(
    one: dict[str, tuple[int, float]], many: dict[str, tuple[int, float]], steps: int
) -> list[list]:
    """[name, times a step, microseconds a step] by time, from what ran in `one` step and in `many`: `steps`."""
    rows = []
    for name, (runs, spent) in many.items():
        runs_of_one, spent_of_one = one.get(name, (0, 0.0))
        rows.append([name, (runs - runs_of_one) / (steps - 1), (spent - spent_of_one) / (steps - 1)])
    return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[2])


def count(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    return count_on_cuda(call) if device.type == "cuda" else count_on_cpu(call)
