"""Measuring the ways to take a step: time, launches, host reads, memory and components, each of a step alone."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dgemma_accel import captures, commit, head_stats, restore, soft_embedding
from dgemma_accel.hf.patches import acceleration_of
from dgemma_accel.samplers import EntropyBound, Renoise

from . import ceilings, floors, memory, step_model, step_trace
from .peers.torch_chain import as_in_a_process_of_its_own, as_in_a_process_that_compiles
from .runner import _one_line
from .step_ways import COMPILED_REFERENCE, REFERENCE, Way, decoder, denoiser, model_of
from .timing import forget_frames

# Of a step's kernels those that take most of it stand in a row.
KERNELS = 60


def room(way: Way, options, canvas: int) -> int:
    """Tokens that all calls of one variant may add to its cache: one by one, or prompts of one and, where they are
    measured, the canvases of `per_canvas` and `launches_of_a_canvas`.

    No more than that: transformers' static caches are read as far as they are allocated.
    """
    if way.decodes:
        return 40 + (2 + options.repeats) * (options.steps + 1)
    canvases = 3 + 2 * options.repeats if has_canvases(way) else 0
    return 30 + 4 * options.repeats + canvases * canvas


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def per_step(
    runs: dict[str, Callable[[int], object]],
    steps: int,
    repeats: int,
    device: torch.device,
    early: dict[str, Callable[[float], None]] | None = None,
) -> dict[str, float | Exception]:
    """name -> milliseconds of a step: the median over repeats of (N steps - 1 step) / (N - 1), or what was raised.

    early: name -> what is given one more sample of that run, taken as soon as it is warm.
    """

    def sample(run: Callable[[int], object]) -> float:
        one = clock(lambda: run(1), device)
        return (clock(lambda: run(steps), device) - one) / (steps - 1)

    # The first call of a compiled function is without CUDA graphs, the second is recorded. Both a run's first step and
    # those behind it, which are another function, have then been recorded.
    return _in_turn(runs, repeats, lambda run: (run(1), run(4)), sample, early or {})


def per_canvas(
    runs: dict[str, Callable[..., object]], repeats: int, device: torch.device
) -> dict[str, float | Exception]:
    """name -> milliseconds of a canvas of one step: the median of (3 canvases - 1 canvas) / 2, or what was raised."""
    return _in_turn(
        runs,
        repeats,
        lambda run: run(1, 2),
        lambda run: (clock(lambda: run(1, 3), device) - clock(lambda: run(1, 1), device)) / 2,
        {},
    )


def _in_turn(
    runs: dict[str, Callable],
    repeats: int,
    warm_up: Callable,
    sample: Callable,
    early: dict[str, Callable[[float], None]],
) -> dict[str, float | Exception]:
    """name -> the median over samples, one of each run in turn, so that a drifting clock meets all alike; or what was
    raised."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, Exception] = {}
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            if name in failed:
                continue
            try:
                if repeat < 0:
                    warm_up(run)
                    if name in early:
                        early[name](sample(run))
                else:
                    found[name].append(sample(run))
            except Exception as error:
                failed[name] = forget_frames(error)
    return {name: failed.get(name) or statistics.median(found[name]) for name in runs}


def counted(run: Callable[[int], object], steps: int, device: torch.device) -> tuple[float, float]:
    """(launches, host reads) of a step, by the same difference.

    All runs draw the same canvas: transformers launches a product for each expert that a step happens to choose.
    """

    def seeded(steps: int) -> None:
        torch.manual_seed(0)
        run(steps)

    one, many = step_trace.count(lambda: seeded(1), device), step_trace.count(lambda: seeded(steps), device)
    return tuple((b - a) / (steps - 1) for a, b in zip(one, many))


def launches_of_a_canvas(run: Callable[..., object], device: torch.device) -> float:
    """Launches by the host of a canvas of one step, its step included."""
    one, two = step_trace.count(lambda: run(1, 1), device), step_trace.count(lambda: run(1, 2), device)
    return two[0] - one[0]


@torch.no_grad()
def head_memory(model, batch: int) -> int | None:
    """Bytes at the peak of an accelerated step's head, sampler and self-conditioning together, called as in a step."""
    acceleration, device, text = acceleration_of(model), model.device, model.config.text_config
    embed_tokens = model.model.decoder.embed_tokens
    shape = batch, model.config.canvas_length
    hidden = torch.empty(*shape, text.hidden_size, dtype=model.dtype, device=device).normal_()
    canvas = torch.zeros(shape, dtype=torch.int64, device=device)
    scores = {"softcap": text.final_logit_softcapping, "temperature": torch.tensor(0.6, device=device)}

    def call() -> tuple:
        logits, stats = head_stats(
            hidden, model.lm_head.weight, **scores, seed=0, backend=acceleration.backend_of("head_stats")
        )
        rule, write = EntropyBound(0.1), Renoise(text.vocab_size)
        decided = commit(canvas, stats, rule, write, seed=0, backend=acceleration.backend_of("commit"))
        soft = soft_embedding(
            logits, stats, embed_tokens.weight, **scores, backend=acceleration.backend_of("soft_embedding")
        )
        del logits
        return decided, soft * embed_tokens.embed_scale.to(soft.dtype)

    # What is made once, a kernel's state say, counts for nothing.
    call()
    return memory.peak_extra(call, device)


def has_canvases(way: Way) -> bool:
    """Whether what a canvas takes besides its steps is measured: transformers' compiled way compiles the pass that
    stores a canvas as well, for minutes more."""
    return not way.decodes and (way.ours or not way.compiles)


def can_count(way: Way, device: torch.device) -> bool:
    """On a CPU the launches of compiled code are read off what inductor wrote, which is done for our own step."""
    return device.type == "cuda" or not way.compiles or way.graph


def blank_row(way: Way, options, context: int, canvas: int, floor: dict) -> dict:
    return {
        "variant": way.name,
        "context": context,
        "batch": options.batch,
        "canvas": canvas,
        "steps": options.steps,
        "status": "ok",
        "error": None,
        "step_ms": None,
        "canvas_ms": None,
        "canvas_launches": None,
        "kernels": None,
        "components_ms": None,
        "launches": None,
        "host_syncs": None,
        "peak_extra_bytes": None,
        "head_peak_bytes": None,
        "floor_ms": floor["total"],
        "floor_multiple": None,
    }


@dataclass(frozen=True)
class Group:
    """Ways that were timed in turn at one context, with the row of each by name, and the runs of those that run."""

    ways: list[Way]
    rows: dict[str, dict]
    runs: dict[str, Callable[..., object]]


def _nobody(rows: list[dict]) -> None:
    """Nobody is told of rows."""


class Bench:
    """The variants with their models, made when first wanted and kept: what a variant compiled serves every context."""

    def __init__(self, model, limits: ceilings.Ceilings, options) -> None:
        self.model, self.limits, self.options = model, limits, options
        self.models: dict[str, object] = {}

    def runner(self, way: Way, context: int) -> Callable[..., object]:
        if way.name not in self.models:
            self.models[way.name] = model_of(self.model, way, self.options.backend)
        model = self.models[way.name]
        more = room(way, self.options, model.config.canvas_length)
        cache = step_model.random_cache(model, self.options.batch, context, kind=way.cache, room=more)
        if way.decodes:
            return decoder(model, cache, self.options.batch, context, compiled=way.compiles)
        run = denoiser(model, cache, self.options.batch)
        if way == REFERENCE:
            return as_in_a_process_of_its_own(run)
        return as_in_a_process_that_compiles(run) if way == COMPILED_REFERENCE else run

    def measure(self, ways: list[Way], context: int) -> list[dict]:
        """The rows of some ways at one context."""
        group = self.times(ways, context)
        self.insides(group)
        return list(group.rows.values())

    def times(self, ways: list[Way], context: int, tell: Callable[[list[dict]], None] = _nobody) -> Group:
        """Time some ways at one context in turn.

        tell: is given a row as soon as there is one sample, where ways behind it have to be compiled first.
        """
        options, device = self.options, self.model.device
        rows, runs, early = {}, {}, {}
        compiled = [way.name for way in ways if way.compiles and way.name not in self.models]
        for way in ways:
            canvas = 1 if way.decodes else self.model.config.canvas_length
            formats = {"experts": way.experts, "linears": way.linears}
            floor = floor_of(self.model, self.limits, context, options.batch, canvas, **formats)
            rows[way.name] = blank_row(way, options, context, canvas, floor)
            try:
                runs[way.name] = self.runner(way, context)
            except Exception as error:
                rows[way.name] |= {"status": "failed", "error": _one_line(error)}

        def timed(name: str, milliseconds: float) -> dict:
            row = rows[name]
            return row | {"step_ms": milliseconds, "floor_multiple": milliseconds / row["floor_ms"]}

        for position, way in enumerate(ways):
            if any(later.name in compiled for later in ways[position + 1 :]):
                early[way.name] = lambda found, name=way.name: tell([timed(name, found)])
        for name, found in per_step(runs, options.steps, options.repeats, device, early).items():
            if isinstance(found, Exception):
                rows[name] |= {"status": "failed", "error": _one_line(found)}
            else:
                rows[name] = timed(name, found)
        return Group(ways, rows, runs)

    def insides(self, group: Group, tell: Callable[[list[dict]], None] = _nobody) -> None:
        """Add to the rows of a group what is found inside its steps, and what canvases take besides, telling each."""
        good = [way for way in group.ways if group.rows[way.name]["status"] == "ok"]
        # Ours first: what is asked of them is more, and takes less time.
        for way in sorted(good, key=lambda way: not way.ours):
            row = group.rows[way.name]
            try:
                self._look_inside(way, group.runs[way.name], row)
            except Exception as error:
                row["error"] = f"inside its steps: {_one_line(error)}"
            tell([row])
        # Last, since every canvas makes the cache longer.
        self._canvases([way for way in good if has_canvases(way)], group)
        tell(list(group.rows.values()))

    def _canvases(self, ways: list[Way], group: Group) -> None:
        device = self.model.device
        runs = {way.name: group.runs[way.name] for way in ways}
        canvases = per_canvas(runs, self.options.repeats, device)
        for way in ways:
            row, found = group.rows[way.name], canvases[way.name]
            try:
                if isinstance(found, Exception):
                    raise found
                row["canvas_ms"] = found - row["step_ms"]
                if device.type == "cuda" and way.ours and row["launches"] is not None:
                    row["canvas_launches"] = launches_of_a_canvas(runs[way.name], device) - row["launches"]
            except Exception as error:
                row["error"] = f"a canvas besides its steps: {_one_line(error)}"

    def _look_inside(self, way: Way, run: Callable[[int], object], row: dict) -> None:
        options, device = self.options, self.model.device
        row["peak_extra_bytes"] = self._extra_memory(way, run)
        if can_count(way, device):
            steps = min(options.steps, 4)
            row["launches"], row["host_syncs"] = counted(run, steps, device)
            if device.type == "cuda" and way.ours:
                one = step_trace.kernels_on_cuda(lambda: run(1))
                many = step_trace.kernels_on_cuda(lambda: run(steps))
                row["kernels"] = step_trace.kernels_of_a_step(one, many, steps)[:KERNELS]
        if way.ours:
            row["head_peak_bytes"] = head_memory(self.models[way.name], options.batch)
        if way.eager and not way.decodes:
            with step_trace.component_timeline(self.models[way.name]) as timeline:
                run(options.steps)
            components = {name: spent / options.steps for name, spent in timeline.milliseconds().items()}
            # Nothing was seen of the layers where a loop does not call them as modules.
            row["components_ms"] = components if components["rest"] > 0 else None

    def _extra_memory(self, way: Way, run: Callable[[int], object]) -> int | None:
        extra = memory.peak_extra(lambda: run(2), self.model.device)
        if not way.compiles or self.model.device.type != "cuda":
            return extra
        # A replay allocates nothing: what it works in belongs to the graph, which only ours tells.
        made = captures(self.models[way.name])
        graphs = sum(capture.memory_bytes for capture in made if capture.what == "step")
        return extra + graphs if way.graph else None

    def keep(self, names: set[str]) -> None:
        """Let go of the models of all other ways, with what they compiled, captured and quantized."""
        for name in self.models.keys() - names:
            restore(self.models.pop(name))
        gc.collect()


def floor_of(
    model, limits: ceilings.Ceilings, context: int, batch: int, canvas: int, *, experts: str | None = None,
    linears: str | None = None,
) -> dict[str, float]:  # fmt: skip
    figures, wide = step_model.text_figures(model.config)
    size = model.dtype.itemsize
    precision = floors.precision_of(size, experts, linears)
    parts = floors.components(figures, canvas, context, batch, precision, global_layers=wide)
    if canvas == 1:
        # A decoded token is not fed back as a soft embedding.
        del parts["self-conditioning"]
    return floors.step_ms(parts, limits.bandwidth, limits.matrix(model.dtype))
