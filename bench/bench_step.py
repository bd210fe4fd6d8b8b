"""`python -m bench step`: a whole denoising step of DiffusionGemma, ours beside transformers, and plain decoding.

The time of a step is that of `generate` with N fixed steps minus that with one, over N - 1: the prompt's pass and
all that happens once a call cancel out, whatever the implementation does inside.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from dgemma_accel.backends import BACKENDS

from . import ceilings, environment, schema, step_model, step_trace, table
from .bench_ops import complain, pick_device
from .cases import BenchError
from .runner import NOT_REACHED, exit_status, within
from .step_measure import Bench
from .step_table import step_lines, window_line
from .step_ways import (
    AUTOREGRESSIVE,
    COMPILED_REFERENCE,
    GRAPH,
    GRAPH_FP8,
    GRAPH_FP8_LINEARS,
    GRAPH_NVFP4,
    OURS,
    OURS_STATIC,
    REFERENCE,
    WAYS,
    Way,
)

# Below the sliding window of 1024 transformers' static cache is right, and so its compiled steps can be compared. The
# last is measured when all else is.
CONTEXTS = (512, 8192, 32_768, 131_072, 1024)
# Where the ways of `BESIDES` are measured if no context is asked for.
BESIDES_AT = 8192
DECODING, DECODING_COMPILED = AUTOREGRESSIVE
LAUNCHED = (OURS, OURS_STATIC)
BESIDES = ((GRAPH_FP8,), (GRAPH_NVFP4,), (GRAPH_FP8_LINEARS,), LAUNCHED, (DECODING_COMPILED,))


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
    parser.add_argument(
        "--way",
        action="append",
        metavar="TEXT",
        help="only the variant TEXT, or those whose name contains it",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no further variant after this time"
    )
    parser.add_argument(
        "--note", metavar="TEXT", help="what disturbed the run: its figures then count as bounds only"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--save", action="store_true", help="write bench/results/<device>/step-<model>.json")
    parser.add_argument("--plot", type=Path, metavar="DIR")
    return parser


def is_named(name: str, text: str) -> bool:
    """Whether `text` names the variant `name`: it is the whole name, or a part that is no variant's whole name."""
    whole = text in {way.name for way in (*WAYS, *AUTOREGRESSIVE)}
    return name == text if whole else text in name


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
    whole = step_model.full_config().text_config.num_hidden_layers
    size = "full" if layers == whole else f"{layers}-layers"
    return model, f"{size} ({layers} of {whole} layers, random weights)"


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    has_time = within(options.budget)
    try:
        if options.steps < 2 or options.batch < 1 or options.repeats < 1:
            raise BenchError("--steps must be at least 2, --batch and --repeats at least 1")
        if options.backend not in ("auto", *BACKENDS):
            raise BenchError(f"unknown backend {options.backend!r}; known are auto, {', '.join(BACKENDS)}")
        known = [way.name for way in (*WAYS, *AUTOREGRESSIVE)]
        for text in options.way or ():
            if not any(is_named(name, text) for name in known):
                raise BenchError(
                    f"--way {text!r}: no variant has that in its name; there are {'; '.join(known)}"
                )
        schema.check_targets(options.json, options.plot)
        device = pick_device(options.device)
        model, name = prepare_model(options, device)
    except BenchError as error:
        complain(str(error))
        return 2
    return bench(model, name, options, device, has_time)


def schedule(options, contexts: list[int], device: torch.device) -> list[tuple[list[Way], int]]:
    """What is measured together, in order: every variant once at a context.

    First our replayed step beside transformers': at the shortest context beside its compiled one, at the others beside
    decoding. Ways that compile for minutes more, and on a GPU our steps without a graph, come after them, at one
    context alone where none is asked for.
    """
    ways = [
        way
        for way in (*WAYS, *AUTOREGRESSIVE)
        if not options.way or any(is_named(way.name, text) for text in options.way)
    ]
    if device.type == "cpu" and not options.compiled:
        left_out = "transformers' compiled variants and quantized weights"
        print(f"{left_out} are left out on a CPU (--compiled includes them)")
        ways = [way for way in ways if not way.compiles or (way.graph and not way.experts)]
    on_gpu = device.type == "cuda"
    if on_gpu and not options.context and contexts == list(CONTEXTS):
        first, *others, last = contexts
        plan = [((REFERENCE, GRAPH, COMPILED_REFERENCE), first)]
        plan += [((REFERENCE, GRAPH, DECODING), context) for context in others]
        plan += [(group, BESIDES_AT) for group in BESIDES]
        plan += [((REFERENCE, GRAPH, DECODING), last)]
    else:
        # On a CPU the steps without a graph cost little, and are better timed in turn with the others.
        together = () if on_gpu else LAUNCHED
        besides = [group for group in BESIDES if group != together]
        plan = [
            ((REFERENCE, *together, GRAPH, COMPILED_REFERENCE, DECODING), context) for context in contexts
        ]
        plan += [(group, context) for group in besides for context in contexts]
    return [(found, context) for group, context in plan if (found := [way for way in group if way in ways])]


def bench(
    model, name: str, options, device: torch.device, has_time: Callable[[], bool] = lambda: True
) -> int:
    """Measure all ways at all contexts, print and write; the exit status."""
    longest = model.config.text_config.max_position_embeddings
    default = (64, 256) if name.startswith("tiny") else CONTEXTS
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
    found: dict[tuple, dict] = {}
    late = []

    def failures() -> list[str]:
        bad = [row for row in found.values() if row["error"]]
        return late + [f"{row['variant']} at context {row['context']}: {row['error']}" for row in bad]

    clocks = {"before": before, "after": None}

    def result() -> dict:
        order = [way.name for way in (*WAYS, *AUTOREGRESSIVE)]
        return {
            "schema": schema.SCHEMA,
            "kind": "step",
            "environment": facts,
            "clocks": clocks,
            "ceilings": limits.as_dict(),
            "options": {
                "model": name,
                "layers": model.config.text_config.num_hidden_layers,
                "dtype": str(model.dtype),
            },
            "rows": [found[key] for key in sorted(found, key=lambda key: (key[0], order.index(key[1])))],
            "problems": refused + failures(),
            **({"note": options.note} if options.note else {}),
        }

    def keep(rows: list[dict]) -> None:
        for row in rows:
            key = row["context"], row["variant"]
            if row["step_ms"] is not None and row["step_ms"] != found.get(key, {}).get("step_ms"):
                print(
                    f"context {row['context']}, {row['variant']}: {table.duration(row['step_ms'] * 1e3)} a step",
                    flush=True,
                )
            found[key] = row
        if options.json:
            # What is there is there, should the time end in a compiler or a profiler.
            schema.write(result(), options.json)

    measured = Bench(model, limits, options)
    plan = schedule(options, contexts, device) if contexts else []
    for position, (ways, context) in enumerate(plan):
        if not has_time():
            late += [
                f"{way.name} at context {context}: {NOT_REACHED} of {options.budget:g} s" for way in ways
            ]
            continue
        with step_trace.reading_compiled_code() if device.type == "cpu" else contextlib.nullcontext():
            group = measured.times(ways, context, keep)
            clocks["after"] = environment.clocks(device)
            keep(list(group.rows.values()))
            measured.insides(group, keep)
        # With the caches and what was compiled over them.
        del group
        measured.keep({way.name for later, _ in plan[position + 1 :] for way in later})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rows = result()["rows"]
    for context in sorted(contexts):
        here = [row for row in rows if row["context"] == context]
        if here:
            print(f"\ncontext {context}")
            print("\n".join(step_lines(here) + window_line(model, context, here)), flush=True)
    if device.type == "cuda":
        print(
            "\nlaunches: kernel and graph launches by the host; host syncs: as CUDA's sync debug mode reports them"
        )
    else:
        print(
            "\nlaunches: non-view aten ops, fused kernels of compiled code, and 1 for an op of this package"
        )
        print(
            "host syncs: host reads in the dispatch trace, outside the host implementations of this package's ops"
        )
    write_result(result(), options, facts, name.split()[0])
    for line in failures():
        complain(line)
    return exit_status(refused, failures())


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
