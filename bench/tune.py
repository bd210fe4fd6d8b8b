"""`python -m bench tune OP`: search tile shapes of the Triton kernels for the GPU at hand, when asked to.

The search starts from the fastest of the shapes that the GPU's architecture ships with (`use`, and the rivals under
`try` that only a measurement can rank) and walks to neighbours (a size halved or doubled, a stage more or less) as long
as the time over the cases of the bench falls. A shape is checked against the reference before it takes another's place,
not before it is timed: the check takes longer than the search. Nothing is written without `--write`, and no user's call
ever tunes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from dgemma_accel import configs

from . import OPS, timing
from .bench_ops import ALIASES, collect, complain, pick_device
from .cases import BenchError, Case, Sizes

FOLDER = Path(configs.__file__).resolve().parent
# A shape has to be faster by this much to replace another: less is noise.
MARGIN = 0.01
SECONDS = 0.15


def neighbours(use: dict) -> list[dict]:
    """Shapes that differ in one number: stages by one, everything else by a factor of two."""
    found = []
    for name, value in use.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        others = (value - 1, value + 1) if "stages" in name else (value // 2, value * 2)
        found += [use | {name: other} for other in others if other >= 1]
    return found


def climb(
    start: dict, cost: Callable[[dict], float], right: Callable[[dict], bool] = lambda shape: True
) -> tuple[dict, float, int]:
    """(best shape, its cost, shapes tried): to the best neighbour that is right until none is better by `MARGIN`.

    cost: seconds or anything that should be small; infinite for a shape that does not work.
    """
    tried = {json.dumps(start, sort_keys=True): cost(start)}
    best, best_cost = start, tried[json.dumps(start, sort_keys=True)]
    while True:
        limit = best_cost * (1 - MARGIN) if math.isfinite(best_cost) else math.inf
        found = []
        for shape in neighbours(best):
            key = json.dumps(shape, sort_keys=True)
            if key not in tried:
                tried[key] = cost(shape)
            if tried[key] < limit:
                found.append((tried[key], key, shape))
        for found_cost, key, shape in sorted(found, key=lambda one: one[0]):
            if right(shape):
                best, best_cost = shape, found_cost
                break
            tried[key] = math.inf
        else:
            return best, best_cost, len(tried)


class _Selection:
    """Stands in for the lookup of a configuration: one entry of an op gets the shape that is being tried."""

    def __init__(self, op: str, entry: int, use: dict):
        self.op, self.entry, self.use = op, entry, use
        self.used = False

    def __call__(self, name: str, op: str, call: tuple) -> dict:
        for position, entry in enumerate(configs.read(name)[op]):
            if configs._fits(entry["when"], dict(call)):
                if op == self.op and position == self.entry:
                    self.used = True
                    return self.use
                return entry["use"]
        raise LookupError(f"configs/{name}.json: no entry of {op} for {dict(call)}")


def case_time(
    case: Case, inputs: object, selection: _Selection, device: torch.device, check: bool = True
) -> float | None:
    """Microseconds of the Triton backend, infinite where it fails or is wrong, None where the entry is not used."""
    variant = next(variant for variant in case.backends if variant.name == "triton")
    selection.used = False
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(configs, "_select", selection))
        try:
            call = variant.prepare(inputs)
            result = call()
            if not selection.used:
                return None
            if check and case.check(result, inputs):
                return math.inf
            del result
            found = timing.measure({"triton": ([call], True)}, device, seconds=SECONDS)["triton"]
        except Exception:
            # Out of shared memory or registers, or a size that the kernel does not take.
            return math.inf
    return math.inf if isinstance(found, Exception) else found.median


def tune(
    op: str,
    cases: list[Case],
    device: torch.device,
    entries: list[dict],
    time_of: Callable[..., float | None] = case_time,
) -> list[dict]:
    """The op's entries with the best shapes found; an entry that no case uses stays as it is."""
    inputs = {case.title: case.make(device, 0) for case in cases}
    found = []
    for position, entry in enumerate(entries):
        start = _Selection(op, position, entry["use"])
        base = {case.title: time_of(case, inputs[case.title], start, device) for case in cases}
        used = [case for case in cases if base[case.title] is not None and math.isfinite(base[case.title])]
        if not used:
            print(f"{op} {entry['when']}: no case uses this entry")
            found.append(entry)
            continue

        def cost(use: dict, check: bool = False, position=position, used=used, base=base) -> float:
            # Relative to the shipped shape, so that long cases do not decide alone.
            selection = _Selection(op, position, use)
            return sum(
                time_of(case, inputs[case.title], selection, device, check) / base[case.title]
                for case in used
            )

        def right(use: dict, cost=cost) -> bool:
            return math.isfinite(cost(use, check=True))

        rivals = entry.get("try", [])
        shapes = sorted([entry["use"], *rivals], key=cost) if rivals else [entry["use"]]
        start_use = next(use for use in shapes if use == entry["use"] or right(use))
        best, total, tried = climb(start_use, cost, right)
        print(
            f"{op} {entry['when']}: {tried} shapes over {len(used)} cases; {entry['use']} -> {best}, "
            f"{100 * (1 - total / len(used)):.1f}% less time",
            flush=True,
        )
        found.append(entry | {"use": best})
    return found


def file_text(file: dict[str, list[dict]]) -> str:
    """The configurations as their file has them, a line for an entry: only what was tuned gives a difference."""

    def entry(one: dict) -> str:
        text = json.dumps({name: value for name, value in one.items() if name != "try"})
        if "try" in one:
            rivals = ",\n    ".join(map(json.dumps, one["try"]))
            text = f'{text[:-1]},\n   "try": [{rivals}]}}'
        return f"  {text}"

    ops = (
        f" {json.dumps(op)}: [\n" + ",\n".join(map(entry, entries)) + "\n ]" for op, entries in file.items()
    )
    return "{\n" + ",\n".join(ops) + "\n}\n"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="+", metavar="OP")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--write", action="store_true", help="write dgemma_accel/configs/<architecture>.json")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        device = pick_device("cuda")
    except BenchError as error:
        complain(str(error).replace("--device cuda", "tune"))
        return 2
    name = configs.name_for(torch.cuda.get_device_capability(device))
    return tune_file(options, device, FOLDER / f"{name}.json")


def tune_file(options, device: torch.device, path: Path, time_of=case_time) -> int:
    """Tune the ops asked for against one configuration file; the exit status."""
    file = json.loads(path.read_text())
    status = 0
    for name in options.ops:
        op = ALIASES.get(name, name)
        if op not in OPS or op not in file:
            complain(f"tune: unknown op {name!r}; {path.name} has {', '.join(file)}")
            status = 2
            continue
        cases, problems = collect([op], device, Sizes(quick=options.quick))
        for line in problems:
            complain(line)
        cases = [case for case in cases if any(variant.name == "triton" for variant in case.backends)]
        if not cases:
            complain(f"tune: {op} has no Triton kernel here")
            status = 2
            continue
        file[op] = tune(op, cases, device, file[op], time_of)
        if options.write:
            path.write_text(file_text(file))
            print(f"written {path}", flush=True)
    return status
