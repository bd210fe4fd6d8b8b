"""`python -m bench step`: a whole denoising step of DiffusionGemma, ours beside transformers, and plain decoding.

The time of a step is that of `generate` with N fixed steps minus that with one, over N - 1: the prompt's pass and
all that happens once a call cancel out, whatever the implementation does inside.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import ceilings, environment, floors, memory, schema, step_model, step_trace, table
from .bench_ops import complain, pick_device
from .cases import BenchError
from .runner import _one_line, within

# What published figures assume one step to write: 256 tokens in 16 steps, and the mean of natural text.
TOKENS_PER_STEP = (16, 19.7)
# Below the sliding window of 1024 transformers' static cache is right, and so its compiled steps can be compared.
CONTEXTS = (512, 1024, 8192, 32_768, 131_072)


@dataclass(frozen=True)
class Way:
    """One way to take a step. cache: of `step_model.random_cache`. compiles: torch.compile is at work, for minutes.

    eager: whether module hooks see inside it. decodes: one token a step instead of a canvas.
    """

    name: str
    cache: str
    ours: bool = False
    graph: bool = False
    compiles: bool = False
    decodes: bool = False

    @property
    def eager(self) -> bool:
        return not self.compiles


REFERENCE = Way("transformers, dynamic cache", "dynamic")
COMPILED_REFERENCE = Way("transformers, static cache, compiled", "static", compiles=True)
OURS = Way("ours, dynamic cache", "dynamic", ours=True)
OURS_STATIC = Way("ours, static cache", "ours", ours=True)
GRAPH = Way("ours, graph", "ours", ours=True, graph=True, compiles=True)
WAYS = (REFERENCE, COMPILED_REFERENCE, OURS, OURS_STATIC, GRAPH)
AUTOREGRESSIVE = (
    Way("autoregressive, dynamic cache", "dynamic", decodes=True),
    Way("autoregressive, static cache, compiled", "static", compiles=True, decodes=True),
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench step", description="Time a whole denoising step.")
    parser.add_argument("--model", choices=("full", "tiny"), help="default: full on a GPU, tiny on a CPU")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the full model instead of 30")
    parser.add_argument("--context", type=int, nargs="+", metavar="L", help="tokens before the canvas")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--backend", default="auto", help="backend of our ops")
    parser.add_argument("--compiled", action="store_true", help="compiled variants on a CPU too")
    parser.add_argument("--way", action="append", metavar="TEXT", help="only variants whose name contains TEXT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further variant after this time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--save", action="store_true", help="write bench/results/<device>/step-<model>.json")
    parser.add_argument("--plot", type=Path, metavar="DIR")
    return parser


def model_of(model, way: Way, backend: str):
    """The way's own model over the weights that all share, accelerated where the way is ours."""
    own = step_model.twin(model)
    if way.ours:
        import dgemma_accel

        dgemma_accel.accelerate(own, backend=backend, graph=way.graph)
    return own


def denoiser(model, cache, batch: int) -> Callable[[int], object]:
    """A call that runs `generate` for one canvas of exactly n steps behind what the cache holds."""
    canvas = model.config.canvas_length
    device = model.device
    prompt = torch.full((batch, 1), 5, device=device)

    def run(steps: int):
        # A history as long as the run is never complete, so no row stops early. It is part of a compiled step's shape,
        # so runs of all lengths have the same.
        return model.generate(
            prompt, past_key_values=cache, max_new_tokens=canvas, max_denoising_steps=steps,
            stability_threshold=max(steps, HISTORY),
        )

    return run


def decoder(model, cache, batch: int, context: int, compiled: bool) -> Callable[[int], object]:
    """A call that decodes n tokens one by one with the encoder's causal pass, greedily."""
    encoder = model.model.encoder
    forward = torch.compile(encoder, mode="reduce-overhead", fullgraph=True) if compiled else encoder
    device, softcap = model.device, model.config.text_config.final_logit_softcapping
    position = context

    @torch.no_grad()
    def run(tokens: int):
        nonlocal position
        token = torch.full((batch, 1), 5, device=device)
        for _ in range(tokens):
            positions = torch.full((batch, 1), position, device=device, dtype=torch.int32)
            masks = encoder.create_masks_for_generate(
                config=model.config, inputs_embeds=torch.empty(batch, 1, 0, dtype=model.dtype, device=device),
                attention_mask=torch.ones(batch, position + 1, dtype=torch.bool, device=device),
                past_key_values=cache, position_ids=positions,
            )
            hidden = forward(
                input_ids=token, attention_mask=masks, past_key_values=cache, position_ids=positions
            ).last_hidden_state
            logits = softcap * torch.tanh(model.lm_head(hidden[:, -1]).float() / softcap)
            token = logits.argmax(-1, keepdim=True)
            position += 1
        return token

    return run


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
    runs: dict[str, Callable[[int], object]], steps: int, repeats: int, device: torch.device
) -> dict[str, float | Exception]:
    """name -> milliseconds of a step: the median over repeats of (N steps - 1 step) / (N - 1), or what was raised.

    One repeat of each in turn, so that a drifting clock meets all alike.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, Exception] = {}
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            if name in failed:
                continue
            try:
                if repeat < 0:
                    run(1)
                    run(2)
                    continue
                one = clock(lambda run=run: run(1), device)
                found[name].append((clock(lambda run=run: run(steps), device) - one) / (steps - 1))
            except Exception as error:
                failed[name] = error
    return {name: failed.get(name) or statistics.median(found[name]) for name in runs}


def counted(run: Callable[[int], object], steps: int, device: torch.device) -> tuple[float, float]:
    """(launches, host reads) of a step, by the same difference."""
    one, many = step_trace.count(lambda: run(1), device), step_trace.count(lambda: run(steps), device)
    return tuple((b - a) / (steps - 1) for a, b in zip(one, many))


def can_count(way: Way, device: torch.device) -> bool:
    """On a CPU the launches of compiled code are read off what inductor wrote, which is done for our own step."""
    return device.type == "cuda" or not way.compiles or way.graph


def blank_row(way: Way, options, context: int, floor: dict) -> dict:
    return {
        "variant": way.name, "context": context, "batch": options.batch, "steps": options.steps, "status": "ok",
        "error": None, "step_ms": None, "components_ms": None, "launches": None, "host_syncs": None,
        "peak_extra_bytes": None, "floor_ms": floor["total"], "floor_multiple": None,
    }


HISTORY = 64
# Tokens that all calls of one variant may add to its cache.
ROOM = 4096


class Bench:
    """The variants with their models, made when first wanted and kept: what a variant compiled serves every context."""

    def __init__(self, model, limits: ceilings.Ceilings, options) -> None:
        self.model, self.limits, self.options = model, limits, options
        self.models: dict[str, object] = {}
        self.validates = torch.distributions.Distribution._validate_args

    def runner(self, way: Way, context: int) -> Callable[[int], object]:
        if way.name not in self.models:
            self.models[way.name] = model_of(self.model, way, self.options.backend)
        model = self.models[way.name]
        cache = step_model.random_cache(model, self.options.batch, context, kind=way.cache, room=ROOM)
        if way.decodes:
            return decoder(model, cache, self.options.batch, context, compiled=way.compiles)
        run = denoiser(model, cache, self.options.batch)

        def as_in_a_process_of_its_own(steps: int):
            # Compiling turns this off for the whole process, and with it a part of the reference's work.
            torch.distributions.Distribution._validate_args = self.validates
            return run(steps)

        return as_in_a_process_of_its_own if way == REFERENCE else run

    def measure(self, ways: list[Way], context: int) -> list[dict]:
        """The rows of some ways at one context, timed in turn."""
        options, device = self.options, self.model.device
        rows, runs = {}, {}
        for way in ways:
            canvas = 1 if way.decodes else self.model.config.canvas_length
            floor = floor_of(self.model, self.limits, context, options.batch, canvas)
            rows[way.name] = blank_row(way, options, context, floor)
            try:
                runs[way.name] = self.runner(way, context)
            except Exception as error:
                rows[way.name] |= {"status": "failed", "error": _one_line(error)}
        times = per_step(runs, options.steps, options.repeats, device)
        for way in ways:
            row = rows[way.name]
            if way.name not in runs:
                continue
            try:
                if isinstance(times[way.name], Exception):
                    raise times[way.name]
                row["step_ms"] = times[way.name]
                row["floor_multiple"] = row["step_ms"] / row["floor_ms"]
                self._look_inside(way, runs[way.name], row)
            except Exception as error:
                row |= {"status": "failed", "error": _one_line(error), "step_ms": None}
        return list(rows.values())

    def _look_inside(self, way: Way, run: Callable[[int], object], row: dict) -> None:
        options, device = self.options, self.model.device
        row["peak_extra_bytes"] = memory.peak_extra(lambda: run(2), device)
        if can_count(way, device):
            row["launches"], row["host_syncs"] = counted(run, min(options.steps, 4), device)
        if way.eager and not way.decodes:
            with step_trace.component_timeline(self.models[way.name]) as timeline:
                run(options.steps)
            components = {name: spent / options.steps for name, spent in timeline.milliseconds().items()}
            # Nothing was seen of the layers where a loop does not call them as modules.
            row["components_ms"] = components if components["rest"] > 0 else None


def floor_of(model, limits: ceilings.Ceilings, context: int, batch: int, canvas: int) -> dict[str, float]:
    figures, wide = step_model.text_figures(model.config)
    size = model.dtype.itemsize
    parts = floors.components(figures, canvas, context, batch, floors.Precision(size, size), global_layers=wide)
    if canvas == 1:
        # A decoded token is not fed back as a soft embedding.
        del parts["self-conditioning"]
    return floors.step_ms(parts, limits.bandwidth, limits.matrix(model.dtype))


def step_lines(rows: list[dict]) -> list[str]:
    """The table of one context."""
    cells = [["", "step", "floor", "multiple", "launches", "host syncs", "extra memory", *step_trace.COMPONENTS]]
    errors = []
    for row in rows:
        if row["status"] != "ok":
            errors.append(f"  {row['variant']} failed: {row['error']}")
            continue
        split = row["components_ms"] or {}
        cells.append([
            row["variant"], table.duration(row["step_ms"] * 1e3), table.duration(row["floor_ms"] * 1e3),
            f"{row['floor_multiple']:.3g}x", table.count(row["launches"]), table.count(row["host_syncs"]),
            table.size(row["peak_extra_bytes"]),
            *(table.duration(split[name] * 1e3) if name in split else "-" for name in step_trace.COMPONENTS),
        ])
    lines = table.columns(cells) + errors
    for line in speedups(rows):
        lines.append(f"  {line}")
    return lines


def speedups(rows: list[dict]) -> list[str]:
    """Ratios within one context: our steps against transformers', and every way against decoding token by token at a
    stated number of tokens a step."""
    good = {row["variant"]: row for row in rows if row["status"] == "ok"}
    lines = []
    for ours in (way for way in WAYS if way.ours and way.name in good):
        for theirs in (REFERENCE, COMPILED_REFERENCE):
            if theirs.name in good:
                mine, other = good[ours.name], good[theirs.name]
                line = f"{ours.name} against {theirs.name}: {other['step_ms'] / mine['step_ms']:.2f}x the speed"
                if mine.get("launches") and other.get("launches"):
                    line += f", {other['launches'] / mine['launches']:.1f}x fewer launches"
                lines.append(line)
    decoding = [good[way.name] for way in AUTOREGRESSIVE if way.name in good]
    if not decoding:
        return lines
    best = min(decoding, key=lambda row: row["step_ms"])
    for way in WAYS:
        if way.name in good:
            ratios = ", ".join(
                f"{tokens * best['step_ms'] / good[way.name]['step_ms']:.2f}x at {tokens:g} tokens a step"
                for tokens in TOKENS_PER_STEP
            )
            lines.append(f"{way.name} against {best['variant']}: {ratios}")
    return lines


def window_line(model, context: int, rows: list[dict]) -> list[str]:
    window = model.config.text_config.sliding_window
    if context < window - 1 or COMPILED_REFERENCE.name not in {row["variant"] for row in rows}:
        return []
    return [f"  {COMPILED_REFERENCE.name}: its tokens are wrong from the sliding window of {window} on; a time only"]


def prepare_model(options, device: torch.device):
    """(model, name of it).

    Raises:
        BenchError: transformers is missing, or the model does not fit or cannot be run here.
    """
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        from transformers import DiffusionGemmaForBlockDiffusion  # noqa: F401
    except ImportError as error:
        raise BenchError(f"step needs transformers >= 5.17: {error}") from error
    kind = options.model or ("full" if device.type == "cuda" else "tiny")
    if kind == "tiny":
        if options.layers:
            raise BenchError("--layers: only the full model can be made smaller")
        model, source = step_model.tiny(device)
        return model, f"tiny ({source})"
    if options.layers is not None and options.layers < 1:
        raise BenchError(f"--layers: must be at least 1, got {options.layers}")
    config = step_model.full_config(options.layers)
    model = step_model.build(config, device, torch.bfloat16)
    layers = config.text_config.num_hidden_layers
    return model, f"full ({layers} layers, random weights)"


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.steps < 2 or options.batch < 1 or options.repeats < 1:
            raise BenchError("--steps must be at least 2, --batch and --repeats at least 1")
        device = pick_device(options.device)
        model, name = prepare_model(options, device)
    except BenchError as error:
        complain(str(error))
        return 2
    return bench(model, name, options, device)


def schedule(options, contexts: list[int], device: torch.device) -> list[tuple[list[Way], int]]:
    """What is measured together, in order; a later measurement replaces an earlier one of the same variant.

    First what does not compile, so that there are figures before the compiler's minutes; then all of it again at every
    context beside our graph, so that they are timed in turn; at last what else compiles.
    """
    ways = [way for way in (*WAYS, *AUTOREGRESSIVE) if not options.way or any(text in way.name for text in options.way)]
    if device.type == "cpu" and not options.compiled:
        print("transformers' compiled variants are left out on a CPU (--compiled includes them)")
        ways = [way for way in ways if not way.compiles or way.graph]
    eager = [way for way in ways if not way.compiles]
    graph = [way for way in ways if way.graph]
    plan = [(eager, context) for context in (contexts[:1] if graph else contexts) if eager]
    if graph:
        plan += [(eager + graph, context) for context in contexts]
    return plan + [([way], context) for way in ways if way.compiles and not way.graph for context in contexts]


def bench(model, name: str, options, device: torch.device) -> int:
    """Measure all ways at all contexts, print and write; the exit status."""
    longest = model.config.text_config.max_position_embeddings
    default = CONTEXTS if name.startswith("full") else (64, 256)
    contexts, refused = [], []
    for context in options.context or default:
        if 1 <= context <= longest - model.config.canvas_length:
            contexts.append(context)
        else:
            refused.append(f"--context {context}: must be in [1, {longest - model.config.canvas_length}]")
    for line in refused:
        complain(line)
    facts, before = environment.describe(device), environment.clocks(device)
    limits = ceilings.measure(device)
    limits.matrix(model.dtype)
    print(f"{facts['device']}, {name}, {options.steps} steps, batch {options.batch}")
    has_time = within(options.budget)
    found: dict[tuple, dict] = {}
    late = []

    def failures() -> list[str]:
        bad = [row for row in found.values() if row["status"] != "ok"]
        return late + [f"{row['variant']} at context {row['context']}: {row['error']}" for row in bad]

    def result() -> dict:
        return {
            "schema": schema.SCHEMA,
            "kind": "step",
            "environment": facts,
            "clocks": {"before": before, "after": environment.clocks(device)},
            "ceilings": limits.as_dict(),
            "options": {"model": name, "layers": model.config.text_config.num_hidden_layers, "dtype": str(model.dtype)},
            "rows": list(found.values()),
            "problems": refused + failures(),
        }

    measured = Bench(model, limits, options)
    for ways, context in schedule(options, contexts, device):
        if not has_time():
            for way in ways:
                if (context, way.name) not in found:
                    late.append(f"{way.name} at context {context}: not reached within {options.budget:g} s")
            continue
        with step_trace.reading_compiled_code() if device.type == "cpu" else contextlib.nullcontext():
            group = measured.measure(ways, context)
        for row in group:
            found[context, row["variant"]] = row
            if row["status"] == "ok":
                print(f"context {context}, {row['variant']}: {table.duration(row['step_ms'] * 1e3)} a step", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.json:
            # What is there is there, should the time end in a compiler.
            schema.write(result(), options.json)
    rows = list(found.values())
    for context in contexts:
        here = [row for row in rows if row["context"] == context]
        if here:
            print(f"\ncontext {context}")
            print("\n".join(step_lines(here) + window_line(model, context, here)), flush=True)
    if device.type == "cuda":
        print("\nlaunches: kernel and graph launches by the host; host syncs: as CUDA's sync debug mode reports them")
    else:
        print("\nlaunches: non-view aten ops, fused kernels of compiled code, and 1 for an op of this package")
        print("host syncs: host reads in the dispatch trace, outside the host implementations of this package's ops")
    write_result(result(), options, facts, name.split()[0])
    for line in failures():
        complain(line)
    return 2 if refused else 1 if failures() else 0


def write_result(result: dict, options, facts: dict, kind: str) -> None:
    targets = [options.json] if options.json else []
    if options.save:
        folder = environment.ROOT / "bench" / "results" / environment.folder_name(facts)
        targets.append(folder / f"step-{kind}.json")
    for path in targets:
        schema.write(result, path)
        print(f"written {path}")
    if options.plot:
        from . import plots

        for path in plots.steps([result], options.plot):
            print(f"written {path}")
